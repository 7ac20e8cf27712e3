"""Cross-entropy of the vocabulary scores, exact in fp32.

In:    a Chunk of logits (n, V) and labels (n,)
Out:   logsumexp(logits) - logits[label], one value per position
State: none
"""

from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts import Chunk
from core.schedules import Schedule
from core.settings import Settings


class CrossEntropySettings(Settings):
    type: Literal["cross_entropy"] = "cross_entropy"
    """Negative log-likelihood of the target, in nats."""
    weight: Schedule = 1.0
    """Factor in the sum of losses."""


class CrossEntropy:
    name = "cross_entropy"
    needs = "logits"

    def __init__(self, settings: CrossEntropySettings):
        self.weight = settings.weight

    def per_token(self, chunk: Chunk) -> Tensor:
        return _CrossEntropy.apply(chunk.scores, chunk.labels)

    def gradient(self, chunk: Chunk, scale: Tensor | float, out: Tensor) -> Tensor:
        return softmax_minus_target(chunk.scores, chunk.labels, scale, out)


def cross_entropy_values(scores: Tensor, labels: Tensor) -> Tensor:
    """(n, V), (n,) -> (n,) without a gradient."""
    return torch.logsumexp(scores, dim=1) - scores.gather(1, labels[:, None]).squeeze(1)


def softmax_minus_target(scores: Tensor, labels: Tensor, scale: Tensor | float, out: Tensor) -> Tensor:
    """Cross-entropy (n,), with its gradient scale * (softmax - onehot) written over `out`, which may be `scores`."""
    labels = labels[:, None]
    below = scores.amax(dim=1, keepdim=True) - scores.gather(1, labels)  # (n, 1) before `out` overwrites the scores
    torch.softmax(scores, dim=1, out=out)  # one pass, row by row, so that it works in place
    # the best score has probability 1 / sum(exp(scores - best)), never under 1 / V: its log is safe for scores of any size
    values = below - out.amax(dim=1, keepdim=True).log_()  # (n, 1)
    out.mul_(scale)
    out.scatter_add_(1, labels, torch.full_like(below, -1.0).mul_(scale))
    return values.squeeze(1)


class _CrossEntropy(torch.autograd.Function):
    """Keeps softmax - onehot instead of the several (n, V) temporaries autograd would."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return cross_entropy_values(scores, labels)
        gradient = torch.empty_like(scores)
        values = softmax_minus_target(scores, labels, 1.0, gradient)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values[:, None], None
