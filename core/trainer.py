"""The training loop: the only one, for every model, loss and source.

In:    objects, through the constructor: nothing here knows a model's, a loss's or a source's name
Out:   a trained model, events in the metrics log, checkpoints
State: Progress, plus what its parts keep; `state()` is all of it

One step: rows → places of heads → curriculum → count → forward → losses → backward → clip → guard → update
          → after_optimizer_step → report
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint import CheckpointStore
from core.contracts import Batch, call_if_defined
from core.curriculum import Curriculum
from core.data.loader import Loader, StepRows
from core.data.source_weights import SourceWeights
from core.data.worker import Stopped
from core.errors import CheckpointError, Diverged, NoData
from core.heads.stack import HeadStack
from core.horizon import Horizon, Progress
from core.losses.stack import LossStack, LossTerms
from core.metrics import MetricsLog
from core.optim import Optimizer
from core.randomness import derive_seed
from core.runtime import Runtime, uncompiled
from core.schedules import learning_rate_schedule, value_at
from core.settings import TrainSettings

BAD_STEPS = 5
"""Non-finite steps in a row that mean the weights, not one batch, are at fault."""
ROLL_BACKS = 2
OUT_OF_MEMORY = "out of memory"
FIRST_SAVE_SECONDS = 30.0
"""A run is first saved after this, then after twice as long each time, up to the preset's interval."""


class Objective(nn.Module):
    """Model, losses and auxiliary heads as one module, so that data parallelism sees every forward and backward pass whole."""

    def __init__(self, model: nn.Module, stack: LossStack, num_sources: int, heads: HeadStack | None = None):
        super().__init__()
        self.model, self.stack, self.num_sources, self.heads = model, stack, num_sources, heads

    def forward(
        self, batch: Batch, count: float, progress: float, head_counts: dict[str, float] | None = None
    ) -> tuple[Tensor, LossTerms]:
        """`count` and `head_counts`: the targets, and the rows of each head, that this rank's share of a step is divided by."""
        output = self.model(batch)
        total, terms = self.stack(output, batch, count, progress, self.num_sources)
        if self.heads is None:
            return total, terms
        surprise = partial(self.stack.surprise_at, output, batch, terms)
        cross_entropy = partial(self.stack.cross_entropy, output.readout)
        seen = self.heads.look(self.model, output, batch, surprise, cross_entropy)
        added, sums = self.heads(seen, head_counts or {}, progress)
        sums = {name: value.to(terms.values.dtype) for name, value in sums.items()}
        return total + added, replace(terms, sums={**terms.sums, **sums})

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradient to a global norm; returns what it was, or what is not finite if anything is not. Heads that the model
        learns nothing from are clipped each alone: their size is no matter of the model's."""
        apart = [list(head.parameters()) for head in self.heads.apart()] if self.heads is not None else []
        others = {id(p) for group in apart for p in group}
        groups = [[p for p in self.parameters() if id(p) not in others], *apart]
        norm, *norms = [torch.nn.utils.clip_grad_norm_(group, max_norm) for group in groups]
        return norm + 0.0 * sum(norms)

    def weights(self, progress: float) -> dict[str, float]:
        """Of all losses, those of heads included."""
        of_losses = {loss.name: value_at(loss.weight, progress) for loss in self.stack.losses}
        return of_losses | (self.heads.weights(progress) if self.heads is not None else {})

    def scheduled(self, progress: float) -> dict[str, float]:
        """What changes over the run, as it is now."""
        return self.stack.scheduled(progress) | (self.heads.scheduled(progress) if self.heads is not None else {})


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
        show: Callable[[nn.Module, int], list[tuple[str, dict[str, Any]]]],
        extra_state: dict[str, Any],
        should_stop: Callable[[], bool],
        source_weights: SourceWeights,
        compile_from_step: int | None = None,
        curriculum: Curriculum | None = None,
    ):
        """`show`: events for people, after each evaluation. `extra_state`: what else a checkpoint must hold.
        `compile_from_step`: the first step of the lineage to compile. `curriculum`: what chooses the rows that are trained."""
        self.objective, self.model = objective, objective.model
        self.module = parallel.wrap(objective)
        self.optimizer, self.loader, self.parallel, self.runtime = optimizer, loader, parallel, runtime
        self.settings, self.horizon, self.progress = settings, horizon, progress
        self.log, self.store, self.evaluate, self.show = log, store, evaluate, show
        self.extra_state, self.should_stop = extra_state, should_stop
        self.source_weights = source_weights
        self.compile_from_step, self.curriculum = compile_from_step, curriculum
        self.micro_batch_rows = settings.per_gpu_batch_size
        self.dtype = runtime.compute_dtype(settings.precision)
        schedule = settings.schedule
        self._factor = learning_rate_schedule(
            schedule.type, schedule.warmup, schedule.decay, schedule.floor, schedule.decay_shape
        )
        self._bad_in_a_row = self._rolled_back = 0
        self._fitted = runtime.device.type != "cuda"  # memory of a CPU is not refused politely: nothing to catch
        self._last_save, self._save_after = time.monotonic(), FIRST_SAVE_SECONDS
        self._step_started = time.monotonic()

    def train(self) -> str:
        """Train until the run's end, an interruption or the end of the data; returns the reason. The end is saved."""
        self.model.train()
        self._step_started = time.monotonic()
        if self.settings.eval_at_start and self.progress.step == 0:
            self.evaluate_and_sample()
        try:
            while (reason := self.horizon.end(self.progress)) is None:
                rows = self.loader.next_step(self.should_stop)
                self._tell_left_out()
                if rows is None:
                    reason = "max_epochs"
                    break
                if self._look_after(self._train_step(rows)):
                    reason = "interrupted"
                    break
        except Stopped:
            reason = "interrupted"
        except NoData:
            self._tell_left_out()
            self._end("no_data")
            raise
        except Diverged:
            self._emit("run_end", reason="diverged")
            raise
        self._end(reason)
        return reason

    # one step --------------------------------------------------------------------------------------------------------

    def _train_step(self, rows: StepRows) -> int:
        """One update from these rows, or from those that the curriculum chooses; returns their tokens, over all ranks."""
        done, progress = self.progress, self.horizon.progress(self.progress, rows.num_tokens // self.settings.candidates)
        call_if_defined(self.model, "set_progress", progress)
        rows = self._with_places(rows)
        self._rehearse(rows, progress)
        if self.curriculum is not None:
            micro_batches = (batch for batch, _ in self._micro_batches(rows.batch))
            rows = self.curriculum.choose(self.model, rows, micro_batches, progress, done.step)
            rows = self._with_places(rows)  # the same places, counted anew
        torch.manual_seed(derive_seed(self.settings.seed, "dropout", done.step, self.parallel.rank))
        terms = [self._forward_backward(batch, last, rows, progress) for batch, last in self._micro_batches(rows.batch)]
        grad_norm = self.objective.clip(self.settings.max_grad_norm)
        report = self._report(terms, grad_norm, rows, progress)
        factor = value_at(self._factor, self.horizon.middle(done, rows.num_tokens))
        if self._is_finite(report):
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
        batch = self.objective.heads.choose(rows.batch, self.settings.seed, self.progress.step, rows.numbers)
        counts = self.objective.heads.count(batch)
        return replace(rows, batch=batch, head_counts=dict(zip(counts, self.parallel.sum(list(counts.values())))))

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """The step's rows in pieces that fit the device, each with whether it is the last."""
        total, size = len(batch.labels), self.micro_batch_rows
        for start in range(0, total, size):
            yield batch.rows(start, min(start + size, total)).to(self.runtime.device), start + size >= total

    def _forward_backward(self, batch: Batch, last: bool, rows: StepRows, progress: float) -> LossTerms:
        # gradients are averaged over ranks, so a share of the global count makes them the sum over all tokens / all tokens
        count = rows.num_targets / self.parallel.world_size
        head_counts = {name: rows_of / self.parallel.world_size for name, rows_of in rows.head_counts.items()}
        with self.parallel.accumulate(self.module, last):
            with torch.autocast(self.runtime.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                loss, terms = self.module(batch, count, progress, head_counts)
            loss.backward()
        return terms

    def _report(self, terms: list[LossTerms], grad_norm: Tensor, rows: StepRows, progress: float) -> dict[str, Any]:
        """The step's numbers over all micro-batches and ranks, with the one read of the device that a step makes."""
        names = list(terms[0].sums)
        sums = torch.stack([torch.stack([t.sums[name] for name in names]) for t in terms]).double().sum(0)
        source_sums = torch.stack([t.source_sums for t in terms]).double().sum(0)
        source_counts = torch.stack([t.source_counts for t in terms]).double().sum(0)
        told = call_if_defined(self.model, "report") or {}  # means of the ranks' numbers, each of its last micro-batch
        of_model = torch.stack([value.double() for value in told.values()]) if told else sums[:0]
        norm, *numbers = torch.cat([grad_norm.double().reshape(1), sums, source_sums, source_counts, of_model]).tolist()
        numbers = self.parallel.sum(numbers)
        losses = {name: value / max(rows.head_counts.get(name, rows.num_targets), 1) for name, value in zip(names, numbers)}
        weights = self.objective.weights(progress)
        k, s = len(names), self.objective.num_sources
        return {
            "loss": sum(weights[name] * value for name, value in losses.items()),
            "losses": losses,
            "grad_norm": norm,
            "by_source": list(zip(self.loader.source_names, numbers[k : k + s], numbers[k + s : k + 2 * s])),
            "model": {name: value / self.parallel.world_size for name, value in zip(told, numbers[k + 2 * s :])},
        }

    def _is_finite(self, report: dict[str, Any]) -> bool:
        """Whether the update may be made. Counts those that may not, and goes back to a checkpoint when they pile up."""
        if math.isfinite(report["loss"]) and math.isfinite(report["grad_norm"]):
            self._bad_in_a_row = 0
            return True
        self.progress.skipped += 1
        self._bad_in_a_row += 1
        self._warn(f"step {self.progress.step + 1}: loss {report['loss']}, gradient norm {report['grad_norm']}; update skipped")
        if self._bad_in_a_row >= BAD_STEPS:
            self._roll_back()
        return False

    def _advance(self, rows: StepRows, progress: float, report: dict[str, Any], factor: float) -> None:
        """Count the step and log it."""
        done, now = self.progress, time.monotonic()
        done.fraction = progress
        done.step, done.run_step, done.horizon_step = done.step + 1, done.run_step + 1, done.horizon_step + 1
        done.tokens += rows.num_tokens
        done.run_tokens += rows.num_tokens
        done.horizon_tokens += rows.num_tokens
        shares = self.source_weights.shares(progress, self.loader.position.drops)
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
            run_tokens=done.run_tokens,
            run_step=done.run_step,
            memory_mb=self.runtime.memory_mb(),
            **rows.told,
        )
        self._step_started = now

    def _reweight(self, rows: StepRows, progress: float, report: dict[str, Any]) -> None:
        """Other shares for the sources, where they follow how well each is learned and it is time."""
        if (losses := self.source_weights.after_step(report["by_source"], rows.num_tokens)) is not None:
            self.loader.reweight(self.source_weights.factors)
            shares = self.source_weights.shares(progress, self.loader.position.drops)
            self._emit("reweighted", sources={name: {"loss": losses.get(name), **share} for name, share in shares.items()})

    # between steps ---------------------------------------------------------------------------------------------------

    def _look_after(self, step_tokens: int) -> bool:
        """Evaluate and save when it is time; returns whether to stop. What the ranks must agree on is decided in one sum."""
        every = self.settings.eval_every_tokens
        crossed = self.progress.run_tokens // every > (self.progress.run_tokens - step_tokens) // every
        if crossed and self.horizon.end(self.progress) is None:  # the end has an evaluation of its own
            self.evaluate_and_sample()
        seconds = time.monotonic() - self._last_save
        due = self.parallel.rank == 0 and seconds >= min(self._save_after, self.settings.checkpoint_every_minutes * 60)
        every_steps = self.settings.checkpoint_every_steps
        stop, due = self.parallel.sum([float(self.should_stop()), float(due)])
        if stop:
            return True
        due = due or (every_steps is not None and self.progress.run_step % every_steps == 0)
        if due and not self._bad_in_a_row:  # what a roll-back looks for must not be pushed out by weights that are at fault
            self._save_after *= 2
            self.save()
        self._tell_saved()
        return False

    def evaluate_and_sample(self) -> dict[str, Any] | None:
        """An evaluation and samples, as events; returns the evaluation's numbers."""
        if self.settings.eval_tokens == 0:
            return None
        started = time.monotonic()
        with uncompiled(self.runtime.device):  # other shapes and modes
            numbers = self.evaluate(self.model, self.progress.fraction)
            if numbers is not None:
                self._emit("eval", **numbers, seconds=time.monotonic() - started)
            if self.parallel.rank == 0:
                for event, fields in self.show(self.model, self.progress.step):
                    self._emit(event, **fields)
        self._step_started += time.monotonic() - started  # tokens per second are of training
        return numbers

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
        """Everything a resumed run needs; see interface in docs/guide.md. Every rank must call it."""
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

    def _end(self, reason: str) -> None:
        """Evaluate unless interrupted, save, and say why. Raises CheckpointError when the end cannot be saved."""
        done = self.progress
        if reason != "interrupted":
            done.finished = reason != "no_data"
            if done.finished:  # once all is read, no run of the chain is left
                done.horizon_runs = self.settings.runs if reason == "max_epochs" else done.horizon_runs + 1
            self.evaluate_and_sample()
        receipt = self.save()["data"]["receipt"]
        self.store.wait()
        failed = self._tell_saved()
        self._emit("run_end", reason=reason, receipt=receipt)
        if failed:
            raise CheckpointError(
                f"the end of the run could not be saved: {failed}\n"
                f"The older checkpoints in {self.store.folder} are untouched. Free some space there and start again."
            )

    def _tell_saved(self) -> str | None:
        """Log how a background save went; returns why it failed, if it did."""
        outcome = self.store.outcome() if self.parallel.rank == 0 else None
        if outcome is None:
            return None
        path, seconds, failed = outcome
        if path is None:
            self._warn(f"checkpoint not saved: {failed}; the older ones are untouched, training goes on")
            return failed
        self._emit("checkpoint", path=path.relative_to(self.store.folder.parent).as_posix(), seconds=seconds)
        return None

    def _tell_left_out(self) -> None:
        """Sources that failed, files that could not be read, and what else the loader has to tell."""
        while self.loader.told:
            self._warn(self.loader.told.pop(0))
        while self.loader.dropped:
            name, reason = self.loader.dropped.pop(0)
            self._warn(f"source {name} dropped, the others go on: {reason}")
        for each, told in self.loader.skipped.items():
            if not told:
                self._emit("skipped", **dict(zip(("source", "file", "reason"), each)))
                self.loader.skipped[each] = True

    def _roll_back(self) -> None:
        """Put weights and optimizer back to the newest checkpoint, and go on with the data after the bad stretch."""
        self._bad_in_a_row = 0
        self.store.wait()
        self.parallel.gather(None)  # no rank reads before rank 0 has finished writing
        # a slot saved right after the update that ruined the weights is of no use: the second time an older one is taken
        state, path, _ = self.store.load(skip=self._rolled_back) if self._rolled_back < ROLL_BACKS else (None, None, [])
        if state is None or path is None:
            raise Diverged(
                f"loss or gradient were not finite {BAD_STEPS} times in a row at step {self.progress.step + 1}. Lower "
                "train.learning_rate or train.max_grad_norm; the checkpoints before it are untouched."
            )
        self._rolled_back += 1
        self.model.load_state_dict(state["model"])
        if self.objective.heads is not None:
            self.objective.heads.load_state_dict(state["heads"])
        self.optimizer.load(state["optimizer"])
        self._warn(f"{BAD_STEPS} bad steps in a row: weights are back at {path.name}, step {state['progress']['step']}")

    def _rehearse(self, rows: StepRows, progress: float) -> None:
        """One micro-batch without an update, where something may fail: before a GPU's first step, and when compiling is due.

        Out of memory halves the micro-batch (and so doubles accumulation) on all ranks; a compiler that fails is left out.
        Compiling waits for a fixed step, so that a resumed run computes each step as the uninterrupted one did.
        """
        if self.compile_from_step is not None and self.progress.step >= self.compile_from_step:
            self.model.compile()
            self.compile_from_step, self._fitted = None, False
        while not self._fitted:
            failure = self._try(rows.batch.rows(0, self.micro_batch_rows), rows, progress)
            self.optimizer.zero_grad()
            failures = [f for f in self.parallel.gather(failure) if f is not None]
            self._fitted = not failures
            if any(f != OUT_OF_MEMORY for f in failures):
                self._warn(f"torch.compile failed, the run goes on without it: {next(f for f in failures if f != OUT_OF_MEMORY)}")
                self.model._compiled_call_impl = None  # how nn.Module.compile() is undone
            elif failures:
                if self.micro_batch_rows == 1:
                    raise Diverged("not even one row fits the device's memory; make the model or model.seq_length smaller")
                self.micro_batch_rows = (self.micro_batch_rows + 1) // 2
                self._warn(f"out of memory: micro-batches have {self.micro_batch_rows} rows now, and there are more of them")

    def _try(self, batch: Batch, rows: StepRows, progress: float) -> str | None:
        """Why forward and backward of a micro-batch fail; None when they do not."""
        try:
            self._forward_backward(batch.to(self.runtime.device), False, rows, progress)
        except torch.OutOfMemoryError:
            return OUT_OF_MEMORY
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # a second of imports that most runs never need

            if not isinstance(error, TorchDynamoException):
                raise
            return str(error).strip().splitlines()[0]
        return None

    def _warn(self, message: str) -> None:
        self._emit("warning", message=message)

    def _emit(self, event: str, **fields: Any) -> None:
        self.log.emit(event, step=self.progress.step, tokens=self.progress.tokens, **fields)
