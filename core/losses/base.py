"""What a token loss sees and what it answers: scores with everything shared between losses, and the
gradient they collect.

In:    a block of fp32 scores, its labels, the embedding table
Out:   softmaxes and their statistics, each computed once however many losses ask; one gradient of
       the scores
State: none beyond the block; the buffers go from block to block

Every loss here is a function of few numbers of a softmax, so its gradient is a combination of few
shapes: p, p * score, some single entries, a constant. Losses add factors; the block is written
once, at the end (`Gradient.write`)."""

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.preset.settings import LossSettings

# n positions of a block, V vocab_size, D hidden_size

T = TypeVar("T")


class Scratch:
    """Buffers of (rows, V) that every block of a walk uses again."""

    def __init__(self, like: Tensor | None = None):
        """`like`: (rows, V), the longest block."""
        self._like, self._buffers, self._taken = like, list[Tensor](), 0

    def take(self, scores: Tensor) -> Tensor:
        """An (n, V) tensor of any content, like `scores`, until the next `give_back`."""
        if self._like is None or len(scores) > len(self._like):
            return torch.empty_like(scores)
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty_like(self._like))
        self._taken += 1
        return self._buffers[self._taken - 1][: len(scores)]

    def give_back(self) -> None:
        self._taken = 0


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
        # fraction of the run's horizon, 0 at the first update and 1 at the last
        self.progress = progress
        self.scratch = scratch or Scratch()
        self._shared: dict[Hashable, Any] = {}

    def softmax(self, temperature: float = 1.0) -> "Softmax":
        """softmax(scores / temperature), the same object for every loss that asks."""
        return self.shared(
            ("softmax", temperature), lambda: Softmax(self.scores, temperature, self.scratch)
        )

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made when `key` is first asked for."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


class Softmax:
    """softmax(scores / temperature) over (n, V), and what losses need of it. No graph: see
    `Gradient`."""

    def __init__(self, scores: Tensor, temperature: float, scratch: Scratch):
        self.scores, self.temperature, self._scratch = scores, temperature, scratch
        self._tops: dict[int, Tensor] = {}

    @cached_property
    def probabilities(self) -> Tensor:
        """(n, V)"""
        out = self._scratch.take(self.scores)
        if self.temperature == 1.0:
            return torch.softmax(self.scores, dim=1, out=out)
        return torch.softmax(torch.div(self.scores, self.temperature, out=out), dim=1, out=out)

    @cached_property
    def weighted_scores(self) -> Tensor:
        """(n, V) p * score"""
        return torch.mul(self.probabilities, self.scores, out=self._scratch.take(self.scores))

    @cached_property
    def mean_score(self) -> Tensor:
        """(n,) the expected score"""
        return self.weighted_scores.sum(dim=1)

    @cached_property
    def log_normalizer(self) -> Tensor:
        """(n,) logsumexp(scores / temperature)"""
        return self._peak / self.temperature - self._log_peak_probability

    @cached_property
    def entropy(self) -> Tensor:
        """(n,) in nats"""
        return self.log_normalizer - self.mean_score / self.temperature

    @cached_property
    def best(self) -> Tensor:
        """(n,) the index of the highest score, the first of equals"""
        return argmax(self.scores)

    def top(self, k: int) -> Tensor:
        """(n, k) indices of the k highest scores, in any order; of equal scores any"""
        if k not in self._tops:
            self._tops[k] = top_indices(self.scores, k)
        return self._tops[k]

    def at(self, indices: Tensor) -> Tensor:
        """(n,) or (n, k) probabilities"""
        return self.probabilities.gather(1, _columns(indices)).view(indices.shape)

    def nll(self, indices: Tensor) -> Tensor:
        """(n,) -log p at one index a row: exact where p underflows"""
        below = self._peak - self.scores.gather(1, indices[:, None]).squeeze(1)
        return below / self.temperature - self._log_peak_probability

    @cached_property
    def _peak(self) -> Tensor:
        return self.scores.amax(dim=1)

    @cached_property
    def _log_peak_probability(self) -> Tensor:
        # the highest probability is never under 1 / V: its log is safe for scores of any size
        return self.probabilities.amax(dim=1).log_()


class Gradient:
    """d(total)/d(scores) and d(total)/d(table) of a block, as its losses collect them. Factors:
    numbers, () or (n,)."""

    def __init__(self, chunk: Chunk, table: Callable[[], Tensor] | None = None):
        """`table`: gives the (V, D) buffer for the table's gradient, to be added to; None when
        nobody wants that."""
        self._chunk, self._table = chunk, table
        self._softmaxes: dict[float, tuple[Softmax, list, list]] = {}
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
        indices = _columns(indices)
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
        """The sum of it all into `out` (n, V), which may be the scores. Overwrites the softmaxes:
        ask them nothing afterwards."""
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

    def _of(self, softmax: Softmax) -> tuple[Softmax, list, list]:
        return self._softmaxes.setdefault(softmax.temperature, (softmax, [], []))


class TokenLoss:
    """A loss on the vocabulary: the base of every entry of LOSSES.

    A subclass writes `per_token`. The stack sums, divides by the targets of the whole optimizer
    step, and weights. It may also define `add_gradient(chunk, scale, gradient)`, which adds scale *
    d(sum of per_token)/d(scores), and the table's share, to `gradient`; without it autograd
    differentiates `per_token`, which costs temporaries. With it, `per_token` is called without a
    graph and may use `chunk.softmax`, which has none. And `facts() -> {name: function of a chunk to
    (n,)}`: what evaluation tells of it beside its value."""

    needs = "logits"
    """Or "distances": what the model's readout must give."""
    reads_table = False
    """Whether it multiplies with the whole embedding table, which longer blocks make cheaper."""

    def __init__(self, settings: LossSettings):
        self.settings, self.weight = settings, settings.weight
        self.name = settings.name or settings.type  # type: ignore[attr-defined]  # every loss's settings have one

    def per_token(self, chunk: Chunk) -> Tensor:
        """(n,)"""
        raise NotImplementedError


def argmax(scores: Tensor) -> Tensor:
    """(n, V) -> (n,) the first of the highest. torch's own takes four times as long on a CPU, which
    has no vector code for it."""
    width = 64
    whole = scores.shape[1] // width * width
    if scores.is_cuda or whole == 0:
        return scores.argmax(dim=1)
    blocks = scores[:, :whole].unflatten(1, (-1, width))  # (n, V // 64, 64)
    block = blocks.amax(dim=2).argmax(dim=1)  # (n,)
    inside = blocks[torch.arange(len(scores)), block]  # (n, 64)
    index = block * width + inside.argmax(dim=1)
    if whole < scores.shape[1]:
        value, last = scores[:, whole:].max(dim=1)
        index = torch.where(
            value > scores.gather(1, index[:, None]).squeeze(1), whole + last, index
        )
    return index


def top_indices(scores: Tensor, k: int) -> Tensor:
    """(n, V) -> (n, k) where the k highest are, unordered. Exact: they lie in the k groups of
    columns with the highest maxima."""
    n, vocab_size = scores.shape
    k = min(k, vocab_size)
    groups = round((vocab_size * k) ** 0.5)  # then there are as many candidates as groups
    if scores.is_cuda or groups <= k:
        return scores.topk(k, dim=1, sorted=False).indices
    members = vocab_size // groups
    whole = groups * members
    # a group is every `groups`-th column: its maximum is vector code
    grouped = scores[:, :whole].unflatten(1, (members, groups))
    group = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices  # (n, k)
    columns = (group[:, :, None] + torch.arange(0, whole, groups)).flatten(1)  # (n, k * members)
    columns = torch.cat([columns, torch.arange(whole, vocab_size).expand(n, -1)], dim=1)
    found = scores.gather(1, columns).topk(k, dim=1, sorted=False).indices
    return columns.gather(1, found)


def _columns(indices: Tensor) -> Tensor:
    return indices[:, None] if indices.ndim == 1 else indices


def _rows(factor: Any) -> Any:
    return factor[:, None] if isinstance(factor, Tensor) and factor.ndim == 1 else factor
