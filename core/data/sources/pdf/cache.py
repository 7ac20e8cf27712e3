"""The cache of the text of PDFs by the content of the file: a second run, epoch, rank or copy reads
no PDF again.

In:    the digest of a file's bytes
Out:   its Extraction, or None; a lock, so that two processes do not read the same file at the same
       time
State: <root>/.cache/pdf/<digest>-<version>.json.gz; may be deleted at any time, and an unwritable
       folder costs only time
"""

import gzip
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from core.data.sources.pdf.messages import CACHEABLE, GOOD
from core.files import check_regular, open_lock, sweep, write_file

try:
    import fcntl
except ImportError:  # not a Unix: two processes may then do the same work
    fcntl = None  # type: ignore[assignment]  # a module's name has no other type

CACHE = ".cache/pdf"
"""The folder, relative to the project."""

EXTRACTOR_VERSION = 2
"""Raised with every change of the text that is made of a PDF."""

_POLL = 0.05
_ABANDONED = 3600.0  # seconds after which a file that is being written counts as abandoned


class Extraction(NamedTuple):
    """The result of reading a PDF."""

    kind: str  # GOOD, or why there is no text
    text: str
    damaged: bool = False  # whether some of the file may be missing from the text


def digest_of_file(path: Path) -> str:
    """Return a stable hash of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


class Lock:
    """The right to read one file, and a message for those who wait for it: the kind of a result
    that is not cached.

    The message stands in the lock's file, whose name is removed with the lock: so only a process
    that has waited can still read it."""

    def __init__(self, file: int | None):
        self._file = file

    def message(self) -> str:
        """Return the previous holder's message; "" if there was none."""
        if self._file is None:
            return ""
        os.lseek(self._file, 0, os.SEEK_SET)
        return os.read(self._file, 100).decode(errors="replace")

    def leave(self, message: str) -> None:
        """Leave a message for those who wait."""
        if self._file is not None:
            with suppress(OSError):
                os.write(self._file, message.encode())


class PdfCache:
    """The cache folder of one project."""

    def __init__(self, root: Path):
        self._folder = root / CACHE
        sweep(self._folder, unused_seconds=_ABANDONED)

    def get(self, digest: str) -> Extraction | None:
        try:
            check_regular(path := self._path(digest))
            found = json.loads(gzip.decompress(path.read_bytes()))
            extraction = Extraction(found["kind"], found["text"], found["damaged"] is True)
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
            # absent, cut off, or of another program
            return None
        fits = (
            extraction.kind in CACHEABLE
            and isinstance(extraction.text, str)
            and bool(extraction.text) == (extraction.kind == GOOD)
        )
        return extraction if fits else None

    def put(self, digest: str, extraction: Extraction) -> None:
        if extraction.kind not in CACHEABLE:
            return
        path = self._path(digest)
        data = gzip.compress(json.dumps(extraction._asdict()).encode(), compresslevel=3, mtime=0)
        with suppress(OSError):
            write_file(path, data)

    @contextmanager
    def lock(self, digest: str, seconds: float) -> Iterator["Lock"]:
        """Hold the lock of a digest while its file is read. After `seconds` the caller goes on
        without the lock, since it only saves work."""
        file = self._lock_file(digest)
        end = time.monotonic() + seconds
        locked = False
        try:
            while file is not None and fcntl is not None and not locked and time.monotonic() < end:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
                except BlockingIOError:
                    time.sleep(_POLL)
                except OSError:  # a file system without locks
                    break
            yield Lock(file if locked else None)
        finally:
            # those who wait find the result in the cache; later ones make a new lock
            if locked:
                with suppress(OSError):
                    self._lock_path(digest).unlink()
            if file is not None:
                os.close(file)

    def _lock_file(self, digest: str) -> int | None:
        try:
            return open_lock(self._lock_path(digest))
        except OSError:
            return None

    def _lock_path(self, digest: str) -> Path:
        return self._folder / f"{digest}.lock"

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}-{EXTRACTOR_VERSION}.json.gz"
