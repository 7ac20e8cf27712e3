"""The file of the metrics log: it only grows, survives kills, and is mended when somebody removes,
replaces or empties it.

In:    a path; lines
Out:   logs/<lineage>/metrics.jsonl
State: the open file and its length up to the last whole line
"""

import io
import os
import shutil
from contextlib import suppress
from pathlib import Path

from core.errors import UserError
from core.files import cause, check_regular, probe, replacing, sweep
from core.metrics.events import step_of

BLOCK = 1 << 16
OF_EVALUATION = tuple(b'{"event": "%s"' % kind for kind in (b"eval", b"sample", b"neighbors"))


def check_log(path: Path) -> None:
    """Find out before the first step whether a log can be written; what a killed run left beside it
    is deleted. Raises UserError."""
    try:
        probe(path)
        sweep(path.parent)
        if path.exists():
            check_regular(path)
            os.close(os.open(path, os.O_RDWR))  # a file may be read-only in a folder that is not
    except OSError as error:
        raise UserError(
            f"the log {path} cannot be written: {cause(error, path)} Then start again."
        ) from None


class LogFile:
    """An open file of whole lines. Every method may raise OSError.

    Opening a file whose last line is half-written (kill -9, power cut) cuts that line off.
    """

    def __init__(self, path: Path):
        self.path = path
        self.raw: io.FileIO | None = None  # None: closed, or it could not be opened again
        self._length = 0  # bytes of whole lines; after a failed write the file may be longer
        self._torn = False
        self._open()

    def append(self, line: bytes) -> None:
        """Write one line, its end included, at once."""
        raw = self._opened()
        if self._torn:  # half a line is left of a write that failed: the next would stick to it
            raw.truncate(self._length)
            raw.seek(self._length)
        self._torn = True
        rest = memoryview(line)
        while rest:
            rest = rest[raw.write(rest) :]
        self._torn = False
        self._length += len(line)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._opened().fileno())

    def close(self) -> None:
        """Close the file, if it is open."""
        raw, self.raw = self.raw, None
        if raw is not None:
            raw.close()

    def mend(self) -> list[str]:
        """Restore the file where it was removed, replaced or cut off from outside; returns what a
        person should know. As long as it is held open, what was removed can be written anew."""
        raw = self._opened()
        held = os.fstat(raw.fileno())
        if held.st_size < self._length:
            lost = self._length - held.st_size
            self._cut(held.st_size)
            return [
                f"{self.path} was cut off from outside: its last {lost:,} bytes are lost, curves "
                "have a gap. The run goes on"
            ]
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), held):
                return []
        what = "was removed or moved"
        if os.path.lexists(self.path):
            what = f"was replaced (what stands there is now {self._set_aside().name})"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(self.path, durable=True) as anew:
                raw.seek(0)
                shutil.copyfileobj(raw, anew)
        finally:
            raw.seek(self._length)
        self._open()
        raw.close()
        return [
            f"{self.path} {what} during the run: it is written anew, with every event so far. The "
            "run goes on"
        ]

    def rewind(self, step: int, evaluation_due: bool) -> list[str]:
        """Drop every line of a later step, and an evaluation at `step` if it is due; returns what a
        person should know. At step 0 the file is set aside instead."""
        kept = reached = 0
        with open(self.path, "rb") as lines:
            for line in lines:  # steps never go down: the first later line ends it
                of_line = step_of(line)
                is_due = evaluation_due and of_line == step and line.startswith(OF_EVALUATION)
                if of_line > step or is_due:
                    break
                kept, reached = kept + len(line), max(reached, of_line)
        if kept != self._length:
            self._drop_after(kept, step)
        if reached == step:
            return []
        there = f"ends at step {reached:,}" if reached else "is gone, or holds no step"
        return [
            f"{self.path} {there}, the checkpoint is of step {step:,}: what the log held between "
            "is lost, curves have a gap"
        ]

    def _drop_after(self, kept: int, step: int) -> None:
        if step == 0:
            self.close()
            try:
                self._set_aside()
            finally:
                self._open()
        else:
            self._cut(kept)

    def _set_aside(self) -> Path:
        """Rename what stands at the log's path; returns its new path."""
        number = 1
        while os.path.lexists(
            aside := self.path.with_name(f"{self.path.stem}.before-{number}{self.path.suffix}")
        ):
            number += 1
        os.replace(self.path, aside)
        return aside

    def _opened(self) -> io.FileIO:
        if self.raw is None:
            raise OSError("it is closed")
        return self.raw

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            check_regular(self.path)
        # appending: no hole, should it be emptied meanwhile
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        # unbuffered: a killed run loses no line it has shown
        self.raw = io.FileIO(descriptor, "r+b")
        self._cut(os.fstat(descriptor).st_size)

    def _cut(self, limit: int) -> None:
        """Truncate to the last line end at or before byte `limit`."""
        raw, end = self._opened(), limit
        while end > 0:
            start = max(0, end - BLOCK)
            raw.seek(start)
            found = raw.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        raw.truncate(end)
        raw.seek(end)
        self._length = end
