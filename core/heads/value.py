"""The value head: how surprising the coming span will be.

In:    the hidden state of one position p a row
Out:   squared error to the mean -log p of tokens p+1 .. p+n, as far as they are in p's document and
       have targets
State: weight (1, D), bias (1,)

Specification 003, "value head": the future average NLL over the forthcoming span; the original took
the whole past."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from core.contracts import IGNORE_INDEX, Batch
from core.heads.head import Head
from core.heads.inputs import HeadInputs, pick, targets_ahead
from core.preset.settings import Settings
from core.schedules import Schedule

# B batch rows, T seq_length, D hidden_size, n tokens of the span


class ValueSettings(Settings):
    """The value head's keys in `auxiliary`."""

    enable_value: bool = False
    """Predict the average loss of the coming span."""
    value_weight: Schedule = 0.05
    """Weight of the value head's error."""
    value_span_tokens: int = Field(16, ge=1, le=1_000_000)
    """Tokens of the span whose average loss the value head predicts."""


class Value(Head, nn.Linear):
    weight_key = "value_weight"

    def __init__(self, settings: ValueSettings, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, 1)
        self.span_tokens = settings.value_span_tokens
        self.ignorance = math.log(vocab_size)

    @torch.no_grad()
    def begin(self) -> None:
        """Predict at first how surprised a model is that knows nothing. From 0, the error would
        begin at the square of that, and its gradient drown all others for the first steps
        (docs/LOG.md)."""
        self.bias.fill_(self.ignorance)

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        return pick(targets_ahead(batch, self.span_tokens) > 0, draws)[:, None]  # (B, 1)

    def predict(self, states: Tensor) -> Tensor:
        """Predict the loss of the coming span: (..., D) -> (...)."""
        return super().forward(states)[..., 0]

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        predicted = self.predict(inputs.at(positions[:, 0]))  # (B,)
        return (predicted - coming_nll(inputs, positions, self.span_tokens)[:, 0]) ** 2


@torch.no_grad()
def coming_nll(inputs: HeadInputs, positions: Tensor, span_tokens: int, roots: int = 1) -> Tensor:
    """Compute the mean -log p of the n tokens after each of the positions p .. p+roots-1, as far as
    p's document has them in the row: p (B, 1) -> (B, roots)."""
    documents, labels = inputs.batch.document_ids, inputs.batch.labels
    T = labels.shape[1]
    # the target of position t is token t+1
    at = positions + torch.arange(
        roots + span_tokens - 1, device=positions.device
    )  # (B, roots + n - 1)
    inside, at = at < T, at.clamp(max=T - 1)
    inside &= (documents.gather(1, at) == documents.gather(1, positions)) & (
        labels.gather(1, at) != IGNORE_INDEX
    )
    values = torch.where(inside, inputs.nll(at), 0.0)
    # (B, roots, n)
    values, inside = values.unfold(1, span_tokens, 1), inside.unfold(1, span_tokens, 1)
    return values.sum(2) / inside.sum(2).clamp(min=1)
