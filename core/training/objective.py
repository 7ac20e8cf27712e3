"""Model, losses and auxiliary heads as one: the loss that a step minimises.

In:    a batch, the counts of the whole step, progress
Out:   the loss to call backward on, the terms it is made of
State: that of its parts
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from core.contracts import Batch, LanguageModel
from core.heads.stack import HeadStack
from core.losses.stack import LossStack, LossTerms
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
        dtype: torch.dtype = torch.float32,
    ):
        """`dtype`: of large products, over weights that stay fp32."""
        super().__init__()
        self.model, self.stack, self.num_sources, self.heads = model, stack, num_sources, heads
        self.dtype = dtype

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
        kind, low = batch.labels.device.type, self.dtype != torch.float32
        # autocast stands in here: DeepSpeed switches off one that stands around a module
        with torch.autocast(kind, dtype=self.dtype, enabled=low):
            return self._loss(batch, count, progress, head_counts or {})

    def _loss(
        self, batch: Batch, count: float, progress: float, head_counts: dict[str, float]
    ) -> tuple[Tensor, LossTerms]:
        output = self.model(batch)
        total, terms = self.stack(output, batch, count, progress, self.num_sources)
        if self.heads is None:
            return total, terms
        nll = partial(self.stack.nll_at, output, batch, terms)
        cross_entropy = partial(self.stack.cross_entropy, output.readout)
        inputs = self.heads.inputs(self.model, output, batch, nll, cross_entropy)
        added, sums = self.heads(inputs, head_counts, progress)
        sums = {name: value.to(terms.values.dtype) for name, value in sums.items()}
        return total + added, replace(terms, sums={**terms.sums, **sums})

    def clipped_together(self) -> list[list[nn.Parameter]]:
        """Return the parameters in groups, each of which is clipped to a global norm of its own:
        first the model with its heads, then each head that the model learns nothing from, so that
        its gradients do not shrink the model's."""
        apart = [] if self.heads is None else self.heads.apart()
        separate = [list(head.parameters()) for head in apart]
        separate_ids = {id(p) for group in separate for p in group}
        return [[p for p in self.parameters() if id(p) not in separate_ids], *separate]

    def weights(self, progress: float) -> dict[str, float]:
        """Return the weight of each loss now, those of heads included."""
        weights = {loss.name: value_at(loss.weight, progress) for loss in self.stack.losses}
        return weights if self.heads is None else weights | self.heads.weights(progress)

    def scheduled(self, progress: float) -> dict[str, float]:
        """Return the present value of each number that changes over the run."""
        values = self.stack.scheduled(progress)
        return values if self.heads is None else values | self.heads.scheduled(progress)
