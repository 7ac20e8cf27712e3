"""The loss stack: the weighted sum of token losses on the vocabulary, without ever holding the
(B*T, V) matrix of scores.

In:    a ModelOutput, a Batch, and the valid targets of the whole optimizer step
Out:   a scalar to call backward on, and the terms to report; `measure` gives evaluation's numbers
       in the same chunks
State: none
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts import IGNORE_INDEX, Batch, ModelOutput, Readout, call_if_defined
from core.errors import UserError
from core.losses.base import TokenLoss
from core.losses.chunked import (
    BLOCK_BYTES,
    TABLE_BLOCK_BYTES,
    ChunkPlan,
    chunk_bytes,
    even_rows,
    score_blocks,
)
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.fused import WeightedLoss, fused_total
from core.losses.scores import compute_dtype, scores_of
from core.losses.token_stats import TOKEN_STATS
from core.schedules import changes, value_at

# B batch rows, T seq_length, P = B * T positions, N those with a target, D hidden_size, V
# vocab_size


@dataclass
class LossTerms:
    """A batch's share of the reports: sums over its valid targets, not weighted, detached, on
    the device."""

    count: Tensor  # () int64, valid targets
    sums: dict[str, Tensor]  # () for each loss
    source_sums: Tensor  # (num_sources,) the first loss, by source
    source_counts: Tensor  # (num_sources,) int64
    values: Tensor  # (B, T) the first loss at each position, 0 where there is no target


@dataclass
class Measures:
    """Evaluation's numbers: sums to add up over batches and ranks, and then to divide by
    `terms.count`."""

    terms: LossTerms
    # () each, by the metric's key: of the predictions whatever the losses are, and of the losses
    token_stats: dict[str, Tensor]


class LossStack:
    """The losses of a run. How many positions a chunk and a block hold follows from the vocabulary,
    unless a test says it."""

    def __init__(
        self, losses: list[TokenLoss], chunk_rows: int | None = None, block_rows: int | None = None
    ):
        assert len({loss.name for loss in losses}) == len(losses), "losses report by name"
        self.losses, self.chunk_rows, self.block_rows = losses, chunk_rows, block_rows

    def check(self, readout: Readout) -> None:
        """Check the losses against a readout. Raises UserError when a loss needs other scores
        than this readout gives."""
        for loss in self.losses:
            if loss.needs != readout.provides:
                raise UserError(
                    f'the loss "{loss.name}" needs {loss.needs}, but this model\'s readout gives '
                    f"{readout.provides}; "
                    "choose another loss or another model"
                )

    def scheduled(self, progress: float) -> dict[str, float]:
        """Return the losses' settings that change over the run, as they are now:
        {"harmonic.h_exp": -7.5}."""
        settings = {
            f"{loss.name}.{key}": value for loss in self.losses for key, value in loss.settings
        }
        return {key: value_at(value, progress) for key, value in settings.items() if changes(value)}

    def count(self, batch: Batch) -> Tensor:
        """Count the valid targets of a batch: () int64 on its device."""
        return (batch.labels != IGNORE_INDEX).sum()

    def __call__(
        self,
        output: ModelOutput,
        batch: Batch,
        count: float | Tensor,
        progress: float,
        num_sources: int,
    ) -> tuple[Tensor, LossTerms]:
        """Compute the total with a graph, () = sum over losses of weight * sum over targets /
        count, and the terms to report.

        `count` is that of the whole optimizer step over all ranks, so accumulation and padding
        never change the gradient. Without a target the total is 0 and every gradient 0. Under
        no_grad only values are computed."""
        reads_table = any(
            getattr(loss, "reads_table", False) or not hasattr(loss, "add_gradient")
            for loss in self.losses
        )
        hidden, plan = self._plan(output, batch, progress, reads_table)
        # a count of 0 only comes with an empty sum, and 0 / 1 is what that should be
        count = count.to(_wide(hidden)).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        weights = [value_at(loss.weight, progress) for loss in self.losses]
        weighted = [
            WeightedLoss(loss, scale=w / count, values=_zeros(hidden, plan), active=w != 0)
            for loss, w in zip(self.losses, weights)
        ]
        total = fused_total(plan, weighted, hidden)
        return total, self._terms([each.values for each in weighted], batch, plan, num_sources)

    @torch.no_grad()
    def measure(
        self, output: ModelOutput, batch: Batch, progress: float, num_sources: int
    ) -> Measures:
        """Measure the losses as they are at `progress`, and the token statistics. No gradient."""
        hidden, plan = self._plan(output, batch, progress, reads_table=True)
        readout = output.readout
        scores = scores_of(hidden, readout, [False] * (1 + len(readout.parameters())))
        values = [_zeros(hidden, plan) for _ in self.losses]
        stats = dict(TOKEN_STATS[readout.provides])
        for loss in self.losses:
            stats |= call_if_defined(loss, "token_stats") or {}
        found = {key: _zeros(hidden, plan) for key in stats}
        for block in score_blocks(plan, hidden, scores):
            chunk, at = block.chunk, block.positions
            with torch.autocast(hidden.device.type, enabled=False):
                for key, into in found.items():
                    into[at] = stats[key](chunk).to(into.dtype)
                for loss, into in zip(self.losses, values):
                    into[at] = loss.per_token(chunk)
        terms = self._terms(values, batch, plan, num_sources)
        return Measures(terms, {key: each.sum() for key, each in found.items()})

    @torch.no_grad()
    def nll_at(self, output: ModelOutput, batch: Batch, terms: LossTerms, at: Tensor) -> Tensor:
        """Compute -log p of the targets at some positions of each row: (B, n) -> (B, n), 0 where
        there is none.

        `terms`: what the call gave. If the first loss is plain cross-entropy they hold it; else it
        is computed here."""
        first = self.losses[0]
        if isinstance(first, CrossEntropy) and first.settings.label_smoothing == 0.0:
            return terms.values.gather(1, at)
        # (B, n, D)
        hidden = output.hidden.gather(1, at[:, :, None].expand(-1, -1, output.hidden.shape[-1]))
        return self.cross_entropy(output.readout, hidden, batch.labels.gather(1, at))[1]

    def cross_entropy(
        self, readout: Readout, hidden: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute plain cross-entropy of any hidden states (B, n, D) and labels (B, n), whatever
        the losses are: its sum () with a graph, and its values (B, n) without one, 0 where there is
        no target. Computed in chunks, as all losses are."""
        zeros = torch.zeros_like(labels)
        # losses read the labels only
        part = Batch(zeros, labels, zeros, zeros.int(), zeros.int(), packed=False)
        plain = LossStack([CrossEntropy(CrossEntropySettings())], self.chunk_rows, self.block_rows)
        total, terms = plain(ModelOutput(hidden, readout), part, 1, 0.0, 1)
        return total, terms.values

    def _plan(
        self, output: ModelOutput, batch: Batch, progress: float, reads_table: bool
    ) -> tuple[Tensor, ChunkPlan]:
        """Flatten the hidden states to (P, D), and plan which positions to score."""
        hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
        labels: Tensor = batch.labels.reshape(-1)
        found = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (N,)
        # with nothing to leave out there is nothing to gather
        positions = None if len(found) == len(labels) else found
        labels = labels if positions is None else labels[positions]
        vocab_size, device = len(output.readout.table), hidden.device
        itemsize = compute_dtype(hidden, output.readout.table).itemsize
        sizes = TABLE_BLOCK_BYTES if reads_table else BLOCK_BYTES
        block_bytes = sizes["cpu" if device.type == "cpu" else "cuda"]
        row_bytes = vocab_size * itemsize
        chunk_rows = self.chunk_rows or even_rows(len(labels), chunk_bytes(device), row_bytes)
        block_rows = self.block_rows or even_rows(chunk_rows, block_bytes, vocab_size * 4)
        return hidden, ChunkPlan(
            output.readout, positions, labels, progress, chunk_rows, block_rows
        )

    def _terms(
        self, values: list[Tensor], batch: Batch, plan: ChunkPlan, num_sources: int
    ) -> LossTerms:
        first = values[0]  # (N,)
        where = slice(None) if plan.positions is None else plan.positions
        # padding's -1 gets a bin that nobody reads
        sources = batch.source_ids.reshape(-1)[where].long() + 1
        everywhere = first.new_zeros(batch.labels.numel())
        everywhere[where] = first
        ones = torch.ones_like(sources)
        return LossTerms(
            count=torch.full((), len(first), device=first.device),
            sums={loss.name: each.sum() for loss, each in zip(self.losses, values)},
            source_sums=first.new_zeros(num_sources + 1).index_add_(0, sources, first)[1:],
            source_counts=sources.new_zeros(num_sources + 1).index_add_(0, sources, ones)[1:],
            values=everywhere.view(batch.labels.shape),
        )


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _zeros(hidden: Tensor, plan: ChunkPlan) -> Tensor:
    return torch.zeros(len(plan.labels), dtype=_wide(hidden), device=hidden.device)
