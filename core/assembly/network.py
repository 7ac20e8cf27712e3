"""The network that is trained: the model with its weights, losses, auxiliary heads, and their
optimizer.

In:    a preset, the weights to start from
Out:   Network
State: none
"""

from dataclasses import dataclass

import torch
from torch import nn

from core.assembly.start import Remarks, Start
from core.checkpoint.copying import stored_bytes
from core.checkpoint.fitting import LINEAGE_OF_ITS_OWN
from core.checkpoint.weights import FITTING
from core.contracts import LanguageModel, Readout, call_if_defined
from core.data.tokenizer import Tokenizer
from core.heads.build import build_heads, check_heads, load_heads, output_of_one_token
from core.heads.stack import HeadStack
from core.losses import build_stack
from core.models import build_model
from core.parallel.engines import choose_engine
from core.parallel.protocol import Engine
from core.parallel.ranks import on_rank_zero, rank_zero_first
from core.preset.base import PresetBase
from core.runtime import Runtime
from core.training.freezing import train_only
from core.training.machine import Machine
from core.training.memory import (
    SMALLEST_VOCABULARY,
    Size,
    check_memory,
    counted,
    least_need,
    size_of,
)
from core.training.objective import Objective
from core.training.optim import Optimizer
from core.training.source_weights import check_adaptive


@dataclass
class Network:
    """A model on its device, and everything that computes its gradients and updates."""

    engine: Engine
    size: Size  # of the model
    objective: Objective
    module: nn.Module  # the objective, as the engine wrapped it
    optimizer: Optimizer


def check_parts(preset: PresetBase, runtime: Runtime) -> None:
    """Check that the parts of a preset go together, as `build_training` does, before anything is
    read. Raises UserError.

    A comparison calls this for every variant, so that a mistake in the last one shows at once, not
    after hours. A model of the Hub is left out: it would be downloaded.
    """
    check_adaptive(preset)
    call_if_defined(preset.model, "check_tokenizer_section", preset.tokenizer)
    check_memory(preset, SMALLEST_VOCABULARY, runtime)
    if hasattr(preset.model, "num_layers"):
        size_of(preset, SMALLEST_VOCABULARY)  # rejects unknown names of parameters
        one_layer = preset.model_copy(
            update={"model": preset.model.model_copy(update={"num_layers": 1})}
        )
        model, stack = build_model(one_layer, SMALLEST_VOCABULARY), build_stack(preset)
        stack.check(output_of_one_token(model, torch.device("cpu")).readout)
        check_heads(preset, model, stack)


def build_network(
    preset: PresetBase,
    machine: Machine,
    start: Start,
    tokenizer: Tokenizer,
    num_sources: int,
    remarks: Remarks,
) -> Network:
    """Build what is trained, with the weights and the optimizer's state to start from. Raises
    UserError."""
    model = _built_model(preset, machine, start, tokenizer.vocab_size, remarks)
    train_only(model, preset.train.trainable)
    note = call_if_defined(model, "attention_note", machine.device, machine.dtype)
    remarks.notes += [note] if note else []
    stack = build_stack(preset)
    output = output_of_one_token(model, torch.device("cpu"))
    stack.check(output.readout)
    check_heads(preset, model, stack)
    heads = build_heads(preset.auxiliary, preset.train.seed, output)
    if heads is not None:
        count = sum(p.numel() for p in heads.parameters())
        remarks.notes.append(
            f"auxiliary heads: {', '.join(heads)}; {count:,} parameters beside the model's"
        )
    tables = _tables_of(model, output.readout)
    stored, size = stored_bytes(model, heads), counted(model)
    engine = _engine(preset, machine, size, tokenizer.vocab_size, remarks)
    engine.place(model, heads, machine.device)
    if start.weights is not None:  # by now: a rank that keeps a share reads no more than that
        advice = FITTING if start.saved is None else LINEAGE_OF_ITS_OWN
        remarks.notes += start.weights.fill(model, advice)
    if start.saved is not None:
        remarks.notes += load_heads(heads, start.saved["heads"])
    optimizer = _optimizer(preset, model, heads, tables, engine)
    objective = Objective(model, stack, num_sources, heads, machine.dtype)
    module = engine.wrap(objective, optimizer.optimizers)
    if start.saved is not None:
        fresh = optimizer.load(start.saved["optimizer"])
        if fresh and start.saved["progress"]["step"]:
            names = ", ".join(fresh[:4])
            remarks.notes.append(
                f"optimizer state starts afresh for {len(fresh)} parameters: {names}"
            )
    # a disk without room for checkpoints is found before the first step
    stored += optimizer.state_bytes() + len(tokenizer.state()["json"])
    on_rank_zero(machine.parallel, lambda: start.store.check_room(stored))
    return Network(engine, size, objective, module, optimizer)


def _engine(
    preset: PresetBase, machine: Machine, size: Size, vocab_size: int, remarks: Remarks
) -> Engine:
    """Choose what keeps the weights: the same on every rank, also where machines differ."""
    runtime, train = machine.runtime, preset.train
    own = (
        least_need(preset, size, vocab_size, machine.dtype == torch.bfloat16),
        runtime.memory_bytes() // runtime.ranks_of_a_memory,
    )
    each_needs, each_has = zip(*machine.parallel.gather(own))
    needed, available = max(each_needs), min(each_has)
    engine, note = choose_engine(
        train.engine, train.deepspeed_config, machine.parallel, machine.device, needed, available
    )
    remarks.notes += [note] if note else []
    return engine


def _built_model(
    preset: PresetBase, machine: Machine, start: Start, vocab_size: int, remarks: Remarks
) -> LanguageModel:
    model = rank_zero_first(machine.parallel, lambda: build_model(preset, vocab_size))
    if start.weights is None:
        rank_zero_first(
            machine.parallel, lambda: call_if_defined(model, "load_published", remarks.notes)
        )
    else:
        remarks.notes += start.weights.prepare(model)
    return model


def _tables_of(model: LanguageModel, readout: Readout) -> set[str]:
    """Return the names of embedding and readout tables."""
    tables = {id(tensor) for tensor in (*readout.parameters(), readout.table)}
    return {name for name, p in model.named_parameters() if id(p) in tables}


def _optimizer(
    preset: PresetBase,
    model: LanguageModel,
    heads: HeadStack | None,
    tables: set[str],
    engine: Engine,
) -> Optimizer:
    """Build the optimizer over model and heads; Muon is kept from tables and heads."""
    of_heads = []
    if heads is not None:
        of_heads = [(f"heads.{name}", p) for name, p in heads.named_parameters()]
    named = [*model.named_parameters(), *of_heads]
    return Optimizer(named, tables | dict(of_heads).keys(), preset.train, engine)
