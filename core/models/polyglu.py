"""PolyGLU's mixture of four activations as one pass over the neurons, forward and backward, that
stores nothing of size 4.

    out = W_down (up * sum_k w_k act_k(gate))    act = ReLU, tanh, SiLU, GELU (erf)
    w   = neuron                                 one set of weights for a whole row (pool
        "sequence"), or
    w_k = neuron_k position_k / sum_j ...        a softmax that factorises (pool "causal")

The weights of a neuron n at a position t are softmax_k((alpha_nk + noise_nk + beta_k f_k(t)) /
tau), and an exponential of a sum is a product: exp((alpha + noise) / tau), one per neuron, times
exp(beta f / tau), one per position. So the causal form needs no exponential per neuron and
position, only their products.

In:    what W_gate and W_up give, (B, T, F); factors per neuron (B, 4, F), per position (B, 4, T)
Out:   (B, T, D), what W_down makes of the mixture
State: none. For the backward pass the inputs are kept, and activations and weights computed again

B batch, T time, D hidden_size, F intermediate_size, b rows and n positions of a block
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from core.models.attention import compiled

NUM_ACTIVATIONS = 4
NAMES = ("ReLU", "Tanh", "SiLU", "GELU")

NEURON_CENTRE, POSITION_CENTRE, POSITION_SPREAD = 40.0, 20.0, 90.0
"""Where the largest logarithm of a factor is put, and how far below it one of a position's may be.
Products then neither overflow nor all vanish: the largest's logarithm is from -30 to 60. A neuron's
factor that fp32 cannot hold any more is 127 below its largest, and so without weight at any
position. Where beta f differs by more than 90 tau, it counts as 90 tau apart."""

BLOCK = 1 << 17
"""Neurons x positions worked on at a time on a CPU: what a block needs stays in the cache."""

PART = 1 << 24
"""Neurons x positions given to a compiled kernel at a time. In the backward pass Inductor writes
out about eight tensors of this size: so it does for a CPU, where its code was read."""

SQRT_HALF, INV_SQRT_2PI = math.sqrt(0.5), 1.0 / math.sqrt(2.0 * math.pi)


def neuron_factors(logits: Tensor) -> Tensor:
    """exp(logits), up to a factor common to the four: (B, F, 4) -> (B, 4, F)."""
    logits = logits.transpose(1, 2)
    return torch.exp(logits - logits.detach().amax(1, keepdim=True) + NEURON_CENTRE).contiguous()


def position_factors(logits: Tensor) -> Tensor:
    """exp(logits), up to a factor common to the four: (B, T, 4) -> (B, 4, T)."""
    logits = logits.transpose(1, 2)
    below = (logits - logits.detach().amax(1, keepdim=True)).clamp_min(-POSITION_SPREAD)
    return torch.exp(below + POSITION_CENTRE).contiguous()


def polyglu(
    gate: Tensor, up: Tensor, down: Tensor, neuron: Tensor, position: Tensor | None = None
) -> Tensor:
    """(up * sum_k w_k act_k(gate)) @ down.T: (B, T, F) -> (B, T, D), in the dtype of `gate`; mixed
    in fp32, or float64.

    gate, up    (B, T, F)
    down        (D, F)
    neuron      (B, 4, F) the weights themselves, or with `position` factors of them
                (`neuron_factors`)
    position    (B, 4, T) the other factors (`position_factors`)
    """
    if not torch.is_grad_enabled():
        return _mix_and_project(gate, up, down, neuron, position)
    return _PolyGLU.apply(gate, up, down, neuron, position)


def pick_activation(gate: Tensor, up: Tensor, neuron: Tensor, position: Tensor) -> Tensor:
    """up * act_k(gate) with the k whose neuron + position is largest: the limit of tau to 0. Not
    for training: no gradient reaches the logits, and tensors of (B, T, F) are written out.

    gate, up    (B, T, F)
    neuron      (B or 1, F, 4) and position (B, T or 1, 4): the logits' two parts
    """
    values, _ = _activations(gate.to(neuron.dtype))

    def score_of(k: int) -> Tensor:
        return neuron[:, None, :, k] + position[:, :, None, k]  # (B, T or 1, F)

    picked, best = values[0], score_of(0)
    for k, value in enumerate(values[1:], 1):
        score = score_of(k)
        picked, best = torch.where(score > best, value, picked), torch.maximum(score, best)
    return (picked * up).to(gate.dtype)


def entropy(logits: Tensor) -> Tensor:
    """Compute -sum p log(p + 1e-10) of p = softmax(logits), in nats: (..., K) -> (...)."""
    p = torch.softmax(logits.float(), dim=-1)
    return -(p * torch.log(p + 1e-10)).sum(-1)


class _PolyGLU(torch.autograd.Function):
    """Chooses who mixes: blocks in the cache on a CPU, a compiled kernel on a GPU, the surrounding
    compiler inside one.

    What `down` multiplies is not kept for its gradient either: mixing again gives it along the way.
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, down: Tensor, neuron: Tensor, position: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up, down, neuron, position)
        return _mix_and_project(gate, up, down, neuron, position)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        gate, up, down, neuron, position = ctx.saved_tensors
        of_mixed = grad @ down.to(grad.dtype)  # (B, T, F)
        found = _by_device(gate, _backward_blocks, _backward)(of_mixed, gate, up, neuron, position)
        mixed, of_gate, of_up, of_neuron, of_position = found
        of_down = grad.flatten(0, 1).T @ mixed.flatten(0, 1)  # (D, F)
        return of_gate, of_up, of_down.to(down.dtype), of_neuron, of_position


def _mix_and_project(
    gate: Tensor, up: Tensor, down: Tensor, neuron: Tensor, position: Tensor | None
) -> Tensor:
    mixed = _by_device(gate, _forward_blocks, _forward)(gate, up, neuron, position)
    return functional.linear(mixed, down.to(gate.dtype))


def _by_device(x: Tensor, blocks: Any, formula: Any) -> Any:
    if torch.compiler.is_compiling():
        return partial(_in_parts, formula)
    return blocks if x.device.type == "cpu" else partial(_in_parts, compiled(formula))


def _in_parts(formula: Any, first: Tensor, *others: Tensor | None) -> Any:
    """Compute a formula for some rows of the batch at a time: what a compiler writes out between
    its kernels is of that size then."""
    rows = max(1, PART // first[0].numel())
    if rows >= len(first):
        return formula(first, *others)
    slices = [slice(b, b + rows) for b in range(0, len(first), rows)]
    parts = [formula(first[b], *(None if t is None else t[b] for t in others)) for b in slices]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(None if of_rows[0] is None else torch.cat(of_rows) for of_rows in zip(*parts))


# the formulas, for a compiler to fuse -------------------------------------------------------------


def _activations(a: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The four activations and their derivatives."""
    sigmoid, tanh = torch.sigmoid(a), torch.tanh(a)
    cdf = 0.5 + 0.5 * torch.erf(a * SQRT_HALF)
    values = [torch.relu(a), tanh, a * sigmoid, a * cdf]
    density = torch.exp(-0.5 * a * a) * INV_SQRT_2PI
    return values, [
        (a > 0).to(a.dtype),
        1 - tanh * tanh,
        sigmoid * (1 + a * (1 - sigmoid)),
        cdf + a * density,
    ]


def _weights(neuron: Tensor, position: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Unnormalised weights of each activation and their sum, as tensors that broadcast to (B, T,
    F); None: normalised."""
    if position is None:
        return [neuron[:, k, None, :] for k in range(NUM_ACTIVATIONS)], None
    products = [neuron[:, k, None, :] * position[:, k, :, None] for k in range(NUM_ACTIVATIONS)]
    return products, products[0] + products[1] + products[2] + products[3]


def _forward(gate: Tensor, up: Tensor, neuron: Tensor, position: Tensor | None) -> Tensor:
    values, _ = _activations(gate.to(neuron.dtype))
    weights, total = _weights(neuron, position)
    mixed = sum(w * value for w, value in zip(weights, values))
    if total is not None:
        mixed = mixed / total
    return (mixed * up).to(gate.dtype)


def _backward(
    grad: Tensor, gate: Tensor, up: Tensor, neuron: Tensor, position: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    values, slopes = _activations(gate.to(neuron.dtype))
    weights, total = _weights(neuron, position)
    grad = grad.to(neuron.dtype)
    of_mix = grad * up  # (B, T, F), and so are all below
    mixed = sum(w * value for w, value in zip(weights, values))
    slope = sum(w * s for w, s in zip(weights, slopes))
    if total is not None:
        mixed, of_mix = mixed / total, of_mix / total
    out, of_gate, of_up = (
        (mixed * up).to(gate.dtype),
        (of_mix * slope).to(gate.dtype),
        (grad * mixed).to(up.dtype),
    )
    if position is None:
        return (
            out,
            of_gate,
            of_up,
            torch.stack([(of_mix * value).sum(1) for value in values], 1),
            None,
        )
    of_weights = [of_mix * (value - mixed) for value in values]
    of_neuron = torch.stack(
        [(w * position[:, k, :, None]).sum(1) for k, w in enumerate(of_weights)], 1
    )
    of_position = torch.stack(
        [(w * neuron[:, k, None, :]).sum(2) for k, w in enumerate(of_weights)], 1
    )
    return out, of_gate, of_up, of_neuron, of_position


# the same in blocks that stay in the cache --------------------------------------------------------


def _blocks(gate: Tensor) -> Iterator[tuple[slice, slice]]:
    """(batch rows, positions) of each block: some positions of one row, or several whole rows where
    rows are short."""
    B, T, F = gate.shape
    n = math.ceil(T / math.ceil(T * F / BLOCK))  # of equal size, the last one a little smaller
    rows = max(1, BLOCK // (T * F))
    return (
        (slice(b, b + rows), slice(t, t + n)) for b in range(0, B, rows) for t in range(0, T, n)
    )


def _tanh(a: Tensor) -> Tensor:
    """A sigmoid takes a fifth of torch.tanh's time on a CPU."""
    return torch.sigmoid(a + a).mul_(2.0).sub_(1.0)


def _values(a: Tensor) -> list[Tensor]:
    return [torch.relu(a), _tanh(a), functional.silu(a), functional.gelu(a)]


def _weigh(parts: list[Tensor], neuron: Tensor, position: Tensor | None) -> Tensor:
    """sum_k w_k parts_k before any division: parts 4 x (b, n, F), neuron (b, 4, F), position (b, 4,
    n) -> (b, n, F)."""
    total = parts[0] * neuron[:, 0, None]
    if position is not None:
        total.mul_(position[:, 0, :, None])
    for k in range(1, NUM_ACTIVATIONS):
        if position is None:
            total.addcmul_(parts[k], neuron[:, k, None])
        else:
            total.addcmul_(parts[k] * neuron[:, k, None], position[:, k, :, None])
    return total


def _forward_blocks(gate: Tensor, up: Tensor, neuron: Tensor, position: Tensor | None) -> Tensor:
    out = torch.empty_like(gate)
    for b, t in _blocks(gate):
        w, at = neuron[b], None if position is None else position[b, :, t]
        # of one position the weights are no more than the factors
        if at is not None and at.shape[-1] == 1:
            w = w * at
            w, at = w / w.sum(1, keepdim=True), None
        mixed = _weigh(_values(gate[b, t].to(w.dtype)), w, at)  # (b, n, F)
        if at is not None:
            mixed.div_(at.transpose(1, 2) @ w)
        torch.mul(mixed, up[b, t], out=out[b, t])
    return out


def _backward_blocks(
    grad: Tensor, gate: Tensor, up: Tensor, neuron: Tensor, position: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    out, of_gate, of_up = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(up)
    of_neuron = torch.zeros_like(neuron)
    of_position = None if position is None else torch.empty_like(position)
    for b, t in _blocks(gate):
        w, at = neuron[b], None if position is None else position[b, :, t]
        # (b, n, F), as all below; they may be the caller's own
        a, u, dy = (x[b, t].to(w.dtype) for x in (gate, up, grad))
        values = _values(a)
        mixed, of_mix = _weigh(values, w, at), dy * u
        if at is not None:
            total = at.transpose(1, 2) @ w
            mixed.div_(total)
            of_mix.div_(total)
        torch.mul(mixed, u, out=out[b, t])
        torch.mul(mixed, dy, out=of_up[b, t])
        scratch = torch.empty_like(a)
        for k, value in enumerate(values):
            if at is None or of_position is None:
                of_neuron[b, k] += torch.mul(value, of_mix, out=scratch).sum(1)
            else:
                torch.sub(value, mixed, out=scratch).mul_(of_mix)
                of_neuron[b, k] += (at[:, k, None] @ scratch)[:, 0]
                of_position[b, k, t] = (scratch @ w[:, k, :, None])[..., 0]
        one = torch.ones_like(a)
        slopes = [
            torch.ops.aten.threshold_backward(one, a, 0),
            torch.ops.aten.tanh_backward(one, values[1]),
            torch.ops.aten.silu_backward(one, a),
            torch.ops.aten.gelu_backward(one, a),
        ]
        torch.mul(_weigh(slopes, w, at), of_mix, out=of_gate[b, t])
    return out, of_gate, of_up, of_neuron, of_position
