"""The whole walk as one node of the autograd graph.

In:    Work, the losses with their scales, and the tensors that may need gradients: hidden, the readout's, the table
Out:   the scaled sum of the losses; every loss's value at every scored position
State: none

Values and gradients both come from the forward pass, and backward only multiplies. So no block's scores outlive the block and
nothing is computed twice (as in Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, here for any list of losses).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts import Chunk, TokenLoss
from core.losses.walk import Block, Work, scores_of, walk

# P positions of the batch, N those with a target, n of them in one block, D hidden_size, V vocab_size


@dataclass
class Scaled:
    """A loss at work."""

    loss: TokenLoss
    scale: float | Tensor  # its weight / the step's count
    values: Tensor  # (N,) filled by the walk
    active: bool  # whether its weight is not 0


def walked_total(work: Work, losses: list[Scaled], hidden: Tensor) -> Tensor:
    """The sum over losses of scale * sum of values: () with a graph if anything here needs a gradient. Fills the values."""
    inputs = [hidden, *work.readout.parameters(), work.readout.table]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Walked.apply(work, losses, *inputs)
    return _forward(work, losses, inputs, [False] * len(inputs))[0]


class _Walked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, losses: list[Scaled], *inputs: Tensor) -> Tensor:
        total, ctx.gradients = _forward(work, losses, inputs, [tensor.requires_grad for tensor in inputs])
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "backward works once per call: it hands its buffers out as the gradients"
        # reading a scalar costs nothing on the CPU but would make a GPU wait
        if grad_total.device.type != "cpu" or grad_total.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_total)
        return None, None, *gradients


def _forward(work: Work, losses: list[Scaled], inputs: Any, wanted: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The total, and its gradients by the inputs that want one."""
    hidden = inputs[0].detach()
    wants_scores, wants_table = any(wanted[:-1]), wanted[-1]
    scores = scores_of(hidden, work.readout, wanted[:-1])
    hidden_gradient = torch.zeros_like(hidden) if wanted[0] else None  # positions without a target keep the 0
    table_gradient = None
    for block in walk(work, hidden, scores, hidden_gradient):
        with torch.autocast(hidden.device.type, enabled=False):  # losses are exact: scores come in fp32 and stay so
            share = _answer(block, losses, wants_scores, wants_table)
        if share is not None:
            table_gradient = share.contiguous() if table_gradient is None else table_gradient.add_(share)
    total = torch.stack([scaled.values.sum() * scaled.scale for scaled in losses]).sum()
    gradients = [hidden_gradient, *scores.gradients(), table_gradient]
    for i, wants in enumerate(wanted[:-1]):
        if wants and gradients[i] is None:  # no target in the batch: DDP still waits for a gradient of every parameter
            gradients[i] = torch.zeros_like(inputs[i])
    return total, gradients


def _answer(block: Block, losses: list[Scaled], wants_scores: bool, wants_table: bool) -> Tensor | None:
    """Fills every loss's values, sets the block's gradient, and returns the table's (V, D) if a loss used it."""
    chunk = block.chunk
    wants = wants_scores or wants_table
    passive = [scaled for scaled in losses if not (wants and scaled.active)]
    analytic = [scaled for scaled in losses if wants and scaled.active and hasattr(scaled.loss, "gradient")]
    others = [scaled for scaled in losses if wants and scaled.active and not hasattr(scaled.loss, "gradient")]
    for scaled in passive:
        scaled.values[block.positions] = scaled.loss.per_token(chunk)
    table_gradient = None
    if others:
        block.gradient, table_gradient = _by_autograd(block, others, wants_scores, wants_table)
    for scaled in analytic:  # after all that still read the scores: the last of these overwrites them
        out = chunk.scores if scaled is analytic[-1] else torch.empty_like(chunk.scores)
        scaled.values[block.positions] = scaled.loss.gradient(chunk, scaled.scale, out)
        block.gradient = out if block.gradient is None else out.add_(block.gradient)
    if not wants_scores:
        block.gradient = None
    return table_gradient


def _by_autograd(
    block: Block, losses: list[Scaled], wants_scores: bool, wants_table: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Fills the values of these losses; the gradients by scores (n, V) and table (V, D)."""
    chunk = block.chunk
    scores = chunk.scores.detach().requires_grad_(wants_scores)
    table = chunk.table.detach().requires_grad_(wants_table)
    leaves = [leaf for leaf in (scores, table) if leaf.requires_grad]
    with torch.enable_grad():
        parts = []
        for scaled in losses:
            values = scaled.loss.per_token(Chunk(scores, chunk.labels, table, chunk.progress))
            scaled.values[block.positions] = values.detach()
            if values.requires_grad:
                parts.append(values.sum() * scaled.scale)
        if not parts:
            return None, None
        found = list(torch.autograd.grad(torch.stack(parts).sum(), leaves, allow_unused=True))
    by_scores = found.pop(0) if wants_scores else None
    return by_scores, found.pop(0) if wants_table else None
