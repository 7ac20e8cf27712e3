"""The harmonic loss (specification 000; Baek et al. 2025, arXiv 2502.01628): a probability falls
with a power of the distance.

In:    a Chunk of squared distances d2 (n, V) between unit vectors, labels (n,)
Out:   -log p[label], p_v proportional to (d2_v + eps)**h with h < 0, one value per position
State: none

In the log domain, p = softmax(h log(d2 + eps)): finite where a hidden state equals a prototype,
where the formula as it is written overflows in fp32 from a cosine of 0.9997 on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from core.losses.base import Chunk, Gradient, TokenLoss
from core.losses.softmax import Softmax
from core.preset.settings import LossSettings
from core.schedules import Schedule, limits, value_at

EPS = 1e-8
FIXED = {"nll_h12": -12.0, "nll_h4": -4.0}
"""Exponents at which evaluation also tells it: at others from time to time, its values could not be
compared over a run."""


class HarmonicSettings(LossSettings):
    type: Literal["harmonic"] = "harmonic"
    """Negative log-likelihood of the target under a power law of distances."""
    h_exp: Schedule = Field(
        default_factory=lambda: {"from": -12.0, "to": -4.0}, validate_default=True
    )
    """The exponent: negative; the closer to 0, the harder the task."""
    distance: Literal["squared", "euclidean"] = "squared"
    """What the exponent applies to: the squared distance plus 1e-8 (the authors' code), or the
    distance (the paper's text)."""

    @model_validator(mode="after")
    def _in_range(self) -> "HarmonicSettings":
        if (high := limits(self.h_exp)[1]) >= 0.0:
            raise ValueError(f"h_exp must stay below 0, but goes up to {high:g}")
        return self


class Harmonic(TokenLoss):
    needs = "distances"
    settings: HarmonicSettings

    def per_token(self, chunk: Chunk) -> Tensor:
        return self._nll_at(value_at(self.settings.h_exp, chunk.progress), chunk)

    def token_stats(self) -> dict[str, Callable[[Chunk], Tensor]]:
        return {name: partial(self._nll_at, h) for name, h in FIXED.items()}

    def _nll_at(self, h_exp: float, chunk: Chunk) -> Tensor:
        """Compute -log p of the labels (n,) at one exponent."""
        return self._softmax(chunk, h_exp)[0].nll(chunk.labels)

    def add_gradient(self, chunk: Chunk, scale: Any, gradient: Gradient) -> None:
        softmax, exponent = self._softmax(chunk, value_at(self.settings.h_exp, chunk.progress))
        factor = scale * exponent
        slopes = torch.mul(softmax.probabilities, factor, out=chunk.scratch.take(chunk.scores))
        slopes.scatter_add_(
            1, chunk.labels[:, None], slopes.new_full((len(slopes), 1), -1.0).mul_(factor)
        )
        shifted = torch.add(chunk.scores, EPS, out=chunk.scratch.take(chunk.scores))
        gradient.add_dense(slopes.div_(shifted))

    def _softmax(self, chunk: Chunk, h: float) -> tuple[Softmax, float]:
        exponent = h * (1.0 if self.settings.distance == "squared" else 0.5)

        def make() -> Softmax:
            powers = (
                torch.add(chunk.scores, EPS, out=chunk.scratch.take(chunk.scores))
                .log_()
                .mul_(exponent)
            )
            return Softmax(powers, 1.0, chunk.scratch)

        return chunk.shared(("harmonic", exponent), make), exponent
