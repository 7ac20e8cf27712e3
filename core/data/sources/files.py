"""What all local sources share: an ordered list of units (files, or stretches of long ones), an exact cursor, and notes.

In:    a subclass that lists its units and reads one of them from any position on
Out:   a FileStream of documents: units in an order permuted by seed and epoch, documents in natural order inside a unit
State: `{"epoch", "unit", "piece"}`: unit counts along the permuted order, piece is the reader's position inside the unit
"""

import importlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.documents import Cursor, Document
from core.errors import SourceUnavailable
from core.randomness import derive_seed

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


def need(module: str, package: str) -> Any:
    """An optional module. Raises SourceUnavailable saying what to install: the other sources can go on without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SourceUnavailable(f"the package {package} is missing: pip install {package}") from None


class FileSource:
    """Base of the local sources. A subclass gives `list_units` and `read`."""

    finite = True

    def __init__(self, name: str, seed: int):
        self.name, self.seed = name, seed
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

    def stream(self, cursor: Cursor) -> "FileStream":
        return FileStream(self, cursor)

    def order(self, epoch: int) -> list[Unit]:
        """The units in the order of one epoch: a pure function of seed, name and epoch."""
        if self._units is None:
            self._units = self.list_units()
        units = list(self._units)
        random.Random(derive_seed(self.seed, "order", self.name, epoch)).shuffle(units)
        return units

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

    def skip(self, unit: Unit, kind: str) -> None:
        self._skipped.setdefault(kind, {})[unit.label] = None

    def skip_rows(self, unit: Unit, count: int) -> None:
        """Later passes over the same file do not count twice; a resumed one may see only the rest of it."""
        if count > self._bad_rows.get(unit.key, 0):
            self._bad_rows[unit.key] = count


class FileStream:
    """One epoch of a FileSource from a cursor on. A cursor beyond a list of files that has shrunk ends the epoch."""

    def __init__(self, source: FileSource, cursor: Cursor):
        self._source = source
        self._epoch: int = cursor.get("epoch", 0)
        self._unit: int = cursor.get("unit", 0)
        self._piece: int = cursor.get("piece", 0)
        self._from_start = self._unit == 0 and self._piece == 0
        self._order = source.order(self._epoch)
        self._documents: Iterator[tuple[int, Document]] | None = None

    def __iter__(self) -> "FileStream":
        return self

    def __next__(self) -> Document:
        while self._unit < len(self._order):
            unit = self._order[self._unit]
            try:
                if self._documents is None:
                    self._documents = self._source.read(unit, self._piece)
                self._piece, document = next(self._documents)
            except StopIteration:
                pass
            except OSError as error:
                self._source.skip(unit, "missing" if isinstance(error, FileNotFoundError) else "unreadable")
            except Damaged as error:
                self._source.skip(unit, error.kind)
            else:
                self._from_start = False
                return document
            self._unit, self._piece, self._documents = self._unit + 1, 0, None
        if self._from_start:  # a whole epoch without a document: the next would be as empty, and the mix would spin
            told = "".join(f"; {note}" for note in self._source.notes)
            count = "its only file" if len(self._order) == 1 else f"any of its {len(self._order)} files"
            raise SourceUnavailable(f"no text in {count} ({self._order[0].label} ...){told}")
        raise StopIteration

    def cursor(self) -> Cursor:
        return {"epoch": self._epoch, "unit": self._unit, "piece": self._piece}
