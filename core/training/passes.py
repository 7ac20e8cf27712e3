"""Forward and backward of a step's rows: as many at once as fit, compiled from some step on, with
fewer rows or without the compiler where that fails.

In:    the rows of a step, progress
Out:   gradients in the parameters; the terms of the losses
State: rows at once; whether the model is compiled
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from core.checkpoint.state import CheckpointState
from core.contracts import Batch
from core.data.loader import StepRows
from core.errors import UserError
from core.losses.stack import LossTerms
from core.preset.base import PresetBase
from core.preset.train import TrainSettings
from core.randomness import derive_seed
from core.runtime import Runtime
from core.signals import signals_held
from core.training.machine import Machine
from core.training.progress import Budget

OUT_OF_MEMORY = "out of memory"
COMPILE_PAYS_AFTER_SECONDS = 3600.0
"""Compiling takes up to a minute on two cores; what it saves of a step on a CPU is a few hundredths
at most (docs/LOG.md)."""


class Passes:
    """Computes the gradients of a step."""

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        machine: Machine,
        settings: TrainSettings,
        compile_from_step: int | None,
        warn: Callable[[str], None],
        note_failure: Callable[[], None],
    ):
        """Train with these settings.

        module              what to call, as the engine wrapped it
        model               the part of it that is compiled
        compile_from_step   the first step of the lineage that is compiled; None: none is
        note_failure        called when the compiler fails, so that a resumed run leaves it out
        """
        self._engine = machine.engine
        self._module, self._model = module, model
        self._parallel, self._device = machine.parallel, machine.device
        self._seed, self._warn, self._note_failure = settings.seed, warn, note_failure
        self._compile_from_step = compile_from_step
        self.rows_at_once = settings.per_gpu_batch_size
        # memory of a CPU is not refused politely: nothing to catch
        self.fitted = self._device.type != "cuda"

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """Cut the step's rows into pieces that fit the device, each with True where it is the
        last."""
        total, size = len(batch.labels), self.rows_at_once
        for start in range(0, total, size):
            rows = batch.rows(start, min(start + size, total))
            yield rows.to(self._device), start + size >= total

    def gradients(self, rows: StepRows, progress: float, step: int) -> list[LossTerms]:
        """Compute the gradients of all micro-batches; all of them once more if memory runs out, or
        a compiler fails, only now."""
        while True:
            torch.manual_seed(derive_seed(self._seed, "dropout", step, self._parallel.rank))
            try:
                return [
                    self._pass(batch, last, rows, progress)
                    for batch, last in self.micro_batches(rows.batch)
                ]
            except Exception as error:
                if self._parallel.world_size > 1 or (failure := self._failure(error)) is None:
                    raise
            self._engine.forget()
            self._give_way([failure])

    def rehearse(self, rows: StepRows, progress: float, step: int) -> None:
        """Try one micro-batch without an update where something may fail: before a GPU's first
        step, and when compiling is due.

        Out of memory halves the micro-batch (and so doubles accumulation) on all ranks; a compiler
        that fails is left out. Compiling waits for a fixed step, so that a resumed run computes
        each step as the uninterrupted one did."""
        if self._compile_from_step is not None and step >= self._compile_from_step:
            self._model.compile()
            self._compile_from_step, self.fitted = None, False
        while not self.fitted:
            failure = self._try(rows.batch.rows(0, self.rows_at_once), rows, progress)
            self._engine.forget()
            failures = [f for f in self._parallel.gather(failure) if f is not None]
            self.fitted = not failures
            if failures:
                self._give_way(failures)

    def _pass(self, batch: Batch, last: bool, rows: StepRows, progress: float) -> LossTerms:
        # gradients are averaged over ranks, so a share of the global count makes them the sum over
        # all tokens / all tokens
        count = rows.num_targets / self._parallel.world_size
        head_counts = {
            name: rows_of / self._parallel.world_size for name, rows_of in rows.head_counts.items()
        }
        held = signals_held() if self._is_compiled else nullcontext()
        with self._engine.one_pass(self._module, last), held:
            loss, terms = self._module(batch, count, progress, head_counts)
            self._engine.backward(loss)
        return terms

    def _try(self, batch: Batch, rows: StepRows, progress: float) -> str | None:
        """Return why forward and backward of a micro-batch fail; None when they do not."""
        try:
            with self._engine.trial():
                self._pass(batch.to(self._device), False, rows, progress)
        except Exception as error:
            if (failure := self._failure(error)) is None:
                raise
            return failure
        return None

    @property
    def _is_compiled(self) -> bool:
        return self._model._compiled_call_impl is not None

    def _failure(self, error: Exception) -> str | None:
        """Return the reason of a failure after which the run can go on in another way: with fewer
        rows at once, or without a compiler (which may fail with any error)."""
        if isinstance(error, torch.OutOfMemoryError):
            return OUT_OF_MEMORY
        if not self._is_compiled:
            return None
        # the first line says little
        return " ".join(str(error).split("\n")[:2]).strip()[:300] or type(error).__name__

    def _give_way(self, failures: list[str]) -> None:
        if of_compiler := [f for f in failures if f != OUT_OF_MEMORY]:
            self._warn(f"torch.compile failed, the run goes on without it: {of_compiler[0]}")
            self._model._compiled_call_impl = None  # how nn.Module.compile() is undone
            self._note_failure()
            return
        if self.rows_at_once == 1:
            several = self._parallel.world_size > 1 and self._engine.name == "ddp"
            raise UserError(
                "not even one row fits the device's memory; make the model or model.seq_length "
                "smaller" + (', or set train.engine to "fsdp"' if several else "")
            )
        self.rows_at_once = (self.rows_at_once + 1) // 2
        self._warn(
            f"out of memory: micro-batches have {self.rows_at_once} rows now, and there are more "
            "of them"
        )


class CompilePlan(NamedTuple):
    """The decision when to compile, with its reason."""

    from_step: int | None
    note: str


def compile_plan(
    preset: PresetBase,
    machine: Machine,
    saved: CheckpointState | None,
    parameters: int,
    budget: Budget,
    failed: bool,
) -> CompilePlan:
    """Decide from which step of the lineage on to compile, once per lineage: a resumed run keeps
    it.

    parameters   of the model
    failed       the compiler failed earlier in this run
    """
    choice = preset.train.compile
    if choice == "never":
        return CompilePlan(None, "not compiled: the preset says never")
    if not machine.engine.compiles:
        note = f"not compiled: models run as they are written with engine {machine.engine.name}"
        return CompilePlan(None, note)
    if failed:
        note = "not compiled: torch.compile failed earlier in this run; the next run tries it again"
        return CompilePlan(None, note)
    if machine.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        note = "not compiled: torch.compile needs a C++ compiler, and there is none"
        return CompilePlan(None, note)
    if choice == "auto":
        seconds = _product_seconds(preset, machine.runtime, parameters, budget)
        if seconds < COMPILE_PAYS_AFTER_SECONDS:
            note = f"not compiled: multiplying takes about {seconds:.0f} s of the run, too little "
            return CompilePlan(None, f"{note}for compiling to pay")
    decided = saved.get("compile_from_step") if saved is not None else None
    if decided is not None:
        return CompilePlan(decided, f"compiled from step {decided + 1} on")
    first = 1 if saved is None else saved["progress"]["step"] + 1
    note = f"compiled from step {first + 1} on; the steps before it run at once"
    return CompilePlan(first, note)


def _product_seconds(
    preset: PresetBase, runtime: Runtime, parameters: int, budget: Budget
) -> float:
    """Estimate the seconds of a run that its matrix products take."""
    tokens = min(budget.run_tokens, budget.schedule_tokens)  # less where max_epochs ends it
    if budget.run_steps is not None:
        rows = preset.train.per_gpu_batch_size * preset.train.accumulation_steps
        rows *= runtime.world_size
        tokens = min(tokens, budget.run_steps * rows * preset.model.seq_length)
    # multiply-adds a second this kind of device reaches, roughly
    speed = 1e14 if runtime.device.type == "cuda" else 1.5e11
    # processes on a CPU share it
    devices = runtime.world_size if runtime.device.type == "cuda" else 1
    return 6 * parameters * tokens / (speed * devices)
