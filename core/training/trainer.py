"""The training loop: the only one, for every model, loss and source.

In:    objects, through the constructor: nothing here knows a model's, a loss's or a source's name
Out:   a trained model, events in the metrics log, checkpoints
State: Progress, plus what its parts keep; `state()` is all of it

One step: rows → positions of heads → rehearsal → curriculum → forward → losses → backward → clip
          → report → guard → update → after_optimizer_step → log
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from core.checkpoint.slots import CheckpointStore
from core.contracts import call_if_defined
from core.data.loader import Loader, StepRows
from core.data.worker import Stopped
from core.errors import CheckpointError, Diverged, NoData
from core.metrics.events import CUT_SHORT
from core.metrics.log import MetricsLog
from core.parallel.shards import tensors_of
from core.preset.train import TrainSettings
from core.schedules import learning_rate_schedule, value_at
from core.training.curriculum import Curriculum
from core.training.inspection import Inspection, Inspector
from core.training.machine import Machine
from core.training.objective import Objective
from core.training.optim import Optimizer
from core.training.passes import Passes
from core.training.progress import Budget, Progress
from core.training.recovery import BAD_STEPS, Recovery
from core.training.reporter import Reporter
from core.training.saving import Saver
from core.training.source_weights import SourceWeights
from core.training.step_report import StepReport, step_report


@dataclass
class Learner:
    """The objective that is trained, the module to call for its loss, and the optimizer."""

    objective: Objective
    module: nn.Module  # the objective, as the engine wrapped it
    optimizer: Optimizer


@dataclass
class Rows:
    """The source of rows: the loader, the mix, and the curriculum that chooses among rows."""

    loader: Loader
    source_weights: SourceWeights
    curriculum: Curriculum | None = None


@dataclass
class Plan:
    """The recipe, its budget and its progress."""

    settings: TrainSettings
    budget: Budget
    progress: Progress
    compile_from_step: int | None = None  # the first step of the lineage to compile


@dataclass
class Records:
    """The log and the checkpoints that a run writes."""

    log: MetricsLog
    store: CheckpointStore
    extra_state: dict[str, Any]  # what else a checkpoint must hold


class Trainer:
    """Trains to the end of one run at a time."""

    def __init__(
        self,
        machine: Machine,
        learner: Learner,
        rows: Rows,
        plan: Plan,
        records: Records,
        inspection: Inspection,
        should_stop: Callable[[], bool],
    ):
        self.runtime, self.parallel = machine.runtime, machine.parallel
        self.engine = machine.engine
        self.objective, self.optimizer = learner.objective, learner.optimizer
        self.model = self.objective.model
        self.loader, self.source_weights = rows.loader, rows.source_weights
        self.curriculum = rows.curriculum
        self.settings, self.budget, self.progress = plan.settings, plan.budget, plan.progress
        self.log, self.store, self.extra_state = records.log, records.store, records.extra_state
        self.should_stop = should_stop
        self.reporter = Reporter(self.log, self.progress)
        self.inspector = Inspector(inspection, self.model, machine, self.progress, self.reporter)
        self.saver = Saver(self.store, self.state, self.settings, machine, self.reporter)
        self.recovery = Recovery(self.store, self.objective, self.optimizer, machine, self.reporter)
        # a resumed run leaves a compiler out that failed
        note_failure = partial(self.extra_state.update, compile_failed=True)
        self.passes = Passes(
            learner.module,
            self.model,
            machine,
            self.settings,
            plan.compile_from_step,
            self.reporter.warn,
            note_failure,
        )
        schedule = self.settings.schedule
        self._rate_schedule = learning_rate_schedule(
            schedule.type, schedule.warmup, schedule.decay, schedule.floor, schedule.decay_shape
        )
        self._sound = True  # whether the state could be saved as it is: not while an update is made
        self._step_started = time.monotonic()

    def train(self) -> str:
        """Train until the run's end, an interruption or the end of the data; returns the reason.

        However it stops, the run is saved first, except with weights that are not finite or after
        half an update. Raises CheckpointError where the end could not be saved.
        """
        self.model.train()
        self._step_started = time.monotonic()
        if self.progress.finished:  # and saved, but the program ended before it was evaluated
            return self._close(self.budget.end(self.progress) or "max_epochs")
        try:
            reason = self._train_on()
        except Stopped:
            reason = "interrupted"
        except Exception as error:
            self._report_reading()
            reason = _reason_of(error)
            if self._sound and self.progress.step > 0:
                self._end(reason)
            else:
                self.reporter.emit("run_end", reason=reason)
            raise
        reason, failure = self._end(reason)
        if failure:
            raise CheckpointError(
                f"the end of the run could not be saved: {failure}\n"
                f"The older checkpoints in {self.store.folder} are untouched. Mend that and start "
                "again."
            )
        return reason

    def _train_on(self) -> str:
        """Take step after step; returns the reason that ended it."""
        # the end waits for a finite step, or a roll-back: until then nobody knows whether the
        # weights are at fault
        while (reason := self.budget.end(self.progress)) is None or self.progress.bad_in_a_row:
            if self.progress.evaluation_due and not self.progress.bad_in_a_row:
                self.evaluate_and_sample()
                if any(self.parallel.sum([float(self.should_stop())])):
                    return "interrupted"
            rows = self._next_rows()
            if rows is None:
                return "max_epochs"
            # where there are several ranks, one that fails is alone: they cannot save together
            self._sound = self.parallel.world_size == 1
            try:
                trained_tokens = self._train_step(rows)
            except Exception:
                self.loader.give_back()
                raise
            self._sound = True
            if self._save_or_stop(trained_tokens):
                return "interrupted"
        return reason

    def _next_rows(self) -> StepRows | None:
        """Read the next step's rows; None when the data has ended."""
        try:
            rows = self.loader.next_step(self.should_stop)
        finally:  # steps may have been passed over, however it ends
            self._enter_passed_over()
        self._report_reading()
        if rows is None and (bad := self.progress.bad_in_a_row):
            self.reporter.warn(
                f"the data ended after {bad} skipped updates in a row: the weights may be at fault"
            )
        return rows

    # one step -------------------------------------------------------------------------------------

    def _train_step(self, rows: StepRows) -> int:
        """Make one update from these rows, or from those that the curriculum chooses; returns their
        tokens, over all ranks."""
        done = self.progress
        progress = self.budget.progress(done, rows.num_tokens // self.settings.candidates)
        call_if_defined(self.model, "set_progress", progress)
        rows = self._with_positions(rows)
        self.passes.rehearse(rows, progress, done.step)
        if self.curriculum is not None:
            micro_batches = (batch for batch, _ in self.passes.micro_batches(rows.batch))
            rows = self.curriculum.choose(self.model, rows, micro_batches, progress, done.step)
            rows = self._with_positions(rows)  # the same positions, counted anew
        terms = self.passes.gradients(rows, progress, done.step)
        groups = self.objective.clipped_together()
        grad_norm = self.engine.clip(groups, self.settings.max_grad_norm)
        report = step_report(
            self.objective,
            terms,
            grad_norm,
            rows,
            self.loader.source_names,
            progress,
            self.parallel,
        )
        factor = value_at(self._rate_schedule, self.budget.middle(done, rows.num_tokens))
        if self._may_update(report):
            self._sound = False  # until the update is counted
            self.optimizer.step(factor)
            if hasattr(self.model, "after_optimizer_step"):
                with self.engine.rewriting():
                    call_if_defined(self.model, "after_optimizer_step")
        self.engine.forget()
        self._advance(rows, progress, report, factor)
        self._reweight(rows, progress, report)
        return rows.num_tokens

    def _with_positions(self, rows: StepRows) -> StepRows:
        """Choose where auxiliary heads look, and count it over all ranks."""
        heads = self.objective.heads
        if heads is None:
            return rows
        batch = heads.choose(rows.batch, self.settings.seed, self.progress.step, rows.numbers)
        counts = heads.count(batch)
        totals = self.parallel.sum([float(count) for count in counts.values()])
        return replace(rows, batch=batch, head_counts=dict(zip(counts, totals)))

    def _may_update(self, report: StepReport) -> bool:
        """Return whether the update may be made. Updates that may not are counted; when they pile
        up, weights and optimizer go back to a checkpoint."""
        if report.is_finite:
            self.progress.bad_in_a_row = 0
            return True
        self.progress.skipped += 1
        self.progress.bad_in_a_row += 1
        step = self.progress.step + 1
        self.reporter.warn(
            f"step {step}: loss {report.loss}, gradient norm {report.grad_norm}; update skipped"
        )
        if self.progress.bad_in_a_row >= BAD_STEPS:
            self._sound = False
            self.progress.bad_in_a_row = 0
            self.recovery.roll_back(step)
        return False

    def _advance(self, rows: StepRows, progress: float, report: StepReport, factor: float) -> None:
        """Count the step and log it."""
        done, now = self.progress, time.monotonic()
        done.advance(progress, rows.num_tokens)
        shares = self.source_weights.shares(progress, self.loader.position.gone)
        sources = {}
        read = zip(rows.source_tokens, rows.documents, rows.epochs)
        for (name, total, targets), (tokens, documents, epochs) in zip(report.by_source, read):
            loss = total / targets if targets else None
            account = done.expose(name, tokens, documents, epochs, loss)
            sources[name] = {**account, "loss": loss, **shares[name]}
        self.reporter.emit(
            "step",
            loss=report.loss,
            losses=report.losses,
            model=report.model,
            scheduled=self.objective.scheduled(progress),
            learning_rate=self.settings.learning_rate * factor,
            grad_norm=report.grad_norm,
            tokens_per_second=rows.num_tokens / max(now - self._step_started, 1e-9),
            data_seconds=rows.waited_seconds,
            sources=sources,
            skipped=done.skipped,
            passed_over=self.loader.position.passed_over,
            run_tokens=done.run_tokens,
            run_step=done.run_step,
            memory_mb=self.runtime.memory_mb(),
            **rows.log_fields,
        )
        self._step_started = now

    def _reweight(self, rows: StepRows, progress: float, report: StepReport) -> None:
        """Give the sources other shares, where they follow how well each is learned and it is
        time."""
        losses = self.source_weights.after_step(report.by_source, rows.num_tokens)
        if losses is None:
            return
        self.loader.reweight(self.source_weights.factors)
        shares = self.source_weights.shares(progress, self.loader.position.gone)
        sources = {name: {"loss": losses.get(name), **share} for name, share in shares.items()}
        self.reporter.emit("reweighted", sources=sources)

    # between steps --------------------------------------------------------------------------------

    def _save_or_stop(self, step_tokens: int) -> bool:
        """Save when it is time, before anything is evaluated; returns whether to stop. The ranks
        agree in one sum."""
        every = self.settings.eval_every_tokens
        if self.progress.run_tokens // every > (self.progress.run_tokens - step_tokens) // every:
            self.progress.evaluation_due = True
        flags = (self.should_stop(), self.saver.is_due(), self.loader.has_unreported)
        stop, due, unreported = self.parallel.sum([float(flag) for flag in flags])
        if unreported:
            self.loader.gather_warnings()
            self._report_reading()
        if stop:
            return True
        is_due = bool(due) or self.saver.is_due_at(self.progress.run_step)
        # weights at fault must not push out what a roll-back looks for
        if is_due and not self.progress.bad_in_a_row:
            with self._not_timed():
                self.saver.save_in_turn()
        self.saver.report()
        return False

    def evaluate_and_sample(self) -> None:
        """Log an evaluation and samples, unless the preset asks for none."""
        self.progress.evaluation_due = False
        if self.settings.eval_tokens > 0:
            with self._not_timed():
                self.inspector.inspect()

    @contextmanager
    def _not_timed(self) -> Iterator[None]:
        """Leave the time of this block out of the step's: tokens per second are those of
        training."""
        started = time.monotonic()
        yield
        self._step_started += time.monotonic() - started

    def save(self) -> dict[str, Any]:
        """Write a checkpoint in the background; returns it. Every rank must call it."""
        with self._not_timed():
            return self.saver.save()

    def state(self, whole: bool = True) -> dict[str, Any]:
        """Return everything a resumed run needs, see core/checkpoint/state.py; whole on rank 0, or
        else tensors as they are kept. Every rank must call it."""
        heads, optimizer = self.objective.heads, self.optimizer.state()
        weights_of = self.engine.weights_of if whole else tensors_of
        return {
            "model": weights_of(self.model),
            "heads": weights_of(heads) if heads is not None else {},
            "optimizer": self.engine.collect(optimizer) if whole else optimizer,
            "progress": asdict(self.progress),
            # random draws are functions of the seed and the step: nothing else is remembered
            "rng": {"seed": self.settings.seed, "step": self.progress.step},
            "data": self.loader.state(),
            "adaptive": self.source_weights.state(),
            **self.extra_state,
        }

    # the end --------------------------------------------------------------------------------------

    def _end(self, reason: str) -> tuple[str, str | None]:
        """Save, then evaluate unless the run goes on at the next start; returns the reason that it
        stops, and the reason that it could not be saved."""
        done = self.progress
        if reason not in CUT_SHORT:
            done.evaluation_due = True
            done.finished = reason != "no_data"
            if done.finished:  # once all is read, no run of the chain is left
                all_read = reason == "max_epochs"
                done.horizon_runs = self.settings.runs if all_read else done.horizon_runs + 1
        failure = self.saver.save_and_wait()
        reason = self._close(reason)
        return reason, failure and self.saver.save_and_wait()  # there may be room by now

    def _close(self, reason: str) -> str:
        """Evaluate a run that is over, and log its last event; returns the reason that it
        stops."""
        if reason not in CUT_SHORT:
            self.evaluate_and_sample()
            reason = "interrupted" if self.progress.evaluation_due else reason
        receipt = self.loader.state()["receipt"]
        self.reporter.emit("run_end", reason=reason, receipt=receipt, ledger=self.progress.ledger)
        return reason

    def _enter_passed_over(self) -> None:
        """Enter in the ledger the documents and epochs that began in steps without a target: they
        were read, though their tokens were not trained."""
        while self.loader.begun:
            name, documents, epochs = self.loader.begun.pop()
            if documents or epochs:
                self.progress.expose(name, 0, documents, epochs, None)

    def _report_reading(self) -> None:
        if self.parallel.rank == 0:
            self.reporter.report_reading(self.loader)


def _reason_of(error: Exception) -> str:
    """Return the reason of a run's end that an error stands for, as `run_end` events name it."""
    if isinstance(error, NoData):
        return "no_data"
    return "diverged" if isinstance(error, Diverged) else "failed"
