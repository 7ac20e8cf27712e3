"""Copies of tensors for a checkpoint, and how much room they take.

In:    a state of nested dicts and lists; modules
Out:   a copy on the host; bytes
State: none
"""

from collections.abc import Callable
from typing import Any

import torch


def stored_bytes(*modules: torch.nn.Module | None) -> int:
    """Count the bytes that the tensors of modules take in a checkpoint, those with several names
    counted once."""
    tensors = {
        _place(t): t.nbytes
        for module in modules
        if module is not None
        for t in module.state_dict().values()
    }
    return sum(tensors.values())


def _place(tensor: torch.Tensor) -> tuple:
    """The same for all names of a tensor: `state_dict` makes an object of each."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def copied(value: Any) -> Any:
    """A deep copy with every tensor on the CPU. One tensor under several names (tied weights) is
    copied once."""
    seen: dict[tuple, torch.Tensor] = {}

    def copy(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if (place := _place(tensor)) not in seen:
            seen[place] = tensor.detach().to("cpu", copy=True)
        return seen[place]

    return each_tensor(value, copy)


def each_tensor(
    value: Any, action: Callable[[str, torch.Tensor], torch.Tensor], name: str = ""
) -> Any:
    """A deep copy, every tensor replaced by what the action makes of its name and itself: keys with
    dots between them."""
    if isinstance(value, torch.Tensor):
        return action(name, value)
    before = f"{name}." if name else ""
    if isinstance(value, dict):
        return {key: each_tensor(item, action, f"{before}{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [each_tensor(item, action, f"{before}{i}") for i, item in enumerate(value)]
    return value
