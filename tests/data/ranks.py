"""Ranks in threads, and sources that fail at a given document."""

import threading
from collections.abc import Callable
from typing import Any

from core.data.documents import Document
from core.errors import SourceUnavailable


class Ranks:
    """Data-parallel ranks as threads of this process: the interface of core/parallel with a barrier
    for a network."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._box: list[Any] = [None] * world_size

    def run(self, job: Callable[[Any], Any]) -> list[Any]:
        """`job(parallel)` on every rank; the results by rank. The first error of any rank is
        raised."""
        results: list[Any] = [None] * self.world_size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = job(_Rank(self, rank))
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next(
                (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
            )
        return results

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._box[rank] = value
        self._barrier.wait()
        values = list(self._box)
        self._barrier.wait()
        return values


class _Rank:
    def __init__(self, ranks: Ranks, rank: int):
        self._ranks, self.rank, self.world_size = ranks, rank, ranks.world_size
        self.device_group = None

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.exchange(self.rank, value)

    def sum(self, numbers: list[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self.gather(list(numbers)))]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


class Fails:
    """A source of one file that is broken at one place: document `at` of it can never be read, nor
    a second epoch."""

    def __init__(self, source: Any, at: int):
        self._source, self._at = source, at
        self.name, self.finite, self.notes = source.name, source.finite, source.notes

    def open(self) -> None:
        self._source.open()

    def stream(self, cursor: dict) -> "_FailingStream":
        return _FailingStream(self._source.stream(cursor), self._at)


class _FailingStream:
    def __init__(self, stream: Any, at: int):
        self._stream, self._at = stream, at

    def __iter__(self) -> "_FailingStream":
        return self

    def __next__(self) -> Document:
        document = next(self._stream)
        cursor = self._stream.cursor()
        if cursor["epoch"] > 0 or cursor["piece"] > self._at:
            raise SourceUnavailable("the disk is broken here")
        return document

    def cursor(self) -> dict:
        return self._stream.cursor()
