"""The dynamics head: the hidden states to come, from the present one and the coming tokens.

In:    the hidden state of one position p a row, and the mean embedding of tokens p+1 .. p+3
Out:   mean squared error to the mean of the hidden states at p+1 .. p+3, which get no gradient
State: a two-layer map, 2D -> 2D -> D

Specification 003, "dynamics module"; the original's root came after the tokens it was given.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import Batch
from core.heads.inputs import Seen, document_bounds, is_text, pick
from core.preset.settings import AuxiliarySettings

# B batch rows, T seq_length, D hidden_size

ROLLOUT = 3
"""Tokens looked ahead."""


class Dynamics(nn.Sequential):
    weight_key = "dynamics_weight"

    def __init__(self, settings: AuxiliarySettings, hidden_size: int, vocab_size: int):
        D = hidden_size
        super().__init__(nn.Linear(2 * D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        _, stop = document_bounds(batch)
        time = torch.arange(stop.shape[1], device=stop.device)
        return pick(is_text(batch) & (time + ROLLOUT < stop), draws)[:, None]  # (B, 1)

    def forward(self, seen: Seen, places: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        T = seen.hidden.shape[1]
        # (B, 3); within T where valid
        ahead = (places + torch.arange(1, ROLLOUT + 1, device=places.device)).clamp(max=T - 1)
        tokens = F.embedding(seen.batch.input_ids.gather(1, ahead), seen.readout.table)  # (B, 3, D)
        with torch.no_grad():
            target = seen.at(ahead).mean(1)  # (B, D)
        root = torch.cat([seen.at(places[:, 0]), seen.wide(tokens).mean(1)], dim=-1)  # (B, 2D)
        return ((super().forward(root) - target) ** 2).mean(-1)
