"""One process, one device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


class Single:
    """The interface of core/parallel, where there is nobody to talk to."""

    rank = 0
    world_size = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module to call in training; its gradients are averaged over ranks when a backward
        pass ends."""
        return module

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; only the `last` of a step exchanges
        gradients."""
        return nullcontext()

    def sum(self, numbers: list[float]) -> list[float]:
        """Element-wise sum over the ranks. Every rank must call it."""
        return numbers

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return value

    def close(self) -> None:
        """Leave the group."""
