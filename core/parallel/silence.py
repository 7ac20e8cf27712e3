"""In place of what DeepSpeed sends with, while a pass is tried: nothing travels, and the same
memory is taken. What arrives means nothing.

In:    DeepSpeed's backend
Out:   one that is silent
State: none
"""

from typing import Any

from torch import Tensor


class Silence:
    """Has the methods of DeepSpeed's backend that a pass calls; the others are the backend's."""

    def __init__(self, backend: Any):
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, **_: Any
    ) -> "_Done":
        for part in output_tensor.view(-1, input_tensor.numel()):
            _copy(part, input_tensor.view(-1))
        return _Done()

    def reduce_scatter_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, **_: Any
    ) -> "_Done":
        _copy(output_tensor.view(-1), input_tensor.view(-1)[: output_tensor.numel()])
        return _Done()

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, **_: Any) -> "_Done":
        for part in tensor_list:
            _copy(part, tensor)
        return _Done()

    def all_reduce(self, *_: Any, **__: Any) -> "_Done":
        return _Done()

    reduce = broadcast = all_reduce


class _Done:
    """A transfer that has ended."""

    def wait(self) -> None:
        pass


def _copy(target: Tensor, source: Tensor) -> None:
    if target.data_ptr() != source.data_ptr():  # it may be a part of what it is gathered into
        target.copy_(source)
