"""Token statistics: what evaluation measures of every prediction, whatever the losses are.

In:    a Chunk
Out:   one value per position, whose means are metrics (core/metrics/table.py)
State: none
"""

from collections.abc import Callable

from torch import Tensor

from core.losses.base import Chunk
from core.losses.cosine import mean_embedding

# n positions of a block, V vocab_size

TokenStat = Callable[[Chunk], Tensor]
"""From a chunk to (n,)."""
TOP = 5


def _in_top(chunk: Chunk, sign: float) -> Tensor:
    """Tell whether fewer than TOP tokens have a better score than the target: (n,). `sign`: -1
    where lower is better."""
    scores = chunk.scores if sign > 0 else -chunk.scores
    target = scores.gather(1, chunk.labels[:, None])  # (n, 1)
    # not by those above it: nothing is above a NaN
    return (scores <= target).sum(dim=1) > scores.shape[1] - TOP


TOKEN_STATS: dict[str, dict[str, TokenStat]] = {
    "logits": {
        "cross_entropy": lambda chunk: chunk.softmax().nll(chunk.labels),
        "entropy": lambda chunk: chunk.softmax().entropy,
        "max_probability": lambda chunk: chunk.softmax().at(chunk.softmax().best),
        "embedding_cosine": lambda chunk: mean_embedding(chunk).cosine,
        "token_accuracy": lambda chunk: chunk.labels == chunk.softmax().best,
        "top5_accuracy": lambda chunk: _in_top(chunk, 1.0),
    },
    "distances": {
        "token_accuracy": lambda chunk: chunk.labels == chunk.scores.argmin(dim=1),
        "top5_accuracy": lambda chunk: _in_top(chunk, -1.0),
    },
}
"""By what the readout gives, then by the metric's key."""
