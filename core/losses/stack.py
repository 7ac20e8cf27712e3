"""The loss stack: the weighted sum of token losses on the vocabulary, without ever holding the (B*T, V) matrix of scores.

In:    a ModelOutput, a Batch, and the valid targets of the whole optimizer step
Out:   a scalar to call backward on, and the terms to report; `measure` gives evaluation's numbers by the same walk
State: none
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts import IGNORE_INDEX, Batch, ModelOutput, Readout, TokenLoss
from core.errors import UserError
from core.losses.cross_entropy import cross_entropy_values
from core.losses.walk import (
    AUTOGRAD_BLOCK_BYTES,
    BLOCK_BYTES,
    CHUNK_BYTES,
    Work,
    compute_dtype,
    even_rows,
    scores_of,
    walk,
)
from core.losses.walked import Scaled, walked_total
from core.schedules import value_at

# B batch rows, T seq_length, P = B * T positions, N those with a target, D hidden_size, V vocab_size


@dataclass
class LossTerms:
    """What one batch adds to the reports: sums over its valid targets, not weighted, detached, on the device."""

    count: Tensor  # () int64, valid targets
    sums: dict[str, Tensor]  # () for each loss
    source_sums: Tensor  # (num_sources,) the first loss, by source
    source_counts: Tensor  # (num_sources,) int64
    values: Tensor  # (B, T) the first loss at each position, 0 where there is no target


@dataclass
class Measures:
    """Evaluation's numbers: sums to add up over batches and ranks, and then to divide by `terms.count`."""

    terms: LossTerms
    cross_entropy: Tensor | None  # () in nats, whatever the losses and weights are; None for a readout without logits
    correct: Tensor  # () int64, targets that have the best score


class LossStack:
    """The losses of a run. How many positions a chunk and a block hold follows from the vocabulary, unless a test says it."""

    def __init__(self, losses: list[TokenLoss], chunk_rows: int | None = None, block_rows: int | None = None):
        names = [loss.name for loss in losses]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"the losses name {', '.join(twice)} more than once; give it once, with the weights added")
        self.losses, self.chunk_rows, self.block_rows = losses, chunk_rows, block_rows

    def check(self, readout: Readout) -> None:
        """Raises UserError when a loss cannot work on what this readout gives."""
        for loss in self.losses:
            if loss.needs != readout.provides:
                raise UserError(
                    f'the loss "{loss.name}" needs {loss.needs}, but this model\'s readout gives {readout.provides}; '
                    "choose another loss or another model"
                )

    def count(self, batch: Batch) -> Tensor:
        """Valid targets of a batch: () int64 on its device."""
        return (batch.labels != IGNORE_INDEX).sum()

    def __call__(
        self, output: ModelOutput, batch: Batch, count: float | Tensor, progress: float, num_sources: int
    ) -> tuple[Tensor, LossTerms]:
        """The total with a graph, () = sum over losses of weight * sum over targets / count, and the terms to report.

        `count` is that of the whole optimizer step over all ranks, so accumulation and padding never change the gradient.
        Without a target the total is 0 and every gradient 0. Under no_grad only values are computed.
        """
        hidden, work = self._work(output, batch, progress)
        # a count of 0 only comes with an empty sum, and 0 / 1 is what that should be
        count = count.to(_wide(hidden)).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        weights = [value_at(loss.weight, progress) for loss in self.losses]
        scaled = [Scaled(loss, w / count, _zeros(hidden, work), w != 0) for loss, w in zip(self.losses, weights)]
        total = walked_total(work, scaled, hidden)
        return total, self._terms([each.values for each in scaled], batch, work, num_sources)

    @torch.no_grad()
    def measure(self, output: ModelOutput, batch: Batch, progress: float, num_sources: int) -> Measures:
        """The losses as they are at `progress`, with cross-entropy and accuracy. No gradient."""
        hidden, work = self._work(output, batch, progress)
        readout = output.readout
        scores = scores_of(hidden, readout, [False] * (1 + len(readout.parameters())))
        values = [_zeros(hidden, work) for _ in self.losses]
        has_logits = readout.provides == "logits"
        nats, right = _zeros(hidden, work), torch.zeros_like(work.labels)
        for block in walk(work, hidden, scores):
            seen, labels, at = block.chunk.scores, block.chunk.labels, block.positions
            right[at] = (labels == (seen.argmax(dim=1) if has_logits else seen.argmin(dim=1))).long()
            with torch.autocast(hidden.device.type, enabled=False):
                if has_logits:
                    nats[at] = cross_entropy_values(seen, labels)
                for loss, into in zip(self.losses, values):
                    into[at] = nats[at] if loss.name == "cross_entropy" else loss.per_token(block.chunk)
        terms = self._terms(values, batch, work, num_sources)
        return Measures(terms, nats.sum() if has_logits else None, right.sum())

    def _work(self, output: ModelOutput, batch: Batch, progress: float) -> tuple[Tensor, Work]:
        """hidden (P, D), and what to walk over."""
        hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
        labels = batch.labels.reshape(-1)
        positions: Tensor | None = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (N,)
        if len(positions) == len(labels):
            positions = None  # nothing to leave out, nothing to gather
        else:
            labels = labels[positions]
        vocab_size, device = len(output.readout.table), hidden.device.type
        itemsize = compute_dtype(hidden, output.readout.table).itemsize
        block_bytes = BLOCK_BYTES if all(hasattr(loss, "gradient") for loss in self.losses) else AUTOGRAD_BLOCK_BYTES
        of = device if device in CHUNK_BYTES else "cuda"
        chunk_rows = self.chunk_rows or even_rows(len(labels), CHUNK_BYTES[of], vocab_size * itemsize)
        block_rows = self.block_rows or even_rows(chunk_rows, block_bytes[of], vocab_size * 4)
        return hidden, Work(output.readout, positions, labels, progress, chunk_rows, block_rows)

    def _terms(self, values: list[Tensor], batch: Batch, work: Work, num_sources: int) -> LossTerms:
        first = values[0]  # (N,)
        where = slice(None) if work.positions is None else work.positions
        sources = batch.source_ids.reshape(-1)[where].long() + 1  # padding's -1 gets a bin that nobody reads
        everywhere = first.new_zeros(batch.labels.numel())
        everywhere[where] = first
        return LossTerms(
            count=torch.full((), len(first), device=first.device),
            sums={loss.name: each.sum() for loss, each in zip(self.losses, values)},
            source_sums=first.new_zeros(num_sources + 1).index_add_(0, sources, first)[1:],
            source_counts=sources.new_zeros(num_sources + 1).index_add_(0, sources, torch.ones_like(sources))[1:],
            values=everywhere.view(batch.labels.shape),
        )


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _zeros(hidden: Tensor, work: Work) -> Tensor:
    return torch.zeros(len(work.labels), dtype=_wide(hidden), device=hidden.device)
