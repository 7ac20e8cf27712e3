"""The training loop: the only one, for every model, loss and source.

In:    objects, through the constructor: nothing here knows a model's, a loss's or a source's name
Out:   a trained model, events in the metrics log, checkpoints
State: Progress, plus what its parts keep; `state()` is all of it

One step: rows → places of heads → curriculum → count → forward → losses → backward → clip → guard →
update
          → after_optimizer_step → report
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint.slots import load_slot
from core.checkpoint.store import CheckpointStore, load_model
from core.contracts import call_if_defined
from core.data.loader import Loader, StepRows
from core.data.worker import Stopped
from core.errors import CheckpointError, Diverged, NoData, first_line
from core.heads.build import load_heads
from core.losses.stack import LossTerms
from core.metrics.log import CUT_SHORT, MetricsLog
from core.preset.settings import TrainSettings
from core.runtime import Runtime, uncompiled
from core.schedules import learning_rate_schedule, value_at
from core.training.curriculum import Curriculum
from core.training.objective import Objective
from core.training.optim import Optimizer
from core.training.passes import Passes
from core.training.progress import Horizon, Progress
from core.training.source_weights import SourceWeights

BAD_STEPS = 5
"""Non-finite steps in a row that mean the weights, not one batch, are at fault."""
ROLL_BACKS = 2
FIRST_SAVE_SECONDS = 30.0
"""A run is first saved after this, then after twice as long each time, up to the preset's
interval."""


class Trainer:
    """Trains to the end of one run at a time."""

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        loader: Loader,
        parallel: Any,
        runtime: Runtime,
        settings: TrainSettings,
        horizon: Horizon,
        progress: Progress,
        log: MetricsLog,
        store: CheckpointStore,
        evaluate: Callable[[nn.Module, float], dict[str, Any] | None],
        show: Callable[[nn.Module, int], Iterable[tuple[str, dict[str, Any]]]],
        extra_state: dict[str, Any],
        should_stop: Callable[[], bool],
        source_weights: SourceWeights,
        compile_from_step: int | None = None,
        curriculum: Curriculum | None = None,
    ):
        """`show`: events for people, after each evaluation. `extra_state`: what else a checkpoint
        must hold. `compile_from_step`: the first step of the lineage to compile. `curriculum`: what
        chooses the rows that are trained."""
        self.objective, self.model = objective, objective.model
        self.module = parallel.wrap(objective)
        self.optimizer, self.loader, self.parallel, self.runtime = (
            optimizer,
            loader,
            parallel,
            runtime,
        )
        self.settings, self.horizon, self.progress = settings, horizon, progress
        self.log, self.store, self.evaluate, self.show = log, store, evaluate, show
        self.extra_state, self.should_stop = extra_state, should_stop
        self.source_weights = source_weights
        self.curriculum = curriculum
        # for a resumed run, which then leaves it out as well
        left_out = partial(extra_state.update, compile_failed=True)
        self.passes = Passes(
            self.module,
            self.model,
            parallel,
            runtime,
            settings,
            compile_from_step,
            self._warn,
            left_out,
        )
        schedule = settings.schedule
        self._factor = learning_rate_schedule(
            schedule.type, schedule.warmup, schedule.decay, schedule.floor, schedule.decay_shape
        )
        self._rolled_back = 0
        self._sound = True  # whether the state could be saved as it is: not while an update is made
        self._told: set[tuple[str, type]] = set()  # what failed of looking at the model, and how
        self._last_save, self._save_after = time.monotonic(), FIRST_SAVE_SECONDS
        self._step_started = time.monotonic()

    def train(self) -> str:
        """Train until the run's end, an interruption or the end of the data; returns the reason.

        However it stops, it is saved first; only weights at fault are not, nor what an update was
        half made of."""
        self.model.train()
        self._step_started = time.monotonic()
        # and saved as such, but the program was ended before it was evaluated
        if self.progress.finished:
            reason = self.horizon.end(self.progress) or "max_epochs"
            return self._close(reason)
        try:
            reason = self._train_on()
        except Stopped:
            reason = "interrupted"
        except Exception as error:
            self._tell_left_out()
            reason = (
                "no_data"
                if isinstance(error, NoData)
                else "diverged"
                if isinstance(error, Diverged)
                else "failed"
            )
            if self._sound and self.progress.step > 0:
                self._end(reason)
            else:
                self._emit("run_end", reason=reason)
            raise
        reason, failed = self._end(reason)
        if failed:
            raise CheckpointError(
                f"the end of the run could not be saved: {failed}\n"
                f"The older checkpoints in {self.store.folder} are untouched. Mend that and start "
                "again."
            )
        return reason

    def _train_on(self) -> str:
        """Step after step; returns why that is over."""
        # an end waits for a finite step, or a roll-back: until then nobody knows whether the
        # weights are at fault
        while (reason := self.horizon.end(self.progress)) is None or self.progress.bad_in_a_row:
            if self.progress.evaluation_due and not self.progress.bad_in_a_row:
                self.evaluate_and_sample()
                if any(self.parallel.sum([float(self.should_stop())])):
                    return "interrupted"
            try:
                rows = self.loader.next_step(self.should_stop)
            finally:  # steps may have been passed over, however it ends
                self._enter_passed_over()
            self._tell_left_out()
            if rows is None:
                if bad := self.progress.bad_in_a_row:
                    self._warn(
                        f"the data ended after {bad} skipped updates in a row: the weights may be "
                        "at fault"
                    )
                return "max_epochs"
            # of several ranks one that fails is alone: they cannot save together
            self._sound = self.parallel.world_size == 1
            try:
                trained_tokens = self._train_step(rows)
            except Exception:
                self.loader.give_back()
                raise
            self._sound = True
            if self._look_after(trained_tokens):
                return "interrupted"
        return reason

    # one step -------------------------------------------------------------------------------------

    def _train_step(self, rows: StepRows) -> int:
        """One update from these rows, or from those that the curriculum chooses; returns their
        tokens, over all ranks."""
        done, progress = (
            self.progress,
            self.horizon.progress(self.progress, rows.num_tokens // self.settings.candidates),
        )
        call_if_defined(self.model, "set_progress", progress)
        rows = self._with_places(rows)
        self.passes.rehearse(rows, progress, done.step)
        if self.curriculum is not None:
            micro_batches = (batch for batch, _ in self.passes.micro_batches(rows.batch))
            rows = self.curriculum.choose(self.model, rows, micro_batches, progress, done.step)
            rows = self._with_places(rows)  # the same places, counted anew
        terms = self.passes.gradients(rows, progress, done.step)
        grad_norm = self.objective.clip(self.settings.max_grad_norm)
        report = self._report(terms, grad_norm, rows, progress)
        factor = value_at(self._factor, self.horizon.middle(done, rows.num_tokens))
        if self._is_finite(report):
            self._sound = False  # until the update is counted
            self.optimizer.step(factor)
            call_if_defined(self.model, "after_optimizer_step")
        self.optimizer.zero_grad()
        self._advance(rows, progress, report, factor)
        self._reweight(rows, progress, report)
        return rows.num_tokens

    def _with_places(self, rows: StepRows) -> StepRows:
        """The rows with the places where auxiliary heads look, counted over all ranks."""
        if self.objective.heads is None:
            return rows
        batch = self.objective.heads.choose(
            rows.batch, self.settings.seed, self.progress.step, rows.numbers
        )
        counts = self.objective.heads.count(batch)
        return replace(
            rows,
            batch=batch,
            head_counts=dict(zip(counts, self.parallel.sum(list(counts.values())))),
        )

    def _report(
        self, terms: list[LossTerms], grad_norm: Tensor, rows: StepRows, progress: float
    ) -> dict[str, Any]:
        """The step's numbers over all micro-batches and ranks, with the one read of the device that
        a step makes."""
        names = list(terms[0].sums)
        sums = (
            torch.stack([torch.stack([t.sums[name] for name in names]) for t in terms])
            .double()
            .sum(0)
        )
        source_sums = torch.stack([t.source_sums for t in terms]).double().sum(0)
        source_counts = torch.stack([t.source_counts for t in terms]).double().sum(0)
        # means of the ranks' numbers, each of its last micro-batch
        told = call_if_defined(self.model, "report") or {}
        of_model = torch.stack([value.double() for value in told.values()]) if told else sums[:0]
        norm, *numbers = torch.cat(
            [grad_norm.double().reshape(1), sums, source_sums, source_counts, of_model]
        ).tolist()
        numbers = self.parallel.sum(numbers)
        losses = {
            name: value / max(rows.head_counts.get(name, rows.num_targets), 1)
            for name, value in zip(names, numbers)
        }
        weights = self.objective.weights(progress)
        k, s = len(names), self.objective.num_sources
        return {
            "loss": sum(weights[name] * value for name, value in losses.items()),
            "losses": losses,
            "grad_norm": norm,
            "by_source": list(
                zip(self.loader.source_names, numbers[k : k + s], numbers[k + s : k + 2 * s])
            ),
            "model": {
                name: value / self.parallel.world_size
                for name, value in zip(told, numbers[k + 2 * s :])
            },
        }

    def _is_finite(self, report: dict[str, Any]) -> bool:
        """Whether the update may be made. Counts those that may not, and goes back to a checkpoint
        when they pile up."""
        if math.isfinite(report["loss"]) and math.isfinite(report["grad_norm"]):
            self.progress.bad_in_a_row = 0
            return True
        self.progress.skipped += 1
        self.progress.bad_in_a_row += 1
        self._warn(
            f"step {self.progress.step + 1}: loss {report['loss']}, gradient norm "
            f"{report['grad_norm']}; update skipped"
        )
        if self.progress.bad_in_a_row >= BAD_STEPS:
            self._roll_back()
        return False

    def _advance(
        self, rows: StepRows, progress: float, report: dict[str, Any], factor: float
    ) -> None:
        """Count the step and log it."""
        done, now = self.progress, time.monotonic()
        done.fraction = progress
        done.step, done.run_step, done.horizon_step = (
            done.step + 1,
            done.run_step + 1,
            done.horizon_step + 1,
        )
        done.tokens += rows.num_tokens
        done.run_tokens += rows.num_tokens
        done.horizon_tokens += rows.num_tokens
        shares = self.source_weights.shares(progress, self.loader.position.gone)
        sources = {}
        read = zip(rows.source_tokens, rows.documents, rows.epochs)
        for (name, loss, count), (tokens, documents, epochs) in zip(report["by_source"], read):
            account = done.expose(name, tokens, documents, epochs, loss / count if count else None)
            sources[name] = {**account, "loss": loss / count if count else None, **shares[name]}
        self._emit(
            "step",
            loss=report["loss"],
            losses=report["losses"],
            model=report["model"],
            scheduled=self.objective.scheduled(progress),
            learning_rate=self.settings.learning_rate * factor,
            grad_norm=report["grad_norm"],
            tokens_per_second=rows.num_tokens / max(now - self._step_started, 1e-9),
            data_seconds=rows.waited_seconds,
            sources=sources,
            skipped=done.skipped,
            passed_over=self.loader.position.passed_over,
            run_tokens=done.run_tokens,
            run_step=done.run_step,
            memory_mb=self.runtime.memory_mb(),
            **rows.told,
        )
        self._step_started = now

    def _reweight(self, rows: StepRows, progress: float, report: dict[str, Any]) -> None:
        """Other shares for the sources, where they follow how well each is learned and it is
        time."""
        if (
            losses := self.source_weights.after_step(report["by_source"], rows.num_tokens)
        ) is not None:
            self.loader.reweight(self.source_weights.factors)
            shares = self.source_weights.shares(progress, self.loader.position.gone)
            self._emit(
                "reweighted",
                sources={
                    name: {"loss": losses.get(name), **share} for name, share in shares.items()
                },
            )

    # between steps --------------------------------------------------------------------------------

    def _look_after(self, step_tokens: int) -> bool:
        """Save when it is time, before anything is evaluated; returns whether to stop. The ranks
        agree on it in one sum."""
        every = self.settings.eval_every_tokens
        if self.progress.run_tokens // every > (self.progress.run_tokens - step_tokens) // every:
            self.progress.evaluation_due = True
        seconds = time.monotonic() - self._last_save
        due = self.parallel.rank == 0 and seconds >= min(
            self._save_after, self.settings.checkpoint_every_minutes * 60
        )
        every_steps = self.settings.checkpoint_every_steps
        stop, due, untold = self.parallel.sum(
            [float(self.should_stop()), float(due), float(self.loader.has_untold)]
        )
        if untold:
            self.loader.gather_told()
            self._tell_left_out()
        if stop:
            return True
        due = due or (every_steps is not None and self.progress.run_step % every_steps == 0)
        # weights at fault must not push out what a roll-back looks for
        if due and not self.progress.bad_in_a_row:
            self._save_after *= 2
            self.save()
        self._tell_saved()
        return False

    def evaluate_and_sample(self) -> None:
        """An evaluation and samples, as events. What fails of it is told and ends nothing; where it
        is stopped, it stays due."""
        self.progress.evaluation_due = False
        if self.settings.eval_tokens == 0:
            return
        started = time.monotonic()
        # a run that goes on has made no step yet
        call_if_defined(self.model, "set_progress", self.progress.fraction)
        with uncompiled(self.runtime.device):  # other shapes and modes
            numbers = self._look(
                "evaluation", lambda: self.evaluate(self.model, self.progress.fraction)
            )
            if numbers is not None:
                self._emit("eval", **numbers, seconds=time.monotonic() - started)
            if self.parallel.rank == 0 and not self.progress.evaluation_due:
                self._look("samples", self._show)
            self.progress.evaluation_due = self.parallel.broadcast(self.progress.evaluation_due)
        self.model.train()
        self._step_started += time.monotonic() - started  # tokens per second are of training

    def _show(self) -> None:
        for event, fields in self.show(self.model, self.progress.step):
            self._emit(event, **fields)

    def _look(self, what: str, action: Callable[[], Any]) -> Any:
        """What `action` finds at the model; None where it fails, which is told once for each way to
        fail."""
        try:
            return action()
        except Stopped:
            self.progress.evaluation_due = True
        except Exception as error:
            if (kind := (what, type(error))) not in self._told:
                self._told.add(kind)
                self._warn(f"{what} failed, the run goes on without: {first_line(error)}")
        return None

    def save(self) -> dict[str, Any]:
        """Write a checkpoint in the background; returns it. Every rank must call it."""
        started = time.monotonic()
        self.store.wait()
        self._tell_saved()  # of the save before: its outcome is kept no longer than this
        state = self.state()
        if self.parallel.rank == 0:
            self.log.sync()
            self.store.save(state)
        self._last_save = time.monotonic()
        self._step_started += self._last_save - started
        return state

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs; see interface in docs/guide.md. Every rank must call
        it."""
        return {
            "model": self.model.state_dict(),
            "heads": self.objective.heads.state_dict() if self.objective.heads is not None else {},
            "optimizer": self.optimizer.state(),
            "progress": asdict(self.progress),
            # random draws are functions of the seed and the step: nothing else is remembered
            "rng": {"seed": self.settings.seed, "step": self.progress.step},
            "data": self.loader.state(),
            "adaptive": self.source_weights.state(),
            **self.extra_state,
        }

    def _end(self, reason: str) -> tuple[str, str | None]:
        """Save, then evaluate unless the run goes on at the next start; returns why it stops, and
        why it could not be saved."""
        done = self.progress
        if reason not in CUT_SHORT:
            done.evaluation_due = True
            done.finished = reason != "no_data"
            if done.finished:  # once all is read, no run of the chain is left
                done.horizon_runs = (
                    self.settings.runs if reason == "max_epochs" else done.horizon_runs + 1
                )
        failed = self._save_now()
        reason = self._close(reason)
        return reason, failed and self._save_now()  # there may be room by now

    def _close(self, reason: str) -> str:
        """The evaluation of a run that is over, and the last event of any; returns why it stops."""
        if reason not in CUT_SHORT:
            self.evaluate_and_sample()
            reason = "interrupted" if self.progress.evaluation_due else reason
        self._emit(
            "run_end",
            reason=reason,
            receipt=self.loader.state()["receipt"],
            ledger=self.progress.ledger,
        )
        return reason

    def _save_now(self) -> str | None:
        """Save and wait for it; returns why it failed, if it did, on every rank."""
        self.save()
        self.store.wait()
        return self.parallel.broadcast(self._tell_saved())

    def _tell_saved(self) -> str | None:
        """Log how a background save went; returns why it failed, if it did."""
        outcome = self.store.outcome() if self.parallel.rank == 0 else None
        if outcome is None:
            return None
        path, seconds, failed = outcome
        if path is None:
            self._warn(
                f"checkpoint not saved: {failed} The older ones are untouched, training goes on"
            )
            return failed
        if failed:
            self._warn(f"the checkpoint is saved, but {failed}")
        self._emit(
            "checkpoint",
            path=path.relative_to(self.store.folder.parent).as_posix(),
            seconds=seconds,
        )
        return None

    def _enter_passed_over(self) -> None:
        """What began in steps that taught nothing goes into the ledger: it was read, though its
        tokens were not trained."""
        while self.loader.begun:
            name, documents, epochs = self.loader.begun.pop()
            if documents or epochs:
                self.progress.expose(name, 0, documents, epochs, None)

    def _tell_left_out(self) -> None:
        """Sources that failed, files that could not be read, and what else the loader has to
        tell."""
        if self.parallel.rank > 0:
            return
        while self.loader.told:
            self._warn(self.loader.told.pop(0))
        while self.loader.dropped:
            name, reason = self.loader.dropped.pop(0)
            self._warn(f"source {name} dropped, the others go on: {reason}")
        if (warning := self.loader.unlearned.warning) is not None:
            self.loader.unlearned.warning = None
            self._warn(warning)
        for each, told in self.loader.skipped.items():
            if not told:
                self._emit("skipped", **dict(zip(("source", "file", "reason"), each)))
                self.loader.skipped[each] = True

    def _roll_back(self) -> None:
        """Put weights and optimizer back to the newest checkpoint, and go on with the data after
        the bad stretch."""
        self._sound = False
        self.progress.bad_in_a_row = 0
        self.store.wait()
        # a slot saved right after the update that ruined the weights is of no use: the second time
        # an older one is taken
        older = self._rolled_back
        told = (
            f"loss or gradient were not finite {BAD_STEPS} times in a row at step "
            f"{self.progress.step + 1}"
        )
        advice = (
            "Lower train.learning_rate or train.max_grad_norm; the checkpoints before it "
            "are untouched."
        )
        state, path, notes = (
            load_slot(self.store, self.parallel, older, True)
            if older < ROLL_BACKS
            else (None, None, [])
        )
        for note in notes:
            self._warn(note)
        if state is None or path is None:
            raise Diverged(f"{told}. {advice}")
        self._rolled_back += 1
        notes = []
        try:  # as a resumed run does: heads, or the rows' length, may have changed since
            call_if_defined(self.model, "prepare_load", state["model"], notes)
            notes += load_model(self.model, state["model"], path.name)
            notes += load_heads(self.objective.heads, state["heads"])
        except CheckpointError as error:
            raise Diverged(
                f"{told}, and the checkpoint before cannot be gone back to: {error}"
            ) from None
        if not all(p.isfinite().all() for p in self.objective.parameters()):
            raise Diverged(
                f"{told}, as are weights that {path.name} lacks ({'; '.join(notes)}). {advice}"
            )
        self.optimizer.load(state["optimizer"])
        self._warn(
            f"{BAD_STEPS} bad steps in a row: weights are back at {path.name}, step "
            f"{state['progress']['step']}"
        )

    def _warn(self, message: str) -> None:
        self._emit("warning", message=message)

    def _emit(self, event: str, **fields: Any) -> None:
        self.log.emit(event, step=self.progress.step, tokens=self.progress.tokens, **fields)
