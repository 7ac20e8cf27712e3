"""Requests to stop: Ctrl-C, SIGTERM, and SIGHUP, which a closed terminal or a lost
connection sends.

In:    signals, to this process or to its whole group
Out:   a question that a job asks between two steps; processes that outlive the signal, to be ended
       by whoever started them
State: whether it was asked; importing this needs no torch
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

OF_TERMINALS = [signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
STOP_SIGNALS = [*OF_TERMINALS, signal.SIGTERM]


@contextmanager
def signals_held(numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Processes started inside are not ended by these signals, which a terminal sends to a whole
    group; nor are theirs.

    For processes that multiprocessing ends by SIGTERM, hold OF_TERMINALS alone. What
    multiprocessing starts first, a process that keeps its queues, lets SIGINT go: hold again for
    the others."""
    # no such platform is trained on, but it may be tried
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # children inherit it; another thread takes the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed, a connection that is lost) into
    a question the trainer asks between steps. A second Ctrl-C stops at once. Under nohup a SIGHUP
    stays without effect."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if (
                number in (signal.SIGINT, signal.SIGTERM)
                or signal.getsignal(number) != signal.SIG_IGN
            ):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
