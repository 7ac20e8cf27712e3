"""The harmonic loss in fp32: finite whatever it is given, near float64 where fp32 can be, in fp32
under autocast too.

n positions, D hidden_size, V vocab_size
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import ModelOutput
from core.losses.harmonic import EPS
from core.losses.stack import LossStack
from core.models.neobert import NeoBERT, NeoBERTSettings
from core.models.readout import DistanceReadout
from tests.losses.setup import make_batch
from tests.losses.test_losses import build
from tests.models.test_models import make_batch as make_row

H_EXPS = [-12.0, -8.0, -4.0]
DISTANCES = {"squared": 1.0, "euclidean": 0.5}
BANDS = {1e-4: (1e-3, 1e-2), 1e-5: (5e-3, 5e-2)}
"""From which 1 - cos on, to the nearest prototype, values and gradients are how near to float64's.
A cosine near 1 is rounded to 6e-8, and its sum of products to a few of them: nothing at right
angles, a hundredth of a distance at 1e-5. Closer still only that all is finite is promised."""

LANES = 2.5e-6
"""Where the target is all but certain, the softmax's sum is 1 and a thousand numbers below its last
digit. Those that are added in the same lane as the 1 are lost: a sixteenth of them in AVX512, an
eighth in AVX2 (1.1e-6, 2.1e-6 of the longest row)."""


def values_of(
    hidden: Tensor, prototypes: Tensor, targets: Tensor, h_exp: float, distance: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Each position's NLL (n,), and the gradients of their mean by hidden (n, D) and prototypes (V,
    D), as a run has them."""
    hidden, prototypes = (
        tensor.detach().clone().requires_grad_() for tensor in (hidden, prototypes)
    )
    stack = LossStack([build("harmonic", h_exp=h_exp, distance=distance)])
    output = ModelOutput(hidden[None], DistanceReadout(prototypes))
    total, terms = stack(output, make_batch(targets[None]), len(targets), 0.0, 2)
    total.backward()
    assert torch.isfinite(total)
    return terms.values[0], hidden.grad, prototypes.grad


def reference(
    hidden: Tensor, prototypes: Tensor, targets: Tensor, h_exp: float, distance: str
) -> Tensor:
    """(n,) by the definition, in the dtype it is given; with a graph."""
    cosine = (F.normalize(hidden, dim=-1) @ F.normalize(prototypes, dim=-1).T).clamp(-1.0, 1.0)
    powers = h_exp * DISTANCES[distance] * (2.0 - 2.0 * cosine + EPS).log()
    return powers.logsumexp(dim=1) - powers.gather(1, targets[:, None])[:, 0]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# finite -------------------------------------------------------------------------------------------


def adversaries(prototypes: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (n, D), each of some kind that distances on a sphere are afraid of, about the
    prototype of its target."""
    n, width = len(targets), prototypes.shape[1]
    own, noise = prototypes[targets], F.normalize(drawn(1, n, width), dim=-1)
    size = own.norm(dim=-1, keepdim=True)
    kinds = [
        drawn(2, n, width),
        own,
        -own,
        own * 3.7,
        own / size.clamp(min=1e-30) * 1e-11,
        *(own + size * noise * distance for distance in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)),
        *(-own + size * noise * distance for distance in (1e-7, 1e-4)),
        torch.zeros(n, width),
        drawn(3, n, width) * 1e18,
        own / size.clamp(min=1e-30) * 1e18,
        drawn(4, n, width) * 1e-30,
        own * 1e-30,
    ]
    return torch.stack(kinds)[torch.arange(n) % len(kinds), torch.arange(n)]


def tables(size: int, width: int = 8) -> dict[str, Tensor]:
    """Prototypes as they may come to lie, and worse."""
    unit = F.normalize(drawn(5, size, width), dim=-1)
    twins = unit.clone()
    twins[size // 2 :] = twins[: size - size // 2] + 1e-7 * drawn(6, size - size // 2, width)
    some_zero = unit.clone()
    some_zero[0] = 0.0
    return {
        "unit": unit,
        "all equal": unit[:1].expand(size, width),
        "twins": twins,
        "opposites": torch.where(torch.arange(size)[:, None] % 2 == 0, unit[0], -unit[0]),
        "with a row of zeros": some_zero,
        "huge": unit * 1e18,
        "tiny": unit * 1e-11,
    }


@pytest.mark.parametrize("h_exp", H_EXPS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_values_and_gradients_are_finite_whatever_comes(distance: str, h_exp: float) -> None:
    """More than 1e5 hidden states for each exponent, equal and nearly equal to prototypes,
    opposite, zero, huge and tiny, over prototypes of every kind and few of them or more; targets
    the prototype they lie at, and others."""
    count = 0
    for size in (2, 3, 37):
        for kind, prototypes in tables(size).items():
            near = torch.arange(5400) % size
            hidden = adversaries(prototypes, near)
            for targets in (near, (near + 1) % size):
                found = values_of(hidden, prototypes, targets, h_exp, distance)
                assert all(tensor.isfinite().all() for tensor in found), (
                    f"{kind}, {size} prototypes"
                )
                assert (found[0] > -1e-4).all() and found[1].shape == hidden.shape
                count += len(hidden)
    assert count > 1e5


@pytest.mark.parametrize("h_exp", H_EXPS)
def test_what_is_known_of_the_edges(h_exp: float) -> None:
    """At its own prototype the target has all of the probability, at another's 1e-8 to the power of
    -h of it; where all prototypes are equal, or the hidden state has no direction, all tokens are
    alike."""
    prototypes, targets = F.normalize(drawn(5, 4, 8), dim=-1), torch.arange(4)
    at, *_ = values_of(prototypes, prototypes, targets, h_exp, "squared")
    assert at.abs().max() < 1e-6
    exactly, other = torch.eye(4), (targets + 1) % 4
    beside, *_ = values_of(exactly, exactly, other, h_exp, "squared")
    torch.testing.assert_close(beside, torch.full((4,), -h_exp * math.log(2.0 / EPS)))
    equal, *_ = values_of(drawn(6, 4, 8), prototypes[:1].expand(4, 8), targets, h_exp, "squared")
    nowhere, *_ = values_of(torch.zeros(4, 8), prototypes, targets, h_exp, "squared")
    torch.testing.assert_close(torch.stack([equal, nowhere]), torch.full((2, 4), math.log(4)))


def test_an_exact_match_pulls_at_nothing() -> None:
    """Two in three cosines of a vector with itself come out at 1 or above, and are clamped; the
    slope at a distance of 1e-8 is 1e9, and of what rounding leaves of that there would be hundreds.
    What is left is the pull of the target at right angles."""
    prototypes = F.normalize(drawn(5, 300, 64), dim=-1)
    _, by_hidden, by_prototypes = values_of(
        prototypes, prototypes, (torch.arange(300) + 1) % 300, -12.0, "squared"
    )
    clamped = DistanceReadout(prototypes)(prototypes).diagonal() == 0.0
    assert clamped.sum() > 150
    assert (300 * by_hidden.norm(dim=-1)).max() < 50.0 and (
        300 * by_prototypes.norm(dim=-1)
    ).max() < 50.0


# near float64 -------------------------------------------------------------------------------------


def scenes(
    n: int = 400, width: int = 64, size: int = 1000
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, prototypes, targets, 1 - cos to the prototype that is nearest), from far away to
    very near."""
    prototypes, targets = F.normalize(drawn(7, size, width), dim=-1), torch.arange(n) * 7 % size
    # of the hidden state from its target's prototype
    distances = 10.0 ** torch.linspace(-4.0, 1.0, n)[:, None]
    hidden = 5.0 * (prototypes[targets] + distances * F.normalize(drawn(8, n, width), dim=-1))
    targets = torch.where(torch.arange(n) % 3 == 0, (targets + 1) % size, targets)
    return hidden, prototypes, targets, nearness(hidden, prototypes)


def nearness(hidden: Tensor, prototypes: Tensor) -> Tensor:
    cosine = F.normalize(hidden.double(), dim=-1) @ F.normalize(prototypes.double(), dim=-1).T
    return 1.0 - cosine.amax(dim=1)


@pytest.mark.parametrize("h_exp", H_EXPS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("band", BANDS)
def test_fp32_is_near_float64(band: float, distance: str, h_exp: float) -> None:
    """Every value relative to itself, every row of a gradient to its own length, or to LANES of the
    longest."""
    hidden, prototypes, targets, near = scenes()
    hidden, targets, (of_values, of_gradients) = (
        hidden[near > band],
        targets[near > band],
        BANDS[band],
    )
    assert 200 < len(hidden) < len(near) - 50, "some are nearer, or the bands would not be needed"
    values, by_hidden, by_prototypes = values_of(hidden, prototypes, targets, h_exp, distance)
    wide = [tensor.double().requires_grad_() for tensor in (hidden, prototypes)]
    expected = reference(*wide, targets, h_exp, distance)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=of_values, atol=1e-5)
    expected.mean().backward()
    for found, exact in ((by_hidden, wide[0].grad), (by_prototypes, wide[1].grad)):
        error = (found.double() - exact).norm(dim=-1)
        length = exact.norm(dim=-1)
        assert (error <= of_gradients * length + LANES * length.max()).all()


@pytest.mark.parametrize("h_exp", H_EXPS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("band", BANDS)
def test_under_autocast_the_head_is_computed_in_fp32(
    band: float, distance: str, h_exp: float
) -> None:
    """Hidden states come in bf16, and what follows is as exact as of any that happen to have few
    digits. bf16 knows no cosine between 0.9961 and 1: a head in bf16 would be far off wherever
    something is learned."""
    hidden, prototypes, targets, _ = scenes()
    hidden = hidden.bfloat16()
    near, (of_values, _) = nearness(hidden, prototypes), BANDS[band]
    hidden, targets, near = (
        hidden[near > band].requires_grad_(),
        targets[near > band],
        near[near > band],
    )
    assert (near < 0.0039).sum() > 50, "cosines that bf16 does not know are among them"
    prototypes.requires_grad_()
    stack = LossStack([build("harmonic", h_exp=h_exp, distance=distance)])
    output, batch = (
        ModelOutput(hidden[None], DistanceReadout(prototypes)),
        make_batch(targets[None]),
    )
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = stack(output, batch, len(targets), 0.0, 2)
        measured = stack.measure(output, batch, 0.0, 2)
    total.backward()
    exact = [
        reference(hidden.double(), prototypes.double(), targets, h, distance).detach()
        for h in (h_exp, -12.0, -4.0)
    ]
    assert terms.values.dtype == torch.float32
    torch.testing.assert_close(terms.values[0].double(), exact[0], rtol=of_values, atol=1e-5)
    assert float(total.detach()) == pytest.approx(float(exact[0].mean()), rel=of_values)
    for name, expected in zip(("nll_h12", "nll_h4"), exact[1:]):
        assert float(measured.token_stats[name]) == pytest.approx(
            float(expected.sum()), rel=of_values
        )
    assert hidden.grad.dtype == torch.bfloat16 and prototypes.grad.dtype == torch.float32
    assert hidden.grad.isfinite().all() and prototypes.grad.isfinite().all()


def test_in_bf16_it_would_be_far_off() -> None:
    """Why it is not: the same hidden states with a head in bf16."""
    hidden, prototypes, targets, _ = scenes()
    exact = reference(hidden.bfloat16().double(), prototypes.double(), targets, -12.0, "squared")
    rough = reference(hidden.bfloat16(), prototypes.bfloat16(), targets, -12.0, "squared").double()
    assert ((rough - exact).abs() > 0.1 * exact + 1.0).float().mean() > 0.1


# the beginning of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("h_exp", [-12.0, -4.0])
@torch.no_grad()
def test_random_weights_begin_at_chance(h_exp: float) -> None:
    """ln V, and h**2 / 2D: vectors of D numbers are at right angles but for 1 / sqrt(D) of chance,
    which the exponent raises. The width is NeoBERT's, for which ground_truth.md has 10.33 to 10.41
    at ln V = 10.326."""
    size = 4000
    torch.manual_seed(1)
    settings = NeoBERTSettings(num_layers=2, head="distance", seq_length=128)
    model = NeoBERT(settings, size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, size, (4, 128), generator=generator)
    hidden = torch.rand(4, 128, generator=generator) < 0.2
    batch = replace(make_row(torch.where(hidden, 3, ids)), labels=torch.where(hidden, ids, -100))
    loss, _ = LossStack([build("harmonic", h_exp=h_exp)])(
        model(batch), batch, int(hidden.sum()), 0.0, 1
    )
    assert float(loss) == pytest.approx(
        math.log(size) + h_exp**2 / (2 * settings.hidden_size), abs=0.03
    )
    assert abs(float(loss) - math.log(size)) < 0.1
