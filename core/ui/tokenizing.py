"""How a tokenization goes on: a bar on a terminal, a line every few seconds elsewhere.

In:    what the tokenize job tells
Out:   lines, and on a terminal a bar below them
State: the source being read, and when its reading began
"""

import time
from collections.abc import Callable
from typing import Any, TextIO

from core.ui import text
from core.ui.dashboard import can_draw

LINE_SECONDS = 5.0


class TokenizeView:
    """Lines that stay, and one place that changes. Close it on every way out: it gives the cursor back."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self._stream, self._clock = stream, clock
        self._bar: Any = None
        self._task: Any = None
        self._name, self._began_at, self._began_tokens, self._shown_at = "", 0.0, 0, 0.0
        if can_draw(stream):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[about]}", markup=False),
            ]
            self._bar = Progress(*columns, console=Console(file=stream, highlight=False), refresh_per_second=4)

    def tell(self, line: str) -> None:
        """A line that stays."""
        line = text.clean(line)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, soft_wrap=True)
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()

    def begin(self, name: str, tokens: int) -> None:
        """A source's turn: `tokens` of it were written by an earlier process."""
        self._name, self._began_tokens = text.clean(name), tokens
        self._began_at = self._shown_at = self._clock()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=None, about="")

    def update(self, tokens: int, documents: int, fraction: float | None) -> None:
        """So much is written. `fraction` of the source that is done; None where nobody knows its size."""
        now = self._clock()
        if self._bar is None and now - self._shown_at < LINE_SECONDS:
            return
        spent, new = now - self._began_at, tokens - self._began_tokens
        parts = [f"{text.count(tokens)} tokens", f"{documents:,} documents"]
        if spent > 0 and new > 0:
            parts.append(f"{text.count(new / spent)} tokens/s")
            if fraction and tokens:  # what earlier processes wrote took no time of this one
                left = spent / new * tokens * (1 - fraction) / fraction
                parts += [f"{fraction * 100:.0f} %", f"{text.duration(left)} left"]
        self._shown_at = now
        if self._bar is None:
            self.tell("  ".join([self._name, *parts]))
        else:
            self._bar.update(self._task, completed=fraction or 0, total=1 if fraction else None, about="  ".join(parts))

    def end(self) -> None:
        """The source's turn is over."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
            self._task = None

    def __enter__(self) -> "TokenizeView":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
