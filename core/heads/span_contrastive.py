"""The span contrastive head: which of the batch's spans comes next.

In:    one span a row; of its document, the hidden states before it
Out:   InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): the query is the mean projection of
       what comes before the span, the keys are those of all spans of the forward pass, which get no
       gradient
State: a two-layer map, D -> D -> D

Specification 003, "span contrastive". The query takes positions before the span only: causal states
after it contain it."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import Batch
from core.errors import UserError
from core.heads.head import Head
from core.heads.inputs import NOWHERE, HeadInputs, document_bounds, is_text, pick
from core.preset.settings import Settings
from core.schedules import Schedule

# B batch rows, T seq_length, D hidden_size


class SpanContrastiveSettings(Settings):
    """The span contrastive head's keys in `auxiliary`."""

    enable_span_contrastive: bool = False
    """Tell a masked span from the other spans of the forward pass (InfoNCE), by what stands before
    it."""
    span_contrastive_weight: Schedule = 0.05
    """Weight of the contrastive loss."""
    span_mask_fraction: float = Field(0.15, gt=0.0, lt=1.0)
    """Length of a masked span: this share of its document, as far as that stands in the row."""
    span_contrastive_temperature: float = Field(0.07, gt=0.0)
    """Temperature of the contrastive loss."""
    span_l2_normalize: bool = True
    """Compare directions only."""


class SpanContrastive(Head, nn.Sequential):
    weight_key = "span_contrastive_weight"

    @classmethod
    def check(cls, settings: Settings, seq_length: int, rows: int) -> None:
        if rows < 2:
            raise UserError(
                "auxiliary.enable_span_contrastive tells a span from the others of a forward pass, "
                "and train.per_gpu_batch_size is 1. Set it to 2 or more."
            )

    def __init__(self, settings: SpanContrastiveSettings, hidden_size: int, vocab_size: int):
        D = hidden_size
        super().__init__(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
        self.settings = settings

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        """(B, 3): where the document begins, where the span begins and where it stops."""
        begin, stop = document_bounds(batch)
        # (B, T)
        length = (self.settings.span_mask_fraction * (stop - begin).double()).long().clamp(min=1)
        time = torch.arange(stop.shape[1], device=stop.device)
        # (B, 1)
        start = pick(is_text(batch) & (time > begin) & (time + length <= stop), draws)[:, None]
        at = start.clamp(min=0)
        positions = torch.cat([begin.gather(1, at), start, at + length.gather(1, at)], dim=1)
        return torch.where(start == NOWHERE, NOWHERE, positions)

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        begin, start, stop = positions[:, :, None].unbind(1)  # (B, 1) each
        time = torch.arange(inputs.hidden.shape[1], device=positions.device)
        inner = self.first_layer(inputs)  # (B, T, D)
        # the last layer is linear: it may follow the mean
        query = self[2](mean_over(inner, (time >= begin) & (time < start)))  # (B, D)
        with torch.no_grad():
            key = self[2](mean_over(inner, (time >= start) & (time < stop)))  # (B, D)
        return info_nce(
            query,
            key,
            valid,
            self.settings.span_contrastive_temperature,
            self.settings.span_l2_normalize,
        )

    def first_layer(self, inputs: HeadInputs) -> Tensor:
        """Compute the first layer at every position: (B, T, D). The one product of heads that is
        large enough for autocast's dtype."""
        weight, bias = (p.to(inputs.dtype) for p in self[0].parameters())
        return self[1](F.linear(inputs.hidden.to(inputs.dtype), weight, bias))


def mean_over(states: Tensor, where: Tensor) -> Tensor:
    """(B, T, D), (B, T) bool -> (B, D), 0 where a row has none; in fp32 or wider."""
    total = torch.bmm(where[:, None].to(states.dtype), states)[:, 0]
    return total.to(torch.promote_types(states.dtype, torch.float32)) / where.sum(
        1, keepdim=True
    ).clamp(min=1)


def info_nce(
    query: Tensor, key: Tensor, valid: Tensor, temperature: float, l2_normalize: bool
) -> Tensor:
    """-log of the share of a row's own key among all valid ones: (B, D), (B, D), (B,) bool ->
    (B,)."""
    if l2_normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    scores = query @ key.T / temperature  # (B, B)
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return -scores.masked_fill(~(valid | own), -torch.inf).log_softmax(-1).diagonal()
