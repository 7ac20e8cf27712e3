"""The mixture of activations: blocks in the cache and the formula for compilers both equal it
written plainly.

B batch, T time, WIDTH intermediate_size, D hidden_size
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.models import polyglu
from core.models.polyglu import neuron_factors, pick_activation, position_factors

B, T, WIDTH, D = 3, 7, 6, 4


def plain(
    gate: Tensor, up: Tensor, down: Tensor, neuron: Tensor, position: Tensor | None
) -> Tensor:
    """As in the specification: the four activations stacked, and a softmax per neuron and
    position."""
    # (B, T, F, 4)
    acts = torch.stack([torch.relu(gate), torch.tanh(gate), F.silu(gate), F.gelu(gate)], dim=-1)
    logits = neuron[:, None] if position is None else neuron[:, None] + position[:, :, None]
    return ((acts * torch.softmax(logits, dim=-1)).sum(-1) * up) @ down.T


def ours(gate: Tensor, up: Tensor, down: Tensor, neuron: Tensor, position: Tensor | None) -> Tensor:
    if position is None:
        return polyglu.polyglu(gate, up, down, torch.softmax(neuron, -1).transpose(1, 2))
    return polyglu.polyglu(gate, up, down, neuron_factors(neuron), position_factors(position))


def inputs(spread: float, dtype: torch.dtype, causal: bool) -> list[Any]:
    random = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(B, T, WIDTH, generator=random, dtype=torch.float64) for _ in range(2))
    down = torch.randn(D, WIDTH, generator=random, dtype=torch.float64)
    logits = [
        torch.rand(B, n, 4, generator=random, dtype=torch.float64) * spread for n in (WIDTH, T)
    ]
    tensors = [gate, up, down, *logits] if causal else [gate, up, down, logits[0]]
    return [t.to(dtype).requires_grad_() for t in tensors] + ([] if causal else [None])


@pytest.fixture(params=["parts of rows", "rows", "formula"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: blocks of two positions, the last of a row shorter; blocks of two rows, the
    last of them alone; or the formula that a compiler gets."""
    if request.param == "formula":
        monkeypatch.setattr(
            polyglu, "_by_device", lambda x, blocks, formula: partial(polyglu._in_parts, formula)
        )
        monkeypatch.setattr(polyglu, "PART", 2 * T * WIDTH)  # two rows, and one
    monkeypatch.setattr(polyglu, "BLOCK", 2 * WIDTH * (T if request.param == "rows" else 1))
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("spread", [1.0, 20.0, 90.0])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_of_the_plain_formula(
    way: str, causal: bool, spread: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Also where logits are so far apart that their exponentials alone would leave fp32."""
    tensors = inputs(spread, dtype, causal)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    found, expected = ours(*tensors), plain(*exact)
    weights = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    (found * weights.to(dtype)).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(tensors, exact):
        if mine is not None:
            torch.testing.assert_close(
                mine.grad.double(), theirs.grad, atol=tolerance, rtol=tolerance
            )


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(way: str, causal: bool) -> None:
    tensors = inputs(2.0, torch.float64, causal)
    assert torch.autograd.gradcheck(ours, tensors, atol=1e-6)


def test_logits_further_apart_than_any_float_stay_finite(way: str) -> None:
    tensors = inputs(1000.0, torch.float32, causal=True)
    out = ours(*tensors)
    out.sum().backward()
    assert out.isfinite().all() and all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_goes_in_and_out_and_fp32_is_mixed(way: str, causal: bool) -> None:
    gate, up, _, neuron, position = inputs(3.0, torch.float32, causal)
    low = [t.detach().bfloat16().requires_grad_() for t in (gate, up)]
    one = torch.eye(WIDTH).requires_grad_()  # what is mixed comes out as it is
    out = ours(*low, one, neuron, position)
    out.sum().backward()
    exact = plain(
        *(t.detach().float() for t in low),
        one.detach(),
        neuron.detach(),
        None if position is None else position.detach(),
    )
    assert (
        out.dtype == low[0].grad.dtype == torch.bfloat16
        and neuron.grad.dtype == one.grad.dtype == torch.float32
    )
    torch.testing.assert_close(out.float(), exact, atol=1e-6, rtol=2**-8)


def test_nothing_of_four_activations_is_kept() -> None:
    """For the backward pass: gate, up, W_down and the factors; no tensor of (B, T, F, 4), and no
    third one of (B, T, F)."""
    kept: list[Tensor] = []
    gate, up, down, *logits = inputs(1.0, torch.float32, causal=True)
    factors = neuron_factors(logits[0]).detach(), position_factors(logits[1]).detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        polyglu.polyglu(gate, up, down, *factors)
    assert sum(t.numel() for t in kept) == 2 * B * T * WIDTH + D * WIDTH + 4 * B * (WIDTH + T)


def test_the_likeliest_activation_is_the_limit_of_a_low_temperature() -> None:
    gate, up, down, neuron, position = (t.detach() for t in inputs(3.0, torch.float64, causal=True))
    expected = plain(gate, up, down, neuron / 1e-4, position / 1e-4)
    torch.testing.assert_close(pick_activation(gate, up, neuron, position) @ down.T, expected)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_the_compiler_takes_the_formula_whole(causal: bool) -> None:
    tensors = inputs(3.0, torch.float32, causal)
    compiled = torch.compile(ours, fullgraph=True)
    expected = ours(*tensors)
    expected.sum().backward()
    gradients = [t.grad.clone() for t in tensors if t is not None]
    for t in tensors:
        if t is not None:
            t.grad = None
    found = compiled(*tensors)
    found.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for t, gradient in zip((t for t in tensors if t is not None), gradients):
        torch.testing.assert_close(t.grad, gradient, atol=1e-5, rtol=1e-5)
