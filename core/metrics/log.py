"""The metrics log: the only record of a run, and the only thing that views are fed from.

In:    a path (none on ranks > 0), and the views: objects with `update(event)`
Out:   one JSON object a line in the log's file; every event also goes to every view
State: the log's file, the views, the place of the last event
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from core.metrics.log_file import LogFile
from core.terminal import tell

ENDINGS = ("eval", "run_end")
"""Events that end a stretch of a run: figures are drawn from the file then."""


class View(Protocol):
    """Something that shows or copies events. It may define `close()`. It must not keep or change
    the dict it is given."""

    def update(self, event: dict[str, Any]) -> None: ...


class MetricsLog:
    """Appends events to a file and forwards them. Nothing that goes wrong in here stops a run."""

    def __init__(self, path: Path | None, views: Iterable[View] = ()):
        self.path = path
        self.views = list(views)
        self._file: LogFile | None = None
        self._warned = False
        self._reached = (0, 0)  # (step, tokens) of the last event
        if path is not None:
            with self._guarded():
                self._file = LogFile(path)

    def emit(self, event: str, *, step: int, tokens: int, **fields: Any) -> dict[str, Any]:
        """Write one event and show it. Returns it as written: plain JSON, NaN and infinity replaced
        by null."""
        self._reached = step, tokens
        if event in ENDINGS:
            self._mend_file()
        record = {"event": event, "step": step, "tokens": tokens, "time": time.time(), **fields}
        record = _plain(record)
        if self._file is not None:
            with self._guarded():
                self._file.append(json.dumps(record).encode() + b"\n")
        failures = []
        for view in list(self.views):
            try:
                view.update(record)
            except Exception as error:  # a view is a convenience: training goes on without it
                self.views.remove(view)
                failures.append(
                    f"{type(view).__name__} stopped, training goes on without it: "
                    f"{type(error).__name__}: {error}"
                )
        for message in failures:
            self.emit("warning", step=step, tokens=tokens, message=message)
        return record

    def sync(self) -> None:
        """Wait until everything emitted so far is on the disk: a checkpoint written after this
        never knows more than the log."""
        self._mend_file()
        if self._file is not None:
            with self._guarded():
                self._file.sync()

    def _mend_file(self) -> None:
        """Mend the file where somebody removed, moved, replaced or emptied it while it was written,
        and say so."""
        notes: list[str] = []
        if self._file is not None:
            with self._guarded():
                notes = self._file.mend()
        step, tokens = self._reached
        for message in notes:
            self.emit("warning", step=step, tokens=tokens, message=message)

    def rewind(self, step: int, evaluation_due: bool = False) -> list[str]:
        """Drop every line of a later step, so that a resumed run leaves no step twice; and an
        evaluation at `step`, if it is due. Returns what a person should know.

        Going back to step 0 means that there is no checkpoint: nothing is dropped then, the old log
        is set aside."""
        notes: list[str] = []
        if self._file is not None:
            with self._guarded():
                notes = self._file.rewind(step, evaluation_due)
            if self._file.raw is None:  # it cannot be opened again: events go to the views alone
                self._file = None
        return notes

    def close(self) -> None:
        """Close the views that can be closed, then the file."""
        for view in self.views:
            try:
                getattr(view, "close", lambda: None)()
            except Exception as error:
                tell(f"{type(view).__name__} did not close: {error}")
        self.views = []
        if self._file is not None:
            with self._guarded():
                self._file.close()
            self._file = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Say once that the file cannot be written, instead of raising OSError."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                tell(
                    f"warning: the metrics log {self.path} cannot be written ({error}); training "
                    "goes on"
                )


def _plain(value: Any) -> Any:
    """Return the value as standard JSON can hold it: non-finite floats as null, scalars of tensor
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
