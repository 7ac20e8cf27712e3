"""What is known of each metric: its name, its unit, and whether lower or higher is better.

In:    a key of an `eval` event, "loss: <name>", "head: <name>", "held out of: <source>" or "read
       of: <source>"
Out:   a Measure; the metrics there can be
State: none
"""

from dataclasses import dataclass

LOSS = "loss: "
"""What stands before the name of a loss among the metrics."""
HEAD = "head: "
"""The same for what an auxiliary head measures of held-out rows: its loss, or "<head>.<what>"."""
HELD_OUT = "held out of: "
"""Before the name of a source: the first loss on what is held out of it."""
READ = "read of: "
"""Before the name of a source: its share of the tokens trained on."""


@dataclass(frozen=True)
class Measure:
    key: str
    label: str
    unit: str = ""
    better: int = 0  # -1: lower is better; 1: higher is better; 0: neither
    digits: int = 3  # after the point, at least


METRICS = {
    measure.key: measure
    for measure in (
        Measure("cross_entropy", "cross-entropy", "nats per token", -1),
        Measure("perplexity", "perplexity", "", -1, 2),
        Measure("bits_per_byte", "bits per byte", "bits per byte", -1),
        Measure("token_accuracy", "token accuracy", "", 1, 4),
        Measure("top5_accuracy", "target among the first five", "", 1, 4),
        Measure("nll_h12", "negative log-likelihood at h = −12", "nats per masked token", -1),
        Measure("nll_h4", "negative log-likelihood at h = −4", "nats per masked token", -1),
        Measure("pseudo_perplexity", "pseudo-perplexity", "", -1, 2),
        Measure("pseudo_perplexity_h12", "pseudo-perplexity at h = −12", "", -1, 2),
        Measure("pseudo_perplexity_h4", "pseudo-perplexity at h = −4", "", -1, 2),
        Measure("decoder_accuracy", "decoder's accuracy", "", 1, 4),
        Measure("decoder_top5_accuracy", "decoder's target among the first five", "", 1, 4),
        Measure("decoder_cross_entropy", "decoder's cross-entropy", "nats per masked token", -1),
        Measure("decoder_pseudo_perplexity", "decoder's pseudo-perplexity", "", -1, 2),
        Measure("embedding_cosine", "embedding cosine", "", 1, 4),
        # A sharper distribution is a property of a model, good or bad only together with its
        # cross-entropy.
        Measure("max_probability", "highest probability", "", 0, 4),
        Measure("entropy", "entropy", "nats per token", 0),
        Measure("table_cosine", "cosine between table rows", "", 0, 4),
        Measure("head: draft.first", "first guess of a draft right", "", 1, 4),
        Measure("head: draft.last", "last guess of a draft right", "", 1, 4),
        Measure("head: draft.accepted", "guesses of a draft before one is wrong", "tokens", 1),
        # How prototypes lie is neither good nor bad before it is known what they predict.
        Measure("prototype_cosine", "cosine between prototypes", "", 0, 4),
        Measure("prototype_spread", "spread of the cosines between prototypes", "", 0, 4),
        Measure("prototype_dimensions", "effective directions of the prototypes", "", 0, 1),
        Measure("prototype_drift", "drift of the prototypes", "", 0, 4),
        Measure(
            "head: planner.gain",
            "planner: log-probability of the next token, less the model's",
            "nats per token",
            1,
            4,
        ),
        Measure("head: planner.kl", "planner: divergence from the model", "nats per token", 0, 4),
        Measure("head: planner.changed", "planner: another token is likeliest", "", 0, 4),
        *(
            Measure(
                f"head: rollouts.{what}_{k}",
                f"rollouts: {told} {k} on, relative to the hidden state’s square",
                "",
                better,
            )
            for what, told, better in (
                ("error", "error", -1),
                ("unchanged", "error of no change", 0),
            )
            for k in range(1, 9)
        ),
        Measure("head: memory.gain", "memory: gain over cropped text", "nats per token", 1),
        Measure("head: memory.gap", "memory: gap to the whole text", "nats per token", -1),
        Measure("head: memory.reconstruction", "memory: reconstruction", "nats per token", -1),
    )
}
_OF_A_TABLE = (
    "table_cosine",
    "prototype_cosine",
    "prototype_spread",
    "prototype_dimensions",
    "prototype_drift",
)
PER_TOKEN = tuple(key for key in METRICS if key not in ("bits_per_byte", *_OF_A_TABLE))
"""Metrics whose value depends on how text is cut into tokens."""


def measure(key: str) -> Measure:
    """The measure of a metric; of one that is not known, neither direction is better."""
    if key.startswith(LOSS):
        return Measure(key, f"loss “{key.removeprefix(LOSS)}”", "", -1)
    if key.startswith(HEAD):
        return METRICS.get(key) or Measure(
            key, f"head “{key.removeprefix(HEAD)}”", "", 0 if "." in key else -1
        )
    if key.startswith(HELD_OUT):
        return Measure(key, f"loss on “{key.removeprefix(HELD_OUT)}”", "", -1)
    if key.startswith(READ):
        return Measure(key, f"share of “{key.removeprefix(READ)}” in training", "", 0)
    return METRICS.get(key) or Measure(key, key.replace("_", " "))


def ordered(keys: set[str]) -> list[str]:
    """The known ones in the order above, then losses, then what heads measure, then the others."""
    known = list(METRICS)

    def place(key: str) -> int:
        return (
            known.index(key)
            if key in known
            else len(known) + (not key.startswith(LOSS)) + (not key.startswith((LOSS, HEAD)))
        )

    return sorted(keys, key=lambda key: (place(key), key))
