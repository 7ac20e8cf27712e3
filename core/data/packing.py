"""Lays documents into rows of fixed length.

In:    documents as (inputs, labels), in their lane's order
Out:   Row: arrays of T positions; attention and positions stay inside each document
State: (document index, positions of it already used): a resumed lane goes on in mid-document

    documents  end to end; one that reaches the row's end goes on in the next row:   |aaaab|bbbcc|cccdd|
    padding    one piece of one document a row, the rest padded:                     |aaaa.|bbbb.|ccccc|
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

IGNORE_INDEX = -100  # the same number as core.contracts.IGNORE_INDEX; this floor of data workers must not import torch


@dataclass(slots=True)
class Row:
    """One row of a batch, and where its lane stands after it."""

    lane: int
    input_ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32
    position_ids: np.ndarray  # (T,) int32
    document_ids: np.ndarray  # (T,) int32: 0, 1, ... inside the row; padding is a document of its own
    source_ids: np.ndarray  # (T,) int32: -1 on padding
    after: tuple[int, int]  # the lane's next (document index, position in it)
    documents: list[int]  # indices of the documents in it
    snapshots: list[dict[str, Any]] = field(default_factory=list)  # of the mixer, taken since the row before


class Packer:
    """One lane's documents on their way into rows."""

    def __init__(self, lane: int, seq_length: int, pad_id: int, packing: str, after: tuple[int, int] = (0, 0)):
        self.lane, self.seq_length, self.pad_id = lane, seq_length, pad_id
        self.one_piece = packing == "padding"
        self.after = after
        self._waiting: deque[tuple[int, int, np.ndarray, np.ndarray]] = deque()  # index, source, inputs, labels
        self._positions = 0  # in `_waiting`, not yet used

    def wants(self, index: int) -> bool:
        """Whether a document lies ahead of this lane's place."""
        return index >= self.after[0]

    def add(self, index: int, source: int, inputs: np.ndarray, labels: np.ndarray) -> None:
        self._waiting.append((index, source, inputs, labels))
        used = self.after[1] if index == self.after[0] else 0
        self._positions += len(inputs) - used
        if not self._waiting_starts_here():
            self.after = (self._waiting[0][0], 0)

    def _waiting_starts_here(self) -> bool:
        return self._waiting[0][0] == self.after[0]

    @property
    def ready(self) -> bool:
        """Whether a full row can be made."""
        return bool(self._waiting) if self.one_piece else self._positions >= self.seq_length

    def row(self) -> Row:
        """The next row; short of documents, the rest of it is padding (the end of the data)."""
        T = self.seq_length
        input_ids = np.full(T, self.pad_id, dtype=np.int32)
        labels = np.full(T, IGNORE_INDEX, dtype=np.int32)
        position_ids = np.zeros(T, dtype=np.int32)
        document_ids = np.zeros(T, dtype=np.int32)
        source_ids = np.full(T, -1, dtype=np.int32)
        filled, documents = 0, []
        while filled < T and self._waiting:
            index, source, inputs, targets = self._waiting[0]
            start = self.after[1]
            stop = min(start + T - filled, len(inputs))
            end = filled + stop - start
            input_ids[filled:end] = inputs[start:stop]
            labels[filled:end] = targets[start:stop]
            position_ids[filled:end] = np.arange(stop - start)
            document_ids[filled:end] = len(documents)
            source_ids[filled:end] = source
            self._positions -= stop - start
            documents.append(index)
            filled = end
            self._advance(index, stop, len(inputs))
            if self.one_piece:
                break
        if filled < T:
            position_ids[filled:] = np.arange(T - filled)
            document_ids[filled:] = len(documents)
        return Row(self.lane, input_ids, labels, position_ids, document_ids, source_ids, self.after, documents)

    def _advance(self, index: int, stop: int, length: int) -> None:
        if stop < length:
            self.after = (index, stop)
            return
        self._waiting.popleft()
        self.after = (self._waiting[0][0], 0) if self._waiting else (index + 1, 0)
