"""The cosine objective (specification 002): the predicted mean embedding should point where the
target's embedding points.

In:    a Chunk of logits z (n, V), labels y, the input embedding table E (V, D)
Out:   1 - cos(mu, E[y]), mu = softmax(z / temperature) E, one value per position
State: none

With L = 1 - cos(mu, e) and g = dL/dmu, d(L)/d(z_i) = p_i (g . E_i) / temperature: the term of the
softmax's normaliser, p_i (g . mu), is 0, because the cosine does not change along mu.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from core.losses.base import Chunk, Gradient, TokenLoss
from core.losses.softmax import Softmax
from core.preset.settings import LossSettings
from core.schedules import Schedule, limits, value_at

EPS = 1e-12  # of F.normalize


class CosineSettings(LossSettings):
    type: Literal["cosine"] = "cosine"
    """1 - the cosine between the predicted mean embedding and the target's, in the input embedding
    table."""
    temperature: Schedule = 1.0
    """Divides the logits before the softmax that weighs the embeddings."""
    topk: int | None = Field(None, ge=1)
    """Only the k most probable tokens make the mean: cheaper in a large vocabulary. Left out, all
    do."""
    detach_table: bool = False
    """Let no gradient reach the table through the mean and the target; it still learns as the
    readout, where it is tied."""

    @model_validator(mode="after")
    def _in_range(self) -> "CosineSettings":
        if (low := limits(self.temperature)[0]) <= 0.0:
            raise ValueError(f"temperature must stay above 0, but goes down to {low:g}")
        return self


@dataclass
class _Mean:
    """The mean embedding of a block and its cosine."""

    softmax: Softmax
    kept: Tensor | None  # (n, k) the tokens that make it; None: all
    unit: Tensor  # (n, D) mu / |mu|
    length: Tensor  # (n, 1)
    target_unit: Tensor  # (n, D)
    target_length: Tensor  # (n, 1)
    cosine: Tensor  # (n,)


class Cosine(TokenLoss):
    settings: CosineSettings

    @property
    def reads_table(self) -> bool:  # type: ignore[override]
        return self.settings.topk is None

    def per_token(self, chunk: Chunk) -> Tensor:
        return 1.0 - self._mean(chunk).cosine

    def add_gradient(self, chunk: Chunk, scale: Any, gradient: Gradient) -> None:
        mean = self._mean(chunk)
        softmax, table, cosine = mean.softmax, chunk.table, mean.cosine[:, None]
        by_mean = (mean.unit * cosine - mean.target_unit) / mean.length * scale  # (n, D)
        into = None if self.settings.detach_table else gradient.table
        if into is not None:
            by_target = (mean.target_unit * cosine - mean.unit) / mean.target_length * scale
            into.index_add_(0, chunk.labels, by_target)
        if mean.kept is None:
            slopes = torch.mm(by_mean, table.t(), out=chunk.scratch.take(chunk.scores))  # (n, V)
            gradient.add_dense(slopes.mul_(softmax.probabilities).div_(softmax.temperature))
            if into is not None:
                into.addmm_(softmax.probabilities.t(), by_mean)
            return
        weights = softmax.at(mean.kept).requires_grad_()  # (n, k)
        with torch.enable_grad():
            mixed = F.embedding_bag(mean.kept, table, per_sample_weights=weights, mode="sum")
        # (n, k) by_mean . E, without holding n * k embeddings
        (slopes,) = torch.autograd.grad(mixed, weights, by_mean)
        weights = weights.detach()
        gradient.add_at(mean.kept, slopes * weights / softmax.temperature)
        if into is not None:
            shares = weights[:, :, None] * by_mean[:, None]  # (n, k, D)
            into.index_add_(0, mean.kept.flatten(), shares.flatten(0, 1))

    def _mean(self, chunk: Chunk) -> _Mean:
        temperature = value_at(self.settings.temperature, chunk.progress)
        return mean_embedding(chunk, temperature, self.settings.topk)


def mean_embedding(chunk: Chunk, temperature: float = 1.0, topk: int | None = None) -> _Mean:
    """The mean embedding under softmax(scores / temperature) and its cosine to the target's, once
    for all that ask."""
    if topk is not None and topk >= chunk.scores.shape[1]:
        topk = None

    def make() -> _Mean:
        softmax = chunk.softmax(temperature)
        kept = None if topk is None else softmax.top(topk)
        if kept is None:
            mu = softmax.probabilities @ chunk.table  # (n, D)
        else:  # not renormalised: a cosine does not see it
            mu = F.embedding_bag(kept, chunk.table, per_sample_weights=softmax.at(kept), mode="sum")
        target = chunk.table[chunk.labels]  # (n, D)
        length, target_length = (v.norm(dim=1, keepdim=True).clamp_min(EPS) for v in (mu, target))
        unit, target_unit = mu / length, target / target_length
        return _Mean(
            softmax, kept, unit, length, target_unit, target_length, (unit * target_unit).sum(dim=1)
        )

    with torch.no_grad():
        return chunk.shared(("mean embedding", temperature, topk), make)
