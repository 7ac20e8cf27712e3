"""Rollouts: from a hidden state, the hidden states to come, one step for each coming token.

In:    the hidden state of one position p a row; of the embeddings of tokens p+1 .. p+K, one at each
       step
Out:   the mean over the steps k of: the squared error of s_k to the hidden state at p+k, relative
       to that state's square; where the value head is on, its squared error at s_k; where the
       policy head is on, its divergence there; to the targets of p+k
State: the transition, a two-layer map beside an identity, 2D -> 2D -> D

    s_0 = h_p,  s_k = s_(k-1) + g(s_(k-1), E[token p+k])

Specification 003, "Multi-step Latent Rollouts"; MuZero (Schrittwieser et al. 2020, arXiv
1911.08265): the map is unrolled through its own states, and what is predicted from them is trained
there, too. The gradient goes back through all steps, into the transition, the value and the policy
head, and stops at h_p, the embeddings and all targets: not so in MuZero, but a model whose hidden
states were drawn towards those to come predicted its next tokens worse (docs/LOG.md). Hidden states
of different models have different sizes: a relative error is worth the same weight in all of them.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import Batch
from core.heads.head import Head
from core.heads.inputs import HeadInputs, pick, targets_ahead
from core.heads.policy import divergence
from core.heads.value import ValueSettings, coming_nll
from core.schedules import Schedule

# B batch rows, D hidden_size, V vocab_size, K steps


class RolloutsSettings(ValueSettings):
    """The rollouts' keys in `auxiliary`; their value span is the value head's."""

    enable_rollouts: bool = False
    """Go from hidden state to hidden state by the coming tokens alone, several steps. Policy and
    value heads that are on learn there, too."""
    rollouts_weight: Schedule = 0.05
    """Weight of the rollouts' error."""
    rollout_steps: int = Field(3, ge=1, le=8)
    """Steps of a rollout, in training and of the planner."""


class Rollouts(Head, nn.Sequential):
    weight_key = "rollouts_weight"

    def __init__(self, settings: RolloutsSettings, hidden_size: int, vocab_size: int):
        D = hidden_size
        super().__init__(nn.Linear(2 * D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.steps, self.span_tokens = settings.rollout_steps, settings.value_span_tokens

    def step(self, state: Tensor, token: Tensor) -> Tensor:
        """The state after a token's embedding: (..., D), (..., D) -> (..., D)."""
        return state + super().forward(torch.cat([state, token], dim=-1))

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        """p, where p .. p+K are in one document and have targets."""
        return pick(targets_ahead(batch, self.steps + 1) > self.steps, draws)[:, None]  # (B, 1)

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        states, targets = self._unrolled(inputs, positions)  # (B, K, D) each
        losses = relative(states - targets, targets)  # (B, K)
        if "value" in inputs.heads:
            coming = coming_nll(
                inputs, self._ahead(inputs, positions)[:, :1], self.span_tokens, self.steps
            )
            losses = losses + (inputs.heads["value"].predict(states) - coming) ** 2  # type: ignore[operator]
        if "policy" in inputs.heads:
            with torch.no_grad():
                # (B * K, V)
                teacher = inputs.wide(inputs.readout(targets.flatten(0, 1))).log_softmax(-1)
            student = inputs.heads["policy"].predict(states.flatten(0, 1))  # type: ignore[operator]
            losses = losses + divergence(teacher, student).view_as(losses)
        return losses.mean(1)

    def measure(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """error_k: of s_k, relative to the square of the state at p+k. unchanged_k: of h_p in its
        place, what is to beat."""
        states, targets = self._unrolled(inputs, positions)
        stays = inputs.at(positions)  # (B, 1, D)
        # (B, K) each
        found = {
            "error": relative(states - targets, targets),
            "unchanged": relative(stays - targets, targets),
        }
        return {
            f"{what}_{k}": each[:, k - 1]
            for what, each in found.items()
            for k in range(1, self.steps + 1)
        }

    def _unrolled(self, inputs: HeadInputs, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The states s_1 .. s_K, and the hidden states they stand for: (B, K, D) each."""
        ahead = self._ahead(inputs, positions)
        with torch.no_grad():
            # (B, K, D)
            tokens = inputs.wide(
                F.embedding(inputs.batch.input_ids.gather(1, ahead), inputs.readout.table)
            )
            state, targets, states = inputs.at(positions[:, 0]), inputs.at(ahead), []
        for token in tokens.unbind(1):
            state = self.step(state, token)
            states.append(state)
        return torch.stack(states, dim=1), targets

    def _ahead(self, inputs: HeadInputs, positions: Tensor) -> Tensor:
        """p+1 .. p+K, within the row where p is valid: (B, K)."""
        return (positions + torch.arange(1, self.steps + 1, device=positions.device)).clamp(
            max=inputs.hidden.shape[1] - 1
        )


def relative(error: Tensor, to: Tensor) -> Tensor:
    """The square of one as a share of the other's: (B, K, D) each -> (B, K)."""
    return (error**2).sum(-1) / (to**2).sum(-1).clamp(min=1e-12)
