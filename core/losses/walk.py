"""The walk over scored positions: the one place that cuts them into chunks, computes scores and carries gradients back.

In:    hidden states, labels and a readout; from its caller, block by block, the gradient of the scores
Out:   blocks of fp32 scores for the losses; at the end the gradients of hidden and readout
State: none; the buffers live as long as the walk

    positions ──► chunks: one matrix product each, long enough for it to run at full speed
    chunk     ──► blocks: what the losses see, short enough that their passes over the scores stay in the cache
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts import Chunk, Readout

# P positions of the batch, N those with a target, n of them in one chunk or block, D hidden_size, V vocab_size

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}
"""Scores of one chunk, in the dtype of the matrix product."""
BLOCK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
"""fp32 scores of one block, when every loss has its own gradient."""
AUTOGRAD_BLOCK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""fp32 scores of one block, when autograd adds temporaries of the same size and a loss may multiply with the whole table."""


@dataclass
class Work:
    """What one walk goes over."""

    readout: Readout
    positions: Tensor | None  # (N,) where in the batch the targets are; None: N is P, all of them
    labels: Tensor  # (N,) every one a real target
    progress: float
    chunk_rows: int
    block_rows: int


@dataclass
class Block:
    """Some positions in the hands of the losses."""

    positions: slice  # of the N
    chunk: Chunk
    gradient: Tensor | None = None  # (n, V) the answer: d(total)/d(scores); may be chunk.scores, overwritten


def even_rows(total: int, budget: int, row_bytes: int) -> int:
    """Rows of each piece, when `total` rows are cut into nearly equal pieces of at most `budget` bytes."""
    pieces = -(-total * row_bytes // budget)
    return max(1, -(-total // max(1, pieces)))


def walk(
    work: Work, hidden: Tensor, scores: "LinearScores | AnyScores", hidden_gradient: Tensor | None = None
) -> Iterator[Block]:
    """Yields the scored positions of hidden (P, D) block by block.

    When a block's `gradient` is set by the time the walk resumes, it is carried back into `hidden_gradient` (P, D), if that is
    given, and into `scores`.
    """
    table = work.readout.table.detach()
    block_buffer = None
    for start in range(0, len(work.labels), work.chunk_rows):
        stop = min(start + work.chunk_rows, len(work.labels))
        where = slice(start, stop) if work.positions is None else work.positions[start:stop]
        raw, gradient = scores.forward(hidden[where])  # (n, V), (n, V)
        wide = torch.promote_types(raw.dtype, torch.float32)
        answered = False
        for first in range(start, stop, work.block_rows):
            at = slice(first, min(first + work.block_rows, stop))
            inside = slice(at.start - start, at.stop - start)
            seen = raw[inside]
            if raw is not gradient or raw.dtype != wide or not seen.is_contiguous():  # otherwise the losses may overwrite it
                if block_buffer is None:
                    block_buffer = raw.new_empty(min(work.block_rows, stop - start), raw.shape[1], dtype=wide)
                seen = block_buffer[: at.stop - at.start].copy_(raw[inside])
            block = Block(at, Chunk(seen, work.labels[at], table, work.progress))
            yield block
            if block.gradient is not None:
                answered = True
                if block.gradient.data_ptr() != gradient[inside].data_ptr():
                    gradient[inside].copy_(block.gradient)
        if answered:
            share = scores.backward(gradient)
            if hidden_gradient is not None:
                hidden_gradient[where] = share.to(hidden_gradient.dtype)


def compute_dtype(hidden: Tensor, parameter: Tensor) -> torch.dtype:
    """What scores are computed in: autocast's dtype inside autocast, which leaves float64 alone."""
    device = hidden.device.type
    if parameter.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return parameter.dtype


def scores_of(hidden: Tensor, readout: Readout, wanted: list[bool]) -> "LinearScores | AnyScores":
    """`wanted`: whether a gradient is wanted for hidden and for each of the readout's parameters."""
    return (AnyScores if readout.linear is None else LinearScores)(hidden, readout, wanted)


class LinearScores:
    """A linear readout, by plain matrix products into one reused buffer, where the gradient takes the scores' place."""

    def __init__(self, hidden: Tensor, readout: Readout, wanted: list[bool]):
        self.weight, self.bias = readout.linear
        self.wants_hidden, self.wants_weight = wanted[:2]
        self.wants_bias = self.bias is not None and wanted[2]
        self.dtype = compute_dtype(hidden, self.weight)
        self.compute_weight = self.weight.detach().to(self.dtype)  # (V, D) once per walk, not per chunk
        self.compute_bias = None if self.bias is None else self.bias.detach().to(self.dtype)
        self.buffer: Tensor | None = None
        self.weight_gradient: Tensor | None = None
        self.bias_gradient: Tensor | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> the scores (n, V), and where their gradient goes (n, V)."""
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
        """(n, V) -> (n, D); the readout's share is added up."""
        if self.wants_weight:
            self._add_to_weight_gradient(gradient.t())
        if self.wants_bias:
            # a product with ones, because sum(dim=0) takes twice as long, and ten times as long when it also casts
            share = torch.mm(gradient.new_ones(1, len(gradient)), gradient)[0].to(self.bias.dtype)  # (V,)
            self.bias_gradient = share if self.bias_gradient is None else self.bias_gradient.add_(share)
        return torch.mm(gradient, self.compute_weight) if self.wants_hidden else None

    def gradients(self) -> list[Tensor | None]:
        return [self.weight_gradient] if self.bias is None else [self.weight_gradient, self.bias_gradient]

    def _add_to_weight_gradient(self, gradient: Tensor) -> None:  # (V, n)
        first = self.weight_gradient is None
        if first:
            self.weight_gradient = torch.empty_like(self.weight)
        total = self.weight_gradient
        if self.dtype == self.weight.dtype:
            torch.addmm(total, gradient, self.hidden, beta=0.0 if first else 1.0, out=total)
            return
        # A product in bf16 is rounded once per chunk; the sum over chunks is not. In pieces that are still in the cache when
        # they are added, product and sum take less time than the product alone does in one piece (measured on a CPU).
        for start in range(0, len(total), 8192):
            piece = slice(start, start + 8192)
            share = torch.mm(gradient[piece], self.hidden)
            if first:
                total[piece].copy_(share)
            else:
                total[piece].add_(share)

    def _new_buffer(self, rows: int) -> Tensor:
        """(rows, V) with every row at a multiple of 64 numbers. At the odd addresses that 50257 gives, a product in fp32 takes
        1.5 times as long (512 x 50257 x 768: 335 instead of 225 ms); a tensor core minds as much."""
        vocab_size = len(self.weight)
        return self.weight.new_empty(rows, -(-vocab_size // 64) * 64, dtype=self.dtype)[:, :vocab_size]


class AnyScores:
    """Any other readout, by autograd inside the chunk."""

    def __init__(self, hidden: Tensor, readout: Readout, wanted: list[bool]):
        self.readout, self.parameters, self.wanted = readout, readout.parameters(), wanted
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> the scores (n, V), and where their gradient goes (n, V)."""
        with torch.set_grad_enabled(any(self.wanted)):
            self.hidden = hidden.detach().requires_grad_(self.wanted[0])
            self.scores = self.readout(self.hidden)
        scores = self.scores.detach()
        # not into the scores' own place: the readout's backward may still need them
        return scores, torch.empty_like(scores) if any(self.wanted) else scores

    def backward(self, gradient: Tensor) -> Tensor | None:
        """(n, V) -> (n, D); the readout's share is added up."""
        inputs = [tensor for tensor, wants in zip([self.hidden, *self.parameters], self.wanted) if wants]
        found = iter(torch.autograd.grad(self.scores, inputs, gradient, allow_unused=True))
        hidden_gradient, *shares = [next(found) if wants else None for wants in self.wanted]
        for i, share in enumerate(shares):
            if share is not None:
                self.sums[i] = share.clone() if self.sums[i] is None else self.sums[i].add_(share)
        self.scores = None
        return hidden_gradient

    def gradients(self) -> list[Tensor | None]:
        return self.sums
