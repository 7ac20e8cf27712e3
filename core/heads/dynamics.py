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
from core.heads.head import Head
from core.heads.inputs import HeadInputs, document_bounds, is_text, pick
from core.preset.settings import Settings
from core.schedules import Schedule

# B batch rows, T seq_length, D hidden_size

ROLLOUT = 3
"""Tokens looked ahead."""


class DynamicsSettings(Settings):
    """The dynamics head's keys in `auxiliary`."""

    enable_dynamics: bool = False
    """Predict the next three hidden states' mean from the present one and the three tokens."""
    dynamics_weight: Schedule = 0.05
    """Weight of the dynamics head's error."""


class Dynamics(Head, nn.Sequential):
    weight_key = "dynamics_weight"

    def __init__(self, settings: DynamicsSettings, hidden_size: int, vocab_size: int):
        D = hidden_size
        super().__init__(nn.Linear(2 * D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        _, stop = document_bounds(batch)
        time = torch.arange(stop.shape[1], device=stop.device)
        return pick(is_text(batch) & (time + ROLLOUT < stop), draws)[:, None]  # (B, 1)

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        T = inputs.hidden.shape[1]
        # (B, 3); within T where valid
        ahead = (positions + torch.arange(1, ROLLOUT + 1, device=positions.device)).clamp(max=T - 1)
        tokens = F.embedding(
            inputs.batch.input_ids.gather(1, ahead), inputs.readout.table
        )  # (B, 3, D)
        with torch.no_grad():
            target = inputs.at(ahead).mean(1)  # (B, D)
        root = torch.cat(
            [inputs.at(positions[:, 0]), inputs.wide(tokens).mean(1)], dim=-1
        )  # (B, 2D)
        return ((super().forward(root) - target) ** 2).mean(-1)
