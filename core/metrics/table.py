"""The table of metrics: what the screen, the reports and a comparison know of each number that an
evaluation gives. Adding one: its computation, and its line here.

In:    a key of an `eval` event, "loss: <name>", "head: <name>", "held out of: <source>" or "read
       of: <source>"
Out:   a Metric; the metrics there can be
State: none

Where they are computed: those of single predictions in core/losses/token_stats.py, those that a
loss adds in its file (`token_stats`), those of a head in its file (`measure`), those of embedding
tables in core/models/embedding_geometry.py, and what follows from these in
core/evaluation/held_out.py."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal

LOSS = "loss: "
"""Before the name of a loss: its value."""
HEAD = "head: "
"""Before the name of an auxiliary head: its loss, or with ".<what>" another number of it."""
HELD_OUT = "held out of: "
"""Before the name of a source: the first loss on what is held out of it."""
READ = "read of: "
"""Before the name of a source: its share of the tokens trained on."""

GivenBy = Literal[
    "every model",
    "logits",
    "next-token logits",
    "masked logits",
    "distances",
    "decoder",
    "heads",
    "tasks",
]
"""The evaluations that give a metric: by what the model's readout gives and predicts; those of a
model that keeps its original decoder, or has auxiliary heads; those that also run tasks."""


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    key         in the `eval` event, or behind a prefix
    name        in reports
    short       on the screen, where that differs
    masked      on the screen, where masked tokens are predicted: these come first there
    given_by    the evaluations that give it
    unit        empty for a pure number
    better      -1: lower is better; 1: higher is better; 0: neither
    digits      after the point in reports, at least
    per_token   whether it depends on how text is cut into tokens
    """

    key: str
    name: str
    _: KW_ONLY
    short: str = ""
    masked: str = ""
    given_by: GivenBy = "every model"
    unit: str = ""
    better: Literal[-1, 0, 1] = 0
    digits: int = 3
    per_token: bool = True

    def screen_name(self, masked: bool = False) -> str:
        """Return the name on the screen; `masked`: where masked tokens are predicted."""
        return (masked and self.masked) or self.short or self.name


_accuracy = partial(Metric, better=1, digits=4)
_perplexity = partial(Metric, better=-1, digits=2)
_nll = partial(Metric, better=-1, unit="nats per token")
_masked_nll = partial(Metric, better=-1, unit="nats per masked token")
_geometry = partial(Metric, digits=4, per_token=False)
_of_head = partial(Metric, given_by="heads")

SCORES = (
    _nll("cross_entropy", "cross-entropy", given_by="logits"),
    _perplexity("perplexity", "perplexity", given_by="next-token logits"),
    Metric(
        "bits_per_byte",
        "bits per byte",
        short="bits/byte",
        given_by="next-token logits",
        unit="bits per byte",
        better=-1,
        per_token=False,
    ),
    _accuracy("token_accuracy", "token accuracy", short="accuracy", masked="top-1"),
    _accuracy("top5_accuracy", "target among the first five", short="top-5", masked="top-5"),
    _accuracy(
        "blimp_accuracy",
        "BLiMP: accuracy over paradigms",
        short="BLiMP",
        given_by="tasks",
        per_token=False,
    ),
    *(
        _masked_nll(
            f"nll_h{h}",
            f"negative log-likelihood at h = −{h}",
            short=f"NLL h -{h}",
            given_by="distances",
        )
        for h in (12, 4)
    ),
    _perplexity("pseudo_perplexity", "pseudo-perplexity", given_by="masked logits"),
    *(
        _perplexity(
            f"pseudo_perplexity_h{h}",
            f"pseudo-perplexity at h = −{h}",
            short=f"pseudo-perplexity h -{h}",
            given_by="distances",
        )
        for h in (12, 4)
    ),
    _accuracy("decoder_accuracy", "decoder's accuracy", short="decoder top-1", given_by="decoder"),
    _accuracy(
        "decoder_top5_accuracy",
        "decoder's target among the first five",
        short="decoder top-5",
        given_by="decoder",
    ),
    _masked_nll(
        "decoder_cross_entropy",
        "decoder's cross-entropy",
        short="decoder cross-entropy",
        given_by="decoder",
    ),
    _perplexity(
        "decoder_pseudo_perplexity",
        "decoder's pseudo-perplexity",
        short="decoder pseudo-perplexity",
        given_by="decoder",
    ),
)
"""Numbers that say how good predictions are."""

BESIDE = (
    # A sharper distribution is a property of a model, good or bad only together with its
    # cross-entropy.
    Metric("entropy", "entropy", given_by="logits", unit="nats per token"),
    Metric("max_probability", "highest probability", short="max p", given_by="logits", digits=4),
    Metric(
        "embedding_cosine",
        "embedding cosine",
        short="cos to target",
        given_by="logits",
        better=1,
        digits=4,
    ),
    _geometry("table_cosine", "cosine between table rows", short="cos in table"),
    # How prototypes lie is neither good nor bad before it is known what they predict.
    _geometry(
        "prototype_cosine",
        "cosine between prototypes",
        short="cos of protos",
        given_by="distances",
    ),
    _geometry(
        "prototype_spread",
        "spread of the cosines between prototypes",
        short="spread of cos",
        given_by="distances",
    ),
    _geometry(
        "prototype_dimensions",
        "effective directions of the prototypes",
        short="directions",
        given_by="distances",
        digits=1,
    ),
    _geometry("prototype_drift", "drift of the prototypes", short="drift", given_by="distances"),
)
"""Numbers that the dashboard shows beside the scores, and plain lines leave out."""

_RELATIVE = "relative to the hidden state’s square"

OF_HEADS = (
    _of_head("head: draft.first", "first guess of a draft right", better=1, digits=4),
    _of_head("head: draft.last", "last guess of a draft right", better=1, digits=4),
    _of_head(
        "head: draft.accepted", "guesses of a draft before one is wrong", unit="tokens", better=1
    ),
    _of_head(
        "head: planner.gain",
        "planner: log-probability of the next token, less the model's",
        unit="nats per token",
        better=1,
        digits=4,
    ),
    _of_head(
        "head: planner.kl", "planner: divergence from the model", unit="nats per token", digits=4
    ),
    _of_head("head: planner.changed", "planner: another token is likeliest", digits=4),
    *(
        _of_head(f"head: rollouts.error_{k}", f"rollouts: error {k} on, {_RELATIVE}", better=-1)
        for k in range(1, 9)
    ),
    *(
        _of_head(
            f"head: rollouts.unchanged_{k}", f"rollouts: error of no change {k} on, {_RELATIVE}"
        )
        for k in range(1, 9)
    ),
    _of_head(
        "head: memory.gain", "memory: gain over cropped text", unit="nats per token", better=1
    ),
    _of_head("head: memory.gap", "memory: gap to the whole text", unit="nats per token", better=-1),
    _of_head(
        "head: memory.reconstruction", "memory: reconstruction", unit="nats per token", better=-1
    ),
)

METRICS = {metric.key: metric for metric in (*SCORES, *BESIDE, *OF_HEADS)}
"""Every known metric, in the order in which screens and reports show them."""
PER_TOKEN = frozenset(key for key, metric in METRICS.items() if metric.per_token)
"""Metrics whose value depends on how text is cut into tokens."""


def metric_of(key: str) -> Metric:
    """Return the metric of a key; of one that is not known, neither direction is better."""
    if key in METRICS:
        return METRICS[key]
    if key.startswith(LOSS):
        return Metric(key, f"loss “{key.removeprefix(LOSS)}”", better=-1)
    if key.startswith(HEAD):
        return Metric(key, f"head “{key.removeprefix(HEAD)}”", better=0 if "." in key else -1)
    if key.startswith(HELD_OUT):
        return Metric(key, f"loss on “{key.removeprefix(HELD_OUT)}”", better=-1)
    if key.startswith(READ):
        return Metric(key, f"share of “{key.removeprefix(READ)}” in training")
    return Metric(key, key.replace("_", " "))


def ordered(keys: set[str]) -> list[str]:
    """Sort keys: the known ones in the table's order, then losses, then heads, then the others."""
    place = {key: i for i, key in enumerate(METRICS)}

    def rank(key: str) -> int:
        others = (not key.startswith(LOSS)) + (not key.startswith((LOSS, HEAD)))
        return place.get(key, len(place) + others)

    return sorted(keys, key=lambda key: (rank(key), key))
