"""The base of token losses: the scores they read, and the gradient they collect.

In:    a block of fp32 scores, its labels, the embedding table
Out:   softmaxes, each computed once however many losses ask; one gradient of the scores
State: none beyond the block; the buffers go from block to block

Every loss here is a function of few numbers of a softmax, so its gradient is a combination of few
shapes: p, p * score, some single entries, a constant. Losses add factors; the block is written
once, at the end (`Gradient.write`)."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.losses.softmax import Scratch, Softmax, as_columns
from core.preset.settings import LossSettings

# n positions of a block, V vocab_size, D hidden_size

T = TypeVar("T")


class Chunk:
    """Some scored positions. `scores`, `labels` and `table` are to be read only."""

    def __init__(
        self,
        scores: Tensor,
        labels: Tensor,
        table: Tensor,
        progress: float,
        scratch: Scratch | None = None,
    ):
        self.scores = scores  # (n, V) logits or distances, fp32 or wider
        self.labels = labels  # (n,) int64, every one a real target
        self.table = table  # (V, D) input embedding table
        # fraction of the run's schedules, 0 at the first update and 1 at the last
        self.progress = progress
        self.scratch = scratch or Scratch()
        self._shared: dict[Hashable, Any] = {}

    def softmax(self, temperature: float = 1.0) -> Softmax:
        """softmax(scores / temperature), the same object for every loss that asks."""
        return self.shared(
            ("softmax", temperature), lambda: Softmax(self.scores, temperature, self.scratch)
        )

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returns, made when `key` is first asked for."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


class Gradient:
    """d(total)/d(scores) and d(total)/d(table) of a block, as its losses collect them. Factors:
    numbers, () or (n,)."""

    def __init__(self, chunk: Chunk, table: Callable[[], Tensor] | None = None):
        """`table`: gives the (V, D) buffer for the table's gradient, to be added to; None when
        nobody wants that."""
        self._chunk, self._table = chunk, table
        self._softmaxes: dict[float, tuple[Softmax, list[Any], list[Any]]] = {}
        self._dense: list[Tensor] = []
        self._entries: list[tuple[Tensor, Tensor]] = []
        self._constants: list[Any] = []

    @property
    def wants_table(self) -> bool:
        return self._table is not None

    @property
    def table(self) -> Tensor | None:
        """(V, D) to add to in place; None when nobody wants it. Asking for it makes it."""
        return None if self._table is None else self._table()

    def add_softmax(self, softmax: Softmax, factor: Any) -> None:
        """factor * p"""
        self._of(softmax)[1].append(factor)

    def add_weighted_scores(self, softmax: Softmax, factor: Any) -> None:
        """factor * p * score"""
        self._of(softmax)[2].append(factor)

    def add_at(self, indices: Tensor, values: Any) -> None:
        """values at single entries: both (n,), or both (n, k) without an index twice in a row; or
        one number for all"""
        indices = as_columns(indices)
        if not isinstance(values, Tensor) or values.ndim == 0:
            values = self._chunk.scores.new_ones(()).mul(values).expand(indices.shape)
        self._entries.append((indices, values.view(indices.shape)))

    def add_constant(self, value: Any) -> None:
        """value at every entry of a row"""
        self._constants.append(value)

    def add_dense(self, values: Tensor) -> None:
        """(n, V), given away: it is overwritten"""
        self._dense.append(values)

    def write(self, out: Tensor) -> None:
        """Write the sum of it all into `out` (n, V), which may be the scores. Overwrites the
        softmaxes: ask them nothing afterwards."""
        terms: list[tuple[Tensor, Any]] = []
        for softmax, factors, score_factors in self._softmaxes.values():
            terms += [(softmax.weighted_scores, sum(score_factors))] if score_factors else []
            terms += [(softmax.probabilities, sum(factors))] if factors else []
        terms += [(values, None) for values in self._dense]
        if not terms:
            terms = [(self._chunk.scratch.take(self._chunk.scores).zero_(), None)]
        first, factor = terms[0]
        # what is rounded is rounded once, at the end
        total = out if out.dtype == first.dtype else first
        torch.mul(first, 1.0 if factor is None else _rows(factor), out=total)
        for values, factor in terms[1:]:
            total.add_(values if factor is None else values.mul_(_rows(factor)))
        for value in self._constants:
            total.add_(_rows(value))
        for indices, values in self._entries:
            total.scatter_add_(1, indices, values)
        if total is not out:
            out.copy_(total)

    def _of(self, softmax: Softmax) -> tuple[Softmax, list[Any], list[Any]]:
        return self._softmaxes.setdefault(softmax.temperature, (softmax, [], []))


class TokenLoss:
    """A loss on the vocabulary: the base of every entry of LOSSES.

    A subclass writes `per_token`. The stack sums, divides by the targets of the whole optimizer
    step, and weights. It may also define `add_gradient(chunk, scale, gradient)`, which adds scale *
    d(sum of per_token)/d(scores), and the table's share, to `gradient`; without it autograd
    differentiates `per_token`, which costs temporaries. With it, `per_token` is called without a
    graph and may use `chunk.softmax`, which has none. And `token_stats() -> {key: function of a
    chunk to (n,)}`: other numbers that an evaluation reports of it."""

    needs = "logits"
    """Or "distances": what the model's readout must give."""
    reads_table = False
    """Whether it multiplies with the whole embedding table, which longer blocks make cheaper."""

    def __init__(self, settings: LossSettings):
        self.settings, self.weight = settings, settings.weight
        self.name = settings.name or settings.type

    def per_token(self, chunk: Chunk) -> Tensor:
        """(n,)"""
        raise NotImplementedError


def _rows(factor: Any) -> Any:
    return factor[:, None] if isinstance(factor, Tensor) and factor.ndim == 1 else factor
