"""Steps of rows for one rank, read and tokenized off the training thread.

    Pipeline (in a thread, or in worker processes that share this rank's lanes out)
        ──► rows in global order ──► one Batch per optimizer step ──► queue ──► next_step()

In:    what a Pipeline is made of, and the position to go on from
Out:   StepRows: this rank's rows of one optimizer step, and the counts of the whole step over all ranks
State: Position: what the *consumed* steps used; whatever was read ahead is read again after a resume
"""

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.contracts import Batch
from core.data.mixing import SourceFailed
from core.data.packing import Row
from core.data.pipeline import Pipeline, Position, share_of_lanes
from core.errors import NoData

ROWS_PER_MESSAGE = 16  # sent by a worker at once: fewer, larger messages cost less than the rows in them
STEPS_AHEAD = 3


@dataclass
class StepRows:
    """This rank's rows of one optimizer step. The counts are of the whole step, over all ranks."""

    batch: Batch  # (rows of this rank, T), on the CPU
    num_targets: int
    num_tokens: int  # padding not counted


def collate(rows: list[Row], packed: bool) -> Batch:
    """Rows to one Batch, (len(rows), T)."""

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


class Loader:
    """Iterates over optimizer steps.

    make_pipeline    (position, lanes) -> Pipeline; picklable when there are worker processes
    parallel         world_size, rank, `sum(numbers)` and `gather(object)` over the ranks
    rows_per_step    global rows of one optimizer step; divisible by the number of ranks
    workers          processes per rank; 0 reads in a thread of this process
    fingerprint      of everything that fixes the rows; kept in the state
    """

    def __init__(
        self,
        make_pipeline: Callable[[Position, list[int]], Pipeline],
        position: Position,
        parallel: Any,
        rows_per_step: int,
        source_names: list[str],
        num_lanes: int,
        packed: bool,
        workers: int = 0,
        pin_memory: bool = False,
        fingerprint: str = "",
    ):
        self.position = position
        self._fingerprint = fingerprint
        self.source_names = source_names
        self._make_pipeline, self._parallel = make_pipeline, parallel
        self._rows_per_step, self._packed, self._pin_memory = rows_per_step, packed, pin_memory
        self._num_lanes = num_lanes
        self._lanes = share_of_lanes(num_lanes, parallel.world_size, parallel.rank)
        self._workers = min(workers, len(self._lanes))
        self._snapshots: list[dict[str, Any]] = [position.snapshot] if position.snapshot else []
        self._reader: _Reader | None = None
        self._empty_rows = 0  # global rows in a row without a document: a whole round of lanes of them is the end
        self.dropped: list[tuple[str, str]] = []  # (source, reason) since last asked: for the log

    def next_step(self) -> StepRows | None:
        """The next step's rows; None when the data has ended. Raises NoData when every source has failed.

        A source that fails on any rank is dropped on all of them, from the same draw on.
        """
        while True:
            if self._reader is None:
                self._reader = _Reader(
                    self._read, self._packed, self._rows_per_step // self._parallel.world_size, self._pin_memory
                )
            item = self._reader.get()
            failed = item if isinstance(item, SourceFailed) else None
            batch, rows = (None, []) if failed else item
            failures = [float(failed is not None and failed.name == name) for name in self.source_names]
            targets = 0 if batch is None else int((batch.labels >= 0).sum())
            tokens = 0 if batch is None else int((batch.source_ids >= 0).sum())
            targets, tokens, *failures = self._parallel.sum([targets, tokens, *failures])
            if any(failures):
                self._drop([name for name, count in zip(self.source_names, failures) if count], failed)
                continue
            if tokens == 0:
                self._empty_rows += self._rows_per_step
                if self._empty_rows >= self._num_lanes:
                    return None
                self._advance(rows)  # these lanes are empty, others may not be
                continue
            self._empty_rows = 0
            self._advance(rows)
            return StepRows(batch, int(targets), int(tokens))

    def state(self) -> dict[str, Any]:
        """The position over all ranks, as JSON. Every rank must call it."""
        own = {
            # of its own lanes only: after a resume it knows the others' as they were then
            "lanes": {str(lane): list(self.position.lanes[lane]) for lane in self._lanes if lane in self.position.lanes},
            "snapshot": self.position.snapshot,
        }
        parts = self._parallel.gather(own)
        snapshots = [part["snapshot"] for part in parts if part["snapshot"]]
        return {
            "rows": self.position.rows,
            "lanes": {lane: after for part in parts for lane, after in part["lanes"].items()},
            "snapshot": min(snapshots, key=lambda s: s["index"]) if snapshots else None,
            "drops": dict(self.position.drops),
            "fingerprint": self._fingerprint,
        }

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _advance(self, rows: list[Row]) -> None:
        """Move the position past consumed rows."""
        self.position.rows += self._rows_per_step
        for row in rows:
            self.position.lanes[row.lane] = row.after
            self._snapshots += row.snapshots
        reached = min(self.position.lanes.get(lane, (0, 0))[0] for lane in self._lanes)
        while len(self._snapshots) > 1 and self._snapshots[1]["index"] <= reached:
            self._snapshots.pop(0)
        self.position.snapshot = self._snapshots[0] if self._snapshots else None

    def _drop(self, names: list[str], failed: SourceFailed | None) -> None:
        """Leave sources out from the first draw that no rank has used yet, and read on from the consumed position."""
        self.close()
        ahead = max((after[0] for after in self.position.lanes.values()), default=0) + 1
        first_unused = int(max(self._parallel.gather(ahead)))
        reasons = {f.name: f.reason for f in self._parallel.gather(failed) if f is not None}
        for name in names:
            self.position.drops[name] = first_unused
            self.dropped.append((name, reasons.get(name, "failed")))
        if set(self.source_names) <= set(self.position.drops):
            last = self.dropped[-1]
            raise NoData(f"no source is left to read from; the last to fail was {last[0]}: {last[1]}")
        self._snapshots = [self.position.snapshot] if self.position.snapshot else []

    def _read(self, stopping: threading.Event) -> Iterator[Row]:
        """This rank's rows in global order, from here or from worker processes."""
        start = Position(self.position.rows, dict(self.position.lanes), self.position.snapshot, dict(self.position.drops))
        if self._workers == 0:
            yield from self._make_pipeline(start, self._lanes)
            return
        workers = [_Worker(self._make_pipeline, start, self._lanes[w :: self._workers]) for w in range(self._workers)]
        owner = {lane: workers[i % self._workers] for i, lane in enumerate(self._lanes)}
        try:
            n = start.rows
            while True:
                if (worker := owner.get(n % self._num_lanes)) is not None:
                    yield worker.next_row(stopping)
                n += 1
        finally:
            for worker in workers:
                worker.close()


class _Reader:
    """The thread that turns rows into steps and keeps a few of them ready."""

    def __init__(self, read: Callable, packed: bool, rows_per_step: int, pin_memory: bool):
        self._queue: queue.Queue = queue.Queue(maxsize=STEPS_AHEAD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(read, packed, rows_per_step, pin_memory), name="data-reader", daemon=True
        )
        self._thread.start()

    def _run(self, read: Callable, packed: bool, rows_per_step: int, pin_memory: bool) -> None:
        try:
            reading = read(self._stopping)
            try:
                while not self._stopping.is_set():
                    rows = [next(reading) for _ in range(rows_per_step)]
                    batch = collate(rows, packed)
                    if pin_memory:
                        batch = Batch(**{k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
                    self._put((batch, rows))
            finally:
                reading.close()
        except BaseException as error:  # handed to the training thread, which raises or handles it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopping.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def get(self) -> Any:
        """The next (Batch, rows), or the SourceFailed that ended the reading. Any other error is raised here."""
        item = self._queue.get()
        if isinstance(item, BaseException) and not isinstance(item, SourceFailed):
            raise item
        return item

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()


class _Worker:
    """A process that runs a Pipeline over some lanes."""

    def __init__(self, make_pipeline: Callable, position: Position, lanes: list[int]):
        context = multiprocessing.get_context("spawn")  # a fork would copy a process with threads and a device in it
        self._queue: Any = context.Queue(maxsize=64)
        self._process = context.Process(target=_work, args=(make_pipeline, position, lanes, self._queue), daemon=True)
        self._process.start()
        self._rows: list[Row] = []

    def next_row(self, stopping: threading.Event) -> Row:
        while not self._rows:
            try:
                item = self._queue.get(timeout=0.5)
            except queue.Empty:
                if stopping.is_set():
                    raise _Stopped from None
                if not self._process.is_alive():
                    raise RuntimeError(f"a data worker died (exit code {self._process.exitcode}); out of memory?") from None
                continue
            if isinstance(item, BaseException):
                raise item
            self._rows = item[::-1]
        return self._rows.pop()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._queue.cancel_join_thread()


class _Stopped(Exception):
    """The reader was closed while it waited for a worker."""


def _work(make_pipeline: Callable, position: Position, lanes: list[int], out: Any) -> None:
    """The worker process: rows in messages of a few."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business; it ends its workers itself
    rows: list[Row] = []
    try:
        for row in make_pipeline(position, lanes):
            rows.append(row)
            if len(rows) >= ROWS_PER_MESSAGE:
                out.put(rows)
                rows = []
    except SourceFailed as error:
        out.put(rows) if rows else None
        out.put(error)
    except BaseException as error:
        out.put(RuntimeError(f"a data worker failed: {type(error).__name__}: {error}"))
    out.close()
    out.join_thread()
