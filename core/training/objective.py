"""Model, losses and auxiliary heads as one: what a step minimises, and what is clipped and told of
it.

In:    a batch, the counts of the whole step, progress
Out:   the loss to go back from, the terms it is made of; the gradient's norm
State: that of its parts
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from core.contracts import Batch
from core.heads.stack import HeadStack
from core.losses.stack import LossStack, LossTerms
from core.schedules import value_at


class Objective(nn.Module):
    """Model, losses and auxiliary heads as one module, so that data parallelism sees every forward
    and backward pass whole."""

    def __init__(
        self, model: nn.Module, stack: LossStack, num_sources: int, heads: HeadStack | None = None
    ):
        super().__init__()
        self.model, self.stack, self.num_sources, self.heads = model, stack, num_sources, heads

    def forward(
        self,
        batch: Batch,
        count: float,
        progress: float,
        head_counts: dict[str, float] | None = None,
    ) -> tuple[Tensor, LossTerms]:
        """`count` and `head_counts`: the targets, and the rows of each head, that this rank's share
        of a step is divided by."""
        output = self.model(batch)
        total, terms = self.stack(output, batch, count, progress, self.num_sources)
        if self.heads is None:
            return total, terms
        nll = partial(self.stack.nll_at, output, batch, terms)
        cross_entropy = partial(self.stack.cross_entropy, output.readout)
        inputs = self.heads.inputs(self.model, output, batch, nll, cross_entropy)
        added, sums = self.heads(inputs, head_counts or {}, progress)
        sums = {name: value.to(terms.values.dtype) for name, value in sums.items()}
        return total + added, replace(terms, sums={**terms.sums, **sums})

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradient to a global norm; returns what it was, or what is not finite if
        anything is not. Heads that the model learns nothing from are clipped each alone: their size
        is no matter of the model's."""
        apart = (
            [list(head.parameters()) for head in self.heads.apart()]
            if self.heads is not None
            else []
        )
        others = {id(p) for group in apart for p in group}
        groups = [[p for p in self.parameters() if id(p) not in others], *apart]
        norm, *norms = [torch.nn.utils.clip_grad_norm_(group, max_norm) for group in groups]
        return norm + 0.0 * sum(norms)

    def weights(self, progress: float) -> dict[str, float]:
        """Of all losses, those of heads included."""
        of_losses = {loss.name: value_at(loss.weight, progress) for loss in self.stack.losses}
        return of_losses | (self.heads.weights(progress) if self.heads is not None else {})

    def scheduled(self, progress: float) -> dict[str, float]:
        """What changes over the run, as it is now."""
        return self.stack.scheduled(progress) | (
            self.heads.scheduled(progress) if self.heads is not None else {}
        )
