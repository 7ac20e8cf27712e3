"""The policy head: the next token's distribution from a map of its own, towards the language
model's.

In:    the hidden state of one position a row that has a target
Out:   KL(language model || head), the language model's side without gradient
State: weight (V, D), bias (V,)

Specification 003, "policy head"; the original looked at the last position, which may be padding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import IGNORE_INDEX, Batch
from core.heads.head import Head
from core.heads.inputs import HeadInputs, pick
from core.preset.settings import Settings
from core.schedules import Schedule

# B batch rows, D hidden_size, V vocab_size

BLOCK_SCORES = 2**24
"""As many are held at once where only the best of them is asked for."""


class PolicySettings(Settings):
    """The policy head's keys in `auxiliary`."""

    enable_policy: bool = False
    """Predict the next token at a sampled position from a head of its own, towards the language
    model's distribution."""
    policy_kl_weight: Schedule = 0.05
    """Weight of the policy head's divergence."""


class Policy(Head, nn.Linear):
    weight_key = "policy_kl_weight"

    def __init__(self, settings: PolicySettings, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size)

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        return pick(batch.labels != IGNORE_INDEX, draws)[:, None]  # (B, 1)

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        root = inputs.at(positions[:, 0])  # (B, D)
        with torch.no_grad():
            teacher = inputs.wide(inputs.readout(root)).log_softmax(-1)  # (B, V)
        return divergence(teacher, self.predict(root))

    def predict(self, states: Tensor) -> Tensor:
        """Compute log-probabilities of the token after each state: (..., D) -> (..., V)."""
        return super().forward(states).log_softmax(-1)

    @torch.no_grad()
    def likeliest(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Find the token after each state that is likeliest, and its log-probability: (..., D) ->
        (...) each. Scored in blocks."""
        found: list[tuple[Tensor, Tensor]] = []
        # (m, D)
        for block in states.flatten(0, -2).split(max(1, BLOCK_SCORES // self.out_features)):
            scores = super().forward(block)  # (m, V)
            best, token = scores.max(-1)
            found.append((token, best - scores.logsumexp(-1)))
        tokens, log_p = (torch.cat(each).view(states.shape[:-1]) for each in zip(*found))
        return tokens, log_p


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute KL(teacher || student) of log-probabilities (..., V) -> (...)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
