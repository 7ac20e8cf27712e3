"""A routing: how neurons weigh the activations, by themselves and given what a text makes
of them, and how undecided.

In:    alpha (L, F, K), beta (L, K), gate outputs f (L, n, K), the temperature
Out:   Static: what alpha alone says; Reading: for each row of a category's documents, sums over
       tokens
State: none

L num_layers, F neurons of a layer, K activations, n some positions of a text
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.models.polyglu import entropy

THRESHOLD = 0.01
"""A neuron prefers an activation whose probability is ahead of the next by more than this. Closer
than that, the largest of the four is an accident of training."""


# by themselves ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Static:
    """The routing of each neuron by alpha alone."""

    preferred: np.ndarray  # (L, F): the activation of the largest alpha
    margin: np.ndarray  # (L, F): by how much its probability is ahead of the next one's
    entropy: np.ndarray  # (L, F) nats
    num_activations: int

    @property
    def max_entropy(self) -> float:
        return math.log(self.num_activations)

    @property
    def decided(self) -> np.ndarray:  # (L, F)
        return self.margin > THRESHOLD

    @property
    def distribution(self) -> np.ndarray:
        """(L, K) per cent of a layer's neurons whose largest alpha is this activation's."""
        return 100 * np.stack(
            [(self.preferred == k).mean(1) for k in range(self.num_activations)], axis=1
        )

    def stats(self) -> dict[str, Any]:
        """entropy_stats.json of specification 001; deviations are those of all neurons, not of a
        sample of them."""
        mean = float(self.entropy.mean())
        return {
            "per_layer_mean": self.entropy.mean(1).tolist(),
            "per_layer_std": self.entropy.std(1).tolist(),
            "aggregate_mean": mean,
            "aggregate_std": float(self.entropy.std()),
            "max_entropy": self.max_entropy,
            "normalized_mean": mean / self.max_entropy,
        }


def static_routing(alpha: Tensor) -> Static:
    """Compute what alpha (L, F, K) alone says of each neuron."""
    top = torch.softmax(alpha.double(), dim=-1).topk(2, dim=-1).values  # (L, F, 2)
    return Static(
        preferred=alpha.argmax(-1).cpu().numpy(),
        margin=(top[..., 0] - top[..., 1]).cpu().numpy(),
        entropy=entropy(alpha).double().cpu().numpy(),
        num_activations=alpha.shape[-1],
    )


# given a text -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of a text."""

    tokens: int
    gates: np.ndarray  # (L, K) of f
    squares: np.ndarray  # (L, K) of f squared
    weights: np.ndarray  # (L, K) of softmax((alpha + beta f) / tau), its mean over neurons
    tempered: np.ndarray  # (L,) of that softmax's entropy, its mean over neurons
    entropy: np.ndarray  # (L,) of the entropy of softmax(alpha + beta f), its mean over neurons

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values())))


@dataclass
class Reading:
    """A category's routing: what its documents made of the routing, as far as they are read."""

    # (which document, what a row of it gave)
    rows: list[tuple[int, Sums]] = field(default_factory=list)
    # (L, F) sum over all tokens of each neuron's entropy, as in Sums
    neurons: np.ndarray | float = 0.0

    def add(self, document: int, sums: Sums, neurons: np.ndarray) -> None:
        self.rows.append((document, sums))
        self.neurons = self.neurons + neurons

    @property
    def documents(self) -> list[Sums]:
        """Return the sums of each document, over all its rows."""
        found: dict[int, Sums] = {}
        for document, sums in self.rows:
            found[document] = found[document] + sums if document in found else sums
        return list(found.values())


@dataclass(frozen=True)
class Router:
    """A model's routing, without noise."""

    alpha: Tensor  # (L, F, K)
    beta: Tensor  # (L, K)
    tau: float

    @torch.no_grad()
    def read(self, gates: Tensor, tokens: int, positions: int) -> tuple[Sums, np.ndarray]:
        """Add up what a text of so many tokens makes of the routing, and the entropy of each neuron
        (L, F), summed like the rest. The neurons are looked at in `positions` places, evenly
        spaced: at every token there would be (L, T, F, K) numbers.

        gates   (L, T, K) f at each token, or (L, 1, K) for all of them
        """
        found = gates.shape[1]
        places = (
            torch.linspace(0, found - 1, min(positions, found), device=gates.device).round().long()
        )
        weights, tempered, free = [], [], []
        # (F, K), (K,), (n, K)
        for alpha, beta, f in zip(self.alpha, self.beta, gates[:, places].to(self.alpha.dtype)):
            logits = alpha + (beta * f)[:, None]  # (n, F, K)
            weights.append(torch.softmax(logits / self.tau, dim=-1).mean((0, 1)))
            tempered.append(entropy(logits / self.tau).mean())
            free.append(entropy(logits).mean(0))
        exact, neurons = gates.double(), torch.stack(free).double()  # (L, T, K), (L, F)
        means = (
            exact.mean(1),
            exact.square().mean(1),
            torch.stack(weights),
            torch.stack(tempered),
            neurons.mean(1),
        )
        return Sums(
            tokens, *(tokens * mean.double().cpu().numpy() for mean in means)
        ), tokens * neurons.cpu().numpy()
