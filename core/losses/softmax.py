"""Softmaxes of a block of scores, and their statistics, each computed once.

In:    a block of fp32 scores
Out:   probabilities, entropies, the best entries
State: none beyond the block; the buffers go from block to block
"""

from functools import cached_property

import torch
from torch import Tensor

# n positions of a block, V vocab_size


class Scratch:
    """Buffers of (rows, V) that every block of scores uses again."""

    def __init__(self, like: Tensor | None = None):
        """`like`: (rows, V), the longest block."""
        self._like, self._buffers, self._taken = like, list[Tensor](), 0

    def take(self, scores: Tensor) -> Tensor:
        """Return an (n, V) tensor of any content, like `scores`, until the next `give_back`."""
        if self._like is None or len(scores) > len(self._like):
            return torch.empty_like(scores)
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty_like(self._like))
        self._taken += 1
        return self._buffers[self._taken - 1][: len(scores)]

    def give_back(self) -> None:
        self._taken = 0


class Softmax:
    """softmax(scores / temperature) over (n, V), and what losses need of it. No graph: see
    `Gradient` in core/losses/base.py."""

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
        return self.probabilities.gather(1, as_columns(indices)).view(indices.shape)

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


def argmax(scores: Tensor) -> Tensor:
    """Find the first of the highest: (n, V) -> (n,). torch's own takes four times as long on a CPU,
    which has no vector code for it."""
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
    """Find the k highest, unordered: (n, V) -> (n, k). Exact: they lie in the k groups of
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


def as_columns(indices: Tensor) -> Tensor:
    """View one index a row as a column: (n,) -> (n, 1)."""
    return indices[:, None] if indices.ndim == 1 else indices
