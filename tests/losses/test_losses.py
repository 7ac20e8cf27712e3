"""What every loss of the table promises, yours too: right gradients, the same in chunks, finite
where it can be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from core.contracts import IGNORE_INDEX, ModelOutput
from core.losses import LOSSES
from core.losses.stack import LossStack
from core.models.readout import DistanceReadout, LinearReadout
from tests.losses.setup import Setup, assert_close, gradients, make, plain_values

MORE: dict[str, list[dict[str, Any]]] = {
    "cross_entropy": [{"label_smoothing": 0.2}, {"label_smoothing": {"from": 0.0, "to": 0.3}}],
    "sharpness": [
        {"penalty": "neg_entropy"},
        {"penalty": "neg_max_prob"},
        {"penalty": "top_k_mass"},
        {"penalty": "top_k_mass", "top_k": 1},
        {"penalty": "top_k_mass", "top_k": 1000},
    ],
    "cosine": [
        {"temperature": 0.7},
        {"temperature": 1.5},
        {"topk": 5},
        {"topk": 5, "temperature": 0.7},
        {"topk": 1000},
    ],
    "harmonic": [{"h_exp": -4.0}, {"h_exp": -6.0, "distance": "euclidean"}],
}
"""Settings tried besides a loss's defaults."""
CASES = [(kind, settings) for kind in LOSSES for settings in [{}, *MORE.get(kind, [])]]
IDS = [f"{kind} {settings or ''}".strip() for kind, settings in CASES]
each_loss = pytest.mark.parametrize("kind, settings", CASES, ids=IDS)


def build(kind: str, **settings: Any) -> Any:
    section, loss = LOSSES[kind]
    return loss(section.model_validate({"type": kind, **settings}))


def readout_for(loss: Any, setup: Setup) -> Any:
    """A readout that gives what a loss needs, from the same tensors."""
    if loss.needs == "distances":
        return DistanceReadout(setup.weight, setup.table)
    return LinearReadout(setup.weight, setup.bias, setup.table)


def leaves_for(loss: Any, setup: Setup) -> list[Tensor]:
    return [leaf for leaf in setup.leaves if loss.needs == "logits" or leaf is not setup.bias]


def total_of(
    losses: list[Any], setup: Setup, count: float = 7.0, progress: float = 0.3, **rows: int
) -> Tensor:
    output = ModelOutput(setup.hidden, readout_for(losses[0], setup))
    return LossStack(losses, **rows)(output, setup.batch, count, progress, num_sources=2)[0]


def plain_total_of(
    losses: list[Any], setup: Setup, count: float = 7.0, progress: float = 0.3
) -> Tensor:
    """By the definitions in setup.py, on the whole matrix of scores. A weight is a number here."""
    readout = readout_for(losses[0], setup)
    keep = setup.batch.labels != IGNORE_INDEX
    scores, labels = readout(setup.hidden[keep]), setup.batch.labels[keep]
    return sum(
        loss.weight * plain_values(loss, scores, labels, readout.table, progress).sum() / count
        for loss in losses
    )


@each_loss
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_that_of_finite_differences(kind: str, settings: dict, tied: bool) -> None:
    setup = make(masked=0.4, tied=tied, bias=not tied, rows=1)
    loss = build(kind, **settings)
    generator = torch.Generator().manual_seed(3)
    for leaf in leaves_for(loss, setup):
        direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        (slope,) = gradients(total_of([loss], setup), [leaf])
        step = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.add_(direction, alpha=sign * step)
                values.append(float(total_of([loss], setup)))
                leaf.sub_(direction, alpha=sign * step)
        found, expected = float((slope * direction).sum()), (values[0] - values[1]) / (2 * step)
        assert abs(found - expected) <= 1e-6 * max(1.0, abs(expected))


@each_loss
@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("chunk_rows, block_rows", [(7, 3), (1, 1), (33, 33)])
def test_in_chunks_it_is_the_same(
    kind: str, settings: dict, masked: float, chunk_rows: int, block_rows: int
) -> None:
    setup, loss = make(masked), build(kind, **settings)
    leaves = leaves_for(loss, setup)
    whole = total_of([loss], setup, chunk_rows=1000, block_rows=1000)
    cut = total_of([loss], setup, chunk_rows=chunk_rows, block_rows=block_rows)
    assert_close(
        [whole.detach(), *gradients(whole, leaves)], [cut.detach(), *gradients(cut, leaves)]
    )


@each_loss
def test_one_token_and_none(kind: str, settings: dict) -> None:
    setup, loss = make(), build(kind, **settings)
    leaves = leaves_for(loss, setup)
    setup.batch.labels.fill_(IGNORE_INDEX)
    nothing = total_of([loss], setup)
    assert float(nothing.detach()) == 0.0 and not any(g.any() for g in gradients(nothing, leaves))
    setup.batch.labels[1, 4] = 5
    one = total_of([loss], setup)
    found = gradients(one, leaves)
    assert one.isfinite() and all(g.isfinite().all() for g in found)
    assert leaves[0] is setup.hidden and found[0][1, 4].any() and not found[0][0].any()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e4])
def test_ties_and_extreme_scores_are_finite(
    kind: str, settings: dict, dtype: torch.dtype, magnitude: float
) -> None:
    """0: every score is the same, so that all are tied. 10,000: a softmax that is one-hot."""
    setup, loss = make(0.3, bias=False, dtype=dtype), build(kind, **settings)
    with torch.no_grad():
        setup.weight.mul_(magnitude / float((setup.hidden @ setup.weight.T).abs().max()))
    total = total_of([loss], setup)
    assert total.isfinite() and all(
        g.isfinite().all() for g in gradients(total, leaves_for(loss, setup))
    )


@each_loss
def test_autocast_changes_scores_only(kind: str, settings: dict) -> None:
    """Under bf16 the scores are rounded, what comes after them is not: values stay within that
    rounding."""
    setup, loss = make(dtype=torch.float32), build(kind, **settings)
    exact = total_of([loss], setup)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = total_of([loss], setup)
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(float(exact.detach()), rel=0.05, abs=1e-3)


@each_loss
def test_it_reports_under_its_name_and_weighs_by_its_schedule(kind: str, settings: dict) -> None:
    setup = make()
    loss = build(kind, **settings, name="mine", weight={"from": 0.0, "to": 2.0})
    output = ModelOutput(setup.hidden, readout_for(loss, setup))
    total, terms = LossStack([loss], 7, 3)(output, setup.batch, 1.0, 0.25, 2)
    assert list(terms.sums) == ["mine"]
    assert float(total.detach()) == pytest.approx(0.5 * float(terms.sums["mine"]), rel=1e-12)
    silent, still = LossStack([loss], 7, 3)(output, setup.batch, 1.0, 0.0, 2)
    assert float(silent.detach()) == 0.0 and float(still.sums["mine"]) != 0.0
    assert not gradients(silent, [setup.hidden])[0].any()


# our own, against their definitions ---------------------------------------------------------------

OWN = [
    case
    for case in CASES
    if case[0] in ("cross_entropy", "cosine", "sharpness", "harmonic", "z_loss")
]
OWN += [("cosine", {"detach_table": True}), ("cosine", {"detach_table": True, "topk": 5})]


@pytest.mark.parametrize("kind, settings", OWN, ids=[f"{k} {s or ''}".strip() for k, s in OWN])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_it_is_its_definition(kind: str, settings: dict, tied: bool, masked: float) -> None:
    setup, loss = make(masked, tied, bias=not tied), build(kind, **settings, weight=0.7)
    leaves = leaves_for(loss, setup)
    found, expected = (
        total_of([loss], setup, chunk_rows=7, block_rows=3),
        plain_total_of([loss], setup),
    )
    assert_close(
        [found.detach(), *gradients(found, leaves)],
        [expected.detach(), *gradients(expected, leaves)],
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_rows, block_rows", [(7, 3), (33, 33), (1, 1)])
def test_all_of_them_together(tied: bool, chunk_rows: int, block_rows: int) -> None:
    """Every loss on logits in one stack, two temperatures among them: one softmax each, one
    gradient."""
    setup = make(0.4, tied, bias=not tied)
    chosen = [case for case in OWN if case[0] != "harmonic"]
    losses = [
        build(kind, **{"name": f"{kind}{i}", "weight": 0.1 + 0.2 * i, **s})
        for i, (kind, s) in enumerate(chosen)
    ]
    found, expected = (
        total_of(losses, setup, chunk_rows=chunk_rows, block_rows=block_rows),
        plain_total_of(losses, setup),
    )
    leaves = setup.leaves
    assert_close(
        [found.detach(), *gradients(found, leaves)],
        [expected.detach(), *gradients(expected, leaves)],
    )


def test_two_harmonic_losses_share_their_powers() -> None:
    setup = make(0.4)
    losses = [
        build("harmonic", name=name, h_exp=-6.0, weight=weight)
        for name, weight in (("a", 0.3), ("b", 0.5))
    ]
    found, expected = (
        total_of(losses, setup, chunk_rows=7, block_rows=3),
        plain_total_of(losses, setup),
    )
    leaves = leaves_for(losses[0], setup)
    assert_close(
        [found.detach(), *gradients(found, leaves)],
        [expected.detach(), *gradients(expected, leaves)],
    )


def test_what_is_tied_is_counted_whole() -> None:
    """Which of equal scores counts as the best is free, but exactly k of them do: the gradient adds
    up to 0 all the same."""
    setup = make(0.0, bias=False)
    with torch.no_grad():
        setup.weight[5:] = setup.weight[4]
    for settings in ({"penalty": "non_max_sum"}, {"penalty": "top_k_mass"}):
        loss = build("sharpness", **settings)
        found, expected = total_of([loss], setup), plain_total_of([loss], setup)
        assert abs(float((found - expected).detach())) <= 1e-10
        (by_hidden,), (wanted,) = (
            gradients(found, [setup.hidden]),
            gradients(expected, [setup.hidden]),
        )
        # equal rows of the readout: whichever is taken, hidden states feel the same
        assert_close([by_hidden], [wanted])
