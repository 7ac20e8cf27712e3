"""One process, as ranks."""

from core.parallel.protocol import T


class Single:
    """One process that has nobody to talk to; see core/parallel/protocol.py."""

    rank = 0
    world_size = 1
    device_group = None

    def sum(self, numbers: list[float]) -> list[float]:
        return numbers

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def close(self) -> None:
        pass
