"""The inputs of auxiliary heads: a forward pass, and the positions to look at in each row.

In:    a Batch, a ModelOutput; a draw for each row
Out:   HeadInputs; positions that are valid and equally likely
State: none

A place is chosen on the CPU before the forward pass, from the batch alone: so its losses are
counted over the whole optimizer step beforehand, and no micro-batch, rank or restart changes where
a head looks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from core.contracts import IGNORE_INDEX, Batch, LanguageModel, Readout

# B batch rows, T seq_length, D hidden_size, n positions of a row

NOWHERE = -1
"""The place in a row that has none."""


@dataclass
class HeadInputs:
    """A forward pass, as heads see it."""

    hidden: Tensor  # (B, T, D) with its graph
    readout: Readout
    batch: Batch
    # positions (B, n) -> -log p of their targets (B, n), 0 where there is none; no graph
    nll: Callable[[Tensor], Tensor]
    dtype: torch.dtype  # of large matrix products; all else is fp32 or wider
    model: LanguageModel | None = None  # for a head that has it read something else
    # all that are on, for a head that builds on others
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Of what the model made of something else: hidden (B, n, D), labels (B, n) -> the sum () with
    its graph, values (B, n)."""

    def at(self, positions: Tensor) -> Tensor:
        """Hidden states: (B,) -> (B, D) or (B, n) -> (B, n, D), in fp32 or wider."""
        rows = torch.arange(len(positions), device=positions.device).view(
            -1, *[1] * (positions.ndim - 1)
        )
        return self.wide(self.hidden[rows, positions])

    def wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pick(valid: Tensor, draws: Tensor) -> Tensor:
    """Pick one of the valid positions of each row: (B, T) bool, (B,) int64 >= 0 -> (B,), NOWHERE in
    a row without one."""
    count = valid.sum(1)
    number = draws % count.clamp(min=1)
    position = (valid.cumsum(1) <= number[:, None]).sum(1)
    return torch.where(count > 0, position, NOWHERE)


def pick_several(valid: Tensor, draws: Tensor, n: int) -> Tensor:
    """Pick several, spread evenly from one that is drawn: (B, T) bool, (B,) -> (B, n); some twice
    in a row that has fewer."""
    count = valid.sum(1).clamp(min=1)
    return torch.stack([pick(valid, draws % count + i * count // n) for i in range(n)], dim=1)


def document_bounds(batch: Batch) -> tuple[Tensor, Tensor]:
    """Find where the document of each position begins and stops in its row: (B, T) each."""
    ids = batch.document_ids
    T = ids.shape[1]
    time = torch.arange(T, device=ids.device).expand(ids.shape)
    first, last = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = last[:, :-1] = ids[:, 1:] != ids[:, :-1]
    begin = torch.where(first, time, 0).cummax(1).values
    stop = torch.where(last, time + 1, T).flip(1).cummin(1).values.flip(1)
    return begin, stop


def targets_ahead(batch: Batch, n: int) -> Tensor:
    """Count how many of the positions p .. p+n-1 have a target and are in the document of p: (B,
    T)."""
    known = (batch.labels != IGNORE_INDEX).long()  # (B, T)
    before = nn.functional.pad(known.cumsum(1), (1, 0))  # (B, T+1) targets left of a position
    _, stop = document_bounds(batch)
    time = torch.arange(known.shape[1], device=known.device).expand(known.shape)
    return before.gather(1, torch.minimum(time + n, stop)) - before[:, :-1]


def is_text(batch: Batch) -> Tensor:
    """Tell text from padding: False on padding: (B, T)."""
    return batch.source_ids >= 0
