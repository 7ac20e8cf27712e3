"""Scores of a chunk of hidden states, and the way of their gradient back to hidden states and
readout.

In:    hidden states (n, D), chunk after chunk; the gradient of each chunk's scores (n, V)
Out:   scores (n, V) with a place for their gradient; gradients of hidden (n, D), and of the
       readout's parameters, added up
State: one buffer of scores and the sums, for as long as the chunks of a pass
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from core.contracts import Readout

# n positions of one chunk, D hidden_size, V vocab_size


class Scores(Protocol):
    """A readout at work on one chunk after the other."""

    # (n, D) -> the scores and where their gradient goes (n, V)
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]: ...

    # (n, V) -> (n, D); the readout's share is added up
    def backward(self, gradient: Tensor) -> Tensor | None: ...

    def gradients(self) -> list[Tensor | None]: ...  # by the readout's parameters

    # whether `table` is a parameter whose gradient `table_gradient` takes too
    def shared_with(self, table: Tensor) -> bool: ...

    def table_gradient(self) -> Tensor: ...  # (V, D) to be added to


def compute_dtype(hidden: Tensor, parameter: Tensor) -> torch.dtype:
    """Return the dtype that scores are computed in: autocast's dtype inside autocast, which leaves
    float64 alone."""
    device = hidden.device.type
    if parameter.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return parameter.dtype


def scores_of(hidden: Tensor, readout: Readout, wanted: list[bool]) -> "Scores":
    """`wanted`: whether a gradient is wanted for hidden and for each of the readout's
    parameters."""
    if readout.linear is None:
        return AnyScores(hidden, readout, wanted)
    return (SphereScores if readout.provides == "distances" else LinearScores)(
        hidden, readout, wanted
    )


class LinearScores:
    """A linear readout, by plain matrix products into one reused buffer, where the gradient takes
    the scores' place."""

    def __init__(self, hidden: Tensor, readout: Readout, wanted: list[bool]):
        assert readout.linear is not None
        self.weight, self.bias = readout.linear
        self.wants_hidden, self.wants_weight = wanted[:2]
        self.wants_bias = self.bias is not None and wanted[2]
        self.dtype = compute_dtype(hidden, self.weight)
        # (V, D) once per pass, not per chunk
        self.compute_weight = self.weight.detach().to(self.dtype)
        self.compute_bias = None if self.bias is None else self.bias.detach().to(self.dtype)
        self.buffer: Tensor | None = None
        self.weight_gradient: Tensor | None = None
        self.bias_gradient: Tensor | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.hidden = hidden.to(self.dtype)
        if self.buffer is None:  # the first chunk is the longest
            self.buffer = self._new_buffer(len(hidden))
        scores = self.buffer[: len(hidden)]
        if self.compute_bias is None:
            torch.mm(self.hidden, self.compute_weight.t(), out=scores)
        else:
            torch.addmm(self.compute_bias, self.hidden, self.compute_weight.t(), out=scores)
        return scores, scores

    def backward(self, gradient: Tensor) -> Tensor | None:
        if self.wants_weight:
            self._add_to_weight_gradient(gradient.t())
        if self.wants_bias and self.bias is not None:
            # a product with ones, because sum(dim=0) takes twice as long, and ten times as long
            # when it also casts
            # (V,)
            share = torch.mm(gradient.new_ones(1, len(gradient)), gradient)[0].to(self.bias.dtype)
            before = self.bias_gradient
            self.bias_gradient = share if before is None else before.add_(share)
        return torch.mm(gradient, self.compute_weight) if self.wants_hidden else None

    def gradients(self) -> list[Tensor | None]:
        if self.bias is None:
            return [self.weight_gradient]
        return [self.weight_gradient, self.bias_gradient]

    def shared_with(self, table: Tensor) -> bool:
        """Return whether `table` is the weight, so that one buffer can take both gradients."""
        return self.wants_weight and table is self.weight

    def table_gradient(self) -> Tensor:
        """Return the buffer (V, D) of a table that is the weight, to be added to."""
        if self.weight_gradient is None:
            self.weight_gradient = torch.zeros_like(self.weight)
        return self.weight_gradient

    def _add_to_weight_gradient(self, gradient: Tensor) -> None:  # (V, n)
        first, total = self.weight_gradient is None, self.weight_gradient
        if total is None:
            self.weight_gradient = total = torch.empty_like(self.weight)
        if self.dtype == self.weight.dtype:
            torch.addmm(total, gradient, self.hidden, beta=0.0 if first else 1.0, out=total)
            return
        # A product in bf16 is rounded once per chunk; the sum over chunks is not. In pieces that
        # are still in the cache when they are added, product and sum take less time than the
        # product alone does in one piece (measured on a CPU).
        for start in range(0, len(total), 8192):
            piece = slice(start, start + 8192)
            share = torch.mm(gradient[piece], self.hidden)
            if first:
                total[piece].copy_(share)
            else:
                total[piece].add_(share)

    def _new_buffer(self, rows: int) -> Tensor:
        """(rows, V) with every row at a multiple of 64 numbers. At the odd addresses that 50257
        gives, a product in fp32 takes 1.5 times as long (512 x 50257 x 768: 335 instead of 225 ms);
        a tensor core minds as much. The numbers between the rows are 0: AMX reads them, too, and
        multiplies them by 0, which is NaN for what memory may hold."""
        vocab_size = len(self.weight)
        buffer = self.weight.new_empty(rows, -(-vocab_size // 64) * 64, dtype=self.dtype)
        buffer[:, vocab_size:].zero_()
        return buffer[:, :vocab_size]


class SphereScores(LinearScores):
    """Squared distances on the unit sphere (DistanceReadout), in fp32 whatever autocast says: bf16
    knows no cosine between 0.9961 and 1, and TF32 puts a vector at a distance from itself."""

    def __init__(self, hidden: Tensor, readout: Readout, wanted: list[bool]):
        super().__init__(hidden, readout, wanted)
        self.dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.length = _length(self.weight.detach().to(self.dtype))  # (V, 1)
        self.compute_weight = self.weight.detach().to(self.dtype) / self.length
        self.slopes: Tensor | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.hidden_length = _length(hidden.to(self.dtype))  # (n, 1)
        with _full_precision(hidden):
            cosine, _ = super().forward(hidden.to(self.dtype) / self.hidden_length)
        self.distances = cosine.clamp_(-1.0, 1.0).mul_(-2.0).add_(2.0)
        if self.slopes is None:
            self.slopes = self._new_buffer(len(hidden))
        return self.distances, self.slopes[: len(hidden)]

    def backward(self, gradient: Tensor) -> Tensor | None:
        clamped = (self.distances <= 0.0).logical_or_(self.distances >= 4.0)
        gradient.mul_(-2.0).masked_fill_(clamped, 0.0)
        with _full_precision(gradient):
            by_unit = super().backward(gradient)
        return (
            None
            if by_unit is None
            else _through_normalize(by_unit, self.hidden, self.hidden_length)
        )

    def gradients(self) -> list[Tensor | None]:
        by_unit = self.weight_gradient
        return [
            None
            if by_unit is None
            else _through_normalize(by_unit, self.compute_weight, self.length).to(self.weight.dtype)
        ]

    def shared_with(self, table: Tensor) -> bool:
        return False  # the sum kept here is that of the unit vectors


class AnyScores:
    """Any other readout, by autograd inside the chunk."""

    def __init__(self, hidden: Tensor, readout: Readout, wanted: list[bool]):
        self.readout, self.parameters, self.wanted = readout, readout.parameters(), wanted
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(any(self.wanted)):
            self.hidden = hidden.detach().requires_grad_(self.wanted[0])
            self.scores = self.readout(self.hidden)
        scores = self.scores.detach()
        # not into the scores' own place: the readout's backward may still need them
        return scores, torch.empty_like(scores) if any(self.wanted) else scores

    def backward(self, gradient: Tensor) -> Tensor | None:
        inputs = [
            tensor for tensor, wants in zip([self.hidden, *self.parameters], self.wanted) if wants
        ]
        found = iter(torch.autograd.grad(self.scores, inputs, gradient, allow_unused=True))
        hidden_gradient, *shares = [next(found) if wants else None for wants in self.wanted]
        for i, share in enumerate(shares):
            if share is not None:
                total = self.sums[i]
                self.sums[i] = share.clone() if total is None else total.add_(share)
        del self.scores
        return hidden_gradient

    def gradients(self) -> list[Tensor | None]:
        return self.sums

    def shared_with(self, table: Tensor) -> bool:
        return False

    def table_gradient(self) -> Tensor:
        raise AssertionError("shares no table")


def _length(rows: Tensor) -> Tensor:
    return rows.norm(dim=1, keepdim=True).clamp_min(1e-12)  # as F.normalize


def _through_normalize(by_unit: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """d(total)/d(x) from d(total)/d(x / |x|): what points along x has no effect."""
    along = torch.linalg.vecdot(by_unit, unit)[:, None]
    return torch.addcmul(by_unit, unit, along, value=-1.0).div_(length)


@contextlib.contextmanager
def _full_precision(tensor: Tensor) -> Iterator[None]:
    """No TF32 in matrix products."""
    if not tensor.is_cuda:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
