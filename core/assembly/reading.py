"""The data of a run: how far it goes, in which mix and from which position it is read.

In:    a preset, an opened corpus, the checkpoint's position
Out:   Budget and Rows
State: none
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.assembly.start import Remarks, Start
from core.data.agreement import agreed_contents
from core.data.corpus import Corpus
from core.data.encoding import shown
from core.data.loader import Layout, Loader
from core.data.pipeline_factory import PipelineFactory
from core.data.position import DataFacts, Position, resumed_position
from core.data.tokenizer import Tokenizer
from core.errors import UserError
from core.parallel.ranks import on_rank_zero
from core.preset.base import PresetBase
from core.preset.settings import MASKED_TOKENS, RUN_TOKENS
from core.training.curriculum import build_curriculum
from core.training.machine import Machine
from core.training.progress import Budget, Progress
from core.training.source_weights import SourceWeights
from core.training.trainer import Rows


@dataclass
class Reading:
    """The rows of a run, and how far it goes."""

    rows: Rows
    budget: Budget
    tokens_per_step: int


def build_reading(
    preset: PresetBase,
    machine: Machine,
    start: Start,
    progress: Progress,
    corpus: Corpus,
    tokenizer: Tokenizer,
    remarks: Remarks,
) -> Reading:
    """Build the loader, from where the checkpoint left off. Raises UserError."""
    train, parallel = preset.train, machine.parallel
    facts = DataFacts(
        fingerprint=corpus.pipeline_factory(tokenizer, preset.model.seq_length).fingerprint(),
        contents=agreed_contents(corpus, parallel),
        held_out=corpus.hold_out.state(),
    )
    facts.epoch_tokens = _epoch_tokens(
        preset, machine, start, progress, corpus, tokenizer, facts, remarks
    )
    budget = budget_of(preset, facts.epoch_tokens)
    rows_per_step = train.per_gpu_batch_size * train.accumulation_steps * parallel.world_size
    tokens_per_step = rows_per_step * preset.model.seq_length
    if parallel.rank == 0 and progress.run_step == 0 and train.max_epochs is None:
        tokens = min(budget.run_tokens, (budget.run_steps or budget.run_tokens) * tokens_per_step)
        remarks.warnings += corpus.repetition_warnings(tokenizer, tokens * train.candidates)
    position = _position(preset, start, progress, corpus, facts, remarks)
    factory = _factory(preset, machine, corpus, tokenizer, position, budget, tokens_per_step)
    adaptive = start.saved.get("adaptive") if start.saved is not None else None
    weights = dict(zip(corpus.names, corpus.mix.weights))
    source_weights = SourceWeights(weights, preset.auxiliary, adaptive)
    if source_weights.factors != position.latest_factors:
        # switched on or off, or the mix begins anew
        position.factors[position.first_unused()] = source_weights.factors
    layout = Layout(
        rows_per_step=rows_per_step * train.candidates,
        num_lanes=preset.data.lanes,
        source_names=corpus.names,
        packed=preset.data.packing != "padding",
        fill=train.candidates == 1,  # a curriculum chooses within whole groups
    )
    on_gpu = machine.device.type == "cuda"
    masked = corpus.objective == MASKED_TOKENS
    loader = Loader(
        factory,
        position,
        parallel,
        layout,
        workers=preset.data.workers if preset.data.workers is not None else int(on_gpu),
        pin_memory=on_gpu,
        facts=facts,
        describe=None if masked else lambda row: shown(tokenizer, row.input_ids, row.labels),
    )
    curriculum = build_curriculum(train, corpus.objective, len(corpus.names), machine)
    return Reading(Rows(loader, source_weights, curriculum), budget, tokens_per_step)


def budget_of(preset: PresetBase, epoch_tokens: int | None) -> Budget:
    """Compute how far a run and its schedules go.

    epoch_tokens   tokens of one pass over the data, where epochs end a run
    """
    train = preset.train
    tokens, steps = RUN_TOKENS * train.runs, train.max_steps
    if train.max_epochs is not None and epoch_tokens is not None:
        tokens = max(1, min(tokens, epoch_tokens * train.max_epochs // train.candidates))
    return Budget(RUN_TOKENS, tokens, steps, steps * train.runs if steps else None)


def _epoch_tokens(
    preset: PresetBase,
    machine: Machine,
    start: Start,
    progress: Progress,
    corpus: Corpus,
    tokenizer: Tokenizer,
    facts: DataFacts,
    remarks: Remarks,
) -> int | None:
    """Measure one pass over the data, where epochs end a run; on rank 0, once for the runs that
    share their schedules. The checkpoint's number holds as long as it is of the same data."""
    train = preset.train
    if train.max_epochs is None:
        return None
    if start.saved is not None and progress.horizon_step > 0:
        saved = start.saved["data"]
        saved_facts = (saved.get("fingerprint"), saved.get("contents"))
        same = saved_facts == (facts.fingerprint, facts.contents)
        if same and (tokens := saved.get("epoch_tokens")):
            return tokens
    # with more tokens than this, epochs do not end the run
    limit = -(-RUN_TOKENS * train.runs * train.candidates // train.max_epochs)
    tokens, notes = on_rank_zero(machine.parallel, lambda: corpus.epoch_tokens(tokenizer, limit))
    remarks.notes += notes
    return tokens


def _position(
    preset: PresetBase,
    start: Start,
    progress: Progress,
    corpus: Corpus,
    facts: DataFacts,
    remarks: Remarks,
) -> Position:
    """Decide where in the data to go on."""
    state: Mapping[str, Any] | None = start.saved["data"] if start.saved is not None else None
    all_failed = state is not None and set(corpus.names) <= set(state["drops"])
    if state is not None and state["drops"] and (progress.run_step == 0 or all_failed):
        # a new run, or one that had none left, gives failed sources another chance
        state = {**state, "fingerprint": ""}
    max_epochs = preset.train.max_epochs
    if max_epochs is not None and progress.run_step == 0 and progress.horizon_runs == 0:
        state = None  # new schedules count their epochs from the first
    position, notes = resumed_position(state, facts.fingerprint, facts.contents, max_epochs)
    if progress.horizon_tokens == 0 and (first := position.first_unused()) > 0:
        position.renewals.append(first)
    remarks.notes += notes
    return position


def _factory(
    preset: PresetBase,
    machine: Machine,
    corpus: Corpus,
    tokenizer: Tokenizer,
    position: Position,
    budget: Budget,
    tokens_per_step: int,
) -> PipelineFactory:
    """Return the factory of pipelines, with the mix spread over the budget."""
    snapshot = position.snapshot
    begins = snapshot is None or "rates" not in snapshot or position.renewals
    rates: tuple[float, ...] = ()
    if begins and corpus.needs_rates:
        measured = corpus.rates(tokenizer) if machine.parallel.rank == 0 else ()
        rates = machine.parallel.broadcast(measured)
    tokens = budget.schedule_tokens
    if budget.schedule_steps is not None:
        tokens = min(tokens, budget.schedule_steps * tokens_per_step)
    mix = replace(corpus.mix, rates=rates, horizon_tokens=tokens * preset.train.candidates)
    return corpus.pipeline_factory(tokenizer, preset.model.seq_length, mix)


def check_ranks(preset: PresetBase, world_size: int) -> None:
    """Check that the lanes of the data can be shared out. Raises UserError."""
    if preset.data.lanes % world_size:
        raise UserError(
            f"{world_size} processes do not divide data.lanes = {preset.data.lanes}; start with "
            "another --nproc_per_node, or set data.lanes to a multiple of it (which changes the "
            "order of the data)."
        )
