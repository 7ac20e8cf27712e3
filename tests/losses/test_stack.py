"""The chunked readout and loss give what the plain computation gives, in a fraction of its
memory."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.readout import Case, measure
from core.contracts import IGNORE_INDEX, ModelOutput
from core.errors import UserError
from core.losses.base import Chunk, Gradient
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.readout import LinearReadout
from tests.losses.setup import (
    B,
    CurvedReadout,
    D,
    Setup,
    T,
    V,
    assert_close,
    gradients,
    make,
    plain_total,
)

PLAIN = [CrossEntropy(CrossEntropySettings())]


class PullToTarget:
    """A toy without a gradient of its own: uses scores and table."""

    name, needs, weight = "pull", "logits", 0.3

    def per_token(self, chunk: Chunk) -> Tensor:
        expected = chunk.scores.softmax(dim=1) @ chunk.table  # (n, D)
        return 1 - F.cosine_similarity(expected, chunk.table[chunk.labels], dim=1)


class Squares:
    """A toy with its own gradient."""

    name, needs, weight = "squares", "logits", 0.01

    def per_token(self, chunk: Chunk) -> Tensor:
        return chunk.scores.square().sum(dim=1)

    def add_gradient(self, chunk: Chunk, scale: Tensor | float, gradient: Gradient) -> None:
        gradient.add_dense(2 * scale * chunk.scores)


class SquaresByAutograd:
    name, needs, weight = "squares", "logits", 0.01
    per_token = Squares.per_token


MIXES = {
    "cross_entropy": PLAIN,
    "by autograd": [*PLAIN, PullToTarget()],
    "two gradients": [*PLAIN, Squares()],
    "all kinds": [
        PullToTarget(),
        SquaresByAutograd(),
        CrossEntropy(CrossEntropySettings(weight=0.7)),
    ],
    "autograd alone": [PullToTarget()],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [0.0, 0.3])
@pytest.mark.parametrize("chunk_rows, block_rows", [(None, None), (7, 3), (1, 1), (5, 5)])
def test_gradients_are_the_plain_ones(
    mix: str, tied: bool, masked: float, chunk_rows: int | None, block_rows: int | None
) -> None:
    setup = make(masked, tied, bias=not tied)
    stack = LossStack(MIXES[mix], chunk_rows, block_rows)
    count = stack.count(setup.batch)
    total, terms = stack(setup.output, setup.batch, count, 0.0, num_sources=2)
    expected = plain_total(setup, stack.losses, count)
    assert abs(float(total.detach() - expected.detach())) <= 1e-10
    assert_close(gradients(total, setup.leaves, 3.0), gradients(expected, setup.leaves, 3.0))
    assert set(terms.sums) == {loss.name for loss in stack.losses}
    assert not total.isnan() and all(not value.requires_grad for value in terms.sums.values())


@pytest.mark.parametrize("mix", ["cross_entropy", "all kinds"])
def test_any_readout(mix: str) -> None:
    setup = make()
    output = ModelOutput(setup.hidden, CurvedReadout(setup.weight, setup.table))
    stack = LossStack(MIXES[mix], 7, 3)
    leaves = [setup.hidden, setup.weight, setup.table]
    total, _ = stack(output, setup.batch, 5, 0.0, 2)
    expected = plain_total(setup, stack.losses, 5, output)
    assert_close(
        [total.detach(), *gradients(total, leaves)],
        [expected.detach(), *gradients(expected, leaves)],
    )


def test_a_weight_that_is_itself_computed() -> None:
    setup = make(bias=False)
    factor = torch.randn(D, D, dtype=torch.float64, requires_grad=True)
    stack = LossStack([*PLAIN, PullToTarget()], 7, 3)
    leaves = [setup.hidden, factor, setup.table]

    def output() -> ModelOutput:
        return ModelOutput(setup.hidden, LinearReadout(setup.table @ factor, None, setup.table))

    total, _ = stack(output(), setup.batch, 9.0, 0.0, 2)
    assert_close(
        gradients(total, leaves), gradients(plain_total(setup, stack.losses, 9.0, output()), leaves)
    )


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits(magnitude: float, dtype: torch.dtype) -> None:
    setup = make(0.0, bias=False, dtype=dtype)
    with torch.no_grad():
        setup.weight.mul_(magnitude / float((setup.hidden @ setup.weight.T).abs().max()))
    stack = LossStack(PLAIN, 7, 3)
    total, _ = stack(setup.output, setup.batch, 33, 0.0, 2)
    expected = plain_total(setup, PLAIN, 33)
    found, wanted = gradients(total, setup.leaves), gradients(expected, setup.leaves)
    assert all(bool(g.isfinite().all()) for g in found)
    exact = 1e-10 if dtype == torch.float64 else 1e-5
    assert abs(float((total / expected).detach()) - 1) <= exact
    for a, b in zip(found, wanted):
        assert float((a - b).abs().max()) <= exact * max(1.0, float(b.abs().max()))


def test_one_token() -> None:
    setup = make()
    setup.batch.labels.fill_(IGNORE_INDEX)
    setup.batch.labels[1, 4] = 5
    setup.batch.source_ids[1, 4] = 1
    stack = LossStack(MIXES["all kinds"])
    total, terms = stack(setup.output, setup.batch, stack.count(setup.batch), 0.0, 2)
    expected = plain_total(setup, stack.losses, 1)
    assert_close(gradients(total, setup.leaves), gradients(expected, setup.leaves))
    assert int(terms.count) == 1 and terms.source_counts.tolist() == [0, 1]
    assert terms.values.nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("readout", ["linear", "any"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_target_gives_zero_gradients(readout: str, dtype: torch.dtype) -> None:
    setup = make(masked=1.1, dtype=torch.float32)
    output = (
        setup.output
        if readout == "linear"
        else ModelOutput(setup.hidden, CurvedReadout(setup.weight, setup.table))
    )
    stack = LossStack(PLAIN)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, terms = stack(output, setup.batch, stack.count(setup.batch), 0.0, 2)
    total.backward()
    assert float(total.detach()) == 0.0 and int(terms.count) == 0
    for tensor in [setup.hidden, *output.readout.parameters()]:
        assert tensor.grad is not None and not tensor.grad.any()
    measured = stack.measure(output, setup.batch, 0.0, 2)
    assert (
        float(measured.token_stats["cross_entropy"]) == 0.0
        and int(measured.token_stats["token_accuracy"]) == 0
    )


@pytest.mark.parametrize(
    "frozen", [("weight", "bias", "table"), ("hidden",), ("bias",), ("hidden", "weight", "bias")]
)
def test_frozen_parts(frozen: tuple[str, ...]) -> None:
    setup = make()
    for name in frozen:
        getattr(setup, name).requires_grad_(False)
    stack = LossStack([*PLAIN, PullToTarget()], 7, 3)
    total, _ = stack(setup.output, setup.batch, 4, 0.0, 2)
    assert_close(
        gradients(total, setup.leaves), gradients(plain_total(setup, stack.losses, 4), setup.leaves)
    )


def test_nothing_to_train_gives_values_only() -> None:
    setup = make()
    stack = LossStack(MIXES["all kinds"], 7, 3)
    with torch.no_grad():
        total, _ = stack(setup.output, setup.batch, 4, 0.0, 2)
    assert not total.requires_grad
    assert abs(float(total - plain_total(setup, stack.losses, 4).detach())) <= 1e-10


def test_a_weight_of_zero_reports_and_pulls_nothing() -> None:
    setup = make()
    schedule = CrossEntropySettings.model_validate(
        {"type": "cross_entropy", "weight": {"from": 0.0, "to": 1.0}}
    ).weight
    pull = PullToTarget()
    pull.weight = schedule
    stack = LossStack([*PLAIN, pull], 7, 3)
    total, terms = stack(setup.output, setup.batch, 4, 0.0, 2)
    assert_close(
        gradients(total, setup.leaves), gradients(plain_total(setup, PLAIN, 4), setup.leaves)
    )
    assert float(terms.sums["pull"]) > 0
    halfway, _ = stack(setup.output, setup.batch, 4, 0.5, 2)
    pull.weight = 0.5
    assert_close(
        gradients(halfway, setup.leaves),
        gradients(plain_total(setup, stack.losses, 4), setup.leaves),
    )


def test_unequal_micro_batches_are_one_big_batch() -> None:
    setup = make(masked=0.5, rows=6)
    stack = LossStack([*PLAIN, Squares()], 7, 3)
    count = stack.count(setup.batch)
    whole, terms = stack(setup.output, setup.batch, count, 0.0, 2)
    expected = gradients(whole, setup.leaves)
    parts = []
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        part = Setup(
            setup.hidden, setup.weight, setup.bias, setup.table, setup.batch.rows(start, stop)
        )
        output = ModelOutput(setup.hidden[start:stop], setup.output.readout)
        parts.append(stack(output, part.batch, float(count), 0.0, 2))
    assert len({int(part_terms.count) for _, part_terms in parts}) > 1
    for total, _ in parts:  # all forward before any backward
        total.backward()
    found = [
        leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in setup.leaves
    ]
    assert_close(found, expected)
    assert abs(float(sum(t.source_sums.sum() for _, t in parts) - terms.source_sums.sum())) <= 1e-9


def test_tied_gradient_joins_the_embeddings() -> None:
    embedding = torch.nn.Embedding(V, D, dtype=torch.float64)
    setup = make()
    ids = torch.randint(V, (B, T))
    stack = LossStack([*PLAIN, PullToTarget()], 7, 3)

    def output() -> ModelOutput:
        return ModelOutput(embedding(ids).tanh(), LinearReadout(embedding.weight))

    stack(output(), setup.batch, 6, 0.0, 2)[0].backward()
    (expected,) = gradients(plain_total(setup, stack.losses, 6, output()), [embedding.weight])
    assert_close([embedding.weight.grad], [expected])


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_autocast_is_as_close_to_the_truth_as_plain_bf16(bias: bool) -> None:
    setup = make(dtype=torch.float32, bias=bias)
    truth = gradients(plain_total(setup, PLAIN, 20), setup.leaves)
    stack = LossStack(PLAIN, 7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = stack(setup.output, setup.batch, 20, 0.0, 2)
        keep = setup.batch.labels != IGNORE_INDEX
        logits = setup.output.readout(setup.hidden[keep])
    plain = F.cross_entropy(logits.float(), setup.batch.labels[keep], reduction="sum") / 20
    assert total.dtype == torch.float32
    assert abs(float((total - plain).detach())) <= 1e-5
    for a, b, c in zip(gradients(total, setup.leaves), gradients(plain, setup.leaves), truth):
        assert a.dtype == torch.float32
        assert float((a - c).abs().max()) <= 2 * float((b - c).abs().max()) + 1e-6


@pytest.mark.parametrize("mix", ["cross_entropy", "all kinds"])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_measure(mix: str, masked: float) -> None:
    setup = make(masked)
    stack = LossStack(MIXES[mix], 7, 3)
    measured = stack.measure(setup.output, setup.batch, 0.0, 2)
    keep = setup.batch.labels != IGNORE_INDEX
    scores, labels = setup.output.readout(setup.hidden[keep]), setup.batch.labels[keep]
    p = scores.detach().softmax(dim=1)
    expected = {
        "cross_entropy": F.cross_entropy(scores, labels, reduction="sum").detach(),
        "entropy": torch.special.entr(p).sum(),
        "max_probability": p.amax(dim=1).sum(),
        "embedding_cosine": F.cosine_similarity(p @ setup.table, setup.table[labels], dim=1)
        .detach()
        .sum(),
        "token_accuracy": (scores.argmax(dim=1) == labels).double().sum(),
        "top5_accuracy": (scores.topk(5).indices == labels[:, None]).double().sum(),
    }
    assert set(measured.token_stats) == set(expected)
    assert_close([measured.token_stats[name] for name in expected], list(expected.values()), 1e-9)
    _, terms = stack(setup.output, setup.batch, 1, 0.0, 2)
    for name, value in measured.terms.sums.items():
        assert abs(float(value - terms.sums[name])) <= 1e-9
    values = F.cross_entropy(
        setup.output.readout(setup.hidden).transpose(1, 2), setup.batch.labels, reduction="none"
    )
    if mix == "cross_entropy":
        assert_close([measured.terms.values, terms.values], [values, values])
        by_source = [values[setup.batch.source_ids == source].sum() for source in (0, 1)]
        assert_close([terms.source_sums], [torch.stack(by_source)])
        assert terms.source_counts.tolist() == [
            int((keep & (setup.batch.source_ids == source)).sum()) for source in (0, 1)
        ]


def test_the_readout_must_give_what_a_loss_needs() -> None:
    setup = make()
    readout = setup.output.readout
    LossStack(PLAIN).check(readout)
    readout.provides = "distances"
    with pytest.raises(
        UserError, match=r'the loss "cross_entropy" needs logits, but .* gives distances'
    ):
        LossStack(PLAIN).check(readout)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the peak of a process can only be reset on Linux"
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_a_fifth_of_plain(precision: str) -> None:
    result = measure(
        Case(tokens=2048, vocab_size=50257, hidden_size=64, precision=precision), repetitions=1
    )
    assert result.memory_ratio <= 0.2
    assert result.gradient_difference <= (1e-5 if precision == "fp32" else 1e-2)
    assert result.loss_difference <= 1e-4
