"""Forward and backward of a step's rows: so many at once as fit, compiled from some step on, and
another way where that fails.

In:    the rows of a step, progress
Out:   gradients in the parameters; the terms of the losses
State: rows at once; whether the model is compiled
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from core.contracts import Batch
from core.data.loader import StepRows
from core.errors import UserError
from core.losses.stack import LossTerms
from core.preset.settings import TrainSettings
from core.randomness import derive_seed
from core.runtime import Runtime
from core.signals import signals_held
from core.training.progress import Horizon

OUT_OF_MEMORY = "out of memory"
COMPILE_PAYS_AFTER_SECONDS = 3600.0
"""Compiling takes up to a minute on two cores; what it saves of a step on a CPU is a few hundredths
at most (docs/LOG.md)."""


class Passes:
    """What a step computes before its update."""

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        parallel: Any,
        runtime: Runtime,
        settings: TrainSettings,
        compile_from_step: int | None,
        warn: Callable[[str], None],
        compiler_left_out: Callable[[], None],
    ):
        """`module`: the objective, as the ranks share it; `model`: the part of it that is
        compiled."""
        self._module, self._model, self._parallel, self._runtime = module, model, parallel, runtime
        self._seed, self._warn, self._compiler_left_out = settings.seed, warn, compiler_left_out
        self._compile_from_step = compile_from_step
        self.rows_at_once = settings.per_gpu_batch_size
        self._dtype = runtime.compute_dtype(settings.precision)
        # memory of a CPU is not refused politely: nothing to catch
        self.fitted = runtime.device.type != "cuda"

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """The step's rows in pieces that fit the device, each with whether it is the last."""
        total, size = len(batch.labels), self.rows_at_once
        for start in range(0, total, size):
            yield (
                batch.rows(start, min(start + size, total)).to(self._runtime.device),
                start + size >= total,
            )

    def gradients(self, rows: StepRows, progress: float, step: int) -> list[LossTerms]:
        """Those of all micro-batches; all of them once more where memory runs out, or a compiler
        fails, only now."""
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
            self._module.zero_grad()
            self._give_way([failure])

    def rehearse(self, rows: StepRows, progress: float, step: int) -> None:
        """One micro-batch without an update, where something may fail: before a GPU's first step,
        and when compiling is due.

        Out of memory halves the micro-batch (and so doubles accumulation) on all ranks; a compiler
        that fails is left out. Compiling waits for a fixed step, so that a resumed run computes
        each step as the uninterrupted one did."""
        if self._compile_from_step is not None and step >= self._compile_from_step:
            self._model.compile()
            self._compile_from_step, self.fitted = None, False
        while not self.fitted:
            failure = self._try(rows.batch.rows(0, self.rows_at_once), rows, progress)
            self._module.zero_grad()
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
        with self._parallel.accumulate(self._module, last), held:
            with torch.autocast(
                self._runtime.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32
            ):
                loss, terms = self._module(batch, count, progress, head_counts)
            loss.backward()
        return terms

    def _try(self, batch: Batch, rows: StepRows, progress: float) -> str | None:
        """Why forward and backward of a micro-batch fail; None when they do not."""
        try:
            self._pass(batch.to(self._runtime.device), False, rows, progress)
        except Exception as error:
            if (failure := self._failure(error)) is None:
                raise
            return failure
        return None

    @property
    def _is_compiled(self) -> bool:
        return self._model._compiled_call_impl is not None

    def _failure(self, error: Exception) -> str | None:
        """Why, if there is another way to go on: fewer rows at once, or no compiler (which may fail
        with any error)."""
        if isinstance(error, torch.OutOfMemoryError):
            return OUT_OF_MEMORY
        if not self._is_compiled:
            return None
        # the first line says little of it
        return " ".join(str(error).split("\n")[:2]).strip()[:300] or type(error).__name__

    def _give_way(self, failures: list[str]) -> None:
        if of_compiler := [f for f in failures if f != OUT_OF_MEMORY]:
            self._warn(f"torch.compile failed, the run goes on without it: {of_compiler[0]}")
            self._model._compiled_call_impl = None  # how nn.Module.compile() is undone
            self._compiler_left_out()
            return
        if self.rows_at_once == 1:
            raise UserError(
                "not even one row fits the device's memory; make the model or model.seq_length "
                "smaller"
            )
        self.rows_at_once = (self.rows_at_once + 1) // 2
        self._warn(
            f"out of memory: micro-batches have {self.rows_at_once} rows now, and there are more "
            "of them"
        )


def compile_plan(
    preset: Any,
    runtime: Runtime,
    saved: dict | None,
    model: nn.Module,
    horizon: Horizon,
    failed: bool,
) -> tuple[int | None, str]:
    """From which step of the lineage on to compile, and why. Decided once per lineage: a resumed
    run keeps it."""
    wish = preset.train.compile
    if wish == "never":
        return None, "not compiled: the preset says never"
    if failed:
        return (
            None,
            "not compiled: torch.compile failed earlier in this run; the next run tries it again",
        )
    if runtime.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return None, "not compiled: torch.compile needs a C++ compiler, and there is none"
    if wish == "auto":
        parameters = sum(p.numel() for p in model.parameters())
        tokens = min(horizon.run_tokens, horizon.horizon_tokens)  # less where max_epochs ends it
        if horizon.run_steps is not None:
            rows = (
                preset.train.per_gpu_batch_size
                * preset.train.accumulation_steps
                * runtime.world_size
            )
            tokens = min(tokens, horizon.run_steps * rows * preset.model.seq_length)
        # multiply-adds a second this kind of device reaches, roughly
        speed = 1e14 if runtime.device.type == "cuda" else 1.5e11
        # processes on a CPU share it
        devices = runtime.world_size if runtime.device.type == "cuda" else 1
        seconds = 6 * parameters * tokens / (speed * devices)
        if seconds < COMPILE_PAYS_AFTER_SECONDS:
            return (
                None,
                f"not compiled: multiplying takes about {seconds:.0f} s of the run, too little "
                "for compiling to pay",
            )
    kept = saved.get("compile_from_step") if saved is not None else None
    if kept is not None:
        return kept, f"compiled from step {kept + 1} on"
    first = 1 if saved is None else saved["progress"]["step"] + 1
    return first, f"compiled from step {first + 1} on; the steps before it run at once"
