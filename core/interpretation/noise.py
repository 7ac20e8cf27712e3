"""Noise: how far numbers of a category would be off with other texts of it, and how far
categories would differ if their texts were shuffled among them.

In:    for each text, a document or a row of one, its tokens, and sums over them
Out:   intervals of means; a Shift
State: none; what is drawn follows from a fixed seed

D texts, C categories, Q quantities, L num_layers, K activations
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from core.randomness import derive_seed

CONFIDENCE = 0.95
DRAWS = 1000
FEWEST = 5
"""With fewer texts nothing is said of noise."""


def intervals(tokens: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Lowest and highest plausible mean per token, (Q,) each, by a bootstrap over texts; None for
    too few of them.

    tokens   (D,)
    sums     (D, Q)
    """
    if len(tokens) < FEWEST:
        return None
    # (draws, D)
    chosen = _generator("intervals").multinomial(
        len(tokens), np.full(len(tokens), 1 / len(tokens)), size=DRAWS
    )
    means = (chosen @ sums) / (chosen @ tokens)[:, None]  # (draws, Q)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means, tail, axis=0), np.quantile(means, 1 - tail, axis=0)


@dataclass(frozen=True)
class Shift:
    """The distance of mean gate outputs between categories, at each layer and activation."""

    value: np.ndarray  # (L, K) highest minus lowest mean of a category
    highest: np.ndarray  # (L, K) which category that is
    lowest: np.ndarray  # (L, K)
    # (L, K) what shuffled texts stay below, at every layer and activation; None: too few
    noise: np.ndarray | None

    @property
    def real(self) -> np.ndarray:
        """(L, K) whether it is more than noise. If no category differed, there would be any with 5
        % probability."""
        return (
            np.zeros(self.value.shape, dtype=bool)
            if self.noise is None
            else self.value > self.noise
        )


def shift_of(tokens: list[np.ndarray], gates: list[np.ndarray]) -> Shift | None:
    """Measure the shift between categories; None for fewer than two of them.

    tokens   C x (D,)
    gates    C x (D, L, K) sums of the gate output
    """
    if len(tokens) < 2:
        return None
    means = np.stack([g.sum(0) / t.sum() for t, g in zip(tokens, gates)])  # (C, L, K)
    found = np.ptp(means, axis=0), means.argmax(0), means.argmin(0)
    if min(map(len, tokens)) < FEWEST:
        return Shift(*found, None)
    all_tokens, all_gates = np.concatenate(tokens), np.concatenate(gates)
    begins = [0, *accumulate(len(t) for t in tokens[:-1])]
    generator, shuffled = _generator("shift"), []
    for _ in range(DRAWS):
        order = generator.permutation(len(all_tokens))
        sums = np.add.reduceat(all_gates[order], begins)  # (C, L, K)
        shuffled.append(
            np.ptp(sums / np.add.reduceat(all_tokens[order], begins)[:, None, None], axis=0)
        )
    return Shift(*found, _bound(np.stack(shuffled)))


def _bound(shuffled: np.ndarray) -> np.ndarray:
    """(draws, L, K) -> (L, K): a bound that only one draw in twenty crosses anywhere, and each
    place as often as any other."""
    usual = np.quantile(shuffled, CONFIDENCE, axis=0)  # (L, K)
    worst = (shuffled / np.maximum(usual, np.finfo(float).tiny)).max((1, 2))  # (draws,)
    return usual * np.quantile(worst, CONFIDENCE)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(0, "interpret", name))
