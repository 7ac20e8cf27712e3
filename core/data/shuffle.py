"""Documents of a shard in a random order that follows from the position alone: there is no buffer
that a resume could lose.

    shard:  | window 0           | window 1           | ...        each of so many positions,
            permuted by seed, epoch and number

In:    a source that can read a shard from any position on (shards.py)
Out:   the same source; inside each window of a shard its documents come permuted
State: none of its own. A position is the window's first position plus the number of documents of
       the window that were read
"""

import random
from collections.abc import Iterator
from typing import Any

from core.data.documents import Document
from core.data.sources.shards import ShardView
from core.errors import SourceUnavailable
from core.randomness import derive_seed


class ShuffledSource(ShardView):
    """A source with its documents shuffled. A resume reads at most one window again. Its shards are
    (epoch, place in the epoch's order, the source's shard)."""

    def __init__(self, source: Any, seed: int):
        super().__init__(source)
        self._seed = seed

    def order(self, epoch: int) -> list[tuple[int, int, Any]]:
        return [(epoch, place, shard) for place, shard in enumerate(self._source.order(epoch))]

    def nothing(self, order: list[tuple[int, int, Any]]) -> str:
        return self._source.nothing([shard for _, _, shard in order])

    def recover(self, shard: tuple[int, int, Any], error: Exception, failures: int) -> bool:
        return self._source.recover(shard[2], error, failures)

    def read(self, shard: tuple[int, int, Any], start: int) -> Iterator[tuple[int, Document]]:
        epoch, place, content = shard
        size = self._source.window
        first, behind = divmod(start, size)
        for number, window in _windows(self._read_on(content, first * size), first, size):
            seed = derive_seed(self._seed, "window", self.name, epoch, place, number)
            random.Random(seed).shuffle(window)
            skipped = behind if number == first else 0
            for done, document in enumerate(window[skipped:], skipped + 1):
                yield number * size + (size if done == len(window) else done), document

    def _read_on(self, shard: Any, start: int) -> Iterator[tuple[int, Document]]:
        """Yield the shard from a position on. Failed reads are retried here: a window is whole, or
        the shard's last."""
        position, failures = start, 0
        while True:
            try:
                for after, document in self._source.read(shard, position):
                    position, failures = after, 0
                    yield after, document
                return
            except SourceUnavailable:
                raise
            except Exception as error:  # the source knows what to do about it
                failures += 1
                if not self._source.recover(shard, error, failures):
                    return


def _windows(
    documents: Iterator[tuple[int, Document]], number: int, size: int
) -> Iterator[tuple[int, list[Document]]]:
    """Yield (number, documents) of each window that has any; positions end in (number * size,
    (number + 1) * size]."""
    window: list[Document] = []
    for position, document in documents:
        if position > (number + 1) * size:
            if window:
                yield number, window
            number, window = (position - 1) // size, []
        window.append(document)
    if window:
        yield number, window
