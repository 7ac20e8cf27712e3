"""The numbers of one step, over all micro-batches and ranks.

In:    the terms of each micro-batch, the gradient's norm, the counts of the whole step
Out:   StepReport, the same on every rank
State: none
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts import call_if_defined
from core.data.loader import StepRows
from core.losses.stack import LossTerms
from core.parallel.protocol import Parallel
from core.training.objective import Objective
from core.training.source_weights import SourceLoss


@dataclass
class StepReport:
    """The numbers of a step."""

    loss: float
    losses: dict[str, float]
    grad_norm: float
    by_source: list[SourceLoss]
    model: dict[str, float]  # what the model reports of itself

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def step_report(
    objective: Objective,
    terms: list[LossTerms],
    grad_norm: Tensor,
    rows: StepRows,
    source_names: list[str],
    progress: float,
    parallel: Parallel,
) -> StepReport:
    """Add up the numbers of all micro-batches and ranks, with the one read of the device that a
    step makes. Every rank must call it."""
    names = list(terms[0].sums)
    by_name = [torch.stack([t.sums[name] for name in names]) for t in terms]
    sums = torch.stack(by_name).double().sum(0)
    source_sums = torch.stack([t.source_sums for t in terms]).double().sum(0)
    source_counts = torch.stack([t.source_counts for t in terms]).double().sum(0)
    # of each rank's last micro-batch; the mean over ranks is reported
    of_model: dict[str, Tensor] = call_if_defined(objective.model, "report") or {}
    packed = [grad_norm.double().reshape(1), sums, source_sums, source_counts]
    packed += [value.double().reshape(1) for value in of_model.values()]
    norm, *local = torch.cat(packed).tolist()  # the one wait for the device
    numbers = iter(parallel.sum(local))
    losses = {
        name: next(numbers) / max(rows.head_counts.get(name, rows.num_targets), 1) for name in names
    }
    loss_sums, targets = ([next(numbers) for _ in source_names] for _ in range(2))
    weights = objective.weights(progress)
    return StepReport(
        loss=sum(weights[name] * value for name, value in losses.items()),
        losses=losses,
        grad_norm=norm,
        by_source=[SourceLoss(*each) for each in zip(source_names, loss_sums, targets)],
        model={name: next(numbers) / parallel.world_size for name in of_model},
    )
