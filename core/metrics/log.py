"""The metrics log: one JSON object a line, the only record of a run and the only thing the views
are fed from.

In:    a path (none on ranks > 0), and the views: objects with `update(event)`
Out:   logs/<lineage>/metrics.jsonl; every event also goes to every view
State: the open file and its length up to the last whole line
"""

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from core.errors import UserError
from core.files import cause, check_regular, probe, replacing, sweep
from core.terminal import tell

LOG = "metrics.jsonl"
BLOCK = 1 << 16
TAIL = 1 << 22
"""Bytes at the end of a log that hold its last step, and what came after."""
OF_EVALUATION = tuple(b'{"event": "%s"' % kind for kind in (b"eval", b"sample", b"neighbors"))
ENDINGS = ("eval", "run_end")
"""Events that end a stretch of a run: pictures are drawn from the file then."""
CUT_SHORT = ("interrupted", "failed", "diverged")
"""Reasons of a `run_end` that no evaluation comes before."""


class View(Protocol):
    """Something that shows or copies events. It may define `close()`. It must not keep or change
    the dict it is given."""

    def update(self, event: dict) -> None: ...


class MetricsLog:
    """Appends events to a file and forwards them. Nothing that goes wrong in here stops a run.

    Opening a file whose last line is half-written (kill -9, power cut) cuts that line off.
    """

    def __init__(self, path: Path | None, views: Iterable[View] = ()):
        self.path = path
        self.views = list(views)
        self._file: Any = None
        self._length = 0  # bytes of whole lines; after a failed write the file may be longer
        self._torn = False
        self._warned = False
        self._reached = (0, 0)  # (step, tokens) of the last event
        if path is not None:
            self._guarded(self._open)

    def emit(self, event: str, *, step: int, tokens: int, **fields: Any) -> dict:
        """Write one event and show it. Returns it as written: plain JSON, NaN and infinity replaced
        by null."""
        self._reached = step, tokens
        if event in ENDINGS:
            self._look_after_file()
        record = {"event": event, "step": step, "tokens": tokens, "time": time.time(), **fields}
        record = _plain(record)
        if self._file is not None:
            line = json.dumps(record).encode() + b"\n"
            self._guarded(lambda: self._write(line))
        failed = []
        for view in list(self.views):
            try:
                view.update(record)
            except Exception as error:  # a view is a convenience: training goes on without it
                self.views.remove(view)
                failed.append(
                    f"{type(view).__name__} stopped, training goes on without it: "
                    f"{type(error).__name__}: {error}"
                )
        for message in failed:
            self.emit("warning", step=step, tokens=tokens, message=message)
        return record

    def sync(self) -> None:
        """Everything emitted so far reaches the disk: a checkpoint written after this never knows
        more than the log."""
        self._look_after_file()
        if self._file is not None:
            self._guarded(lambda: os.fsync(self._file.fileno()))

    def _look_after_file(self) -> None:
        """Somebody may have removed, moved, replaced or emptied the file while it was written: that
        is mended, and told."""
        told: list[str] = []
        if self._file is not None:
            self._guarded(lambda: told.extend(self._mended()))
        for message in told:
            self.emit("warning", step=self._reached[0], tokens=self._reached[1], message=message)

    def _mended(self) -> list[str]:
        """The file is held open: as long as it is, what was removed can be written anew. Returns
        what a person should know."""
        held = os.fstat(self._file.fileno())
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
                self._file.seek(0)
                shutil.copyfileobj(self._file, anew)
        finally:
            self._file.seek(self._length)
        removed = self._file
        self._open()
        removed.close()
        return [
            f"{self.path} {what} during the run: it is written anew, with every event so far. The "
            "run goes on"
        ]

    def _set_aside(self) -> Path:
        """Where what stands in the log's place is kept from now on."""
        number = 1
        while os.path.lexists(
            aside := self.path.with_name(f"{self.path.stem}.before-{number}{self.path.suffix}")
        ):
            number += 1
        os.replace(self.path, aside)
        return aside

    def rewind(self, step: int, evaluation_due: bool = False) -> list[str]:
        """Drop every line of a later step, so that a resumed run leaves no step twice; nor an
        evaluation at `step`, if it is due. Returns what a person should know.

        Going back to step 0 means that there is no checkpoint: nothing is dropped then, the old log
        is set aside."""
        notes: list[str] = []
        if self._file is not None:
            self._guarded(lambda: notes.extend(self._rewind(step, evaluation_due)))
        return notes

    def _rewind(self, step: int, evaluation_due: bool) -> list[str]:
        kept = reached = 0
        with open(self.path, "rb") as lines:
            for line in lines:  # steps never go down: the first later line ends it
                of_line = _step_of(line)
                if of_line > step or (
                    evaluation_due and of_line == step and line.startswith(OF_EVALUATION)
                ):
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
            self._file.close()
            self._file = None  # where neither name can be opened, events go to the views alone
            try:
                self._set_aside()
            finally:
                self._open()
        else:
            self._cut(kept)

    def close(self) -> None:
        """Close the views that can be closed, then the file."""
        for view in self.views:
            try:
                getattr(view, "close", lambda: None)()
            except Exception as error:
                tell(f"{type(view).__name__} did not close: {error}")
        self.views = []
        if self._file is not None:
            self._guarded(self._file.close)
            self._file = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            check_regular(self.path)
        # no hole, should it be emptied meanwhile
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        # unbuffered: a killed run loses no line it has shown
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._cut(os.fstat(descriptor).st_size)

    def _cut(self, limit: int) -> None:
        """Truncate to the last line end at or before byte `limit`."""
        end = limit
        while end > 0:
            start = max(0, end - BLOCK)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        self._file.truncate(end)
        self._file.seek(end)
        self._length = end

    def _write(self, line: bytes) -> None:
        # half a line is left of a write that failed; without this the next line would be glued to
        # it
        if self._torn:
            self._file.truncate(self._length)
            self._file.seek(self._length)
        self._torn = True
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._torn = False
        self._length += len(line)

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            if not self._warned:
                self._warned = True
                tell(
                    f"warning: the metrics log {self.path} cannot be written ({error}); training "
                    "goes on"
                )


def check_log(path: Path) -> None:
    """Find out before the first step whether a log can be written. Raises UserError; what a killed
    run left beside it goes."""
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


def read_events(path: Path, most: int | None = None) -> Iterator[dict]:
    """Every event of a log, oldest first; lines that are no whole event are passed over. A file
    that cannot be read has none.

    most   of each kind at most so many, every n-th and the last; the others are not even decoded
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            for line in file if most is None else _thinned(file, most):
                event = _decoded(line)
                if isinstance(event.get("event"), str) and all(
                    type(event.get(key)) is int for key in ("step", "tokens")
                ):
                    yield event
    except OSError:
        return


def _thinned(file: Iterable[bytes], most: int) -> list[bytes]:
    """Of each kind of line every n-th and the last, so that there are at most so many, in order."""
    kept: dict[bytes, list[tuple[int, bytes]]] = {}
    counts: Counter[bytes] = Counter()
    every: dict[bytes, int] = {}
    last: dict[bytes, tuple[int, bytes]] = {}
    for number, line in enumerate(file):
        kind = _kind_of(line)
        last[kind] = number, line
        if counts[kind] % every.setdefault(kind, 1) == 0:
            lines = kept.setdefault(kind, [])
            lines.append(last[kind])
            if len(lines) > most - 1:
                kept[kind], every[kind] = lines[::2], 2 * every[kind]
        counts[kind] += 1
    return [
        line
        for _, line in sorted({each for lines in [*kept.values(), last.values()] for each in lines})
    ]


def _kind_of(line: bytes) -> bytes:
    """The beginning of a line that says what event it is, as `emit` writes it."""
    return line[:40].partition(b",")[0] if line.startswith(b'{"event"') else b""


def evaluation_is_missing(path: Path, step: int) -> bool:
    """Whether the log ends at this step, without the end of an evaluation there: the program was
    ended before or in it."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return step == 0
    for line in reversed(lines):
        if _step_of(line) == step and line.startswith(b'{"event": "run_end"'):
            if json.loads(line).get("reason") not in CUT_SHORT:
                return False
        elif line.startswith(b'{"event": "step"'):
            return _step_of(line) == step
    return step == 0


def _plain(value: Any) -> Any:
    """The value as standard JSON can hold it: non-finite floats as null, scalars of tensor
    libraries as numbers."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):  # a lone surrogate is legal in Python, not in UTF-8
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(item := getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0:
        return _plain(item())
    return str(value)


def _step_of(line: bytes) -> int:
    """The step of a line of the log; a line that is not ours counts as old."""
    step = _decoded(line).get("step")
    return step if type(step) is int else 0


def _decoded(line: bytes) -> dict[str, Any]:
    """A line's event; {} where it is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}
