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
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import Batch
from core.heads.inputs import Seen, pick, targets_ahead
from core.heads.policy import divergence
from core.heads.value import coming_surprise
from core.preset.settings import AuxiliarySettings

# B batch rows, D hidden_size, V vocab_size, K steps


class Rollouts(nn.Sequential):
    weight_key = "rollouts_weight"

    def __init__(self, settings: AuxiliarySettings, hidden_size: int, vocab_size: int):
        D = hidden_size
        super().__init__(nn.Linear(2 * D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.steps, self.span_tokens = settings.rollout_steps, settings.value_span_tokens

    def step(self, state: Tensor, token: Tensor) -> Tensor:
        """The state after a token's embedding: (..., D), (..., D) -> (..., D)."""
        return state + super().forward(torch.cat([state, token], dim=-1))

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        """p, where p .. p+K are in one document and have targets."""
        return pick(targets_ahead(batch, self.steps + 1) > self.steps, draws)[:, None]  # (B, 1)

    def forward(self, seen: Seen, places: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        states, targets = self._unrolled(seen, places)  # (B, K, D) each
        losses = relative(states - targets, targets)  # (B, K)
        if "value" in seen.heads:
            coming = coming_surprise(
                seen, self._ahead(seen, places)[:, :1], self.span_tokens, self.steps
            )
            losses = losses + (seen.heads["value"].predict(states) - coming) ** 2  # type: ignore[operator]
        if "policy" in seen.heads:
            with torch.no_grad():
                # (B * K, V)
                teacher = seen.wide(seen.readout(targets.flatten(0, 1))).log_softmax(-1)
            student = seen.heads["policy"].predict(states.flatten(0, 1))  # type: ignore[operator]
            losses = losses + divergence(teacher, student).view_as(losses)
        return losses.mean(1)

    def measure(self, seen: Seen, places: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """error_k: of s_k, relative to the square of the state at p+k. unchanged_k: of h_p in its
        place, what is to beat."""
        states, targets = self._unrolled(seen, places)
        stays = seen.at(places)  # (B, 1, D)
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

    def _unrolled(self, seen: Seen, places: Tensor) -> tuple[Tensor, Tensor]:
        """The states s_1 .. s_K, and the hidden states they stand for: (B, K, D) each."""
        ahead = self._ahead(seen, places)
        with torch.no_grad():
            # (B, K, D)
            tokens = seen.wide(
                F.embedding(seen.batch.input_ids.gather(1, ahead), seen.readout.table)
            )
            state, targets, states = seen.at(places[:, 0]), seen.at(ahead), []
        for token in tokens.unbind(1):
            state = self.step(state, token)
            states.append(state)
        return torch.stack(states, dim=1), targets

    def _ahead(self, seen: Seen, places: Tensor) -> Tensor:
        """p+1 .. p+K, within the row where p is valid: (B, K)."""
        return (places + torch.arange(1, self.steps + 1, device=places.device)).clamp(
            max=seen.hidden.shape[1] - 1
        )


def relative(error: Tensor, to: Tensor) -> Tensor:
    """The square of one as a share of the other's: (B, K, D) each -> (B, K)."""
    return (error**2).sum(-1) / (to**2).sum(-1).clamp(min=1e-12)
