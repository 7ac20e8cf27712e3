"""The live view of a run on a terminal; `view_for` chooses it, or plain lines where nothing can be
drawn.

In:    events
Out:   a dashboard that is redrawn in place, and stays on the screen when the run ends
State: the run so far (run_state.py), rich's drawing thread while a run is on
"""

import os
import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from core.ui import text
from core.ui.plain import PlainLines, summary
from core.ui.run_state import RunState

REFRESH_PER_SECOND = 4


class Dashboard:
    """Draws a run from its run_start to its run_end; events outside of a run are shown as plain
    lines.

    Drawing happens in a thread of its own, so `update` only stores the event. Anything else that is
    printed meanwhile appears above the dashboard. `close` gives the cursor back: call it on every
    way out."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.time, console: Console | None = None
    ):
        self.console = console or Console(file=stream, highlight=False, soft_wrap=False)
        self.clock = clock
        self._plain = PlainLines(stream)
        # only around the state: rich's own lock must never be taken inside it
        self._lock = threading.Lock()
        self._state: RunState | None = None
        self._live: Live | None = None

    def update(self, event: dict) -> None:
        kind = event.get("event")
        if kind == "run_start":
            self.close()
            self._state = RunState(event)
            self.open()
        elif self._live is None or self._state is None:
            self._plain.update(event)
        else:
            with self._lock:
                self._state.update(event)
            if kind == "run_end":
                self.close()
                self.console.print(Text(summary(event), "bold"))

    def open(self) -> None:
        """Start the drawing thread."""
        self._live = Live(
            get_renderable=self.render,
            console=self.console,
            refresh_per_second=REFRESH_PER_SECOND,
            vertical_overflow="crop",
        )
        self._live.start()

    def render(self) -> Text:
        """Return the dashboard of this moment. Once the run is over, it leaves room below for the
        summary and the shell's prompt."""
        try:
            with self._lock:
                width, height = self.console.size
                is_over = self._state is not None and self._state.end
                return self.draw(width, max(1, height - (3 if is_over else 1)))
        except Exception as error:
            # an exception here would end the drawing thread with a traceback over the dashboard
            return Text(f"the dashboard cannot draw: {type(error).__name__}: {text.clean(error)}")

    def draw(self, width: int, height: int) -> Text:
        """Return at most `height` lines of at most `width` cells; called with the lock held."""
        return Text() if self._state is None else self._state.draw(width, height, self.clock())

    def close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def view_for(stream: TextIO) -> Dashboard | PlainLines:
    """Return the dashboard for a terminal that can show it, plain lines for any other stream."""
    return Dashboard(stream) if can_draw(stream) else PlainLines(stream)


def can_draw(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal that can redraw lines and show more than ASCII."""
    utf8 = (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return utf8 and stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
