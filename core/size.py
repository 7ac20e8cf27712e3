"""How large a preset's model is, and what memory training it takes, before anything is made: what the menu tells.

In:    a preset, the size of its vocabulary
Out:   Size; bytes
State: none
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from core.assembly import build_model
from core.contracts import call_if_defined
from core.freezing import share_with_graph, train_only


@dataclass(frozen=True)
class Size:
    """What a preset's model is, before it is built: shared parameters counted once."""

    parameters: int
    trained: int
    share_with_graph: float  # of the layers: those that leave something for the backward pass


class _Undrawn(TorchFunctionMode):
    """Nothing is drawn: into tensors without memory torch would draw by way of its compiler, whose import takes over a second."""

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        named = named or {}
        drawn = function in (init.normal_, init.uniform_, init.kaiming_uniform_)
        return [*arguments, *named.values()][0] if drawn else function(*arguments, **named)


def size_of(preset: Any, vocab_size: int) -> Size | None:
    """Without allocating any weights; None where nobody knows before the model is there.

    A model that is slow to build, or to import, counts its own in its settings. Raises UserError for patterns that name nothing.
    """
    settings, wish = preset.model, preset.train.trainable
    if hasattr(settings, "num_parameters"):
        count = settings.num_parameters(vocab_size)
        if count is None or wish is None:
            frozen = call_if_defined(settings, "num_frozen", vocab_size) or 0
            return None if count is None else Size(count, count - frozen, 1.0)
    with torch.device("meta"), _Undrawn():
        model = build_model(preset, vocab_size)
    train_only(model, wish)
    parameters = list(model.parameters())
    return Size(
        sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad), share_with_graph(model)
    )


def memory_estimate(preset: Any, size: Size, vocab_size: int, bf16: bool) -> tuple[int, int]:
    """Bytes one device needs, roughly: whatever the batch, and for each row of a micro-batch.

    Weights in fp32, of the trained ones gradients and AdamW, autocast's copy of the weights, and the readout; what rows leave for
    the backward pass, and what one layer computes with.
    """
    model = preset.model
    if hasattr(model, "activation_bytes"):
        position = model.activation_bytes(bf16)
    else:
        width = model.hidden_size * 14 + 2 * (model.intermediate_size or 4 * model.hidden_size)
        position = model.num_layers * width * (2 if bf16 else 4)
    readout = (200 << 20) + 6 * vocab_size * model.hidden_size  # the walk's buffers, and its weight and gradient
    policy = vocab_size * model.hidden_size if preset.auxiliary.enable_policy else 0  # the other auxiliary heads are small
    weights = (6 if bf16 else 4) * size.parameters + 12 * size.trained + 16 * policy
    kept = min(1.0, size.share_with_graph + 1 / model.num_layers) if size.share_with_graph < 1.0 else 1.0
    return weights + readout, int(kept * position) * model.seq_length
