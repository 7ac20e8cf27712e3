"""Tensors of which each rank may hold a share, or which are still on the disk.

In:    a tensor, plain, sharded (as a DTensor is, or a parameter of DeepSpeed) or stored
Out:   another form of it; whole ones on the host of rank 0
State: none
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Stored(Tensor):
    """A tensor whose content is on the disk. `fill` reads it into another of its shape; of a
    sharded one this rank's share, and no more."""

    fill: Callable[[Tensor], None]

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, fill: Callable[[Tensor], None]) -> "Stored":
        stored = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        stored.fill = fill
        return stored


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # DTensor, whose import is slow and not always needed


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, itself where it is whole. Every rank must call it."""
    whole: Any = tensor
    if isinstance(tensor, Stored):
        tensor.fill(whole := torch.empty(tensor.shape, dtype=tensor.dtype))
        return whole
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
    if isinstance(whole, Stored):
        whole.fill(target := torch.empty_like(other.detach(), dtype=whole.dtype))
        return target
    if not is_sharded(other):
        return whole.to(other.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(
        whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors by name, as they are kept; one with several names is one object."""
    return module.state_dict(keep_vars=True)


def host_copy(tensor: Tensor, mesh: "DeviceMesh") -> Tensor:
    """Return a copy of a sharded tensor: this rank's share, in the memory of its host.

    mesh   the same ranks, on the host
    """
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    share = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(
        share, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
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
