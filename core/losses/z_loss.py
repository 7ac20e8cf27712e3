"""The z-loss keeps the softmax's normaliser near 1, so that logits do not drift (Chowdhery et al.
2022, arXiv 2204.02311, 5).

In:    a Chunk of logits (n, V)
Out:   logsumexp(logits)**2, one value per position
State: none
"""

from typing import Any, Literal

from torch import Tensor

from core.losses.base import Chunk, Gradient, TokenLoss
from core.preset.settings import LossSettings
from core.schedules import Schedule


class ZLossSettings(LossSettings):
    type: Literal["z_loss"] = "z_loss"
    """The squared log of the softmax's normaliser."""
    weight: Schedule = 1e-4
    """Factor in the sum of losses."""


class ZLoss(TokenLoss):
    def per_token(self, chunk: Chunk) -> Tensor:
        return chunk.softmax().log_normalizer.square()

    def add_gradient(self, chunk: Chunk, scale: Any, gradient: Gradient) -> None:
        softmax = chunk.softmax()
        gradient.add_softmax(softmax, 2.0 * scale * softmax.log_normalizer)
