"""How large a preset's model is, and what memory training it takes, before anything is made: what
the menu tells, and what stops a run that could only fail.

In:    a preset, the size of its vocabulary
Out:   Size; bytes; UserError for what no memory holds
State: none
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from core.contracts import call_if_defined
from core.errors import UserError
from core.models import MODELS
from core.runtime import Runtime
from core.training.freezing import share_with_graph, train_only

SMALLEST_VOCABULARY = 257
"""That of bytes; others are known only when their tokenizer is there."""
ROW_BYTES = 16
"""What a position of a row takes while it waits: tokens, targets, places, documents."""
ROUGH = 8
"""How much less a forward pass may take than `memory_estimate` says: nothing that fits is
refused."""
FEWER_ROWS = "Set train.per_gpu_batch_size, train.accumulation_steps or model.seq_length lower."
SMALLER_MODEL = "Set model.hidden_size, model.num_layers or the size of the vocabulary lower."


@dataclass(frozen=True)
class Size:
    """What a preset's model is, before it is built: shared parameters counted once."""

    parameters: int
    trained: int
    share_with_graph: float  # of the layers: those that leave something for the backward pass


class _Undrawn(TorchFunctionMode):
    """Nothing is drawn: into tensors without memory torch would draw by way of its compiler, whose
    import takes over a second."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        named = named or {}
        drawn = function in (init.normal_, init.uniform_, init.kaiming_uniform_)
        return [*arguments, *named.values()][0] if drawn else function(*arguments, **named)


def size_of(preset: Any, vocab_size: int) -> Size | None:
    """Without allocating any weights; None where nobody knows before the model is there.

    A model that is slow to build, or to import, counts its own in its settings. Raises UserError
    for patterns that name nothing."""
    settings, wish = preset.model, preset.train.trainable
    if hasattr(settings, "num_parameters"):
        count = settings.num_parameters(vocab_size)
        if count is None or wish is None:
            frozen = call_if_defined(settings, "num_frozen", vocab_size) or 0
            return None if count is None else Size(count, count - frozen, 1.0)
    with torch.device("meta"), _Undrawn():
        model = MODELS[settings.type][1](settings, vocab_size)
    train_only(model, wish)
    parameters = list(model.parameters())
    return Size(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        share_with_graph(model),
    )


def memory_estimate(preset: Any, size: Size, vocab_size: int, bf16: bool) -> tuple[int, int]:
    """Bytes one device needs, roughly: whatever the batch, and for each row of a micro-batch.

    Weights in fp32, of the trained ones gradients and AdamW, autocast's copy of the weights, and
    the readout; what rows leave for the backward pass, and what one layer computes with.
    """
    model = preset.model
    if hasattr(model, "activation_bytes"):
        position = model.activation_bytes(bf16)
    else:
        width = model.hidden_size * 14 + 2 * (model.intermediate_size or 4 * model.hidden_size)
        position = model.num_layers * width * (2 if bf16 else 4)
    # the walk's buffers, and its weight and gradient
    readout = (200 << 20) + 6 * vocab_size * model.hidden_size
    # the other auxiliary heads are small
    policy = vocab_size * model.hidden_size if "enable_policy" in preset.auxiliary.heads else 0
    weights = (6 if bf16 else 4) * size.parameters + 12 * size.trained + 16 * policy
    kept = (
        min(1.0, size.share_with_graph + 1 / model.num_layers)
        if size.share_with_graph < 1.0
        else 1.0
    )
    return weights + readout, int(kept * position) * model.seq_length


def check_memory(preset: Any, vocab_size: int, runtime: Runtime) -> None:
    """Raises UserError where a run cannot fit, by what it needs at the least. Nothing is made to
    find that out.

    On a GPU too large a micro-batch is none of that: the first step halves it until it fits.
    """
    train, there = preset.train, runtime.memory_bytes()
    everything = preset.model_copy(update={"train": train.model_copy(update={"trainable": None})})
    # of all weights, also where some are frozen: counted at once
    size = size_of(everything, vocab_size)
    rows = train.per_gpu_batch_size * train.accumulation_steps * train.candidates
    needs = [
        (ROW_BYTES * rows * preset.model.seq_length, f"the {rows:,} rows of a step", FEWER_ROWS)
    ]
    if size is not None:
        states = (
            (12 if train.optimizer == "adamw" else 8) * size.trained
            if train.trainable is None
            else 0
        )
        needs.append(
            (
                4 * size.parameters + states,
                f"{size.parameters:,} weights and what trains them",
                SMALLER_MODEL,
            )
        )
    if size is not None and runtime.device.type == "cpu" and train.trainable is None:
        bf16 = runtime.compute_dtype(train.precision) == torch.bfloat16
        row = memory_estimate(preset, size, vocab_size, bf16)[1]
        needs.append(
            (
                row * train.per_gpu_batch_size // ROUGH,
                f"a pass of {train.per_gpu_batch_size:,} rows",
                FEWER_ROWS,
            )
        )
    for needed, what, advice in needs:
        if needed > there:
            raise UserError(
                f"{what} take {needed:,} bytes of memory or more, and {runtime.device_name} has "
                f"{there:,}. {advice}"
            )
