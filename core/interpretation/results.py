"""The results of looking into a model's routing, and its two files of numbers.

In:    Static, and the Reading of each category
Out:   Interpretation; entropy_stats.json and interpret.json
State: none

L num_layers, F neurons of a layer, K activations, D texts: documents, or rows of them
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from core.interpretation.noise import CONFIDENCE, FEWEST, Shift, intervals, shift_of
from core.interpretation.routing import THRESHOLD, Reading, Static, Sums

FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """A number with its interval; without one where there are too few texts."""

    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


@dataclass(frozen=True)
class Category:
    """One data source's routing: means over its tokens."""

    name: str
    documents: int
    tokens: int
    gates: Spread  # (L, K) f
    gate_sd: np.ndarray  # (L, K) its standard deviation over tokens
    weights: Spread  # (L, K) of each activation, at the model's temperature
    entropy: Spread  # (L,) nats, without temperature
    tempered: Spread  # (L,) nats, at the model's temperature
    of_neurons: np.ndarray  # (L, F) nats, without temperature


@dataclass(frozen=True)
class Interpretation:
    """All results of a model's routing."""

    about: dict[str, Any]  # what was looked at, and how
    activations: tuple[str, ...]  # names of the K
    tau: float
    causal: bool
    static: Static
    categories: list[Category]
    # "documents", what intervals and noise are over; "rows" where a category has too few documents
    unit: str
    shift: Shift | None  # None of one category

    def mean(self, of: str) -> np.ndarray:
        """Over categories, each counting as much as the others."""
        found = [getattr(category, of) for category in self.categories]
        return np.mean([each.mean if isinstance(each, Spread) else each for each in found], axis=0)


def interpret_routing(
    about: dict[str, Any],
    activations: tuple[str, ...],
    tau: float,
    causal: bool,
    static: Static,
    readings: dict[str, Reading],
) -> Interpretation:
    """`readings`: of each category, by its name."""
    documents = {name: reading.documents for name, reading in readings.items()}
    unit = "documents" if min(map(len, documents.values())) >= FEWEST else "rows"
    texts = (
        documents
        if unit == "documents"
        else {name: [s for _, s in reading.rows] for name, reading in readings.items()}
    )
    categories = [
        _category(name, len(documents[name]), texts[name], np.asarray(reading.neurons))
        for name, reading in readings.items()
    ]
    tokens = [np.array([sums.tokens for sums in each]) for each in texts.values()]
    shift = shift_of(tokens, [np.stack([sums.gates for sums in each]) for each in texts.values()])
    return Interpretation(about, activations, tau, causal, static, categories, unit, shift)


def _category(name: str, documents: int, texts: list[Sums], neurons: np.ndarray) -> Category:
    tokens = np.array([sums.tokens for sums in texts])  # (D,)
    total = int(tokens.sum())

    def spread(of: str) -> Spread:
        sums = np.stack([getattr(each, of) for each in texts])  # (D, ...)
        between = intervals(tokens, sums.reshape(len(texts), -1))
        mean = sums.sum(0) / total
        if not between:
            return Spread(mean, None, None)
        low, high = (each.reshape(sums.shape[1:]) for each in between)
        return Spread(mean, low, high)

    gates = spread("gates")
    variance = np.sum([sums.squares for sums in texts], axis=0) / total - gates.mean**2
    deviation = np.sqrt(np.maximum(variance, 0.0))
    return Category(
        name,
        documents,
        total,
        gates,
        deviation,
        spread("weights"),
        spread("entropy"),
        spread("tempered"),
        neurons / total,
    )


# files --------------------------------------------------------------------------------------------


def entropies(prefix: str, per_layer: np.ndarray) -> dict[str, float]:
    """Name entropies as training does: "<prefix>/layer_0" and so on, and "<prefix>/mean"."""
    layers = {f"{prefix}/layer_{i}": float(value) for i, value in enumerate(per_layer)}
    return {**layers, f"{prefix}/mean": float(per_layer.mean())}


def numbers(found: Interpretation) -> dict[str, Any]:
    """interpret.json."""
    static, shift = found.static, found.shift
    return {
        "format": FORMAT,
        **found.about,
        "activations": list(found.activations),
        "tau": found.tau,
        "causal": found.causal,
        "confidence": CONFIDENCE,
        "noise_over": found.unit,
        "static": {
            **entropies("routing_entropy", static.entropy.mean(1)),
            "distribution_percent": static.distribution.tolist(),
            "threshold": THRESHOLD,
            "share_with_preference": float(static.decided.mean()),
            "share_with_preference_per_layer": static.decided.mean(1).tolist(),
            "mean_margin": float(static.margin.mean()),
        },
        "dynamic": {
            **entropies("dynamic_routing_entropy", found.mean("entropy")),
            **entropies("dynamic_routing_entropy_at_tau", found.mean("tempered")),
            "routing_weights": found.mean("weights").tolist(),
        },
        "categories": [_numbers_of(category) for category in found.categories],
        "routing_shift": shift
        and {
            "value": shift.value.tolist(),
            "noise": None if shift.noise is None else shift.noise.tolist(),
            "beyond_noise": None if shift.noise is None else shift.real.tolist(),
            "highest": [[found.categories[c].name for c in row] for row in shift.highest],
            "lowest": [[found.categories[c].name for c in row] for row in shift.lowest],
        },
    }


def _numbers_of(category: Category) -> dict[str, Any]:
    return {
        "name": category.name,
        "documents": category.documents,
        "tokens": category.tokens,
        "gate_mean": _spread(category.gates),
        "gate_sd": category.gate_sd.tolist(),
        "routing_weights": _spread(category.weights),
        "dynamic_routing_entropy": _spread(category.entropy),
        "dynamic_routing_entropy_at_tau": _spread(category.tempered),
    }


def _spread(spread: Spread) -> dict[str, Any]:
    return {key: None if value is None else value.tolist() for key, value in vars(spread).items()}
