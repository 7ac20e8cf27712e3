"""Model, losses and auxiliary heads as one: the loss that a step minimises, and the clipping of its
gradient.

In:    a batch, the counts of the whole step, progress
Out:   the loss to call backward on, the terms it is made of; the gradient's norm
State: that of its parts
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from core.contracts import Batch, LanguageModel
from core.heads.stack import HeadStack
from core.losses.stack import LossStack, LossTerms
from core.parallel.shards import full
from core.schedules import value_at


class Objective(nn.Module):
    """Model, losses and auxiliary heads as one module, so that data parallelism sees every forward
    and backward pass whole."""

    def __init__(
        self,
        model: LanguageModel,
        stack: LossStack,
        num_sources: int,
        heads: HeadStack | None = None,
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
        """Compute the loss of a micro-batch, and the terms it is made of.

        count         targets that this rank's share of a step is divided by
        head_counts   the same for each head, in rows
        """
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
        """Clip the gradient to a global norm.

        Returns the norm before clipping: not finite where any gradient is not. Heads that the model
        learns nothing from are clipped separately, so that their gradients do not shrink the
        model's.
        """
        apart = [] if self.heads is None else self.heads.apart()
        separate = [list(head.parameters()) for head in apart]
        separate_ids = {id(p) for group in separate for p in group}
        together = [p for p in self.parameters() if id(p) not in separate_ids]
        norm, *norms = [
            full(torch.nn.utils.clip_grad_norm_(group, max_norm)) for group in (together, *separate)
        ]
        return norm + 0.0 * sum(norms)

    def weights(self, progress: float) -> dict[str, float]:
        """Return the weight of each loss now, those of heads included."""
        weights = {loss.name: value_at(loss.weight, progress) for loss in self.stack.losses}
        return weights if self.heads is None else weights | self.heads.weights(progress)

    def scheduled(self, progress: float) -> dict[str, float]:
        """Return the present value of each number that changes over the run."""
        values = self.stack.scheduled(progress)
        return values if self.heads is None else values | self.heads.scheduled(progress)
