"""Sharpness penalties (specification 004): what a diffuse prediction costs.

In:    a Chunk of logits (n, V); p = softmax(logits)
Out:   one value per position that has a target
State: none

    non_max_sum    1 - max p
    neg_max_prob   -max p                  the same gradient
    neg_entropy    -sum p log p            the entropy itself, in spite of its name
    top_k_mass     1 - sum of the k highest p
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from core.losses.base import Chunk, Gradient, TokenLoss
from core.preset.settings import LossSettings
from core.schedules import Schedule


class SharpnessSettings(LossSettings):
    type: Literal["sharpness"] = "sharpness"
    """A penalty on diffuse predictions."""
    weight: Schedule = 0.01
    """Factor in the sum of losses (the specification's lambda)."""
    penalty: Literal["non_max_sum", "neg_entropy", "neg_max_prob", "top_k_mass"] = "non_max_sum"
    """non_max_sum: 1 - the highest probability. neg_entropy: the entropy. neg_max_prob: minus the
    highest probability. top_k_mass: 1 - the sum of the top_k highest."""
    top_k: int = Field(5, ge=1)
    """How many tokens top_k_mass lets have it all."""


class Sharpness(TokenLoss):
    settings: SharpnessSettings

    def per_token(self, chunk: Chunk) -> Tensor:
        softmax = chunk.softmax()
        match self.settings.penalty:
            case "non_max_sum":
                return 1.0 - softmax.at(softmax.best)
            case "neg_max_prob":
                return -softmax.at(softmax.best)
            case "neg_entropy":
                return softmax.entropy
            case "top_k_mass":
                return 1.0 - softmax.at(softmax.top(self.settings.top_k)).sum(dim=1)

    def add_gradient(self, chunk: Chunk, scale: Any, gradient: Gradient) -> None:
        softmax = chunk.softmax()
        if self.settings.penalty == "neg_entropy":
            gradient.add_softmax(softmax, scale * softmax.mean_score)
            gradient.add_weighted_scores(softmax, -scale)
            return
        # (n, k)
        kept = (
            softmax.top(self.settings.top_k)
            if self.settings.penalty == "top_k_mass"
            else softmax.best[:, None]
        )
        share = softmax.at(kept)
        gradient.add_softmax(softmax, scale * share.sum(dim=1))
        gradient.add_at(kept, -scale * share)
