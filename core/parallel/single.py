"""One process, one device."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from core.parallel.protocol import T


class Single:
    """One process that has nobody to talk to; see core/parallel/protocol.py."""

    rank = 0
    world_size = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, numbers: list[float]) -> list[float]:
        return numbers

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def close(self) -> None:
        pass
