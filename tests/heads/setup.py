"""What tests of heads are made of: rows of documents, a model, and the heads on it."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.contracts import IGNORE_INDEX, Batch
from core.heads import HEADS, AuxiliarySettings
from core.heads.inputs import NOWHERE, HeadInputs
from core.heads.stack import HeadStack
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.initial import draw_weights
from core.models.readout import LinearReadout
from core.training.objective import Objective
from tests.models.test_models import T, V, build

ON = {f"enable_{name}": True for name in HEADS}
ALL: dict[str, Any] = ON | {"memory_tokens_after": 3}
"""All heads, as they fit into short rows."""
SHIPPED = (
    "policy",
    "value",
    "dynamics",
    "span_contrastive",
    "rollouts",
    "planner",
    "memory",
    "draft",
)
"""The heads of which tests/heads has a plain reading; one added by a playbook has its own test."""
D = 32
LENGTHS = [[16], [6, 10], [3, 1, 8], [2, 2, 2], [1, 4], [14]]


def rows_of(lengths: list[list[int]], width: int, vocab_size: int, seed: int = 2) -> Batch:
    """Packed documents of these lengths, each row filled up with padding; every label is the next
    token of its document."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    ids = torch.randint(0, vocab_size, (B, width), generator=generator)
    # at a document's end, a token the row does not have
    labels = torch.randint(0, vocab_size, (B, width), generator=generator)
    positions, documents = torch.zeros(2, B, width, dtype=torch.int64)
    sources = torch.zeros(B, width, dtype=torch.int32)
    for row, own in enumerate(lengths):
        pieces = [*own, width - sum(own)]
        ends = torch.tensor(pieces).cumsum(0)
        documents[row] = torch.bucketize(torch.arange(width), ends, right=True)
        positions[row] = torch.cat([torch.arange(n) for n in pieces])
        inside = documents[row, 1:] == documents[row, :-1]
        labels[row, :-1] = torch.where(inside, ids[row, 1:], labels[row, :-1])
        labels[row, sum(own) :] = IGNORE_INDEX
        sources[row, sum(own) :] = -1
    return Batch(ids, labels, positions, documents.int(), sources, packed=True)


def heads_for(hidden_size: int, vocab_size: int, seed: int = 0, **settings: Any) -> HeadStack:
    """The heads that settings switch on; all of them where they switch on none."""
    wanted = settings if any(key in ON for key in settings) else ALL | settings
    heads = HeadStack(HEADS, AuxiliarySettings(**wanted), hidden_size, vocab_size)
    torch.manual_seed(seed)
    heads.apply(draw_weights)
    for p in heads.parameters():  # far enough from 0 that every part of a loss counts
        p.data += 0.1 * torch.randn_like(p)
    return heads


def objective_of(model: nn.Module, heads: HeadStack | None) -> Objective:
    return Objective(model, LossStack([CrossEntropy(CrossEntropySettings())]), 1, heads)


def placed(
    heads: HeadStack, batch: Batch, step: int = 0, first: int = 0
) -> tuple[Batch, dict[str, float]]:
    """The batch with positions, and how many they are."""
    batch = heads.choose(batch, 7, step, list(range(first, first + len(batch.labels))))
    return batch, {name: float(count) for name, count in heads.count(batch).items()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Taken out of the module."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def rows(lengths: list[list[int]] = LENGTHS) -> Batch:
    return rows_of(lengths, T, V)


def inputs_of(
    batch: Batch,
    heads: HeadStack | None = None,
    hidden: Tensor | None = None,
    table: Tensor | None = None,
) -> HeadInputs:
    """Of random hidden states, in float64, and a model with this table; `heads`: those that others
    can build on."""
    torch.manual_seed(5)
    if hidden is None:
        hidden = torch.randn(*batch.labels.shape, D, dtype=torch.float64)
    readout = LinearReadout(
        nn.Parameter(torch.randn(V, D, dtype=torch.float64)) if table is None else table
    )
    model: Any = build("simple_lm").double()
    model.embedding.weight = readout.table
    with torch.no_grad():
        nll = F.cross_entropy(
            readout(hidden).transpose(1, 2),
            batch.labels,
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
    cross_entropy = partial(LossStack([]).cross_entropy, readout)
    found = HeadInputs(
        hidden, readout, batch, lambda at: nll.gather(1, at), torch.float64, model, heads or {}
    )
    return replace(found, cross_entropy=cross_entropy)


def run(name: str, heads: HeadStack, inputs: HeadInputs) -> Tensor:
    """(B,) one head's losses, NaN in rows without a place."""
    positions = inputs.batch.head_positions[name]
    valid = positions[:, 0] != NOWHERE
    return torch.where(valid, heads[name](inputs, positions.clamp(min=0), valid), math.nan)
