"""The base of all sources: an ordered list of shards, read one after the other from exact cursors.

In:    a subclass that lists its shards and reads one of them from any position on
Out:   a ShardStream of documents: shards in an order permuted by seed and epoch, documents in their
       own order inside a shard
State: `{"epoch", "unit", "piece"}`: unit counts along the permuted order, piece is the reader's
       position inside the shard
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

from core.data.documents import Cursor, Document
from core.data.sources.skips import Skips
from core.errors import SourceUnavailable
from core.randomness import derive_seed


class ShardSource:
    """Base of the sources. A subclass gives `shards`, `read` and `recover`, and says which of its
    shards are worth caching."""

    finite = True
    patient = False  # whether opening waits for a service that is away
    column_hint = ""  # advice where a column is missing
    window = 1024
    """Positions inside which the documents of a shard are shuffled: a few megabytes of text."""

    def __init__(self, name: str, seed: int):
        self.name, self.seed = name, seed
        self.skips = Skips(self.column_hint)

    @property
    def notes(self) -> list[str]:
        """Notes on what was passed over so far. Grows while reading: opening does not look into
        every file."""
        return self.skips.notes

    def skipped(self) -> list[tuple[str, str]]:
        """Return (file or row, reason) of everything that was left out so far."""
        return self.skips.log_entries()

    def open(self) -> None:
        """Make sure that documents can be read, within seconds. Raises SourceUnavailable."""
        raise NotImplementedError

    def shards(self) -> list[Any]:
        """Return all shards in one stable order. Raises SourceUnavailable when there is none."""
        raise NotImplementedError

    def read(self, shard: Any, start: int) -> Iterator[tuple[int, Document]]:
        """Yield (position after it, document) from position `start` on; positions grow."""
        raise NotImplementedError

    def recover(self, shard: Any, error: Exception, failures: int) -> bool:
        """Decide what follows a failed read: True to try again from the same position, False to
        leave out the rest of the shard.

        failures  number of failures in a row, without a document between them
        Raises SourceUnavailable when the source has failed for good, and any error that is our own
        mistake."""
        raise error

    def contents(self) -> str:
        """Return a text that changes when the files do: an epoch may then have another order."""
        return ""

    def address(self, shard: Any) -> str | None:
        """Return a text that identifies the content of a shard that is slow to reach or to seek in;
        None where reading it again costs little."""
        return None

    def seeks(self, shard: Any) -> bool:
        """Return whether `read` reaches a position without reading everything before it."""
        return False

    size_is_positions = False
    """Whether sizes are counted in positions."""

    def size(self, shard: Any) -> int | None:
        """Return the size of a shard, in any unit that is the same for all; None where it is not
        known without reading the shard."""
        return None

    def nothing(self, order: list[Any]) -> str:
        """Return the reason why an epoch has no document."""
        return "it holds no text"

    def stream(self, cursor: Cursor) -> "ShardStream":
        return ShardStream(self, cursor)

    def order(self, epoch: int) -> list[Any]:
        """Return the shards in the order of one epoch: a pure function of seed, name and epoch."""
        shards = list(self.shards())
        random.Random(derive_seed(self.seed, "order", self.name, epoch)).shuffle(shards)
        return shards


class ShardView:
    """Base of what wraps a source to give its documents in another way. Shards, cursors and errors
    stay the source's. A subclass gives `read`."""

    def __init__(self, source: "ShardSource | ShardView"):
        self._source = source
        self.name: str = source.name
        self.finite: bool = source.finite
        self.window: int = source.window
        self.size_is_positions: bool = source.size_is_positions
        self.open: Callable[[], None] = source.open
        self.contents: Callable[[], str] = source.contents
        self.skipped: Callable[[], list[tuple[str, str]]] = source.skipped
        self.size: Callable[[Any], int | None] = source.size

    @property
    def notes(self) -> list[str]:
        return self._source.notes

    def read(self, shard: Any, start: int) -> Iterator[tuple[int, Document]]:
        """Yield (position after it, document) from position `start` on; positions grow."""
        raise NotImplementedError

    def order(self, epoch: int) -> list[Any]:
        return self._source.order(epoch)

    def recover(self, shard: Any, error: Exception, failures: int) -> bool:
        return self._source.recover(shard, error, failures)

    def nothing(self, order: list[Any]) -> str:
        return self._source.nothing(order)

    def stream(self, cursor: Cursor) -> "ShardStream":
        return ShardStream(self, cursor)


class ShardStream:
    """One epoch from a cursor on. Where the list of shards has shrunk, a cursor beyond its end ends
    the epoch."""

    def __init__(self, source: ShardSource | ShardView, cursor: Cursor):
        self._source = source
        self._epoch = int(cursor.get("epoch", 0))
        # "shard", "row": Hub cursors of older checkpoints
        self._unit = int(cursor["unit"] if "unit" in cursor else cursor.get("shard", 0))
        self._piece = int(cursor["piece"] if "piece" in cursor else cursor.get("row", 0))
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
                # only the source knows what a broken file or connection raises
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
