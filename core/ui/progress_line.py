"""The progress of a job that does not train: a bar on a terminal, a line every few seconds
elsewhere.

In:    messages and counts of the job
Out:   lines, and on a terminal a bar below them
State: the task that is worked on, and when it began
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TextIO

from core.terminal import write_line
from core.ui import text
from core.ui.dashboard import can_draw

LINE_SECONDS = 5.0


class ProgressLine:
    """Lines that stay, and one line that changes. Close it on every way out: it gives the cursor
    back."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self._stream, self._clock = stream, clock
        self._bar: Any = None
        self._task_id: Any = None
        self._name, self._began_at, self._shown_at = "", 0.0, 0.0
        if can_draw(stream):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[about]}", markup=False),
            ]
            self._bar = Progress(
                *columns, console=Console(file=stream, highlight=False), refresh_per_second=4
            )

    def tell(self, line: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text.clean(line), markup=False, soft_wrap=True)
        else:
            write_line(self._stream, text.clean(line))

    def start(self, name: str) -> None:
        """Begin a task."""
        self._name = text.clean(name)
        self._began_at = self._shown_at = self._clock()
        if self._bar is not None:
            self._bar.start()
            self._task_id = self._bar.add_task(self._name, total=None, about="")

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Begin a task, and end it on the way out."""
        self.start(name)
        try:
            yield
        finally:
            self.end()

    @property
    def seconds(self) -> float:
        """Return the time since the task began."""
        return self._clock() - self._began_at

    @property
    def due(self) -> bool:
        """Tell whether it is time to show the progress: a bar always, lines only now and then."""
        return self._bar is not None or self._clock() - self._shown_at >= LINE_SECONDS

    def show(self, parts: list[str], fraction: float | None) -> None:
        """Show the progress of the task; `fraction` is None where nobody knows its size."""
        self._shown_at = self._clock()
        if self._bar is None:
            self.tell("  ".join([self._name, *parts]))
        else:
            self._bar.update(
                self._task_id,
                completed=fraction or 0,
                total=1 if fraction else None,
                about="  ".join(parts),
            )

    def end(self) -> None:
        """End the task."""
        if self._bar is not None and self._task_id is not None:
            self._bar.remove_task(self._task_id)
            self._bar.stop()
            self._task_id = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
