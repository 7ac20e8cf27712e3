"""Copies of tensors for a checkpoint, and how much room they take.

In:    a state of nested dicts and lists; modules
Out:   a copy on the host; bytes
State: none
"""

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

    def copy(v: Any) -> Any:
        if isinstance(v, torch.Tensor):
            if (place := _place(v)) not in seen:
                seen[place] = v.detach().to("cpu", copy=True)
            return seen[place]
        if isinstance(v, dict):
            return {key: copy(item) for key, item in v.items()}
        if isinstance(v, list | tuple):
            return [copy(item) for item in v]
        return v

    return copy(value)
