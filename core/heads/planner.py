"""The planner: the model's likeliest next tokens, weighed anew by what may come after each.

In:    a hidden state and the model's scores there; the policy, value and rollouts heads, and the
       embedding table
Out:   scores to draw from instead: those of the C likeliest tokens changed, all others as they
       were. In training, at m positions a row, the mean of -log q(target) + planner_kl_weight *
       KL(q || p), of q the changed scores' distribution and p the model's
State: the router, a two-layer map of a candidate's features to the change of its score; it begins
at no change

    candidate a    s_1 = transition(h, E[a]); each further step takes the token that the policy head
                   finds likeliest at s_k
    features       log p(a); the policy head's log-probability of a at h, and of each token the
                   rollout took; the value head at s_1 .. s_K and their discounted mean; and each of
                   these less its mean over the candidates

Specification 003, "Adapter Reintegration (full planner)": lookahead-based token reweighting by
auxiliary heads and a router. The features get no gradient: what the planner learns changes nothing
else. The target is never forced among the candidates: q is a proper distribution over the whole
vocabulary. Training and generation take it from the same function."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import IGNORE_INDEX, Batch
from core.heads.head import Head
from core.heads.inputs import HeadInputs, pick_several
from core.heads.policy import divergence
from core.heads.rollouts import RolloutsSettings
from core.schedules import Schedule

# B batch rows, m planner_positions, n any positions, C candidates of each, K steps of a rollout, D
# hidden_size, V vocab_size

WIDTH = 32
"""Of the router's middle."""
DISCOUNT = 0.9
"""Of each further step in the mean of the values."""


class PlannerSettings(RolloutsSettings):
    """The planner's keys in `auxiliary`; it takes as many steps as the rollouts."""

    enable_planner: bool = False
    """Learn to weigh the model's likeliest next tokens anew, by where rollouts of them lead. Needs
    the policy, value and rollouts heads; `generate.planner` uses it."""
    planner_weight: Schedule = 0.05
    """Weight of the planner's loss. Only the planner learns from it."""
    planner_positions: int = Field(4, ge=1, le=1_000_000)
    """Places of a row at which it learns."""
    planner_candidates: int = Field(8, ge=2, le=256)
    """Likeliest tokens the planner rolls out."""
    planner_kl_weight: float = Field(0.1, ge=0.0)
    """Weight, inside the planner's loss, of its distribution's divergence from the model's."""


class Planner(Head, nn.Sequential):
    weight_key = "planner_weight"
    needs = ("policy", "value", "rollouts")
    apart = True

    def __init__(self, settings: PlannerSettings, hidden_size: int, vocab_size: int):
        super().__init__(
            nn.Linear(2 * num_features(settings.rollout_steps), WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, 1),
        )
        self.candidates = min(settings.planner_candidates, vocab_size)
        self.positions, self.kl_weight = settings.planner_positions, settings.planner_kl_weight

    @torch.no_grad()
    def begin(self) -> None:
        """Begin with no change, from a first layer as wide as its few features want: at the models'
        N(0, 0.02) it learns half as fast."""
        first, last = self[0], self[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        return pick_several(batch.labels != IGNORE_INDEX, draws, self.positions)  # (B, m)

    def plan(
        self, hidden: Tensor, scores: Tensor, heads: Mapping[str, Any], table: Tensor
    ) -> Tensor:
        """The scores (n, V) of hidden states (n, D), changed. Gradients reach the router only.

        `heads`: the others, by name. `table`: (V, D), of input embeddings.
        """
        with torch.no_grad():
            scores = scores.detach()
            _, tokens = scores.topk(self.candidates)  # (n, C)
            # (n, C, f)
            features = look_ahead(hidden.to(scores.dtype), scores, tokens, heads, table)
            features = torch.cat([features, features - features.mean(1, keepdim=True)], dim=-1)
        change = super().forward(features)[..., 0]  # (n, C)
        return scores.scatter_add(1, tokens, change)

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        before, after, target = self._distributions(inputs, positions)
        # (B * m,)
        losses = self.kl_weight * divergence(after, before) - after.gather(1, target)[:, 0]
        return losses.view(positions.shape).mean(1)

    def measure(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """gain: log q - log p of the target, in nats; kl: of q from p; changed: whether another
        token is the likeliest."""
        before, after, target = self._distributions(inputs, positions)
        found = {
            "gain": (after - before).gather(1, target)[:, 0],
            "kl": divergence(after, before),
            "changed": (before.argmax(1) != after.argmax(1)).to(before.dtype),
        }
        return {what: each.view(positions.shape).mean(1) for what, each in found.items()}

    def _distributions(
        self, inputs: HeadInputs, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p and log q (B * m, V), and the target (B * m, 1); any token in rows without a
        place."""
        with torch.no_grad():
            hidden = inputs.at(positions).flatten(0, 1)  # (B * m, D)
            scores = inputs.wide(inputs.readout(hidden))  # (B * m, V)
        after = self.plan(hidden, scores, inputs.heads, inputs.readout.table)
        return (
            scores.log_softmax(-1),
            after.log_softmax(-1),
            inputs.batch.labels.gather(1, positions).clamp(min=0).view(-1, 1),
        )


def num_features(steps: int) -> int:
    """f, of `look_ahead`."""
    return 2 + (steps - 1) + steps + 1


@torch.no_grad()
def look_ahead(
    hidden: Tensor, scores: Tensor, tokens: Tensor, heads: Mapping[str, Any], table: Tensor
) -> Tensor:
    """Collect what is known of each candidate, all in nats: (n, D), (n, V), (n, C) -> (n, C, f)."""
    policy, value, rollouts = (heads[name] for name in Planner.needs)
    # (n, C) each
    found = [scores.log_softmax(-1).gather(1, tokens), policy.predict(hidden).gather(1, tokens)]
    state, values = hidden[:, None].expand(-1, tokens.shape[1], -1), []  # (n, C, D)
    for k in range(rollouts.steps):
        if k > 0:
            tokens, log_p = policy.likeliest(state)
            found.append(log_p)
        state = rollouts.step(state, F.embedding(tokens, table).to(state.dtype))
        values.append(value.predict(state))
    weights = [
        DISCOUNT**k / sum(DISCOUNT**i for i in range(len(values))) for k in range(len(values))
    ]
    mean = sum(weight * each for weight, each in zip(weights, values))
    return torch.stack([*found, *values, mean], dim=-1)
