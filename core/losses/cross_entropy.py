"""Cross-entropy of the vocabulary scores, with label smoothing.

In:    a Chunk of logits (n, V) and labels (n,)
Out:   -log softmax(logits)[label], one value per position
State: none
"""

from typing import Any, Literal

from pydantic import model_validator
from torch import Tensor

from core.losses.base import Chunk, Gradient, TokenLoss
from core.preset.settings import LossSettings
from core.schedules import Schedule, limits, value_at


class CrossEntropySettings(LossSettings):
    type: Literal["cross_entropy"] = "cross_entropy"
    """Negative log-likelihood of the target, in nats."""
    label_smoothing: Schedule = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary (Szegedy et al.
    2016, section 7). Evaluation's cross_entropy is without it."""

    @model_validator(mode="after")
    def _in_range(self) -> "CrossEntropySettings":
        low, high = limits(self.label_smoothing)
        if low < 0.0 or high >= 1.0:
            raise ValueError(
                f"label_smoothing must stay in [0, 1), but goes from {low:g} to {high:g}"
            )
        return self


class CrossEntropy(TokenLoss):
    """-log p of the target, with label smoothing (Szegedy et al. 2016, section 7)."""

    settings: CrossEntropySettings

    def per_token(self, chunk: Chunk) -> Tensor:
        softmax = chunk.softmax()
        smoothing = value_at(self.settings.label_smoothing, chunk.progress)
        values = softmax.nll(chunk.labels)
        if smoothing == 0.0:
            return values
        to_all = softmax.log_normalizer - chunk.scores.mean(dim=1)  # (n,)
        return (1.0 - smoothing) * values + smoothing * to_all

    def add_gradient(self, chunk: Chunk, scale: Any, gradient: Gradient) -> None:
        smoothing = value_at(self.settings.label_smoothing, chunk.progress)
        gradient.add_softmax(chunk.softmax(), scale)
        gradient.add_at(chunk.labels, (smoothing - 1.0) * scale)
        if smoothing:
            gradient.add_constant(-smoothing / chunk.scores.shape[1] * scale)
