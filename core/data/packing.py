"""Lays documents into rows of fixed length.

In:    documents as (inputs, labels), in their lane's order
Out:   Row: arrays of T positions; attention and positions stay inside each document
State: LanePosition: which documents are still to be used, and from which position on

    documents  end to end; one that reaches the row's end goes on in the next row:
               |aaaab|bbbcc|cccdd|
    best_fit   whole, unless longer than a row; those are cut where they fill one:
               |aaaaa|abbbb|ccdd.|
    padding    one piece of one document a row, the rest padded:
               |aaaa.|bbbb.|ccccc|

The last two would cut a long document at the same places in every epoch. From the second epoch on
its first piece has another length, `first_piece`. Documents laid end to end are cut where the ones
before them let them begin: elsewhere in each epoch by itself.
"""

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from core.data.objectives import IGNORE_INDEX
from core.randomness import derive_seed

POOL_ROWS = 8
"""Rows' worth of documents that best_fit chooses from: beyond this the rows get hardly fuller
(docs/LOG.md)."""


SHORTEST_PIECE = 32
"""A document that has to be cut anyway fills the rest of a row where that is at least a 32nd of the
row: shorter segments teach little."""


def first_piece(seed: int, epoch: int, digest: int, seq_length: int) -> int:
    """Return how many positions the first piece of a document has where it is longer than a row:
    a whole row's in the first epoch, 1 to `seq_length` in the others."""
    return 1 + derive_seed(seed, "phase", epoch, digest) % seq_length if epoch else seq_length


class LanePosition(NamedTuple):
    """A lane's position: all documents before `next` are used up, except the waiting ones, each of
    which goes on at a position."""

    next: int = 0
    waiting: tuple[tuple[int, int], ...] = ()  # (document index, first unused position)

    @property
    def oldest(self) -> int:
        """The index of the first document that is still needed."""
        return self.waiting[0][0] if self.waiting else self.next

    @classmethod
    def from_json(cls, saved: Any) -> "LanePosition":
        """Read what a checkpoint holds."""
        return cls(saved[0], tuple((index, start) for index, start in saved[1]))


class Segment(NamedTuple):
    """A row's part of a document."""

    draw: int  # its index
    source: int
    digest: int
    start: int  # positions of the document before this segment
    length: int
    opens_epoch: bool  # whether an epoch of its source begins with this document


@dataclass(slots=True)
class Row:
    """One row of a batch, and where its lane stands after it."""

    lane: int
    input_ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32
    position_ids: np.ndarray  # (T,) int32
    # (T,) int32: 0, 1, ... inside the row; padding is a document of its own
    document_ids: np.ndarray
    source_ids: np.ndarray  # (T,) int32: -1 on padding
    after: LanePosition
    segments: list[Segment]
    # of the mixer, taken since the row before
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    # index: (source, tokens, epoch), made since the row before
    draws: dict[int, tuple[int, ...]] = field(default_factory=dict)
    # (source, file, why), found since the row before
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    # of what is learned of the documents that end in it, where `Packer.add` was told
    num_bytes: int = 0


@dataclass(slots=True)
class _Item:
    """A document on its way into rows."""

    index: int
    source: int
    digest: int
    opens_epoch: bool
    inputs: np.ndarray
    labels: np.ndarray
    start: int = 0
    num_bytes: int = 0
    first: int = 0  # positions of its first piece, where it has to be cut; 0: what a row has

    @property
    def left(self) -> int:
        return len(self.inputs) - self.start


class Packer:
    """One lane's documents on their way into rows, end to end."""

    def __init__(self, lane: int, seq_length: int, pad_id: int, place: LanePosition):
        self.lane, self.seq_length, self.pad_id = lane, seq_length, pad_id
        self._next = place.next
        self._resumed = dict(place.waiting)  # documents in use, not yet read again
        self._items: deque[_Item] = deque()
        self._positions = 0  # unused ones in `_items`

    def wants(self, index: int) -> bool:
        """Return whether a document lies ahead of this lane's position."""
        return index >= self._next or index in self._resumed

    def add(
        self,
        index: int,
        source: int,
        digest: int,
        opens_epoch: bool,
        inputs: np.ndarray,
        labels: np.ndarray,
        num_bytes: int = 0,
        first: int = 0,
    ) -> None:
        """Take the lane's next document. `first`: see `first_piece`."""
        item = _Item(
            index,
            source,
            digest,
            opens_epoch,
            inputs,
            labels,
            self._resumed.pop(index, 0),
            num_bytes,
            first if len(inputs) > self.seq_length else 0,
        )
        self._items.append(item)
        self._positions += item.left

    def lose(self, index: int) -> None:
        """Give up a document in use that can no longer be read."""
        self._resumed.pop(index, None)

    @property
    def ready(self) -> bool:
        """True when there are documents enough for the next row."""
        return self._positions >= self.seq_length

    def row(self) -> Row:
        """Return the next row; at the end of the data, its rest is padding."""
        T = self.seq_length
        input_ids = np.full(T, self.pad_id, dtype=np.int32)
        labels = np.full(T, IGNORE_INDEX, dtype=np.int32)
        position_ids = np.zeros(T, dtype=np.int32)
        document_ids = np.zeros(T, dtype=np.int32)
        source_ids = np.full(T, -1, dtype=np.int32)
        filled = num_bytes = 0
        segments: list[Segment] = []
        while filled < T and (item := self._take(T - filled)) is not None:
            start, stop = item.start, self._stop(item, T - filled)
            end = filled + stop - start
            input_ids[filled:end] = item.inputs[start:stop]
            labels[filled:end] = item.labels[start:stop]
            position_ids[filled:end] = np.arange(stop - start)
            document_ids[filled:end] = len(segments)
            source_ids[filled:end] = item.source
            segments.append(
                Segment(
                    item.index,
                    item.source,
                    item.digest,
                    start,
                    stop - start,
                    item.opens_epoch and start == 0,
                )
            )
            self._used(item, stop)
            filled = end
            num_bytes += item.num_bytes if item.left == 0 else 0
        if filled < T:
            position_ids[filled:] = np.arange(T - filled)
            document_ids[filled:] = len(segments)
        return Row(
            lane=self.lane,
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            document_ids=document_ids,
            source_ids=source_ids,
            after=self._place(),
            segments=segments,
            num_bytes=num_bytes,
        )

    def _take(self, room: int) -> _Item | None:
        """Return the document that the next `room` positions of the row begin with; None leaves
        them empty."""
        return self._items[0] if self._items else None

    def _stop(self, item: _Item, room: int) -> int:
        """Return the position of `item` at which its segment ends."""
        return min(item.start + room, len(item.inputs))

    def _used(self, item: _Item, stop: int) -> None:
        """Record that `item` is used up to position `stop`."""
        self._positions -= stop - item.start
        item.start = stop
        self._next = item.index + 1
        if item.left == 0:
            self._items.popleft()

    def _place(self) -> LanePosition:
        begun = self._items[0] if self._items and self._items[0].start > 0 else None
        return LanePosition(self._next, ((begun.index, begun.start),) if begun is not None else ())


class PaddingPacker(Packer):
    """One piece of one document a row."""

    @property
    def ready(self) -> bool:
        return bool(self._items)

    def _take(self, room: int) -> _Item | None:
        return self._items[0] if self._items and room == self.seq_length else None

    def _stop(self, item: _Item, room: int) -> int:
        return _with_first_piece(item, super()._stop(item, room))


def _with_first_piece(item: _Item, stop: int) -> int:
    """Return the end of a segment that would end at `stop`: that of the first piece, if sooner."""
    return item.first if item.start < item.first < stop else stop


class BestFitPacker(Packer):
    """Every row begins with the oldest document in a pool and is filled with the longest ones that
    still fit whole.

    Where none does, a document that has to be cut anyway, being longer than a row, is cut there.
    Nothing waits for ever, as each row takes the oldest. After best-fit packing (arXiv 2404.10830),
    on a stream."""

    def __init__(self, lane: int, seq_length: int, pad_id: int, place: LanePosition):
        super().__init__(lane, seq_length, pad_id, place)
        self._pool: dict[int, _Item] = {}  # by index, oldest first
        # (positions it would take whole, -index) of the pool, sorted
        self._sizes: list[tuple[int, int]] = []
        self._pooled = 0  # unused positions in the pool
        # not in `_sizes` before the next row: this one holds their first pieces
        self._aside: list[_Item] = []

    @property
    def ready(self) -> bool:
        self._admit()
        return not self._resumed and self._pooled >= POOL_ROWS * self.seq_length

    def row(self) -> Row:
        self._admit()
        row = super().row()
        while self._aside:
            self._sort_in(self._aside.pop())
        return row

    def _admit(self) -> None:
        """Fill the pool, no further than it needs: what it holds must follow from the lane's place
        alone."""
        while self._items and (
            self._items[0].index < self._next or self._pooled < POOL_ROWS * self.seq_length
        ):
            item = self._items.popleft()
            self._next = max(self._next, item.index + 1)
            self._pool[item.index] = item
            self._pooled += item.left
            self._sort_in(item)

    def _sort_in(self, item: _Item) -> None:
        insort(self._sizes, (self._size(item), -item.index))

    def _size(self, item: _Item) -> int:
        return min(item.left, self.seq_length + 1)  # one more than a row: it has to be cut

    def _take(self, room: int) -> _Item | None:
        if not self._pool:
            return None
        if room == self.seq_length:
            return next(iter(self._pool.values()))
        fitting = bisect_right(self._sizes, (room, 0))  # -index is never above 0
        if fitting:
            return self._pool[-self._sizes[fitting - 1][1]]
        if not self._sizes:
            return None
        # the oldest of those longer than a row, if there are any
        longest = self._pool[-self._sizes[-1][1]]
        return (
            longest
            if longest.left > self.seq_length and room * SHORTEST_PIECE >= self.seq_length
            else None
        )

    def _stop(self, item: _Item, room: int) -> int:
        return _with_first_piece(item, super()._stop(item, room))

    def _used(self, item: _Item, stop: int) -> None:
        del self._sizes[bisect_right(self._sizes, (self._size(item), -item.index)) - 1]
        self._pooled -= stop - item.start
        self._positions -= stop - item.start
        item.start = stop
        if item.left == 0:
            del self._pool[item.index]
        elif stop == item.first:
            self._aside.append(item)
        else:
            self._sort_in(item)

    def _place(self) -> LanePosition:
        return LanePosition(
            self._next, tuple((item.index, item.start) for item in self._pool.values())
        )


PACKERS = {"documents": Packer, "best_fit": BestFitPacker, "padding": PaddingPacker}
