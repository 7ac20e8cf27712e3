"""The value head: how surprising the coming span will be.

In:    the hidden state of one position p a row
Out:   squared error to the mean -log p of tokens p+1 .. p+n, as far as they are in p's document and have targets
State: weight (1, D), bias (1,)

Specification 003, "value head": the future average NLL over the forthcoming span; the original took the whole past.
"""

import math

import torch
from torch import Tensor, nn

from core.contracts import IGNORE_INDEX, Batch
from core.heads.look import Seen, document_bounds, pick
from core.settings import AuxiliarySettings

# B batch rows, T seq_length, D hidden_size, n tokens of the span


class Value(nn.Linear):
    weight_key = "value_weight"

    def __init__(self, settings: AuxiliarySettings, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, 1)
        self.span_tokens = settings.value_span_tokens
        self.ignorance = math.log(vocab_size)

    @torch.no_grad()
    def begin(self) -> None:
        """Predict at first how surprised a model is that knows nothing. From 0, the error would begin at the square of that, and
        its gradient drown all others for the first steps (docs/LOG.md)."""
        self.bias.fill_(self.ignorance)

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        known = (batch.labels != IGNORE_INDEX).long()  # (B, T)
        before = torch.nn.functional.pad(known.cumsum(1), (1, 0))  # (B, T+1) targets left of a position
        _, stop = document_bounds(batch)
        time = torch.arange(known.shape[1], device=known.device).expand(known.shape)
        ahead = before.gather(1, torch.minimum(time + self.span_tokens, stop)) - before[:, :-1]
        return pick(ahead > 0, draws)[:, None]  # (B, 1)

    def forward(self, seen: Seen, places: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        predicted = super().forward(seen.at(places[:, 0]))[:, 0]  # (B,)
        return (predicted - coming_surprise(seen, places, self.span_tokens)) ** 2


@torch.no_grad()
def coming_surprise(seen: Seen, places: Tensor, span_tokens: int) -> Tensor:
    """The mean -log p of the tokens p+1 .. p+n that p's document has in the row: p (B, 1) -> (B,)."""
    documents, labels = seen.batch.document_ids, seen.batch.labels
    T = labels.shape[1]
    # the target of position t is token t+1
    at = places + torch.arange(span_tokens, device=places.device)  # (B, n)
    inside, at = at < T, at.clamp(max=T - 1)
    inside &= (documents.gather(1, at) == documents.gather(1, places)) & (labels.gather(1, at) != IGNORE_INDEX)
    values = torch.where(inside, seen.surprise(at), 0.0)
    return values.sum(1) / inside.sum(1).clamp(min=1)
