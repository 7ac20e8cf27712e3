"""The rows of each step for one rank, read and tokenized off the training thread.

    Pipeline (in a thread, or in worker processes that share this rank's lanes out)
        ──► rows in global order ──► one Batch per optimizer step ──► queue ──► next_step()

In:    a maker of Pipelines, and the position to go on from
Out:   StepRows: this rank's rows of one optimizer step, and the counts of the whole step over all
       ranks
State: Position: as far as *consumed* steps used the data; rows read ahead are read again after a
       resume
"""

import copy
import itertools
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from core.contracts import Batch
from core.data.mixing import SourceFailed
from core.data.packing import LanePosition, Row
from core.data.pipeline import share_of_lanes
from core.data.position import DataFacts, Position, linked, merged_state
from core.data.reader import Item, Reader, collate
from core.data.unlearned import Unlearned
from core.data.worker import DataWorker, MakePipeline, ReadingBroke, Stopped, WorkerDied, broke_by
from core.errors import NoData, ReadingFailed
from core.parallel.protocol import Parallel

CLOSE_SECONDS = 2.0


@dataclass
class StepRows:
    """This rank's rows of one optimizer step. The counts are of the whole step, over all ranks."""

    batch: Batch  # (rows of this rank, T), on the CPU
    num_targets: int
    num_tokens: int  # padding not counted
    source_tokens: list[int]  # of each source; together they are num_tokens
    documents: list[int]  # begun in this step, of each source
    epochs: list[int]  # begun in this step, of each source
    waited_seconds: float = 0.0  # for this rank's rows: 0 where they were ready
    # this rank's rows are these of all rows read for the step
    numbers: list[int] = field(default_factory=list)
    # rows in which each auxiliary head has a position
    head_counts: dict[str, float] = field(default_factory=dict)
    # for the step's event: how they were chosen, where a curriculum did
    log_fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Group:
    """This rank's share of `rows_per_step` consecutive rows, with the counts over all ranks."""

    batch: Batch
    rows: list[Row]
    filled: int  # rows that hold anything
    counts: np.ndarray  # see Loader._counts_of


@dataclass(frozen=True)
class Layout:
    """The division of rows into steps; the same on every rank."""

    rows_per_step: int  # over all ranks, whose number divides it
    num_lanes: int
    source_names: list[str]
    packed: bool
    # whether a step is filled up from the groups of rows that follow, once lanes have ended
    fill: bool = True


class Loader:
    """Iterates over optimizer steps.

    make_pipeline    (position, lanes) -> Pipeline; picklable when there are worker processes
    workers          processes per rank; 0 reads in a thread of this process
    facts            what the rows follow from besides the position; the state keeps it
    describe         writes a row as text, for the warning that nothing in it is learned; None where
                     that is chance
    """

    def __init__(
        self,
        make_pipeline: MakePipeline,
        position: Position,
        parallel: Parallel,
        layout: Layout,
        workers: int = 0,
        pin_memory: bool = False,
        facts: DataFacts | None = None,
        describe: Callable[[Row], str] | None = None,
    ):
        self.position, self.source_names = position, layout.source_names
        self._make_pipeline, self._parallel, self._layout = make_pipeline, parallel, layout
        self._pin_memory, self._facts, self._describe = pin_memory, facts or DataFacts(), describe
        self._rows_per_step, self._num_lanes = layout.rows_per_step, layout.num_lanes
        self._lanes = share_of_lanes(layout.num_lanes, parallel.world_size, parallel.rank)
        self._num_workers = min(workers, len(self._lanes))
        self._workers: list[DataWorker] = []
        self._snapshots: list[dict[str, Any]] = [position.snapshot] if position.snapshot else []
        self._reader: Reader | None = None
        self._held: Item | None = None  # read, but found no room in the step before
        self._waited = 0.0
        self._behind = 0  # the draw that the snapshots of all ranks have reached
        # global rows in a row without a document: a whole round of lanes of them is the end
        self._empty_rows = 0
        self._replaced_at = -1  # the row at which a worker that died was replaced last
        # where it stood before the step that was handed out last
        self._before: tuple[Position, list[dict[str, Any]]] | None = None
        self.unlearned = Unlearned(
            position.rows > position.passed_over * layout.rows_per_step, of_chance=describe is None
        )
        # (source, documents, epochs) that began in steps passed over, since the last report
        self.begun: list[tuple[str, int, int]] = []
        self.dropped: list[tuple[str, str]] = []  # (source, reason) since the last report
        self.warnings: list[str] = []
        # (source, file, why): whether it was logged
        self.skipped: dict[tuple[str, str, str], bool] = {}

    def next_step(self, should_stop: Callable[[], bool] = lambda: False) -> StepRows | None:
        """Read the next step's rows; None when the data has ended. Every rank must call it.

        Raises on all ranks, with the position as it was: NoData when every source has failed,
        ReadingFailed when any rank cannot read on, Stopped once any rank is to stop while it waits
        for rows. Raises UserError when step after step has no token that is learned; each is passed
        over and counted.

        A source that fails on any rank is dropped on all of them, from the same draw on.

        A step is one group of rows, one from each of so many lanes in turn. Where lanes have ended,
        the groups that follow are joined to it as long as their rows find room, and rows without a
        document are left out: the same for any number of ranks."""
        step: list[_Group] = []
        self._waited, filled = 0.0, 0
        while True:
            item = self._next_item(should_stop, step)
            if (group := self._agreed(item)) is None:  # all that is not consumed is read anew
                step, filled, self._empty_rows = [], 0, 0
                continue
            self._empty_rows = 0 if group.filled else self._empty_rows + self._rows_per_step
            ended = self._empty_rows >= self._num_lanes
            if not step and not group.filled:  # these lanes are empty, others may not be
                if ended:
                    self.unlearned.end()
                    return None
                self._advance(group.rows)
                continue
            if filled + group.filled > self._rows_per_step:
                self._held = item
            else:
                step.append(group)
                filled += group.filled
                if self._layout.fill and filled < self._rows_per_step and not ended:
                    continue
            self._empty_rows = 0
            if (rows := self._step_of(step)) is not None:
                return rows
            step, filled = [], 0

    def _next_item(self, should_stop: Callable[[], bool], step: list[_Group]) -> Item | None:
        """Return what this rank reads after the groups of `step`; None where it is to stop."""
        if self._held is not None:
            held, self._held = self._held, None
            return held
        again = len(step)  # groups read again, after workers that died: the same ones
        while True:
            if self._reader is None:
                share = self._rows_per_step // self._parallel.world_size
                self._reader = Reader(self._read, self._layout.packed, share, self._pin_memory)
                again = 0
            started = time.monotonic()
            item = self._reader.get(should_stop)
            self._waited += time.monotonic() - started
            if isinstance(item, WorkerDied) and self._replaced_at != self.position.rows:
                self._replace_workers(item)
            elif isinstance(item, tuple) and again < len(step):
                step[again].rows = item[1]
                again += 1
            else:
                return item

    def _agreed(self, item: Item | None) -> _Group | None:
        """Exchange with the other ranks what was read; None where everything after the position has
        to be read once more. Raises Stopped or ReadingFailed on all ranks where any rank must."""
        failed = item if isinstance(item, SourceFailed) else None
        broke = broke_by(item) if isinstance(item, BaseException) and failed is None else None
        batch, rows = item if isinstance(item, tuple) else (None, [])
        local = [
            float(item is None),
            float(broke is not None),
            float(sum(bool(row.segments) for row in rows)),
            *self._own_index(),
            *[float(failed is not None and failed.name == name) for name in self.source_names],
            *self._counts_of(batch, rows),
        ]
        stops, breaks, filled, *numbers = self._parallel.sum(local)
        ranks, sources = self._parallel.world_size, len(self.source_names)
        self._behind = int(min(numbers[:ranks]))
        failures, counts = numbers[ranks : ranks + sources], numbers[ranks + sources :]
        if breaks:
            raise self._cannot_go_on(broke) from (item if isinstance(item, Exception) else None)
        if stops:
            raise Stopped
        if any(failures):
            self._drop([name for name, count in zip(self.source_names, failures) if count], failed)
            return None
        assert batch is not None
        return _Group(batch, rows, int(filled), np.array(counts, dtype=np.int64))

    def _own_index(self) -> list[float]:
        """Return this rank's snapshot index at its place among zeros: a sum over the ranks gives
        all of them."""
        indices = [0.0] * self._parallel.world_size
        indices[self._parallel.rank] = float(self._snapshot_index)
        return indices

    def _counts_of(self, batch: Batch | None, rows: list[Row]) -> list[float]:
        """Count targets and tokens; then for each source the tokens, then the documents, then the
        epochs that begin in these rows."""
        targets = 0 if batch is None else int((batch.labels >= 0).sum())
        total = 0 if batch is None else int((batch.source_ids >= 0).sum())
        tokens, documents, epochs = np.zeros((3, len(self.source_names)), dtype=np.int64)
        for row in rows:
            for segment in row.segments:
                tokens[segment.source] += segment.length
                documents[segment.source] += segment.start == 0
                epochs[segment.source] += segment.opens_epoch
        return [targets, total, *tokens.tolist(), *documents.tolist(), *epochs.tolist()]

    def _step_of(self, groups: list[_Group]) -> StepRows | None:
        """Put groups together to a step, and move the position past it; None where it is passed
        over because nothing in it is learned."""
        targets, tokens, *by_source = np.sum([group.counts for group in groups], axis=0).tolist()
        source_tokens, documents, epochs = np.reshape(by_source, (3, -1)).tolist()
        rows = [row for group in groups for row in group.rows]
        # each rank has one row at least
        kept = [i for i, row in enumerate(rows) if row.segments or not self._layout.fill] or [0]
        if targets == 0:
            if self._describe and self.unlearned.needs_example:
                self.unlearned.show(self._describe(rows[kept[0]]))
            self.position.passed_over += len(groups)
            self.begun += zip(self.source_names, documents, epochs)
        else:
            self.unlearned.learned()
            self._before = self._copied_position(), list(self._snapshots)
        first = self.position.rows
        for group in groups:
            self._advance(group.rows)
        if targets == 0:
            self.unlearned.add(tokens)
            return None
        read = range(self.position.rows - first)  # by all ranks
        own = [i for i in read if (first + i) % self._num_lanes in self._lanes]
        batch = groups[0].batch
        if len(groups) > 1 or len(kept) < len(rows):
            batch = collate([rows[i] for i in kept], self._layout.packed)
        return StepRows(
            batch=batch,
            num_targets=targets,
            num_tokens=tokens,
            source_tokens=source_tokens,
            documents=documents,
            epochs=epochs,
            waited_seconds=self._waited,
            numbers=[own[i] for i in kept],
        )

    @property
    def has_unreported(self) -> bool:
        """True where this rank has met something that rank 0, where the log is, does not know."""
        return self._parallel.rank > 0 and (bool(self.warnings) or not all(self.skipped.values()))

    def gather_warnings(self) -> None:
        """Hand the warnings and skipped files of all ranks to rank 0. Every rank must call it."""
        by_rank = self._parallel.gather((self.warnings, self.skipped))
        if self._parallel.rank > 0:
            self.warnings, self.skipped = [], dict.fromkeys(self.skipped, True)
            return
        for rank, (warnings, skipped) in enumerate(by_rank[1:], 1):
            self.warnings += [f"process {rank}: {message}" for message in warnings]
            self.skipped = {**dict.fromkeys(skipped, False), **self.skipped}

    def give_back(self) -> None:
        """Go back to before the step that was handed out last, which was not trained."""
        if self._before is not None:
            self._stop_reading(CLOSE_SECONDS)
            (self.position, self._snapshots), self._before = self._before, None

    def state(self) -> dict[str, Any]:
        """Return the position over all ranks, as JSON. Every rank must call it."""
        parts = self._parallel.gather(self.position.of_lanes(self._lanes))
        return merged_state(parts) | asdict(self._facts)

    def reweight(self, factors: dict[str, float]) -> None:
        """Multiply the weights of sources by these factors, by name, from the first draw that no
        rank has used yet.

        Every rank must call it, after the same step; the factors of rank 0 hold. Nothing happens
        where they are those that hold already."""
        factors = self._parallel.broadcast(factors)
        if factors != self.position.latest_factors:
            self.position.factors[self._read_anew()] = factors

    def close(self, patience: float | None = CLOSE_SECONDS) -> None:
        """Stop reading ahead, for good."""
        self._stop_reading(patience)
        self._end_workers()

    def _copied_position(self) -> Position:
        """Return a copy that does not change when the position moves on."""
        now = self.position
        return replace(
            now, lanes=dict(now.lanes), draws=dict(now.draws), receipts=dict(now.receipts)
        )

    def _advance(self, rows: list[Row]) -> None:
        """Move the position past consumed rows."""
        position = self.position
        position.rows += self._rows_per_step
        for row in rows:
            position.lanes[row.lane] = row.after
            position.receipts[row.lane] = linked(position.receipts.get(row.lane, ""), row.segments)
            self._snapshots += row.snapshots
            position.draws |= row.draws
            for each in row.skipped:
                self.skipped.setdefault(each, False)
        reached = min(position.lanes.get(lane, LanePosition()).oldest for lane in self._lanes)
        while len(self._snapshots) > 1 and self._snapshots[1]["index"] <= reached:
            self._snapshots.pop(0)
        position.snapshot = self._snapshots[0] if self._snapshots else None
        position.renewals = [draw for draw in position.renewals if draw >= self._snapshot_index]
        position.factors = {
            draw: each for draw, each in position.factors.items() if draw >= self._snapshot_index
        }
        # a rank that loses a source in mid-run needs what the others have drawn of it, back to its
        # own snapshot
        position.draws = {
            index: draw for index, draw in position.draws.items() if index >= self._behind
        }

    @property
    def _snapshot_index(self) -> int:
        return self.position.snapshot["index"] if self.position.snapshot else 0

    def _replace_workers(self, died: WorkerDied) -> None:
        """Start all of this rank's workers again, and read on from the consumed position. Only
        once: a worker that dies again before a step is made would do so for ever."""
        self._replaced_at = self.position.rows
        self._stop_reading(None)
        self._end_workers()
        self._snapshots = [self.position.snapshot] if self.position.snapshot else []
        self.warnings.append(f"{died}; the workers are started again and read on from the same row")

    def _cannot_go_on(self, broke: ReadingBroke | None) -> ReadingFailed:
        """Make the error that every rank raises, with the first reason that any of them has."""
        reason = next(each for each in self._parallel.gather(str(broke) if broke else None) if each)
        return ReadingFailed(
            f"reading the data failed: {reason}.\nStart again to go on from the newest checkpoint; "
            'with "data": {"workers": 0} reading takes the least memory, and a source taken out of '
            "the preset is not read."
        )

    def _drop(self, names: list[str], failed: SourceFailed | None) -> None:
        """Leave sources out from the first draw that no rank has used yet, and read on from the
        consumed position."""
        # a rank that is ahead knows more draws
        for draws in self._parallel.gather(self.position.draws):
            self.position.draws = {**draws, **self.position.draws}
        first_unused = self._read_anew()
        reasons = {f.name: f.reason for f in self._parallel.gather(failed) if f is not None}
        for name in names:
            self.position.drops[name] = first_unused
            self.dropped.append((name, reasons.get(name, "failed")))
        if set(self.source_names) <= set(self.position.drops):
            name, reason = self.dropped[-1]
            raise NoData(f"no source is left to read from; the last to fail was {name}: {reason}")

    def _read_anew(self) -> int:
        """Go on from the consumed position; returns the first draw that no rank has used yet, where
        a change may begin."""
        self._stop_reading(None)  # the next reader uses the same sources
        first_unused = max(self._parallel.gather(self.position.first_unused()))
        self.position.draws = {
            index: draw for index, draw in self.position.draws.items() if index < first_unused
        }
        self._snapshots = [self.position.snapshot] if self.position.snapshot else []
        return first_unused

    def _stop_reading(self, patience: float | None) -> None:
        self._held = None
        if self._reader is not None:
            self._reader.close(patience)
            self._reader = None

    def _end_workers(self) -> None:
        while self._workers:
            self._workers.pop().close()

    def _read(self, stopping: threading.Event) -> Generator[Row, None, None]:
        """Give this rank's rows in global order, read here or in worker processes."""
        start = copy.deepcopy(self.position)
        if self._num_workers == 0:
            yield from self._make_pipeline(start, self._lanes)
            return
        shares = [self._lanes[w :: self._num_workers] for w in range(self._num_workers)]
        self._workers = self._workers or [
            DataWorker(self._make_pipeline, share) for share in shares
        ]
        for worker in self._workers:
            worker.begin(start)
        owner = {lane: self._workers[i % self._num_workers] for i, lane in enumerate(self._lanes)}
        for n in itertools.count(start.rows):
            if (lane := n % self._num_lanes) in owner:
                yield owner[lane].next_row(stopping)
