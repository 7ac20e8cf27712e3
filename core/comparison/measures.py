"""What is known of each metric: its name, its unit, and whether lower or higher is better.

In:    a key of an `eval` event, or "loss: <name>"
Out:   a Measure
State: none
"""

from dataclasses import dataclass

LOSS = "loss: "
"""What stands before the name of a loss among the metrics."""


@dataclass(frozen=True)
class Measure:
    key: str
    label: str
    unit: str = ""
    better: int = 0  # -1: lower is better; 1: higher is better; 0: neither
    digits: int = 3  # after the point, at least


_KNOWN = {
    measure.key: measure
    for measure in (
        Measure("cross_entropy", "cross-entropy", "nats per token", -1),
        Measure("perplexity", "perplexity", "", -1, 2),
        Measure("bits_per_byte", "bits per byte", "bits per byte", -1),
        Measure("token_accuracy", "token accuracy", "", 1, 4),
        Measure("embedding_cosine", "embedding cosine", "", 1, 4),
        # A sharper distribution is a property of a model, good or bad only together with its cross-entropy.
        Measure("max_probability", "highest probability", "", 0, 4),
        Measure("entropy", "entropy", "nats per token", 0),
        Measure("table_cosine", "cosine between table rows", "", 0, 4),
    )
}
PER_TOKEN = ("cross_entropy", "perplexity", "token_accuracy", "embedding_cosine", "max_probability", "entropy")
"""Metrics whose value depends on how text is cut into tokens."""


def measure(key: str) -> Measure:
    """The measure of a metric; of one that is not known, neither direction is better."""
    if key.startswith(LOSS):
        return Measure(key, f"loss “{key.removeprefix(LOSS)}”", "", -1)
    return _KNOWN.get(key) or Measure(key, key.replace("_", " "))


def ordered(keys: set[str]) -> list[str]:
    """The known ones in the order above, then losses, then the others."""
    known = list(_KNOWN)
    return sorted(keys, key=lambda key: (known.index(key) if key in known else len(known) + (not key.startswith(LOSS)), key))
