"""Tensors of which each rank may hold a share.

In:    a tensor, plain or sharded (torch's DTensor)
Out:   the other form
State: none
"""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # DTensor, whose import is slow and not always needed


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, itself where it is whole. Every rank must call it."""
    whole: Any = tensor
    return whole.full_tensor() if is_sharded(tensor) else tensor


def like(whole: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor as `other` is kept: on its device, and of a sharded one this rank's
    share. Nothing is exchanged."""
    if not is_sharded(other):
        return whole.to(other.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(
        whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )
