"""What tests of losses are made of: a small batch with its readout, and the plain computation of
every loss.

The definitions here are the papers' and specifications' own, on the whole matrix of scores,
differentiated by autograd."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import IGNORE_INDEX, Batch, ModelOutput
from core.losses.base import Chunk
from core.models.readout import LinearReadout
from core.schedules import value_at

# B batch rows, T seq_length, D hidden_size, V vocab_size, N positions with a target
B, T, D, V = 3, 11, 8, 37


class CurvedReadout:
    """A readout that is no matrix product, whose backward needs its own output (exp)."""

    provides, linear = "logits", None

    def __init__(self, weight: Tensor, table: Tensor):
        self.weight, self.table = weight, table

    def __call__(self, hidden: Tensor) -> Tensor:
        return (F.normalize(hidden, dim=-1) @ F.normalize(self.weight, dim=-1).T).exp()

    def parameters(self) -> list[Tensor]:
        return [self.weight]


@dataclass
class Setup:
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    table: Tensor  # (V, D) the weight itself when tied
    batch: Batch

    @property
    def output(self) -> ModelOutput:
        return ModelOutput(self.hidden, LinearReadout(self.weight, self.bias, self.table))

    @property
    def leaves(self) -> list[Tensor]:
        found = {
            id(t): t
            for t in (self.hidden, self.weight, self.bias, self.table)
            if t is not None and t.requires_grad
        }
        return list(found.values())


def make_batch(labels: Tensor) -> Batch:
    sources = torch.arange(labels.shape[0], dtype=torch.int32)[:, None].expand(labels.shape) % 2
    sources = torch.where(labels == IGNORE_INDEX, -1, sources).int()
    zeros = torch.zeros_like(labels)
    return Batch(zeros, labels, zeros, zeros.int(), sources, packed=False)


def make(
    masked: float = 0.3,
    tied: bool = False,
    bias: bool = True,
    rows: int = B,
    dtype: torch.dtype = torch.float64,
) -> Setup:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    hidden, weight, offsets, table = normal(rows, T, D), normal(V, D), normal(V), normal(V, D)
    labels = torch.randint(V, (rows, T), generator=generator)
    labels[torch.rand(rows, T, generator=generator) < masked] = IGNORE_INDEX
    return Setup(
        hidden, weight, offsets if bias else None, weight if tied else table, make_batch(labels)
    )


def plain_total(
    setup: Setup, losses: list, count: float | Tensor, output: ModelOutput | None = None
) -> Tensor:
    output = output or setup.output
    keep = setup.batch.labels != IGNORE_INDEX
    scores = output.readout(output.hidden[keep])
    labels = setup.batch.labels[keep]
    total = torch.zeros((), dtype=scores.dtype)
    for loss in losses:
        values = plain_values(loss, scores, labels, output.readout.table)
        total = total + loss.weight * values.sum() / count
    return total


def gradients(total: Tensor, leaves: list[Tensor], factor: float = 1.0) -> list[Tensor]:
    found = torch.autograd.grad(total * factor, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) <= tolerance


# the plain computation ----------------------------------------------------------------------------


def plain_values(
    loss: Any, scores: Tensor, labels: Tensor, table: Tensor, progress: float = 0.0
) -> Tensor:
    """(N,) of any loss: by its definition below, or its own `per_token` where it has none (losses
    of a test)."""
    settings = getattr(loss, "settings", None)
    if settings is None:
        return loss.per_token(Chunk(scores, labels, table, progress))
    return globals()[f"plain_{settings.type}"](settings, scores, labels, table, progress)


def plain_cross_entropy(
    settings: Any, scores: Tensor, labels: Tensor, table: Tensor, progress: float
) -> Tensor:
    smoothing = value_at(settings.label_smoothing, progress)
    return F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)


def plain_z_loss(
    settings: Any, scores: Tensor, labels: Tensor, table: Tensor, progress: float
) -> Tensor:
    return scores.logsumexp(dim=1) ** 2


def plain_sharpness(
    settings: Any, scores: Tensor, labels: Tensor, table: Tensor, progress: float
) -> Tensor:
    p = scores.softmax(dim=1)
    if settings.penalty == "non_max_sum":
        return 1 - p.max(dim=1).values
    if settings.penalty == "neg_max_prob":
        return -p.max(dim=1).values
    if settings.penalty == "neg_entropy":
        return -(p * scores.log_softmax(dim=1)).sum(dim=1)
    return 1 - p.topk(min(settings.top_k, p.shape[1]), dim=1).values.sum(dim=1)


def plain_cosine(
    settings: Any, scores: Tensor, labels: Tensor, table: Tensor, progress: float
) -> Tensor:
    p = (scores / value_at(settings.temperature, progress)).softmax(dim=1)
    if settings.detach_table:
        table = table.detach()
    if settings.topk is not None:
        kept = p.topk(min(settings.topk, p.shape[1]), dim=1)
        p = torch.zeros_like(p).scatter(1, kept.indices, kept.values)
    mean, target = F.normalize(p @ table, dim=1), F.normalize(table[labels], dim=1)
    return 1 - (mean * target).sum(dim=1)


def plain_harmonic(
    settings: Any, scores: Tensor, labels: Tensor, table: Tensor, progress: float
) -> Tensor:
    exponent = value_at(settings.h_exp, progress) * (1.0 if settings.distance == "squared" else 0.5)
    powers = exponent * (scores + 1e-8).log()
    return powers.logsumexp(dim=1) - powers.gather(1, labels[:, None]).squeeze(1)
