"""Documents, which flow into training, the protocol of whatever yields them, and which of them are
held out.

Importing this needs no torch: data workers start quickly.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Cursor = dict[str, Any]
"""A place in a source, as JSON. `{}` is the beginning of the first epoch."""


Messages = tuple[tuple[str, str], ...]
"""A conversation: (role, content) in order."""

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT)
"""Whose messages count; those of any other role are left out."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as tokens: all that training needs of it."""

    ids: np.ndarray  # (n,) int32, without an end-of-document token
    # (n,) bool: tokens that are predicted, not only read; None: all, and the document's end
    learned: np.ndarray | None
    digest: int  # of the document it was made from
    size: int  # characters of that document; 0 where there never were any
    # UTF-8 bytes of the text that is learned; None where there is no text with it
    num_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of real data: a text, a conversation, or tokens."""

    text: str  # of a conversation: what is said in it; of tokens: empty
    # stable identity inside the source, for logs and hold-out: "pathlib.py#3", "guide.pdf#12"
    key: str
    messages: Messages | None = None  # of a conversation
    read_only: tuple[int, ...] = ()  # numbers of the assistant's messages that are not learned
    encoded: Encoded | None = None  # already tokenized: nothing else is looked at then

    @property
    def digest(self) -> int:
        """64 bits that stand for its content, the same on every machine."""
        if self.encoded is not None:
            return self.encoded.digest
        content = (
            self.text
            if self.messages is None
            else repr(self.messages) + repr(self.read_only or "")[: -2 or None]
        )
        return digest_of(content.encode("utf-8", "surrogatepass"))

    @property
    def size(self) -> int:
        """In characters; of tokens that never were a text about as many as would make them."""
        if self.encoded is None:
            return len(self.text)
        return self.encoded.size or 4 * len(self.encoded.ids)

    def is_shorter_than(self, characters: int) -> bool:
        """Return whether its text is shorter. Tokens that never had a text are not, nor are
        conversations: a short one is complete all the same."""
        if self.encoded is None:
            return self.messages is None and len(self.text) < characters
        return self.encoded.learned is None and 0 < self.encoded.size < characters


class SkipRow(Exception):
    """A row that gives no document. Its text is the reason for the screen: "no message has text".
    The file's reader counts rows by reason, names the first of each, and goes on."""


class DocumentStream(Protocol):
    """One epoch of a source, from a cursor to the epoch's end."""

    def __iter__(self) -> "DocumentStream": ...

    def __next__(self) -> Document:
        """Return the next document. Raises StopIteration when the epoch is over, SourceUnavailable
        when the source has failed for good."""

    def cursor(self) -> Cursor:
        """Return where the next document starts: `source.stream(cursor)` goes on exactly there."""


class Source(Protocol):
    """A registered kind of data: one class and one line in `SOURCES`."""

    name: str  # unique in a preset; the name in logs and cursors
    finite: bool  # whether an epoch is known to end
    size_is_positions: bool  # whether `size` counts positions, as cursors do

    def open(self) -> None:
        """Make sure that documents can be read, within seconds.

        Raises SourceUnavailable saying what, where and what to do. May leave remarks in `notes`.
        """

    @property
    # what a person should be told after opening ("skipped 1 encrypted file: a.pdf")
    def notes(self) -> list[str]: ...

    def contents(self) -> str:
        """Return a text that changes when its files do: the order of an epoch may change then."""

    def skipped(self) -> list[tuple[str, str]]:
        """Return (file or row, why) of everything that was left out so far."""

    def order(self, epoch: int) -> list[Any]:
        """Return the shards in the order of one epoch."""

    def size(self, shard: Any) -> int | None:
        """Return how much is in a shard, in one unit for all of them; None if unknown."""

    def stream(self, cursor: Cursor) -> DocumentStream:
        """Return the documents of epoch `cursor.get("epoch", 0)` from the cursor on, in an order
        fixed by seed and epoch."""


def shorter_than(characters: int) -> str:
    """Describe texts that are left out, for the screen."""
    return f"shorter than data.min_text_length = {characters:,} characters"


def num_bytes_of(text: str) -> int:
    """Return the UTF-8 bytes of a text, which bits per byte divides by."""
    # half a surrogate pair: as long as what stands for it
    return len(text.encode("utf-8", "surrogatepass"))


def digest_of(content: bytes) -> int:
    """Return a stable 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def held_out_by_hash(digest: int, fraction: float) -> bool:
    """Return whether the document with this digest belongs to validation: the same on every
    machine and rank."""
    return digest < fraction * 2**64


_BREAKS = [re.compile(p) for p in (r"\n\s*\n", r"[.!?][\"')\]]*\s", r"\n", r"\s")]


def split_text(text: str, low: int, high: int) -> list[str]:
    """Cut a long text into pieces of `low` to `high` characters, at paragraph, sentence, line or
    word ends (in that order).

    Nothing is lost: the pieces joined are the text. The last piece may be shorter than `low`; one
    of less than a quarter of `low` is kept with its neighbour, even above `high`.
    """
    pieces, start = [], 0
    while len(text) - start > high + low // 4:
        window = text[start + low : start + high]
        for pattern in _BREAKS:
            ends = [m.end() for m in pattern.finditer(window)]
            if ends:
                break
        cut = start + low + (ends[-1] if ends else len(window))
        pieces.append(text[start:cut])
        start = cut
    if start < len(text):
        pieces.append(text[start:])
    return pieces
