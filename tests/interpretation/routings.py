"""Routings of any shape, and what made-up documents of some categories say to them."""

from typing import Any

import torch

from core.interpretation.results import Interpretation, interpret_routing
from core.interpretation.routing import Reading, Router, static_routing
from core.models.polyglu import NAMES

ABOUT = {
    "preset": "Look <into> it",
    "description": "A made-up model.",
    "weights": "t_current.pth",
    "step": 1234,
    "seq_length": 64,
    "tokens_per_category": 5000,
    "positions_per_row": 4,
    "notes": [],
}


def made_up(
    layers: int = 3,
    neurons: int = 32,
    documents: tuple[int, ...] = (12, 12),
    spread: float = 0.5,
    shift: float = 0.0,
    causal: bool = True,
    names: tuple[str, ...] = ("stdlib", "pdf", "wikipedia", "math", "code", "chats"),
    seed: int = 0,
) -> Interpretation:
    """`documents`: how many each category has. `spread`: how far alphas are apart. `shift`: how far
    categories are, beside documents that are 0.5 apart, and tokens that are 0.3."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    router = Router(spread * normal(layers, neurons, 4), 1 + 0.1 * normal(layers, 4), 0.3)
    base, readings = 0.5 * normal(layers, 1, 4), {}
    for name, count in zip(names, documents):
        center, reading = base + shift * normal(layers, 1, 4), Reading()
        for document in range(count):
            tokens = int(torch.randint(20, 60, (), generator=random))
            gates = (
                center
                + 0.5 * normal(layers, 1, 4)
                + 0.3 * normal(layers, tokens if causal else 1, 4)
            )
            reading.add(document, *router.read(gates, tokens, 4))
        readings[name] = reading
    about: dict[str, Any] = {
        **ABOUT,
        "pool": "causal" if causal else "sequence",
        "evaluate": "soft",
    }
    return interpret_routing(
        about, NAMES, router.tau, causal, static_routing(router.alpha), readings
    )
