"""The readouts: hidden states to logits by a matrix, or to squared distances from prototypes on the
unit sphere.

In:    tensors the model owns: `lm_head.weight`, `lm_head.bias`, `embedding.weight`
Out:   a Readout (core/contracts.py) for ModelOutput
State: none
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import Readout

# n positions, D hidden_size, V vocab_size


class LinearReadout:
    """scores = hidden @ weight.T + bias.

    Not a module, so that the owning model's state dict keeps its names. The model makes one in its
    forward: `LinearReadout(self.lm_head.weight, self.lm_head.bias, self.embedding.weight)`, or, if
    tied, `LinearReadout(self.embedding.weight)`.
    """

    provides = "logits"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, table: Tensor | None = None):
        self.weight = weight  # (V, D)
        self.bias = bias  # (V,)
        self.table = weight if table is None else table  # (V, D)

    @property
    def linear(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def __call__(self, hidden: Tensor) -> Tensor:  # (n, D) -> (n, V)
        return F.linear(hidden, self.weight, self.bias)

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def detached(self) -> "LinearReadout":
        return LinearReadout(
            self.weight.detach(),
            None if self.bias is None else self.bias.detach(),
            self.table.detach(),
        )


class DistanceReadout:
    """scores = |h - w|**2 of h = hidden / |hidden| and w = the rows of weight / |weight|: 2 - 2
    cos, from 0 to 4.

    As specification 000's DistLayer computes it: the cosine is clamped to [-1, 1], so that beyond
    it there is no gradient, and a row of zeros is at distance 2 from everything.
    """

    provides = "distances"

    def __init__(self, weight: Tensor, table: Tensor | None = None):
        self.weight = weight  # (V, D)
        self.table = weight if table is None else table  # (V, D)

    @property
    def linear(self) -> tuple[Tensor, None]:
        return self.weight, None

    def __call__(self, hidden: Tensor) -> Tensor:  # (n, D) -> (n, V)
        cosine = F.normalize(hidden, dim=-1) @ F.normalize(self.weight, dim=-1).T
        return 2.0 - 2.0 * cosine.clamp(-1.0, 1.0)

    def parameters(self) -> list[Tensor]:
        return [self.weight]

    def detached(self) -> "DistanceReadout":
        return DistanceReadout(self.weight.detach(), self.table.detach())


def full_scores(readout: Readout, hidden: Tensor) -> Tensor:
    """Scores (n, V) of hidden states (n, D) in fp32 at least, whatever the model computes in: bf16
    has three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return readout(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
