"""Chunked scoring: the one place that cuts scored positions into chunks and blocks, and carries
gradients back.

In:    hidden states, labels and the readout's scores; from its caller, block by block, the gradient
       of the scores
Out:   blocks of fp32 scores for the losses; at the end the gradients of hidden and readout
State: none; the buffers live as long as the iteration

    positions ──► chunks: one matrix product each, long enough for it to run at full speed
    chunk     ──► blocks: what the losses see, short enough that their passes over the scores stay
              in the cache
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts import Readout
from core.losses.base import Chunk, Gradient
from core.losses.scores import Scores
from core.losses.softmax import Scratch

# P positions of the batch, N those with a target, n of them in one chunk or block, D hidden_size, V
# vocab_size

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 128 << 20}
"""Scores of one chunk, in the dtype of the matrix product; less where memory is small."""
MEMORY_SHARE = 64
"""A chunk is at most one part in so many of the device's memory: of all of it, not of what is free,
as sums over chunks round differently and a resumed run must compute the same bits."""
BLOCK_BYTES = {"cpu": 5 << 20, "cuda": 128 << 20}
"""fp32 scores of one block. On a CPU, two or three such buffers stay in the cache (docs/LOG.md)."""
TABLE_BLOCK_BYTES = {"cpu": 48 << 20, "cuda": 128 << 20}
"""The same, when a loss multiplies with the whole embedding table or autograd adds temporaries:
products want long blocks."""


@dataclass
class ChunkPlan:
    """The positions to score, and how many at a time."""

    readout: Readout
    positions: Tensor | None  # (N,) where in the batch the targets are; None: N is P, all of them
    labels: Tensor  # (N,) every one a real target
    progress: float
    chunk_rows: int
    block_rows: int


class ScoreBlock:
    """Some positions and their scores, which the losses read and answer with a gradient."""

    def __init__(self, positions: slice, chunk: Chunk, place: Tensor):
        self.positions, self.chunk, self._place = positions, chunk, place  # of the N
        self.answered = False

    def answer(self, gradient: Gradient) -> None:
        """Take d(total)/d(scores). The scores are overwritten."""
        gradient.write(self._place)
        self.answered = True


def even_rows(total: int, budget: int, row_bytes: int) -> int:
    """Compute the rows of each piece, when `total` rows are cut into nearly equal pieces of at most
    `budget` bytes."""
    pieces = -(-total * row_bytes // budget)
    return max(1, -(-total // max(1, pieces)))


def chunk_bytes(device: torch.device) -> int:
    """Return the bytes of one chunk of scores on a device."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        known = hasattr(os, "sysconf")
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 1 << 62
    wanted = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(1 << 20, min(wanted, total // MEMORY_SHARE))


def score_blocks(
    plan: ChunkPlan, hidden: Tensor, scores: Scores, hidden_gradient: Tensor | None = None
) -> Iterator[ScoreBlock]:
    """Score the positions of hidden (P, D), block by block.

    When a block is answered by the time the iteration resumes, its gradient is carried back into
    `hidden_gradient` (P, D), if that is given, and into `scores`.
    """
    table = plan.readout.table.detach()
    block_buffer, scratch = None, None
    for start in range(0, len(plan.labels), plan.chunk_rows):
        stop = min(start + plan.chunk_rows, len(plan.labels))
        where = slice(start, stop) if plan.positions is None else plan.positions[start:stop]
        raw, gradient = scores.forward(hidden[where])  # (n, V), (n, V)
        wide = torch.promote_types(raw.dtype, torch.float32)
        answered = False
        for first in range(start, stop, plan.block_rows):
            at = slice(first, min(first + plan.block_rows, stop))
            inside = slice(at.start - start, at.stop - start)
            seen = raw[inside]
            if raw.dtype != wide or not seen.is_contiguous():
                if block_buffer is None:
                    rows = min(plan.block_rows, stop - start)
                    block_buffer = raw.new_empty(rows, raw.shape[1], dtype=wide)
                seen = block_buffer[: at.stop - at.start].copy_(raw[inside])
            scratch = scratch or Scratch(seen)  # the first block is the longest
            scratch.give_back()
            chunk = Chunk(seen, plan.labels[at], table, plan.progress, scratch)
            block = ScoreBlock(at, chunk, gradient[inside])
            yield block
            answered = answered or block.answered
        if answered:
            share = scores.backward(gradient)
            if hidden_gradient is not None and share is not None:
                hidden_gradient[where] = share.to(hidden_gradient.dtype)
