"""The thread that turns rows into batches ahead of time.

In:    a rank's rows in global order
Out:   (Batch, its rows), as many rows at once as asked for; or the error that ended the reading
State: a few batches that are ready
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator

import numpy as np
import torch

from core.contracts import Batch
from core.data.packing import Row

STEPS_AHEAD = 3
STOP_POLL_SECONDS = 0.2

ReadRows = Callable[[threading.Event], Generator[Row, None, None]]
"""Gives a rank's rows in global order, until the event is set."""
Item = tuple[Batch, list[Row]] | BaseException
"""Rows of one batch, or the error that ended the reading."""


def collate(rows: list[Row], packed: bool) -> Batch:
    """Put rows together to one Batch, (len(rows), T)."""

    def stack(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows])).to(dtype)

    return Batch(
        input_ids=stack("input_ids", torch.int64),
        labels=stack("labels", torch.int64),
        position_ids=stack("position_ids", torch.int64),
        document_ids=stack("document_ids", torch.int32),
        source_ids=stack("source_ids", torch.int32),
        packed=packed,
    )


class Reader:
    """The thread that turns rows into steps and keeps a few of them ready."""

    def __init__(self, read: ReadRows, packed: bool, rows_per_step: int, pin_memory: bool):
        self._queue: queue.Queue[Item] = queue.Queue(maxsize=STEPS_AHEAD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            args=(read, packed, rows_per_step, pin_memory),
            name="data-reader",
            daemon=True,
        )
        self._thread.start()

    def _run(self, read: ReadRows, packed: bool, rows_per_step: int, pin_memory: bool) -> None:
        try:
            reading = read(self._stopping)
            try:
                while not self._stopping.is_set():
                    rows = [next(reading) for _ in range(rows_per_step)]
                    batch = collate(rows, packed)
                    self._put((batch.pinned() if pin_memory else batch, rows))
            finally:
                reading.close()
        except BaseException as error:  # handed to the training thread, which handles it
            self._put(error)

    def _put(self, item: Item) -> None:
        while not self._stopping.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def get(self, should_stop: Callable[[], bool]) -> Item | None:
        """Return the next item; None when it is time to stop before there is one: a source may wait
        for minutes."""
        while True:
            try:
                return self._queue.get(timeout=STOP_POLL_SECONDS)
            except queue.Empty:
                if should_stop():
                    return None

    def close(self, patience: float | None = None) -> None:
        """End the reading, and wait for its end for `patience` seconds at most. A thread that still
        waits for a source then ends with the process."""
        self._stopping.set()
        # a thread that finds room sees at once that it is to stop
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(patience)
