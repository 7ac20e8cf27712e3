"""The feed-forward layers of PolychromaticLM (specification 001): PolyGLU, whose neurons choose
among four activations, and its SwiGLU baseline.

In:    hidden states; what the layers of a forward pass share
Out:   hidden states; what the routing read, as f
State: parameters named as the published ones; the pool's running sums, in the cache

B batch, T time, D hidden_size, F neurons, G gate width
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from core.models.grouped_query import AttentionPass
from core.models.polyglu import (
    NUM_ACTIVATIONS,
    neuron_factors,
    pick_activation,
    polyglu,
    position_factors,
)
from core.preset.settings import Settings
from core.schedules import Piece, Schedule, limits

GATE_WIDTH = 32
"""Hidden width of the network that reads what the routing depends on."""


class RoutingSettings(Settings):
    """The way in which the neurons of PolyGLU choose their activation."""

    pool: Literal["causal", "sequence"] = "causal"
    """What a position's routing depends on. causal: the mean over its document up to it. sequence:
    the mean over the row, the future, neighbours and padding included: as published, and its loss
    is not a language model's."""
    tau: Schedule = Piece(start=1.0, to=0.1)
    """Temperature of the choice: high mixes the four activations, low takes one."""
    noise: bool = True
    """Gumbel noise on the choice in training, one draw per row and neuron."""
    evaluate: Literal["soft", "argmax", "sample"] = "soft"
    """Outside training. soft: no noise. argmax: the likeliest activation alone. sample: noise as in
    training, as published."""

    @model_validator(mode="after")
    def _tau_is_positive(self) -> "RoutingSettings":
        if (lowest := limits(self.tau)[0]) <= 0:
            raise ValueError(f"tau comes down to {lowest:g}; it divides, so keep it above 0")
        return self


@dataclass(kw_only=True)
class Pass(AttentionPass):
    """State that the layers of one forward pass share."""

    position_ids: Tensor  # (B, T), from 0 at the start of each document
    tau: Tensor  # ()


class SwiGLU(nn.Module):
    """The baseline: SiLU for every neuron (Shazeer 2020)."""

    def __init__(self, hidden_size: int, neurons: int):
        super().__init__()
        D, F = hidden_size, neurons
        self.W_gate, self.W_up = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.W_down = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor, shared: Pass, layer: int) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and no routing."""
        return self.W_down(functional.silu(self.W_gate(x)) * self.W_up(x)), None


class PolyGLU(SwiGLU):
    """State-conditional activation routing: each neuron mixes four activations by softmax((alpha +
    beta f(m) + noise) / tau), where m is a mean over what was read and f a small network. Routing
    is computed in fp32."""

    def __init__(self, hidden_size: int, neurons: int, routing: RoutingSettings):
        super().__init__(hidden_size, neurons)
        self.routing = routing
        self.alpha = nn.Parameter(torch.zeros(neurons, NUM_ACTIVATIONS))
        self.beta = nn.Parameter(torch.ones(NUM_ACTIVATIONS))
        self.gate_net = nn.Sequential(
            nn.Linear(hidden_size, GATE_WIDTH),
            nn.ReLU(),
            nn.Linear(GATE_WIDTH, NUM_ACTIVATIONS),
        )

    def forward(self, x: Tensor, shared: Pass, layer: int) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), and f of every position, (B, T, 4), or of the row, (B, 1, 4)."""
        gate, up = self.W_gate(x), self.W_up(x)  # (B, T, F)
        with torch.autocast(x.device.type, enabled=False):
            f = self._gates(x.to(torch.promote_types(x.dtype, torch.float32)), shared, layer)
            return self._routed(gate, up, f, shared, layer), f

    def _gates(self, x: Tensor, shared: Pass, layer: int) -> Tensor:
        """Compute f of the mean over the row, or over the document so far; there the mean of W x is
        taken, which is W of the mean."""
        first, second = self.gate_net[0], self.gate_net[2]
        assert isinstance(first, nn.Linear)
        if self.routing.pool == "sequence":
            return second(functional.relu(first(x.mean(1, keepdim=True))))  # (B, 1, 4)
        sums = running_sum(functional.linear(x, first.weight), shared.position_ids)  # (B, T, G)
        count = shared.position_ids[..., None] + 1
        if shared.cache is not None:
            name = f"pool.{layer}"
            if name in shared.cache.state:
                sums = sums + shared.cache.state[name][:, -1:]
            shared.cache.state[name] = sums
        return second(functional.relu(sums / count + first.bias))  # (B, T, 4)

    def _routed(self, gate: Tensor, up: Tensor, f: Tensor, shared: Pass, layer: int) -> Tensor:
        """Mix the activations: (B, T, F), f (B, T or 1, 4) -> (B, T, D)."""
        down = self.W_down.weight
        neuron, position = self.alpha[None], self.beta * f  # (1, F, 4), (B, T or 1, 4)
        choice = self.routing.evaluate
        if self.training:
            choice = "sample" if self.routing.noise else "soft"
        if choice == "argmax":
            picked = pick_activation(gate, up, neuron, position)
            return functional.linear(picked, down.to(gate.dtype))
        if choice == "sample":
            neuron = neuron + gumbel(len(gate), *self.alpha.shape, like=self.alpha)  # (B, F, 4)
        if self.routing.pool == "sequence":
            weights = torch.softmax((neuron + position) / shared.tau, dim=-1)  # (B, F, 4)
            return polyglu(gate, up, down, weights.transpose(1, 2))
        fixed, name = {} if shared.cache is None else shared.cache.fixed, f"factors.{layer}"
        if name not in fixed:
            fixed[name] = neuron_factors(neuron / shared.tau)
        of_neurons = fixed[name].expand(len(gate), -1, -1)
        return polyglu(gate, up, down, of_neurons, position_factors(position / shared.tau))


def gumbel(*shape: int, like: Tensor) -> Tensor:
    """Draw Gumbel noise from torch's generator, which core/training/passes.py seeds for each step,
    as for dropout."""
    return -torch.empty(shape, dtype=like.dtype, device=like.device).exponential_().log()


def running_sum(x: Tensor, position_ids: Tensor) -> Tensor:
    """Add up x (B, T, C) over each position's document up to it, in log2 T additions of whole
    tensors.

    Subtracting cumulative sums would mix rounding errors of other documents into a document's
    sums; this does not."""
    T, shift = x.shape[1], 1
    while shift < T:
        before = functional.pad(x, (0, 0, shift, 0))[:, :T]
        x = x + torch.where((position_ids >= shift)[..., None], before, 0.0)
        shift *= 2
    return x
