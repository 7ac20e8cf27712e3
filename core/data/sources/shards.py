"""What all sources share: an ordered list of shards, read one after the other from an exact cursor.

In:    a subclass that lists its shards and reads one of them from any position on
Out:   a ShardStream of documents: shards in an order permuted by seed and epoch, documents in their
       own order inside a shard
State: `{"epoch", "unit", "piece"}`: unit counts along the permuted order, piece is the reader's
position inside the shard"""

import random
from collections.abc import Iterator
from typing import Any

from core.data.documents import Cursor, Document
from core.data.sources.skips import Skips
from core.errors import SourceUnavailable
from core.randomness import derive_seed


class ShardSource:
    """Base of the sources. A subclass gives `shards`, `read` and `recover`, and says what of it is
    worth caching."""

    finite = True
    column_hint = ""  # what to do where a column is not there
    window = 1024
    """Positions inside which the documents of a shard are shuffled: a few megabytes of text."""

    def __init__(self, name: str, seed: int):
        self.name, self.seed = name, seed
        self.skips = Skips(self.column_hint)

    @property
    def notes(self) -> list[str]:
        """What was passed over so far. Grows while reading: not every file is looked into at
        opening."""
        return self.skips.notes

    def skipped(self) -> list[tuple[str, str]]:
        """(file or row, why) of everything that was left out so far."""
        return self.skips.log_entries()

    def open(self) -> None:
        """Make sure that documents can be read, within seconds. Raises SourceUnavailable."""
        raise NotImplementedError

    def shards(self) -> list[Any]:
        """All shards in one stable order. Raises SourceUnavailable when there is none."""
        raise NotImplementedError

    def read(self, shard: Any, start: int) -> Iterator[tuple[int, Document]]:
        """(position after it, document) from position `start` on; positions grow."""
        raise NotImplementedError

    def recover(self, shard: Any, error: Exception, failures: int) -> bool:
        """After a failed read: True to try again from the same position, False to leave the rest of
        the shard out.

        failures  so many in a row, without a document between them
        Raises SourceUnavailable when the source has failed for good, and any error that is our own
        mistake."""
        raise error

    def contents(self) -> str:
        """Changes when its files do: the order of an epoch may be another then."""
        return ""

    def address(self, shard: Any) -> str | None:
        """What stands for the content of a shard that is slow to reach or to seek in; None: reading
        it again costs little."""
        return None

    def seeks(self, shard: Any) -> bool:
        """Whether `read` gets to a position faster than by reading everything before it."""
        return False

    size_is_positions = False
    """Whether sizes are counted in positions."""

    def size(self, shard: Any) -> int | None:
        """How much is in a shard, in any unit that is the same for all; None: nobody knows without
        reading it."""
        return None

    def nothing(self, order: list[Any]) -> str:
        """What to say of an epoch without a document."""
        return "it holds no text"

    def stream(self, cursor: Cursor) -> "ShardStream":
        return ShardStream(self, cursor)

    def order(self, epoch: int) -> list[Any]:
        """The shards in the order of one epoch: a pure function of seed, name and epoch."""
        shards = list(self.shards())
        random.Random(derive_seed(self.seed, "order", self.name, epoch)).shuffle(shards)
        return shards


class ShardView:
    """A source seen through something that gives its documents in another way: shards, cursors and
    troubles are its own."""

    def __init__(self, source: Any):
        self._source = source
        self.name, self.finite, self.window = source.name, source.finite, source.window
        self.open, self.contents, self.skipped = source.open, source.contents, source.skipped
        self.size, self.size_is_positions = source.size, source.size_is_positions

    @property
    def notes(self) -> list[str]:
        return self._source.notes

    def order(self, epoch: int) -> list[Any]:
        return self._source.order(epoch)

    def recover(self, shard: Any, error: Exception, failures: int) -> bool:
        return self._source.recover(shard, error, failures)

    def nothing(self, order: list[Any]) -> str:
        return self._source.nothing(order)

    def stream(self, cursor: Cursor) -> "ShardStream":
        return ShardStream(self, cursor)


class ShardStream:
    """One epoch from a cursor on. A cursor beyond a list of shards that has shrunk ends the
    epoch."""

    def __init__(self, source: Any, cursor: Cursor):
        self._source = source
        self._epoch: int = cursor.get("epoch", 0)
        # "shard", "row": Hub cursors of older checkpoints
        self._unit: int = cursor.get("unit", cursor.get("shard", 0))
        self._piece: int = cursor.get("piece", cursor.get("row", 0))
        self._from_start = self._unit == 0 and self._piece == 0
        self._order = source.order(self._epoch)
        self._documents: Iterator[tuple[int, Document]] | None = None
        self._failures = 0

    def __iter__(self) -> "ShardStream":
        return self

    def __next__(self) -> Document:
        while self._unit < len(self._order):
            shard = self._order[self._unit]
            try:
                if self._documents is None:
                    self._documents = self._source.read(shard, self._piece)
                self._piece, document = next(self._documents)
            except StopIteration:
                pass
            except SourceUnavailable:
                raise
            except Exception as error:
                # what a broken file or line raises is known to the source alone
                self._documents = None
                self._failures += 1
                if self._source.recover(shard, error, self._failures):
                    continue
            else:
                self._from_start, self._failures = False, 0
                return document
            self._unit, self._piece, self._documents, self._failures = self._unit + 1, 0, None, 0
        # a whole epoch without a document: the next would be as empty, and the mix would spin
        if self._from_start:
            raise SourceUnavailable(self._source.nothing(self._order))
        raise StopIteration

    def cursor(self) -> Cursor:
        return {"epoch": self._epoch, "unit": self._unit, "piece": self._piece}
