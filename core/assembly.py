"""The only file that knows models, losses, data and trainer together: a preset in, a ready Trainer
out.

In:    a preset, the runtime, the ranks, the project's root folder
Out:   TrainingSession: the trainer with its log, and what a person should know before it starts
State: none; everything lives in the objects it builds
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from core.checkpoint.lineage import changed_sources
from core.checkpoint.slots import load_slot
from core.checkpoint.store import FORMAT, LINEAGE_OF_ITS_OWN, CheckpointStore, stored_bytes
from core.checkpoint.weights import FITTING, Weights, find_weights
from core.contracts import call_if_defined
from core.data.agreement import agreed_contents
from core.data.corpus import Corpus, PipelineFactory, data_position, open_corpus
from core.data.encoding import shown
from core.data.loader import Loader
from core.data.packing import Row
from core.data.pipeline import Position
from core.data.tokenizer import SAMPLE_CHARACTERS, Tokenizer, build_tokenizer
from core.data.validation import hide_one, shortfall
from core.data.worker import stop_if
from core.errors import UserError
from core.evaluation.held_out import Evaluator
from core.file_names import slot_name
from core.generation.samples import build_samples
from core.heads.build import build_heads, check_heads, load_heads, output_of_one_token
from core.losses import LOSSES
from core.losses.stack import LossStack
from core.metrics.log import LOG, MetricsLog, check_log, evaluation_is_missing
from core.models import MODELS
from core.parallel.ranks import on_rank_zero, rank_zero_first
from core.preset.merge import preset_json
from core.preset.settings import MASKED_TOKENS, RUN_TOKENS
from core.randomness import derive_seed
from core.runtime import Runtime
from core.training.curriculum import build_curriculum
from core.training.freezing import train_only
from core.training.memory import SMALLEST_VOCABULARY, check_memory, size_of
from core.training.objective import Objective
from core.training.optim import Optimizer
from core.training.passes import compile_plan
from core.training.progress import Horizon, Progress, begin_next_run
from core.training.source_weights import SourceWeights, check_adaptive
from core.training.trainer import Trainer

MIRRORS = {"lm": "simple_lm_trained.pth"}
"""Lineages whose newest checkpoint has another name as well (specification 003)."""


@dataclass
class TrainingSession:
    """A trainer, ready to go, and what is told about it."""

    trainer: Trainer
    log: MetricsLog
    start_event: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# models -------------------------------------------------------------------------------------------


def build_model(preset: Any, vocab_size: int) -> nn.Module:
    """The preset's model with weights that follow from its seed."""
    torch.manual_seed(derive_seed(preset.train.seed, "init"))
    return MODELS[preset.model.type][1](preset.model, vocab_size)


def build_stack(preset: Any) -> LossStack:
    return LossStack([LOSSES[settings.type][1](settings) for settings in preset.losses])


def check_parts(preset: Any, runtime: Runtime) -> None:
    """Raises UserError where the parts of a preset do not go together, as `build_training` would,
    before anything is read.

    For a comparison, whose last variant would else say so after hours. A model of the Hub is left
    out: it would be downloaded."""
    check_adaptive(preset)
    call_if_defined(preset.model, "check_tokenizer_section", preset.tokenizer)
    check_memory(preset, SMALLEST_VOCABULARY, runtime)
    if hasattr(preset.model, "num_layers"):
        size_of(preset, SMALLEST_VOCABULARY)  # refuses names of parameters that there are not
        one_layer = preset.model_copy(
            update={"model": preset.model.model_copy(update={"num_layers": 1})}
        )
        model, stack = build_model(one_layer, SMALLEST_VOCABULARY), build_stack(preset)
        stack.check(output_of_one_token(model, torch.device("cpu")).readout)
        check_heads(preset, model, stack)


# the session --------------------------------------------------------------------------------------


def build_training(
    preset: Any,
    runtime: Runtime,
    parallel: Any,
    root: Path,
    make_views: Any,
    should_stop: Any,
    tokenizer_state: dict[str, Any] | None = None,
    validation_seed: int | None = None,
) -> TrainingSession:
    """Everything from data to trainer. Raises UserError (or NoData) before anything is written.

    tokenizer_state   of a tokenizer made before; weights that have a tokenizer with them keep it
    validation_seed   which held-out text is measured, where it shall not follow from the preset's
                      seed
    """
    adapting = check_adaptive(preset)
    call_if_defined(preset.model, "check_tokenizer_section", preset.tokenizer)
    check_memory(preset, SMALLEST_VOCABULARY, runtime)  # before anything is read
    if preset.data.lanes % parallel.world_size:
        raise UserError(
            f"{parallel.world_size} processes do not divide data.lanes = {preset.data.lanes}; "
            "start with another "
            "--nproc_per_node, or set data.lanes to a multiple of it (which changes the order of "
            "the data)."
        )
    store = CheckpointStore(root / "checkpoints", preset.lineage, MIRRORS.get(preset.lineage))
    saved, weights, notes = _beginning(preset, store, root, parallel)
    corpus = open_corpus(preset, root, parallel, (saved or {"data": {}})["data"].get("held_out"))
    masked = corpus.objective == MASKED_TOKENS
    warnings = [
        f"source {name} dropped, the others go on: {reason}"
        for name, reason in corpus.failed.items()
    ]
    if saved is not None:
        (warnings if saved["preset"]["name"] == preset.name else notes).extend(
            changed_sources(saved, preset, corpus.failed)
        )
    notes += corpus.notes + adapting
    tokenizer, told = _tokenizer(preset, weights, parallel, corpus, tokenizer_state)
    corpus.check_tokenizer(tokenizer)
    of_tokens, loud = corpus.told_of(tokenizer)
    notes, warnings = notes + told + of_tokens, warnings + loud

    check_memory(preset, tokenizer.vocab_size, runtime)
    repeats = runtime.keep_order(preset.train.deterministic)
    model = rank_zero_first(parallel, lambda: build_model(preset, tokenizer.vocab_size))
    if weights is None:
        rank_zero_first(parallel, lambda: call_if_defined(model, "load_published", notes))
    else:
        notes += weights.load_into(model, FITTING if saved is None else LINEAGE_OF_ITS_OWN)
    model.to(runtime.device)
    train_only(model, preset.train.trainable)
    if note := call_if_defined(
        model, "attention_note", runtime.device, runtime.compute_dtype(preset.train.precision)
    ):
        notes.append(note)
    stack = build_stack(preset)
    output = output_of_one_token(model, runtime.device)
    readout = output.readout
    stack.check(readout)
    check_heads(preset, model, stack)
    heads = build_heads(preset.auxiliary, preset.train.seed, output)
    notes += load_heads(heads, saved["heads"]) if saved is not None else []
    if heads is not None:
        count = sum(p.numel() for p in heads.parameters())
        notes.append(
            f"auxiliary heads: {', '.join(heads)}; {count:,} parameters beside the model's"
        )
    tables = {id(tensor) for tensor in (*readout.parameters(), readout.table)}
    embeddings = {name for name, p in model.named_parameters() if id(p) in tables}
    of_heads = (
        [(f"heads.{name}", p) for name, p in heads.named_parameters()] if heads is not None else []
    )
    optimizer = Optimizer(
        [*model.named_parameters(), *of_heads], embeddings | dict(of_heads).keys(), preset.train
    )
    if (
        saved is not None
        and (fresh := optimizer.load(saved["optimizer"]))
        and saved["progress"]["step"]
    ):
        notes.append(
            f"optimizer state starts afresh for {len(fresh)} parameters: {', '.join(fresh[:4])}"
        )

    size = stored_bytes(model, heads) + optimizer.state_bytes() + len(tokenizer.state()["json"])
    on_rank_zero(parallel, lambda: store.check_room(size))

    log_file = root / "logs" / preset.lineage / LOG
    progress, told = _progress(
        preset,
        saved,
        lambda step: on_rank_zero(parallel, lambda: evaluation_is_missing(log_file, step)),
    )
    notes += told
    facts = {
        "fingerprint": corpus.pipeline_factory(tokenizer, preset.model.seq_length).fingerprint(),
        "contents": agreed_contents(corpus, parallel),
        "held_out": corpus.hold_out.state(),
    }
    kept = saved["data"] if saved is not None and progress.horizon_step > 0 else None
    facts["epoch_tokens"], told = _epoch_tokens(preset, kept, facts, corpus, tokenizer, parallel)
    notes += told
    horizon = _horizon(preset, facts["epoch_tokens"])
    rows_per_step = (
        preset.train.per_gpu_batch_size * preset.train.accumulation_steps * parallel.world_size
    )
    tokens_per_step = rows_per_step * preset.model.seq_length
    if parallel.rank == 0 and progress.run_step == 0 and preset.train.max_epochs is None:
        tokens = min(
            horizon.run_tokens, (horizon.run_steps or horizon.run_tokens) * tokens_per_step
        )
        warnings += corpus.too_often(tokenizer, tokens * preset.train.candidates)
    factory, position, told = _data(
        preset, saved, progress, corpus, tokenizer, horizon, tokens_per_step, facts, parallel
    )
    notes += told
    source_weights = SourceWeights(
        dict(zip(corpus.names, corpus.mix.weights)), preset.auxiliary, (saved or {}).get("adaptive")
    )
    # switched on or off, or the mix begins anew
    if source_weights.factors != position.latest_factors:
        position.factors[position.first_unused()] = source_weights.factors
    workers = (
        preset.data.workers
        if preset.data.workers is not None
        else int(runtime.device.type == "cuda")
    )
    loader = Loader(
        factory,
        position,
        parallel,
        rows_per_step * preset.train.candidates,
        corpus.names,
        preset.data.lanes,
        packed=preset.data.packing != "padding",
        workers=workers,
        pin_memory=runtime.device.type == "cuda",
        facts=facts,
        describe=None if masked else lambda row: shown(tokenizer, row.input_ids, row.labels),
        fill=preset.train.candidates == 1,  # a curriculum chooses within whole groups
    )
    # of this run
    compile_failed = (
        saved is not None and saved.get("compile_failed", False) and progress.run_step > 0
    )
    compile_from_step, compile_told = compile_plan(
        preset, runtime, saved, model, horizon, compile_failed
    )
    dtype = runtime.compute_dtype(preset.train.precision)
    curriculum = build_curriculum(
        preset.train, corpus.objective, len(corpus.names), parallel, runtime.device, dtype
    )
    notes += [curriculum.note] if curriculum is not None else []

    def stop_when_asked(*_: int) -> None:
        stop_if(should_stop())

    def held_out_rows() -> list[Row]:
        how = preset.model.seq_length, preset.train.eval_tokens, validation_seed
        rows = corpus.validation_rows(tokenizer, *how, between=stop_when_asked)
        if message := shortfall(rows, preset.train.eval_tokens):
            log.emit("warning", step=progress.step, tokens=progress.tokens, message=message)
        return rows

    evaluator = Evaluator(
        held_out_rows,
        stack,
        preset.train.per_gpu_batch_size,
        parallel,
        runtime.device,
        dtype,
        (lambda rows: hide_one(rows, tokenizer)) if masked else None,
        heads,
        preset.train.seed if validation_seed is None else validation_seed,
        corpus.names,
    )
    of_samples = preset.generate, preset.model.seq_length, masked, preset.train.seed
    show, told = build_samples(tokenizer, *of_samples, stop_when_asked)
    notes += told

    wandb_id = (saved or {}).get("wandb_id") or uuid.uuid4().hex[:12]
    init_from = (
        saved.get("init_from")
        if saved is not None
        else str(weights)
        if weights is not None
        else None
    )
    resolved = preset_json(preset)
    start_event = {
        "preset": preset.name,
        "lineage": preset.lineage,
        "run": progress.run,
        "resumed_from": f"step {progress.step}" if saved is not None else None,
        "init_from": init_from,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "causal": model.is_causal,
        "objective": corpus.objective,
        "world_size": parallel.world_size,
        "device": runtime.device_name,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "repeats": repeats,
        "budget_tokens": horizon.run_tokens,
        "end_tokens": horizon.run_end(progress),
        "run_tokens": progress.run_tokens,
        "max_steps": preset.train.max_steps,
        "run_step": progress.run_step,
        "tokens_per_step": tokens_per_step,
        "compile": compile_told,
        "compile_from_step": compile_from_step,
        "eval_every_tokens": preset.train.eval_every_tokens,
        "sources": corpus.names,
    }
    rank_zero = parallel.rank == 0
    folder = root / "logs" / preset.lineage
    views = make_views(folder, start_event, resolved, wandb_id, notes) if rank_zero else []
    log = MetricsLog(log_file if rank_zero else None, views)
    notes += log.rewind(progress.step, evaluation_due=progress.evaluation_due)
    trainer = Trainer(
        Objective(model, stack, len(corpus.names), heads),
        optimizer,
        loader,
        parallel,
        runtime,
        preset.train,
        horizon,
        progress,
        log,
        store,
        evaluate=lambda model, progress: evaluator.run(model, progress, stop_when_asked),
        show=show,
        extra_state={
            "format": FORMAT,
            "tokenizer": tokenizer.state(),
            "preset": resolved,
            "wandb_id": wandb_id,
            "init_from": init_from,
            "compile_from_step": compile_from_step,
            "compile_failed": compile_failed,
        },
        should_stop=should_stop,
        source_weights=source_weights,
        compile_from_step=compile_from_step,
        curriculum=curriculum,
    )
    return TrainingSession(trainer, log, start_event, notes, warnings)


def _beginning(
    preset: Any, store: CheckpointStore, root: Path, parallel: Any
) -> tuple[dict[str, Any] | None, Weights | None, list[str]]:
    """(checkpoint to go on from, weights to begin with, remarks), on every rank.

    The weights are those of the lineage's newest slot; where it has none, those that `init_from`
    names, if it does."""

    def prepare() -> list[str]:
        check_log(root / "logs" / preset.lineage / LOG)
        return store.prepare()

    notes = on_rank_zero(parallel, prepare)
    state, path, told = load_slot(store, parallel)
    notes += told
    origin = preset.init_from
    if state is not None:
        notes += (
            [f'init_from "{origin}" is not used again: the lineage goes on from its own checkpoint']
            if origin
            else []
        )
        return state, Weights.of(state, path, slot_name(preset.lineage, "*")), notes
    if origin is None:
        return None, None, notes
    weights = rank_zero_first(parallel, lambda: find_weights(origin, root))
    notes += [*weights.notes, f"weights from {weights}; optimizer and schedules start afresh"]
    if others := weights.other_settings(preset.model):
        notes.append(f"they were made with other settings: {'; '.join(others)}")
    return None, weights, notes


def _tokenizer(
    preset: Any,
    weights: Weights | None,
    parallel: Any,
    corpus: Corpus,
    given: dict[str, Any] | None,
) -> tuple[Tokenizer, list[str]]:
    """The one that came with the weights, else the one given; else a new one, made on rank 0 and
    sent to the others."""
    if weights is not None and weights.tokenizer is not None and weights.preset is not None:
        told = weights.preset["tokenizer"] != preset.tokenizer.model_dump(mode="json")
        notes = ["the checkpoint's tokenizer is used; the preset's differs"] if told else []
        return Tokenizer.from_state(weights.tokenizer), notes
    if given is not None:
        return Tokenizer.from_state(given), []

    def make() -> dict[str, Any]:
        if weights is not None:
            return weights.tokenizer_state(preset.tokenizer, corpus.root)
        needs_text = preset.tokenizer.type == "bpe"
        if needs_text and all(section.type == "tokens" for section in corpus.sections):
            beside = Path(corpus.sections[0].path).parent / "tokenizer.json"
            raise UserError(
                'no source has text to train a "bpe" on, all are tokens already. Name the '
                "tokenizer that made them: "
                f'"tokenizer": {{"type": "file", "path": "{beside}"}}'
            )
        texts = corpus.sample_texts(SAMPLE_CHARACTERS) if needs_text else []
        return build_tokenizer(preset.tokenizer, texts, corpus.markers, root=corpus.root).state()

    return Tokenizer.from_state(on_rank_zero(parallel, make)), []


def _progress(
    preset: Any, saved: dict[str, Any] | None, is_missing: Callable[[int], bool]
) -> tuple[Progress, list[str]]:
    """Go on with an interrupted run, or begin the next one. `is_missing`: whether the log lacks the
    evaluation at that step."""
    if saved is None:
        return Progress(evaluation_due=preset.train.eval_at_start), []
    progress = Progress.of(saved["progress"])
    progress.evaluation_due = progress.evaluation_due and is_missing(progress.step)
    does = what_goes_on(preset, saved, lambda: progress.evaluation_due)
    if does == "run":
        return progress, [
            f"run {progress.run} goes on from step {progress.step}, {progress.run_tokens:,} "
            "tokens into it"
        ]
    if does == "evaluation":
        return progress, [
            f"run {progress.run} was trained to its end and saved, but not evaluated: that is "
            "done now"
        ]
    notes = []
    if progress.evaluation_due and progress.finished:
        notes.append(
            f'run {progress.run} of "{saved["preset"]["name"]}" was ended before its last '
            "evaluation"
        )
    if not progress.finished:
        notes.append(
            f'run {progress.run} of "{saved["preset"]["name"]}" was left at '
            f"{progress.run_tokens:,} tokens"
        )
    begin_next_run(progress, preset.train.runs if saved["preset"]["name"] == preset.name else 1)
    notes.append(f"run {progress.run} begins from the weights of step {progress.step}")
    return progress, notes


def what_goes_on(
    preset: Any, saved: dict[str, Any], is_missing: Callable[[], bool]
) -> Literal["run", "evaluation", "next run"]:
    """What a start does with a lineage's checkpoint. `is_missing`: whether the log lacks the
    evaluation at its step."""
    progress = saved["progress"]
    if saved["preset"]["name"] != preset.name:
        return "next run"
    if not progress["finished"]:
        return "run"
    return "evaluation" if progress.get("evaluation_due") and is_missing() else "next run"


def _epoch_tokens(
    preset: Any,
    kept: dict[str, Any] | None,
    facts: dict[str, Any],
    corpus: Corpus,
    tokenizer: Tokenizer,
    parallel: Any,
) -> tuple[int | None, list[str]]:
    """Tokens of one pass over the data, where epochs end a run; remarks. Decided by rank 0, once
    for each horizon: `kept`, of its checkpoint, holds as long as it is of the same data."""
    train = preset.train
    if train.max_epochs is None:
        return None, []
    if (
        kept is not None
        and kept.get("epoch_tokens")
        and all(kept.get(key) == facts[key] for key in ("fingerprint", "contents"))
    ):
        return kept["epoch_tokens"], []
    # with more, epochs do not end it
    limit = -(-RUN_TOKENS * train.runs * train.candidates // train.max_epochs)
    return on_rank_zero(parallel, lambda: corpus.epoch_tokens(tokenizer, limit))


def _horizon(preset: Any, epoch_tokens: int | None) -> Horizon:
    train = preset.train
    tokens = RUN_TOKENS * train.runs
    if train.max_epochs is not None and epoch_tokens is not None:
        tokens = max(1, min(tokens, epoch_tokens * train.max_epochs // train.candidates))
    steps = train.max_steps
    return Horizon(RUN_TOKENS, tokens, steps, steps * train.runs if steps else None)


def _data(
    preset: Any,
    saved: dict[str, Any] | None,
    progress: Progress,
    corpus: Corpus,
    tokenizer: Tokenizer,
    horizon: Horizon,
    tokens_per_step: int,
    facts: dict[str, Any],
    parallel: Any,
) -> tuple[PipelineFactory, Position, list[str]]:
    """What rows are made from, where to go on, and what is told. `facts`: of the data, as the
    checkpoint keeps them."""
    state = saved["data"] if saved is not None else None
    if (
        state is not None
        and state["drops"]
        and (progress.run_step == 0 or set(corpus.names) <= set(state["drops"]))
    ):
        # a new run, or one that had none left, gives failed sources another chance
        state = {**state, "fingerprint": ""}
    if (
        preset.train.max_epochs is not None
        and progress.run_step == 0
        and progress.horizon_runs == 0
    ):
        state = None  # a new horizon counts its epochs from the first
    position, notes = data_position(
        state, facts["fingerprint"], facts["contents"], preset.train.max_epochs
    )
    if progress.horizon_tokens == 0 and (first := position.first_unused()) > 0:
        position.renewals.append(first)
    begins = position.snapshot is None or "rates" not in position.snapshot or position.renewals
    measured = begins and corpus.needs_rates
    rates = (
        parallel.broadcast(corpus.rates(tokenizer) if parallel.rank == 0 else None)
        if measured
        else ()
    )
    tokens = horizon.horizon_tokens
    if horizon.horizon_steps is not None:
        tokens = min(tokens, horizon.horizon_steps * tokens_per_step)
    mix = replace(corpus.mix, rates=rates, horizon_tokens=tokens * preset.train.candidates)
    return corpus.pipeline_factory(tokenizer, preset.model.seq_length, mix), position, notes
