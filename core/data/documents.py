"""What flows into training: documents, the protocol of whatever yields them, and which of them are held out.

Importing this needs no torch: data workers start quickly.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Protocol

Cursor = dict[str, Any]
"""A place in a source, as JSON. `{}` is the beginning of the first epoch."""


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of real text."""

    text: str
    key: str  # stable identity inside the source, for logs and hold-out: "pathlib.py#3", "guide.pdf#12"


class DocumentStream(Protocol):
    """One epoch of a source, from a cursor to the epoch's end."""

    def __iter__(self) -> "DocumentStream": ...

    def __next__(self) -> Document:
        """The next document. StopIteration: the epoch is over. SourceUnavailable: the source failed for good."""

    def cursor(self) -> Cursor:
        """Where the next document starts: `source.stream(cursor)` goes on exactly there."""


class Source(Protocol):
    """A registered kind of data: one class and one line in `SOURCES`."""

    name: str  # unique in a preset; the name in logs and cursors
    finite: bool  # whether an epoch is known to end

    def open(self) -> None:
        """Make sure that documents can be read, within seconds.

        Raises SourceUnavailable saying what, where and what to do. May leave remarks in `notes`.
        """

    notes: list[str]  # what a person should be told after opening ("skipped 1 encrypted file: a.pdf")

    def stream(self, cursor: Cursor) -> DocumentStream:
        """The documents of epoch `cursor.get("epoch", 0)` from the cursor on, in an order fixed by seed and epoch."""


def held_out_by_hash(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a stable hash of its text, so the same on every machine and rank."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


_BREAKS = [re.compile(p) for p in (r"\n\s*\n", r"[.!?][\"')\]]*\s", r"\n", r"\s")]


def split_text(text: str, low: int, high: int) -> list[str]:
    """Cut a long text into pieces of `low` to `high` characters, at paragraph, sentence, line or word ends (in that order).

    Nothing is lost: the pieces joined are the text. The last piece may be shorter than `low`; one of less than a quarter
    of `low` is kept with its neighbour, even above `high`.
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
