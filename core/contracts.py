"""Contracts between the parts of the program: the batch, the model's output, and the
protocols.

B batch rows, T seq_length, D hidden_size, V vocab_size, n some positions. What a loss sees and
answers: core/losses/base.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
"""The label of a position without a target."""


@dataclass
class Batch:
    """One micro-batch, on the training device. Labels are already aligned: nothing later shifts
    them."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the target of the output at t, IGNORE_INDEX where there is none
    # (B, T) int64: position inside the document, 0 at its first token in the row
    position_ids: Tensor
    # (B, T) int32: equal inside a document, different between neighbours; padding is its own
    document_ids: Tensor
    source_ids: Tensor  # (B, T) int32: index into the run's list of sources, -1 on padding
    # whether a row may hold more than one document, so that attention needs a document mask
    packed: bool
    # (B, k) int64 each: where the auxiliary heads look in each row (core/heads)
    head_positions: dict[str, Tensor] | None = None

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows `start` to `stop` as a view: how a step is cut into micro-batches."""
        return self._each(lambda tensor: tensor[start:stop])

    def take(self, rows: list[int]) -> "Batch":
        """Some of the rows, in this order."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """A copy in memory that a GPU reads while the program goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {
            key: change(value) if isinstance(value, Tensor) else value
            for key, value in vars(self).items()
        }
        if self.head_positions is not None:
            changed["head_positions"] = {
                name: change(positions) for name, positions in self.head_positions.items()
            }
        return replace(self, **changed)


def plain_batch(input_ids: Tensor) -> Batch:
    """Rows (B, T) of one text each, that nobody learns from."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    zeros = torch.zeros_like(input_ids, dtype=torch.int32)
    return Batch(input_ids, input_ids, positions, zeros, zeros, packed=False)


class Readout(Protocol):
    """Maps any slice of hidden states to vocabulary scores.

    A light view of tensors the model owns under its published names, not a module: making one at
    every forward costs nothing and adds nothing to the state dict.
    """

    provides: str
    """The kind of a score: "logits", or "distances": squared, between unit vectors."""
    table: Tensor
    """(V, D) the input embedding table, for losses that compare with embeddings."""

    @property
    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight (V, D), bias (V,)), where logits are hidden @ weight.T + bias, or distances are
        those of hidden to the rows of weight. None for any other readout, which is differentiated
        by autograd."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute scores: (n, D) -> (n, V)."""

    def parameters(self) -> list[Tensor]:
        """Return every tensor the scores depend on besides `hidden`."""

    def detached(self) -> "Readout":
        """Return a readout of the same scores, without gradient for any of these tensors."""


@dataclass
class ModelOutput:
    """The output of a trunk: hidden states, and the readout that would turn them into scores."""

    hidden: Tensor  # (B, T, D)
    readout: Readout


class LanguageModel(nn.Module):
    """A trunk plus readout. No loss, optimizer, print or device choice inside.

    It may define, and whoever needs them calls them where they exist:

        set_progress(p)                before each update, and before a trained model is used:
                                       schedules of its own
        after_optimizer_step()         after each update
        report() -> {name: scalar}     numbers of the last forward pass, told with the step;
                                       tensors, never read here
        new_cache() -> cache           of one batch of texts that grow at their ends; None where no
                                       cache would be exact
        extend(input_ids (B, t), cache) -> ModelOutput of these t positions, which follow what the
        cache holds

    A cache that has `cut(length)` can forget all positions after the first `length`; at least one
    of the last `extend` stays."""

    # whether no position sees a later one: where it is False, losses and perplexities are not a
    # language model's
    is_causal: bool
    vocab_size: int

    def forward(self, batch: Batch) -> ModelOutput:
        raise NotImplementedError


def call_if_defined(module: Any, method: str, *args: Any) -> Any:
    """Call an optional hook of a model (`after_optimizer_step`, `load_published`, ...), of its
    settings or of a source (`check_tokenizer`); returns what it returns."""
    hook = getattr(module, method, None)
    return hook(*args) if hook is not None else None
