"""Scores, losses and gradients fused into one node of the autograd graph.

In:    ChunkPlan, the losses with their scales, and the tensors that may need gradients: hidden, the
       readout's, the table
Out:   the scaled sum of the losses; every loss's value at every scored position
State: none

Values and gradients both come from the forward pass, and backward only multiplies. So no block's
scores outlive the block and nothing is computed twice (as in Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989, here for any list of losses)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.losses.base import Chunk, Gradient, TokenLoss
from core.losses.chunked import ChunkPlan, ScoreBlock, score_blocks
from core.losses.scores import scores_of

# P positions of the batch, N those with a target, n of them in one block, D hidden_size, V
# vocab_size


@dataclass
class WeightedLoss:
    """A loss with its factor in the total, and its values."""

    loss: TokenLoss
    scale: float | Tensor  # its weight / the step's count
    values: Tensor  # (N,) filled block by block
    active: bool  # whether its weight is not 0


def fused_total(plan: ChunkPlan, losses: list[WeightedLoss], hidden: Tensor) -> Tensor:
    """Compute the sum over losses of scale * sum of values: () with a graph if anything here needs
    a gradient. Fills the values."""
    inputs = [hidden, *plan.readout.parameters(), plan.readout.table]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _FusedTotal.apply(plan, losses, *inputs)
    return _forward(plan, losses, inputs, [False] * len(inputs))[0]


class _FusedTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: ChunkPlan, losses: list[WeightedLoss], *inputs: Tensor) -> Tensor:
        total, ctx.gradients = _forward(
            plan, losses, inputs, [tensor.requires_grad for tensor in inputs]
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, (
            "backward works once per call: it hands its buffers out as the gradients"
        )
        # reading a scalar costs nothing on the CPU but would make a GPU wait
        if grad_total.device.type != "cpu" or grad_total.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_total)
        return None, None, *gradients


def _forward(
    plan: ChunkPlan, losses: list[WeightedLoss], inputs: Any, wanted: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the total, and its gradients by the inputs that want one."""
    hidden, table = inputs[0].detach(), plan.readout.table
    wants_scores, wants_table = any(wanted[:-1]), wanted[-1]
    scores = scores_of(hidden, plan.readout, wanted[:-1])
    tables = _Table(table) if wants_table and not scores.shared_with(table) else None
    into = None if not wants_table else scores.table_gradient if tables is None else tables.gradient
    # positions without a target keep the 0
    hidden_gradient = torch.zeros_like(hidden) if wanted[0] else None
    for block in score_blocks(plan, hidden, scores, hidden_gradient):
        # losses are exact: scores come in fp32 and stay so
        with torch.autocast(hidden.device.type, enabled=False):
            _answer(block, losses, wants_scores, into)
    total = torch.stack([scaled.values.sum() * scaled.scale for scaled in losses]).sum()
    gradients = [hidden_gradient, *scores.gradients(), tables.found if tables is not None else None]
    for i, wants in enumerate(wanted[:-1]):
        # no target in the batch: DDP still waits for a gradient of every parameter
        if wants and gradients[i] is None:
            gradients[i] = torch.zeros_like(inputs[i])
    return total, gradients


class _Table:
    """The gradient of a table that is not the readout's weight: none until a loss asks for it."""

    def __init__(self, table: Tensor):
        self._table = table
        self.found: Tensor | None = None  # (V, D)

    def gradient(self) -> Tensor:
        if self.found is None:
            self.found = torch.zeros_like(self._table)
        return self.found


def _answer(
    block: ScoreBlock,
    losses: list[WeightedLoss],
    wants_scores: bool,
    table: Callable[[], Tensor] | None,
) -> None:
    """Fill every loss's values, and gives the block its gradient; `table` gives the buffer for the
    table's."""
    chunk = block.chunk
    gradient = Gradient(chunk, table)
    wants = wants_scores or table is not None
    for scaled in losses:
        if not (wants and scaled.active):
            scaled.values[block.positions] = _values(scaled.loss, chunk)
        elif hasattr(scaled.loss, "add_gradient"):
            scaled.values[block.positions] = _values(scaled.loss, chunk)
            scaled.loss.add_gradient(chunk, scaled.scale, gradient)
    by_autograd = [s for s in losses if wants and s.active and not hasattr(s.loss, "add_gradient")]
    if by_autograd:
        _differentiate(block, by_autograd, wants_scores, gradient)
    if wants_scores:
        block.answer(gradient)


@torch.no_grad()
def _values(loss: TokenLoss, chunk: Chunk) -> Tensor:
    return loss.per_token(chunk)


def _differentiate(
    block: ScoreBlock, losses: list[WeightedLoss], wants_scores: bool, gradient: Gradient
) -> None:
    """Compute values and gradients of losses that have no gradient of their own."""
    chunk = block.chunk
    scores = chunk.scores.detach().requires_grad_(wants_scores)
    table = chunk.table.detach().requires_grad_(gradient.wants_table)
    leaves = [leaf for leaf in (scores, table) if leaf.requires_grad]
    with torch.enable_grad():
        parts = []
        for scaled in losses:
            values = scaled.loss.per_token(Chunk(scores, chunk.labels, table, chunk.progress))
            scaled.values[block.positions] = values.detach()
            if values.requires_grad:
                parts.append(values.sum() * scaled.scale)
        if not parts:
            return
        found = list(torch.autograd.grad(torch.stack(parts).sum(), leaves, allow_unused=True))
    by_scores = found.pop(0) if wants_scores else None
    by_table = found.pop(0) if table.requires_grad else None
    if by_scores is not None:
        gradient.add_dense(by_scores.contiguous())
    if by_table is not None and gradient.table is not None:
        gradient.table.add_(by_table)
