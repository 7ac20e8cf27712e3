"""The base of all local sources: shards that are files or stretches of long ones, and notes of what
was passed over.

In:    a subclass that lists its units and reads one of them from any position on
Out:   the shards of a ShardSource
State: its cursor (shards.py); the list of files, looked up once
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from core.data.documents import Document
from core.data.sources import decode
from core.data.sources.decode import (
    PIECE,
    as_utf8,
    compression,
    first_of_character,
    unpacked,
    wide_encoding,
)
from core.data.sources.find_files import FoundFiles
from core.data.sources.shards import ShardSource
from core.data.sources.skips import Damaged

SEGMENT_BYTES = 16 * 1024 * 1024
"""Long plain files are read in stretches of this size: this bounds the memory, makes resuming quick
and mixes the order better."""
LINE_BYTES = 1 << 20
"""Bytes in which the end of a line of plain text is looked for where a stretch begins or ends."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A file, or the lines of it that begin in bytes [begin, end)."""

    path: Path
    # as a person would name the file: relative to the project or the folder in the preset
    label: str
    begin: int = 0
    end: int | None = None  # None: to the end of the file

    @property
    def key(self) -> str:
        return f"{self.label}@{self.begin}" if self.begin else self.label

    def pieces(self, rows: bool) -> Iterator[bytes]:
        """Yield the bytes, unpacked and in UTF-8. Raises OSError or Damaged.

        rows  whether a line is a row, which is never cut; otherwise a line of over LINE_BYTES may
              be cut between two stretches
        """
        with self.path.open("rb") as file:
            if self.begin == 0 and self.end is None:
                yield from as_utf8(unpacked(file, compression(self.path.name)))
            else:
                stretch = self._stretch(file, rows)
                yield from stretch if self.begin else as_utf8(stretch)

    def _stretch(self, file: BinaryIO, rows: bool) -> Iterator[bytes]:
        begin = _edge(file, self.begin, rows)
        if begin is None:  # the whole stretch is inside a line that is too long to be read
            return
        end = None if self.end is None else _edge(file, self.end, rows)
        if end is None and self.end is not None:
            end = self.end + decode.RECORD_BYTES + 1  # enough to see that the last line is too long
        file.seek(begin)
        while data := file.read(PIECE if end is None else min(PIECE, max(0, end - begin))):
            yield data
            begin += len(data)


def _edge(file: BinaryIO, at: int, rows: bool) -> int | None:
    """Return where the first line begins that begins at `at` or later; None where a row that began
    before runs on for more than RECORD_BYTES."""
    if at == 0:
        return 0
    file.seek(at - 1)
    read, most = 0, decode.RECORD_BYTES if rows else LINE_BYTES
    while read <= most:
        data = file.read(min(PIECE, LINE_BYTES))
        if (cut := data.find(b"\n") + 1) or not data:
            return at - 1 + read + cut
        read += len(data)
    if rows:
        return None
    file.seek(max(0, at - 4))
    around = file.read(8)
    return at - min(4, at) + first_of_character(around, min(4, at))


def split_into_units(path: Path, label: str) -> list[Unit]:
    """Return the units of a plain file: itself, or its stretches. Raises OSError."""
    size = path.stat().st_size
    if size <= 2 * SEGMENT_BYTES:
        return [Unit(path, label)]
    with path.open("rb") as file:
        if wide_encoding(file.read(4)):
            return [Unit(path, label)]
    begins = list(range(0, size, SEGMENT_BYTES))
    return [Unit(path, label, begin, end) for begin, end in zip(begins, [*begins[1:], None])]


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


class FileSource(ShardSource):
    """Base of the local sources. A subclass gives `list_units` and `read`."""

    def __init__(self, name: str, seed: int):
        super().__init__(name, seed)
        self._units: list[Unit] | None = None

    def list_units(self) -> list[Unit]:
        """Return all units in one stable order. Raises SourceUnavailable when there is none."""
        raise NotImplementedError

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        """Yield (position after it, document) from `start` on. Raises OSError or Damaged."""
        raise NotImplementedError

    def open(self) -> None:
        """List the files and read one document. Raises SourceUnavailable."""
        self._units = None  # a second open looks again
        next(self.stream({}))

    def shards(self) -> list[Unit]:
        if self._units is None:
            self._units = self.list_units()
        return self._units

    def contents(self) -> str:
        facts = [
            (unit.key, file_size(unit.path) if unit.begin == 0 else 0) for unit in self.shards()
        ]
        return hashlib.blake2b(
            repr(facts).encode("utf-8", "backslashreplace"), digest_size=8
        ).hexdigest()

    def size(self, unit: Unit) -> int | None:
        """Return the bytes of a unit on the disk."""
        return (unit.end if unit.end is not None else file_size(unit.path)) - unit.begin

    def recover(self, unit: Unit, error: Exception, failures: int) -> bool:
        """Leave out a file that cannot be read, and name it; the others go on. What may be no fault
        of the file is tried once more."""
        if failures == 1 and not isinstance(error, Damaged):
            return True
        self.skips.file(unit.label, error)
        return False

    def nothing(self, order: list[Unit]) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        count = "its only file" if len(order) == 1 else f"any of its {len(order)} files"
        return f"no text in {count} ({order[0].label} ...){notes}"

    def skip(self, unit: Unit, kind: str) -> None:
        self.skips.file(unit.label, Damaged(kind))

    def note_unread(self, found: FoundFiles, root: Path, advice: str) -> None:
        """Note the files that a search met and that are not read."""
        self.skips.remarks |= dict.fromkeys(found.remarks(advice))
        for path, error in found.closed.items():
            self.skips.file(label_of(Path(path), root), error)


def label_of(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
