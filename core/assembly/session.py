"""Puts a training session together.

In:    a preset, the runtime, the ranks, the project's root folder
Out:   TrainingSession: the trainer with its log, and what a person should know before it starts
State: none; everything lives in the objects it builds
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from core.assembly.network import Network, build_network
from core.assembly.reading import Reading, build_reading, check_ranks
from core.assembly.start import (
    Remarks,
    Start,
    choose_tokenizer,
    find_start,
    note_changed_sources,
    progress_of,
)
from core.checkpoint.slots import FORMAT
from core.checkpoint.state import held_out_of
from core.contracts import LanguageModel, call_if_defined
from core.data.corpus import Corpus, open_corpus
from core.data.packing import Row
from core.data.tokenizer import Tokenizer
from core.data.validation import hide_one, shortfall
from core.data.worker import stop_if
from core.evaluation.during_training import build_tasks
from core.evaluation.held_out import Evaluator, HeldOut
from core.generation.samples import build_samples
from core.metrics.events import LOG, evaluation_is_missing
from core.metrics.log import MetricsLog, View
from core.parallel.engines import check_engine
from core.parallel.protocol import Parallel
from core.parallel.ranks import on_rank_zero
from core.preset.base import PresetBase
from core.preset.merge import preset_json
from core.preset.settings import MASKED_TOKENS
from core.runtime import Runtime
from core.training.inspection import Inspection
from core.training.machine import Machine
from core.training.memory import SMALLEST_VOCABULARY, check_memory
from core.training.passes import CompilePlan, compile_plan
from core.training.progress import Progress
from core.training.source_weights import check_adaptive
from core.training.trainer import Learner, Plan, Records, Trainer


class MakeViews(Protocol):
    """Makes the views that show or copy a run's events."""

    def __call__(
        self,
        folder: Path,
        start_event: dict[str, Any],
        resolved: dict[str, Any],
        wandb_id: str,
        notes: list[str],
    ) -> list[View]: ...


@dataclass
class Parts:
    """The parts that a training is put together from."""

    preset: PresetBase
    machine: Machine
    start: Start
    corpus: Corpus
    tokenizer: Tokenizer
    network: Network
    progress: Progress
    reading: Reading
    compiling: CompilePlan


@dataclass
class TrainingSession:
    """A trainer that is ready to start, with the notes and warnings for its user."""

    trainer: Trainer
    log: MetricsLog
    start_event: dict[str, Any]
    notes: list[str]
    warnings: list[str]


def build_training(
    preset: PresetBase,
    runtime: Runtime,
    parallel: Parallel,
    root: Path,
    make_views: MakeViews,
    should_stop: Callable[[], bool],
    tokenizer_state: dict[str, Any] | None = None,
    validation_seed: int | None = None,
) -> TrainingSession:
    """Build everything from data to trainer. Raises UserError (or NoData) before anything is
    written.

    tokenizer_state   of a tokenizer made before; weights that have a tokenizer with them keep it
    validation_seed   decides which held-out text is measured, where it shall not follow from the
                      preset's seed
    """
    remarks = Remarks()
    machine = _machine(preset, runtime, parallel)
    adaptive_notes = _check(preset, machine)
    start = find_start(preset, root, parallel, remarks)
    corpus = _open_corpus(preset, root, parallel, start, remarks)
    remarks.notes += adaptive_notes
    tokenizer = choose_tokenizer(preset, start, parallel, corpus, tokenizer_state, remarks)
    _check_tokenizer(corpus, tokenizer, remarks)

    check_memory(preset, tokenizer.vocab_size, runtime)
    repeats = runtime.keep_order(preset.train.deterministic)
    network = build_network(preset, machine, start, tokenizer, len(corpus.names), remarks)
    machine = replace(machine, engine=network.engine)
    log_file = root / "logs" / preset.lineage / LOG

    def is_missing(step: int) -> bool:
        return on_rank_zero(parallel, lambda: evaluation_is_missing(log_file, step))

    progress = progress_of(preset, start, is_missing, remarks)
    reading = build_reading(preset, machine, start, progress, corpus, tokenizer, remarks)
    compiling = _compile_plan(preset, machine, start, network, progress, reading)
    if reading.rows.curriculum is not None:
        remarks.notes.append(reading.rows.curriculum.note)
    parts = Parts(preset, machine, start, corpus, tokenizer, network, progress, reading, compiling)

    def warn(message: str) -> None:
        log.emit("warning", step=progress.step, tokens=progress.tokens, message=message)

    inspection = _inspection(parts, root, validation_seed, warn, should_stop, remarks)
    extra_state, start_event = _extra_state(parts), _start_event(parts, repeats)
    if parallel.rank == 0:
        wandb_id, resolved = extra_state["wandb_id"], extra_state["preset"]
        views = make_views(log_file.parent, start_event, resolved, wandb_id, remarks.notes)
        log = MetricsLog(log_file, views)
    else:
        log = MetricsLog(None)
    remarks.notes += log.rewind(progress.step, evaluation_due=progress.evaluation_due)
    plan = Plan(preset.train, reading.budget, progress, compiling.from_step)
    learner = Learner(network.objective, network.module, network.optimizer)
    records = Records(log, start.store, extra_state)
    trainer = Trainer(machine, learner, reading.rows, plan, records, inspection, should_stop)
    return TrainingSession(trainer, log, start_event, remarks.notes, remarks.warnings)


def _machine(preset: PresetBase, runtime: Runtime, parallel: Parallel) -> Machine:
    dtype = runtime.compute_dtype(preset.train.precision)
    return Machine(runtime, parallel, parallel.broadcast(dtype))  # processors may differ


def _check(preset: PresetBase, machine: Machine) -> list[str]:
    """Check what can be checked before anything is read; returns notes on adaptive weights."""
    train = preset.train
    notes = check_adaptive(preset)
    call_if_defined(preset.model, "check_tokenizer_section", preset.tokenizer)
    check_memory(preset, SMALLEST_VOCABULARY, machine.runtime)
    check_ranks(preset, machine.parallel.world_size)
    check_engine(train.engine, train.deepspeed_config, machine.parallel.world_size)
    return notes


def _open_corpus(
    preset: PresetBase, root: Path, parallel: Parallel, start: Start, remarks: Remarks
) -> Corpus:
    held_out = held_out_of(start.saved) if start.saved is not None else None
    corpus = open_corpus(preset, root, parallel, held_out)
    remarks.warnings += [
        f"source {name} dropped, the others go on: {reason}"
        for name, reason in corpus.failed.items()
    ]
    note_changed_sources(preset, start, corpus, remarks)
    remarks.notes += corpus.notes
    return corpus


def _check_tokenizer(corpus: Corpus, tokenizer: Tokenizer, remarks: Remarks) -> None:
    corpus.check_tokenizer(tokenizer)
    notes, warnings = corpus.tokenizer_remarks(tokenizer)
    remarks.notes += notes
    remarks.warnings += warnings


def _compile_plan(
    preset: PresetBase,
    machine: Machine,
    start: Start,
    network: Network,
    progress: Progress,
    reading: Reading,
) -> CompilePlan:
    failed = start.compiler_failed and progress.run_step > 0  # in this run
    parameters = network.size.parameters
    plan = compile_plan(preset, machine, start.saved, parameters, reading.budget, failed)
    return machine.parallel.broadcast(plan)  # one rank's machine may lack a compiler


def _inspection(
    parts: Parts,
    root: Path,
    validation_seed: int | None,
    warn: Callable[[str], None],
    should_stop: Callable[[], bool],
    remarks: Remarks,
) -> Inspection:
    """Build the evaluation and the samples that are made between steps."""
    preset, corpus, tokenizer = parts.preset, parts.corpus, parts.tokenizer
    train, seq_length = preset.train, preset.model.seq_length
    masked = corpus.objective == MASKED_TOKENS

    def stop_when_asked(*_: int) -> None:
        stop_if(should_stop())

    def held_out_rows() -> list[Row]:
        rows = corpus.validation_rows(
            tokenizer, seq_length, train.eval_tokens, validation_seed, between=stop_when_asked
        )
        if message := shortfall(rows, train.eval_tokens):
            warn(message)
        return rows

    hide = (lambda rows: hide_one(rows, tokenizer)) if masked else None
    evaluator = Evaluator(
        parts.machine,
        HeldOut(held_out_rows, corpus.names, hide),
        parts.network.objective.stack,
        train.per_gpu_batch_size,
        parts.network.objective.heads,
        train.seed if validation_seed is None else validation_seed,
    )
    show, notes = build_samples(
        tokenizer, preset.generate, seq_length, masked, train.seed, stop_when_asked
    )
    remarks.notes += notes
    tasks = build_tasks(preset, parts.machine, tokenizer, root, stop_when_asked)

    def evaluate(model: LanguageModel, fraction: float) -> dict[str, Any] | None:
        numbers = evaluator.run(model, fraction, stop_when_asked)
        return numbers if numbers is None else numbers | tasks(model)

    return Inspection(evaluate=evaluate, show=show)


def _extra_state(parts: Parts) -> dict[str, Any]:
    """Return the parts of a checkpoint that the trainer does not know."""
    start = parts.start
    saved_id = start.saved.get("wandb_id") if start.saved is not None else None
    return {
        "format": FORMAT,
        "tokenizer": parts.tokenizer.state(),
        "preset": preset_json(parts.preset),
        "wandb_id": saved_id or uuid.uuid4().hex[:12],
        "init_from": start.init_from,
        "compile_from_step": parts.compiling.from_step,
        "compile_failed": start.compiler_failed and parts.progress.run_step > 0,
    }


def _start_event(parts: Parts, repeats: str) -> dict[str, Any]:
    """Return the fields of the `run_start` event."""
    preset, machine, progress = parts.preset, parts.machine, parts.progress
    size, budget = parts.network.size, parts.reading.budget
    return {
        "preset": preset.name,
        "lineage": preset.lineage,
        "run": progress.run,
        "resumed_from": f"step {progress.step}" if parts.start.saved is not None else None,
        "init_from": parts.start.init_from,
        "parameters": size.parameters,
        "trained_parameters": size.trained,
        "causal": parts.network.objective.model.is_causal,
        "objective": parts.corpus.objective,
        "world_size": machine.parallel.world_size,
        "engine": machine.engine.name,
        "device": machine.runtime.device_name,
        "precision": "bf16" if machine.dtype == torch.bfloat16 else "fp32",
        "repeats": repeats,
        "budget_tokens": budget.run_tokens,
        "end_tokens": budget.run_end(progress),
        "run_tokens": progress.run_tokens,
        "max_steps": preset.train.max_steps,
        "run_step": progress.run_step,
        "tokens_per_step": parts.reading.tokens_per_step,
        "compile": parts.compiling.note,
        "compile_from_step": parts.compiling.from_step,
        "eval_every_tokens": preset.train.eval_every_tokens,
        "sources": parts.corpus.names,
    }
