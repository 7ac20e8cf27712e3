"""The size of a preset's model, and the memory that training it takes, before anything is made: for
the menu, and to refuse a run that could only fail.

In:    a preset, the size of its vocabulary
Out:   Size; bytes; UserError for what no memory holds
State: none
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from core.contracts import call_if_defined
from core.errors import UserError
from core.models import MODELS
from core.preset.base import PresetBase
from core.runtime import Runtime
from core.training.freezing import share_with_graph, train_only

SMALLEST_VOCABULARY = 257
"""The vocabulary of bytes; others are known only when their tokenizer is there."""
ROW_BYTES = 16
"""Bytes of a position of a row while it waits: tokens, targets, positions, documents."""
ROUGH = 8
"""A forward pass may take so many times less than `memory_estimate` says: nothing that fits is
refused."""
FEWER_ROWS = "Set train.per_gpu_batch_size, train.accumulation_steps or model.seq_length lower."
SMALLER_MODEL = "Set model.hidden_size, model.num_layers or the size of the vocabulary lower."


@dataclass(frozen=True)
class Size:
    """The size of a preset's model before it is built, with shared parameters counted once."""

    parameters: int
    trained: int
    share_with_graph: float  # of the layers: those that keep activations for the backward pass


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of weights: into tensors without memory torch would draw by way of its
    compiler, whose import takes over a second."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        named = named or {}
        drawn = function in (init.normal_, init.uniform_, init.kaiming_uniform_)
        return [*arguments, *named.values()][0] if drawn else function(*arguments, **named)


def size_of(preset: PresetBase, vocab_size: int) -> Size | None:
    """Compute the size of a preset's model without allocating any weights; None where it is only
    known once the model is there.

    A model that is slow to build, or to import, counts its own parameters in its settings. Raises
    UserError for patterns in `train.trainable` that name nothing."""
    settings, patterns = preset.model, preset.train.trainable
    if hasattr(settings, "num_parameters"):
        count = settings.num_parameters(vocab_size)
        if count is None or patterns is None:
            frozen = call_if_defined(settings, "num_frozen", vocab_size) or 0
            return None if count is None else Size(count, count - frozen, 1.0)
    with torch.device("meta"), _Undrawn():
        model = MODELS[settings.type][1](settings, vocab_size)
    train_only(model, patterns)
    return counted(model)


def counted(model: nn.Module) -> Size:
    """Count the size of a model that is there."""
    parameters = list(model.parameters())
    return Size(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        share_with_graph=share_with_graph(model),
    )


class Memory(NamedTuple):
    """Bytes that training takes on one device."""

    fixed: int  # whatever the batch
    row: int  # for each row of a micro-batch


def memory_estimate(preset: PresetBase, size: Size, vocab_size: int, bf16: bool) -> Memory:
    """Estimate roughly what memory one device needs.

    Fixed are the weights in fp32, gradients and AdamW's state of the trained ones, autocast's copy
    of the weights, and the readout. A row takes what it keeps for the backward pass, and what one
    layer computes with.
    """
    model: Any = preset.model  # each kind has keys of its own
    if hasattr(model, "activation_bytes"):
        position = model.activation_bytes(bf16)
    else:
        width = model.hidden_size * 14 + 2 * (model.intermediate_size or 4 * model.hidden_size)
        position = model.num_layers * width * (2 if bf16 else 4)
    # the buffers of the loss, and the readout's weight and gradient
    readout = (200 << 20) + 6 * vocab_size * model.hidden_size
    # the other auxiliary heads are small
    policy = vocab_size * model.hidden_size if "enable_policy" in preset.auxiliary.heads else 0
    weights = (6 if bf16 else 4) * size.parameters + 12 * size.trained + 16 * policy
    kept = 1.0
    if size.share_with_graph < 1.0:
        kept = min(1.0, size.share_with_graph + 1 / model.num_layers)
    return Memory(fixed=weights + readout, row=int(kept * position) * model.seq_length)


def least_need(preset: PresetBase, size: Size, vocab_size: int, bf16: bool) -> int:
    """Estimate roughly the bytes that training takes on one device with one row at a time."""
    if not hasattr(preset.model, "hidden_size"):  # one of the Hub, whose widths are not known here
        return (6 if bf16 else 4) * size.parameters + 12 * size.trained
    memory = memory_estimate(preset, size, vocab_size, bf16)
    return memory.fixed + memory.row


def check_memory(preset: PresetBase, vocab_size: int, runtime: Runtime) -> None:
    """Check that a run's least need of memory can be met, without making anything. Raises
    UserError.

    A micro-batch that is too large for a GPU is not refused: the first step halves it until it
    fits.
    """
    train, available = preset.train, runtime.memory_bytes()
    everything = preset.model_copy(update={"train": train.model_copy(update={"trainable": None})})
    # of all weights, also where some are frozen: counted at once
    size = size_of(everything, vocab_size)
    rows = train.per_gpu_batch_size * train.accumulation_steps * train.candidates
    needs = [
        (ROW_BYTES * rows * preset.model.seq_length, f"the {rows:,} rows of a step", FEWER_ROWS)
    ]
    if size is not None:
        optimizer_bytes = 12 if train.optimizer == "adamw" else 8
        states = optimizer_bytes * size.trained if train.trainable is None else 0
        what = f"{size.parameters:,} weights and what trains them"
        of_a_rank = 4 * size.parameters + states
        if runtime.world_size > 1 and (train.engine in ("auto", "fsdp") or train.zero_stage > 0):
            # its share; and all weights, for an evaluation
            of_a_rank = of_a_rank // runtime.world_size + 4 * size.parameters
        needs.append((of_a_rank * runtime.ranks_of_a_memory, what, SMALLER_MODEL))
    if size is not None and runtime.device.type == "cpu" and train.trainable is None:
        bf16 = runtime.compute_dtype(train.precision) == torch.bfloat16
        row = memory_estimate(preset, size, vocab_size, bf16).row
        what = f"a pass of {train.per_gpu_batch_size:,} rows"
        needs.append((row * train.per_gpu_batch_size // ROUGH, what, FEWER_ROWS))
    for needed, what, advice in needs:
        if needed > available:
            raise UserError(
                f"{what} take {needed:,} bytes of memory or more, and {runtime.device_name} has "
                f"{available:,}. {advice}"
            )
