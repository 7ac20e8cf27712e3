"""Small models, and their scores computed the plain way: one text at a time, one full forward pass,
every score of it.

T tokens of a text, V vocab_size
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts import Batch
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.models import MODELS
from core.preset.settings import NEXT_TOKEN, TokenizerSettings
from tests.models.test_models import tiny_settings
from tests.project import story

CONTEXT = 24
EXACT = 1e-9
SEQUENCE = {"pool": "sequence", "tau": 0.1}
"""The routing of specification 001 as it is published, which sees the whole row."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name, (settings, _) in MODELS.items()
        if getattr(settings, "objective", NEXT_TOKEN) == NEXT_TOKEN
    },
    "post-norm": ("simple_lm", {"norm": "post", "activation": "relu", "tie_embeddings": False}),
    "not causal": ("polychromatic", {"routing": SEQUENCE}),
}
"""Every model of the table that learns next tokens, and forms of them that are scored or continued
in other ways."""

OF_TEXT = [kind for kind in KINDS if kind != "hub"]
"""Those that any tokenizer can be made for."""


@lru_cache
def byte_tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerSettings(type="byte"), [])


@lru_cache
def bpe_tokenizer() -> Tokenizer:
    """Its tokens are words, with the space before them."""
    return build_tokenizer(
        TokenizerSettings(type="bpe", vocab_size=400), [story(number) for number in range(8)]
    )


def build(kind: str, vocab_size: int = 40, context: int = CONTEXT) -> Any:
    """A model in evaluation mode and float64, whose likeliest tokens differ from place to place."""
    name, changes = KINDS[kind]
    settings = tiny_settings(name, **{"seq_length": context, **changes})
    if name == "polychromatic":
        settings = MODELS[name][0].model_validate({**settings.model_dump(mode="json"), **changes})
    torch.manual_seed(1)
    model = MODELS[name][1](settings, vocab_size).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                0.3
                * torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
                )
            )
    return model


@torch.no_grad()
def logs_of(model: nn.Module, ids: list[int]) -> Tensor:
    """log p(next token) at every position of one text: (T, V)."""
    row = torch.tensor([ids])
    none = torch.zeros_like(row, dtype=torch.int32)
    output = model(Batch(row, row, torch.arange(len(ids))[None], none, none, packed=False))
    return output.readout(output.hidden[0]).log_softmax(-1)


def by_hand(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-probability of a continuation that fits, and whether it is the likeliest, token by
    token."""
    window = CONTEXT + 1 if model.is_causal else CONTEXT
    ids = [*context, *continuation][-window:]
    logs = logs_of(model, ids[:-1] if model.is_causal else ids)
    first = len(ids) - len(continuation)
    total, greedy = 0.0, True
    for place in range(first, len(ids)):
        total += float(logs[place - 1, ids[place]])
        greedy = greedy and int(logs[place - 1].argmax()) == ids[place]
    return total, greedy


def continue_by_hand(model: Any, ids: list[int], count: int, stop: int | None = None) -> list[int]:
    """The likeliest tokens after a text, each from a forward pass over everything before it."""
    said: list[int] = []
    while len(said) < count:
        token = int(logs_of(model, [*ids, *said])[-1].argmax())
        if token == stop:
            break
        said.append(token)
    return said
