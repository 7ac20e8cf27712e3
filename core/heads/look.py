"""What an auxiliary head sees of a forward pass, and how it finds a place to look at in each row.

In:    a Batch, a ModelOutput; a draw for each row
Out:   Seen; positions that are valid and equally likely
State: none

A place is chosen on the CPU before the forward pass, from the batch alone: so its losses are counted over the whole optimizer
step beforehand, and no micro-batch, rank or restart changes where a head looks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from core.contracts import Batch, LanguageModel, Readout

# B batch rows, T seq_length, D hidden_size, n positions of a row

NOWHERE = -1
"""The place in a row that has none."""


@dataclass
class Seen:
    """A forward pass, as heads see it."""

    hidden: Tensor  # (B, T, D) with its graph
    readout: Readout
    batch: Batch
    surprise: Callable[[Tensor], Tensor]  # positions (B, n) -> -log p of their targets (B, n), 0 where there is none; no graph
    dtype: torch.dtype  # of large matrix products; all else is fp32 or wider
    model: LanguageModel | None = None  # for a head that has it read something else
    heads: Mapping[str, nn.Module] = field(default_factory=dict)  # all that are on, for a head that builds on others

    def at(self, positions: Tensor) -> Tensor:
        """Hidden states: (B,) -> (B, D) or (B, n) -> (B, n, D), in fp32 or wider."""
        rows = torch.arange(len(positions), device=positions.device).view(-1, *[1] * (positions.ndim - 1))
        return self.wide(self.hidden[rows, positions])

    def wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pick(valid: Tensor, draws: Tensor) -> Tensor:
    """One of the valid positions of each row: (B, T) bool, (B,) int64 >= 0 -> (B,), NOWHERE in a row without one."""
    count = valid.sum(1)
    number = draws % count.clamp(min=1)
    position = (valid.cumsum(1) <= number[:, None]).sum(1)
    return torch.where(count > 0, position, NOWHERE)


def document_bounds(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where the document of each position begins and stops in its row: (B, T) each."""
    ids = batch.document_ids
    T = ids.shape[1]
    time = torch.arange(T, device=ids.device).expand(ids.shape)
    first, last = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = last[:, :-1] = ids[:, 1:] != ids[:, :-1]
    begin = torch.where(first, time, 0).cummax(1).values
    stop = torch.where(last, time + 1, T).flip(1).cummin(1).values.flip(1)
    return begin, stop


def is_text(batch: Batch) -> Tensor:
    """False on padding: (B, T)."""
    return batch.source_ids >= 0
