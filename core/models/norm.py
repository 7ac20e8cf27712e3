"""RMSNorm's arithmetic, shared by the models; each has a module of its own, as the published names
of its gain differ.

In:    x (..., D), gain (D,)
Out:   (..., D) in the gain's dtype
State: none
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * gain, over the last dimension, in the gain's dtype (Zhang &
    Sennrich 2019)."""
    if not torch.is_grad_enabled():
        return functional.rms_norm(x.to(gain.dtype), gain.shape, gain, eps)
    return _RMSNorm.apply(x, gain, eps)


class _RMSNorm(torch.autograd.Function):
    """torch's, but that only x is kept for the backward pass, in its own dtype; on a CPU torch
    keeps three of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return functional.rms_norm(x.to(gain.dtype), gain.shape, gain, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        wide = x.to(gain.dtype)
        mean_square = torch.linalg.vecdot(wide, wide) / len(gain)
        scale = torch.rsqrt(mean_square + ctx.eps)[..., None]
        unit = wide * scale
        along = torch.linalg.vecdot(grad * gain, unit)[..., None] / len(gain)
        return (
            ((grad * gain - unit * along) * scale).to(x.dtype),
            (grad * unit).flatten(0, -2).sum(0),
            None,
        )
