"""PDF files of a folder: the text of their pages as paragraphs, cut at sentence ends.

    list of files ─► order of the epoch ─► this file, and the next ones ahead of time ─► documents
                                           pool.py ─► cache.py, or a worker: worker.py ─► layout.py

In:    a folder (looked through to any depth), read with PyMuPDF (AGPL) in processes of its own
Out:   documents of 3000 to 5000 characters; files that give no text are skipped and named
State: none in its cursor but that of files.py; files being read ahead, which change nothing but
speed"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Literal

from pydantic import Field

from core.data.documents import Document, split_text
from core.data.sources.files import FileSource, Unit, label_of
from core.data.sources.find_files import FoundFiles, walk
from core.data.sources.pdf.cache import Extraction, PdfCache
from core.data.sources.pdf.messages import CRASH, GOOD, LARGE, SLOW, TRANSIENT
from core.data.sources.pdf.pool import Limits, Pool
from core.data.sources.skips import CutShort, Damaged
from core.errors import SourceUnavailable
from core.files import own_path
from core.preset.settings import SourceSettings

LOW, HIGH = 3000, 5000
"""Characters of a document."""

CHECKED_AT_OPEN = 200
CHECK_SECONDS = 4.0
"""Files looked into before training starts, and for how long; the others are when their turn
comes."""

OPEN_SECONDS = 9.0
"""How long to look for a first file with text: short of the time that all sources together have to
open."""

PEEK_SECONDS = (0.5, 4.0)
"""How long a file may take to show some text at opening; those that take longer get a second
chance, if no other has any."""


class PdfSettings(SourceSettings):
    type: Literal["pdf"] = "pdf"
    """PDF files of a folder."""
    path: str = Field("./pdfs", min_length=1)
    """The folder, relative to the project; looked through to any depth."""
    name: str = Field("pdf", min_length=1)
    """Name in logs and weights."""
    leave_out: list[str] = Field([])
    """Names of files that are not read."""
    file_seconds: float = Field(default=60.0, gt=0, le=86_400.0)
    """Longest time that reading one file may take; one that takes longer is skipped."""


class PdfSource(FileSource):
    """The PDF files under a folder."""

    MEMORY = 1 << 30
    """Bytes that reading one file may take."""
    AHEAD = 6
    """Files read while one is in use."""

    def __init__(self, settings: PdfSettings, root: Path, seed: int):
        super().__init__(settings.name, seed)
        self._folder = own_path(settings.path, root)
        self._seconds, self._leave_out = settings.file_seconds, settings.leave_out
        self._pool = Pool(PdfCache(root))
        self._lock = threading.Lock()  # a source may have several readers
        # what comes after each file in the order asked for last
        self._following: dict[Unit, tuple[Unit, ...]] = {}
        self._reading: dict[Unit, Future[Extraction]] = {}
        # took too long or too much here: not tried again at every epoch
        self._given_up: dict[Unit, str] = {}

    def list_units(self) -> list[Unit]:
        if self._folder.is_file():
            return [Unit(self._folder, self._folder.name)]
        found = FoundFiles()
        for path in walk(self._folder, found):
            if path.name not in self._leave_out:
                found.add(path, lambda path: path.suffix.lower() == ".pdf")
        self.note_unread(
            found, self._folder, 'a source of type "text" reads text, web pages and tables'
        )
        if not found.paths:
            state = "does not exist"
            if self._folder.is_dir():
                state = " but ".join(["holds no PDF", *self._leave_out])
            raise SourceUnavailable(f"the folder {self._folder} {state}; put PDF files there")
        units = [Unit(path, label_of(path, self._folder)) for path in found.paths.values()]
        return sorted(units, key=lambda unit: unit.label)

    def order(self, epoch: int) -> list[Unit]:
        units = super().order(epoch)
        ahead = {unit: tuple(units[i + 1 : i + 1 + self.AHEAD]) for i, unit in enumerate(units)}
        with self._lock:
            self._following = ahead
        return units

    def open(self) -> None:
        """Finds one file with text, and looks into as many others as there is time for. Raises
        SourceUnavailable."""
        self._units = None  # a second open looks again
        units = self.order(0)
        begin = time.monotonic()
        slow, found, asked = units, False, 0
        for seconds in PEEK_SECONDS:
            candidates, slow = slow, []
            for unit, kind in self._peek(
                candidates, Limits(seconds, self.MEMORY, peek=True), begin + OPEN_SECONDS
            ):
                asked += 1
                found |= kind == GOOD
                if kind == SLOW:
                    slow.append(unit)  # not condemned: it has all of its time when its turn comes
                elif kind != GOOD:
                    self.skip(unit, self._describe(kind))
                if found and (asked >= CHECKED_AT_OPEN or time.monotonic() > begin + CHECK_SECONDS):
                    return
            if found:
                return
        over = time.monotonic() > begin + OPEN_SECONDS
        raise SourceUnavailable(self._nothing_yet(units) if slow or over else self.nothing(units))

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        extraction = self._extraction(unit)
        if extraction.kind != GOOD:
            raise Damaged(self._describe(extraction.kind))
        for index, piece in enumerate(split_text(extraction.text, LOW, HIGH)):
            if index >= start:
                yield index + 1, Document(piece, f"{unit.key}#{index}")
        if extraction.damaged:
            raise CutShort("the damage, as far as that could be repaired")

    def _extraction(self, unit: Unit) -> Extraction:
        """What a file holds; while it is read and used, the files after it are read ahead. Raises
        OSError, SourceUnavailable."""
        limits = Limits(self._seconds, self.MEMORY)
        with self._lock:
            if unit in self._given_up:
                return Extraction(self._given_up[unit], "")
            following = [u for u in self._following.get(unit, ()) if u not in self._given_up]
            future = self._reading.pop(unit, None)
            if future is None or future.cancelled():
                future = self._pool.submit(unit.path, limits, first=True)
            else:
                self._pool.prioritize(future)
            # another reader's, or of a list that was left
            for other in [u for u in self._reading if u not in following]:
                self._reading.pop(other).cancel()
            for other in following:
                if other not in self._reading:
                    self._reading[other] = self._pool.submit(other.path, limits)
        extraction = future.result()
        if extraction.kind in TRANSIENT:
            with self._lock:
                self._given_up[unit] = extraction.kind
        return extraction

    def _peek(self, units: list[Unit], limits: Limits, end: float) -> Iterator[tuple[Unit, str]]:
        """(file, kind) of files looked into side by side, as they answer, until the time is over or
        nobody asks any more."""
        waiting = iter(units)
        running: dict[Future[Extraction], Unit] = {}
        try:
            while time.monotonic() < end:
                while (
                    len(running) < 2 * self._pool.size and (unit := next(waiting, None)) is not None
                ):
                    running[self._pool.submit(unit.path, limits)] = unit
                if not running:
                    return
                done, _ = wait(running, max(0.0, end - time.monotonic()), FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), _kind(future)
        finally:
            for future in running:
                future.cancel()

    def _describe(self, kind: str) -> str:
        """A kind as the notes tell it: it completes "skipped 2 ... files"."""
        texts = {
            SLOW: f"slow (over {self._seconds:g} s)",
            LARGE: f"too large (over {self.MEMORY / 2**30:.2g} GB of memory)",
            CRASH: "crashing (their reader does not survive them)",
        }
        return texts.get(kind, kind)

    def _nothing_yet(self, units: list[Unit]) -> str:
        told = "".join(f"; {note}" for note in self.notes)
        return (
            f"no text within {OPEN_SECONDS:g} s in any of its {len(units)} files "
            f"({units[0].label} ...){told}"
        )


def _kind(future: "Future[Extraction]") -> str:
    """The kind of a file's extraction. Raises SourceUnavailable."""
    try:
        return future.result().kind
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"
