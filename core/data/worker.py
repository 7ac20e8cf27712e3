"""A process that runs a Pipeline over some of a rank's lanes. Importing this needs no torch:
workers start quickly.

In:    what a Pipeline is made of, and lanes; positions, one after another
Out:   rows, in messages of a few
State: none; where the run stands is known to the loader alone
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.data.mixing import SourceFailed
from core.data.packing import Row
from core.data.pipeline import Pipeline
from core.data.position import Position
from core.environment import redacted
from core.errors import UserError
from core.signals import OF_TERMINALS, signals_held

ROWS_PER_MESSAGE = 16  # sent at once: fewer, larger messages cost less than the rows in them
MESSAGES_AHEAD = 64
POLL_SECONDS = 0.05
CLOSE_SECONDS = 2.0

MakePipeline = Callable[[Position, list[int]], Pipeline]


class DataWorker:
    """A worker process, seen from the rank's reading thread. It lives on when reading goes on from
    another position."""

    def __init__(self, make_pipeline: MakePipeline, lanes: list[int]):
        # a fork would copy a process with threads and a device in it
        context = multiprocessing.get_context("spawn")
        with signals_held(OF_TERMINALS):  # by the process that multiprocessing keeps for its queues
            self._queue: Any = context.Queue(maxsize=MESSAGES_AHEAD)
            self._positions: Any = context.Queue()
        self._process = context.Process(
            target=_work, args=(make_pipeline, lanes, self._positions, self._queue), daemon=True
        )
        with signals_held(OF_TERMINALS):  # until `_work` ignores them
            self._process.start()
        # the only end left to write to is the worker's: where it is killed within a message, what
        # waits for the rest meets the end of the pipe
        self._queue._writer.close()  # type: ignore[attr-defined]
        self._rows: list[Row] = []
        self._begun = 0

    def begin(self, position: Position) -> None:
        """Read from here on: `next_row` returns nothing more of what was read before."""
        self._begun += 1
        self._rows = []
        self._positions.put(position)

    def next_row(self, stopping: threading.Event) -> Row:
        """Return the next row. Raises SourceFailed as the pipeline does, Stopped once `stopping` is
        set, ReadingBroke, and WorkerDied."""
        while not self._rows:
            try:
                begun, item = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if stopping.is_set():
                    raise Stopped from None
                if not self._process.is_alive():
                    raise WorkerDied(_ending(self._process.exitcode)) from None
                continue
            except (EOFError, OSError):
                self._process.join(CLOSE_SECONDS)
                raise WorkerDied(_ending(self._process.exitcode)) from None
            if begun != self._begun:
                continue
            if isinstance(item, BaseException):
                raise item
            self._rows = item[::-1]
        return self._rows.pop()

    def close(self) -> None:
        """End the process; kill it where it does not end by itself, as one that was frozen."""
        self._process.terminate()
        self._process.join(CLOSE_SECONDS)
        self._process.kill()
        self._process.join(CLOSE_SECONDS)  # what hangs in the kernel still ends with the program
        self._queue.cancel_join_thread()
        self._positions.cancel_join_thread()


class Stopped(Exception):
    """Somebody asked to stop while something else was waited for."""


def stop_if(asked: bool) -> None:
    """Raise Stopped if asked to."""
    if asked:
        raise Stopped


class ReadingBroke(Exception):
    """Reading met an error that nobody expected. Its text says which, and where."""


class WorkerDied(Exception):
    """A worker process is gone, and what it had read. All of it can be read again. Its text says
    how it ended."""


def broke_by(error: BaseException) -> ReadingBroke:
    """Describe an error for the screen, with the place it comes from."""
    if isinstance(error, ReadingBroke):
        return error
    if isinstance(error, UserError):
        return ReadingBroke(str(error))
    places = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
    return ReadingBroke(redacted(f"{type(error).__name__}: {error}{place}"))


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"a data worker ended (exit code {exit_code})"
    name = (
        signal.Signals(-exit_code).name
        if -exit_code in set(signal.Signals)
        else f"signal {-exit_code}"
    )
    return f"a data worker was killed ({name})" + (
        ", probably for want of memory" if -exit_code == signal.SIGKILL else ""
    )


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, then end this one: left behind, it
    would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(make_pipeline: MakePipeline, lanes: list[int], positions: Any, out: Any) -> None:
    """Run the worker process: read from each position that it is given, until there is another
    one."""
    # Ctrl-C is the trainer's business; it ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    begun = 0
    while True:
        position, begun, rows = positions.get(), begun + 1, []
        try:
            for row in make_pipeline(position, lanes):
                rows.append(row)
                if len(rows) >= ROWS_PER_MESSAGE:
                    out.put((begun, rows))
                    rows = []
                    if not positions.empty():
                        break
        except SourceFailed as error:
            out.put((begun, rows)) if rows else None
            out.put((begun, error))
        except BaseException as error:
            out.put((begun, broke_by(error)))
