"""Tensors of which each rank may hold a share.

In:    a tensor, plain or sharded (as a DTensor is, or a parameter of DeepSpeed)
Out:   the other form; whole ones on the host of rank 0
State: none
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # DTensor, whose import is slow and not always needed


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, itself where it is whole. Every rank must call it."""
    whole: Any = tensor
    if is_sharded(tensor):
        return whole.full_tensor()
    # a parameter of ZeRO stage 3 is empty while its module is not called
    if hasattr(tensor, "ds_status") and whole.ds_status.name == "NOT_AVAILABLE":
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


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


def to_host(tensor: Tensor, rank: int) -> Tensor | None:
    """Return a copy in memory of the host on rank 0; None on the others."""
    return tensor.detach().to("cpu", copy=True) if rank == 0 else None


def weights_by_name(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return a module's tensors, whole and on the host, on rank 0, one by one and those with
    several names once; nothing on the others."""
    collected: dict[int, Tensor | None] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in collected:
            collected[id(tensor)] = to_host(full(tensor), rank)
        if (whole := collected[id(tensor)]) is not None:
            found[name] = whole
    return found


def collected(states: Mapping[str, Mapping[str, Any]], rank: int) -> dict[str, dict[str, Any]]:
    """Return what an optimizer keeps, whole and on the host, on rank 0; nothing on the others."""
    found = {
        name: {
            key: to_host(full(value), rank) if hasattr(value, "ndim") else value
            for key, value in state.items()
        }
        for name, state in states.items()
    }
    return found if rank == 0 else {}
