"""PDF files of a folder: the text of their pages as paragraphs, cut at sentence ends.

    list of files ─► order of the epoch ─► this file, and the next ones ahead of time ─► documents
                                           pool.py ─► cache.py, or a worker: worker.py ─► layout.py

In:    a folder (looked through to any depth), read with PyMuPDF (AGPL) in processes of its own
Out:   documents of 3000 to 5000 characters; files that give no text are skipped and named
State: its cursor (files.py); files being read ahead, which change only the speed
"""

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
"""Files that are looked into before training starts, and the seconds for it; the others follow when
their turn comes."""

OPEN_SECONDS = 9.0
"""Seconds in which a first file with text is looked for: fewer than all sources together have to
open."""

PEEK_SECONDS = (0.5, 4.0)
"""Seconds that a file may take to show some text at opening; slower files get a second chance if no
other file has text."""


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
        # the files after each file in the order of the last epoch
        self._following: dict[Unit, tuple[Unit, ...]] = {}
        self._reading: dict[Unit, Future[Extraction]] = {}
        # files that took too much time or memory here: not tried again at every epoch
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
        """Find one file with text, and look into as many others as there is time for. Raises
        SourceUnavailable."""
        self._units = None  # a second open looks again
        units = self.order(0)
        begin = time.monotonic()
        slow, any_text, checked = units, False, 0
        for seconds in PEEK_SECONDS:
            candidates, slow = slow, []
            limits = Limits(seconds, self.MEMORY, peek=True)
            for unit, kind in self._peek(candidates, limits, begin + OPEN_SECONDS):
                checked += 1
                any_text |= kind == GOOD
                if kind == SLOW:
                    slow.append(unit)  # not skipped: it has all of its time when its turn comes
                elif kind != GOOD:
                    self.skip(unit, self._describe(kind))
                out_of_time = time.monotonic() > begin + CHECK_SECONDS
                if any_text and (checked >= CHECKED_AT_OPEN or out_of_time):
                    return
            if any_text:
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
        """Read a file, and begin to read the files after it. Raises OSError, SourceUnavailable."""
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
            # files of another reader, or of an earlier order
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
        """Yield (file, kind) of files that are looked into side by side, as they answer, until the
        time is over or the caller stops."""
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
        """Return a kind in the words of the notes: it completes "skipped 2 ... files"."""
        texts = {
            SLOW: f"slow (over {self._seconds:g} s)",
            LARGE: f"too large (over {self.MEMORY / 2**30:.2g} GB of memory)",
            CRASH: "crashing (their reader does not survive them)",
        }
        return texts.get(kind, kind)

    def _nothing_yet(self, units: list[Unit]) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"no text within {OPEN_SECONDS:g} s in any of its {len(units)} files "
            f"({units[0].label} ...){notes}"
        )


def _kind(future: "Future[Extraction]") -> str:
    """Return the kind of a file's extraction. Raises SourceUnavailable."""
    try:
        return future.result().kind
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"
