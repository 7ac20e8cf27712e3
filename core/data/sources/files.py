"""What all local sources share: shards that are files or stretches of long ones, and notes of what was passed over.

In:    a subclass that lists its units and reads one of them from any position on
Out:   the shards of a ShardSource
State: its cursor (shards.py); the list of files, looked up once
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.data.documents import Document
from core.data.sources.shards import ShardSource
from core.environment import redacted

SEGMENT_BYTES = 16 * 1024 * 1024
"""Long plain files are read in stretches of this size: bounds the memory, makes resuming quick and the order less uniform."""

_NAMES_SHOWN = 5


class Damaged(Exception):
    """A unit that cannot be read (any further). It is skipped and named in the notes; the others go on."""

    def __init__(self, kind: str):
        self.kind = kind  # completes "skipped 2 ... files"
        super().__init__(kind)


@dataclass(frozen=True, slots=True)
class Unit:
    """A file, or the lines of it that begin in bytes [begin, end)."""

    path: Path
    label: str  # as a person would name the file: relative to the project or the folder that was asked for
    begin: int = 0
    end: int | None = None  # None: to the end of the file

    @property
    def key(self) -> str:
        return f"{self.label}@{self.begin}" if self.begin else self.label

    def read_bytes(self) -> bytes:
        with self.path.open("rb") as file:
            if self.begin:  # the line that runs into this stretch belongs to the one before
                file.seek(self.begin - 1)
                file.readline()
            if self.end is None:
                return file.read()
            data = file.read(max(0, self.end - file.tell()))
            return data if data.endswith(b"\n") or not data else data + file.readline()


def split_into_units(path: Path, label: str) -> list[Unit]:
    """The units of a plain file: itself, or its stretches. Raises OSError."""
    size = path.stat().st_size
    if size <= 2 * SEGMENT_BYTES:
        return [Unit(path, label)]
    begins = list(range(0, size, SEGMENT_BYTES))
    return [Unit(path, label, begin, end) for begin, end in zip(begins, [*begins[1:], None])]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


class FileSource(ShardSource):
    """Base of the local sources. A subclass gives `list_units` and `read`."""

    def __init__(self, name: str, seed: int):
        super().__init__(name, seed)
        self._units: list[Unit] | None = None
        self._skipped: dict[str, dict[str, None]] = {}  # kind -> labels, in the order found
        self._bad_rows: dict[str, int] = {}

    def list_units(self) -> list[Unit]:
        """All units in one stable order. Raises SourceUnavailable when there is none."""
        raise NotImplementedError

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        """(position after it, document) from position `start` on. Raises OSError or Damaged."""
        raise NotImplementedError

    def open(self) -> None:
        """Lists the files and reads one document. Raises SourceUnavailable."""
        self._units = None  # a second open looks again
        next(self.stream({}))

    def shards(self) -> list[Unit]:
        if self._units is None:
            self._units = self.list_units()
        return self._units

    def contents(self) -> str:
        facts = [(unit.key, _size(unit.path) if unit.begin == 0 else 0) for unit in self.shards()]
        return hashlib.blake2b(repr(facts).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()

    def size(self, unit: Unit) -> int | None:
        """Its bytes, as they are on the disk."""
        return (unit.end if unit.end is not None else _size(unit.path)) - unit.begin

    def recover(self, unit: Unit, error: Exception, failures: int) -> bool:
        """A file that cannot be read is left out and named, the others go on."""
        if isinstance(error, OSError):
            self.skip(unit, "missing" if isinstance(error, FileNotFoundError) else "unreadable")
        elif isinstance(error, Damaged):
            self.skip(unit, error.kind)
        else:  # whatever a library makes of a file that nobody has thought of
            self.skip(unit, redacted(f"unreadable ({type(error).__name__}: {error})"))
        return False

    def nothing(self, order: list[Unit]) -> str:
        told = "".join(f"; {note}" for note in self.notes)
        count = "its only file" if len(order) == 1 else f"any of its {len(order)} files"
        return f"no text in {count} ({order[0].label} ...){told}"

    @property
    def notes(self) -> list[str]:
        """What was passed over so far. Grows while reading: not every file is looked into at opening."""
        notes = []
        for kind, labels in self._skipped.items():
            shown = ", ".join(list(labels)[:_NAMES_SHOWN])
            more = f" and {len(labels) - _NAMES_SHOWN} more" if len(labels) > _NAMES_SHOWN else ""
            notes.append(f"skipped {len(labels)} {kind} {'file' if len(labels) == 1 else 'files'}: {shown}{more}")
        for key, count in self._bad_rows.items():
            notes.append(f"skipped {count} {'row' if count == 1 else 'rows'} without readable text in {key}")
        return notes

    def skipped(self) -> list[tuple[str, str]]:
        return [(label, kind) for kind, labels in self._skipped.items() for label in labels]

    def skip(self, unit: Unit, kind: str) -> None:
        self._skipped.setdefault(kind, {})[unit.label] = None

    def skip_rows(self, unit: Unit, count: int) -> None:
        """Later passes over the same file do not count twice; a resumed one may see only the rest of it."""
        if count > self._bad_rows.get(unit.key, 0):
            self._bad_rows[unit.key] = count
