"""The draft head: what the model will say after its next token, guessed token by token without
reading them.

In:    the hidden states of some positions p a row, and the coming tokens p+1 .. p+K
Out:   mean over them of KL(language model's distribution at p+k || readout(s_k)), k = 1 .. K
State: two norms and a gated two-layer map, 2D -> 2 x 2D -> D

    s_0 = h_p        s_k = s_(k-1) + map(norm s_(k-1), norm E[token p+k])        readout(s_k)
                     guesses token p+k+1

Specification 003, "speculative draft decoding"; recurrent as EAGLE is (Li et al. 2024, arXiv
2401.15077), but without attention, as it shall cost little. Embeddings and readout are the model's
own. Nothing of the model gets a gradient from it: a model is the same with a draft head beside it
as without."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import IGNORE_INDEX, Batch
from core.heads.head import Head
from core.heads.inputs import HeadInputs, document_bounds, pick_several
from core.heads.policy import divergence
from core.preset.settings import Settings
from core.schedules import Schedule

# B batch rows, T seq_length, D hidden_size, V vocab_size, n draft_positions, K draft_tokens


class DraftSettings(Settings):
    """The draft head's keys in `auxiliary`."""

    enable_draft: bool = False
    """Guess the tokens after the next one, for generation to draft with. The model itself learns
    nothing from it."""
    draft_weight: Schedule = 1.0
    """Weight of the draft head's divergence. Its gradient reaches the head alone."""
    draft_tokens: int = Field(4, ge=1, le=16)
    """Tokens guessed one after the other, in training and at most in generation."""
    draft_positions: int = Field(8, ge=1, le=1_000_000)
    """Places of a row from which it guesses: more cost time and memory, and teach faster."""


class Draft(Head):
    weight_key = "draft_weight"
    apart = True

    def __init__(self, settings: DraftSettings, hidden_size: int, vocab_size: int):
        super().__init__()
        D = hidden_size
        self.tokens, self.positions = settings.draft_tokens, settings.draft_positions
        self.norm_state, self.norm_token = nn.LayerNorm(D), nn.LayerNorm(D)
        self.inner, self.outer = nn.Linear(2 * D, 4 * D), nn.Linear(2 * D, D)

    def follow(self, states: Tensor, tokens: Tensor) -> Tensor:
        """s_(k-1) and the embeddings of the tokens that come next, (..., D) each -> s_k (...,
        D)."""
        both = torch.cat([self.norm_state(states), self.norm_token(tokens)], dim=-1)
        gate, up = self.inner(both).chunk(2, dim=-1)
        return states + self.outer(F.silu(gate) * up)  # (..., 2D) inside

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        """Choose (B, n) positions, evenly spread over the row's positions, from one that is drawn;
        some of them twice where there are fewer."""
        _, stop = document_bounds(batch)
        time = torch.arange(stop.shape[1], device=stop.device)
        there = (batch.labels != IGNORE_INDEX) & (time + self.tokens < stop)  # (B, T)
        return pick_several(there, draws, self.positions)

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:
        losses = [
            divergence(of_model, guess.log_softmax(-1))
            for of_model, guess in self._guesses(inputs, positions)
        ]
        return torch.stack(losses).mean(0).view(positions.shape).mean(1)

    @torch.no_grad()
    def measure(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Measure how often the likeliest guess is the model's likeliest token, for the first of
        them and for the last; and `accepted`: how many are, of K, before one is not. On the
        held-out text, where generation would go on with what was said."""
        right = torch.stack(
            [
                of_model.argmax(-1) == guess.argmax(-1)
                for of_model, guess in self._guesses(inputs, positions)
            ]
        )
        right = right.view(-1, *positions.shape).float()  # (K, B, n)
        found = {"first": right[0], "last": right[-1], "accepted": right.cumprod(0).sum(0)}
        return {what: each.mean(1) for what, each in found.items()}

    def _guesses(self, inputs: HeadInputs, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For k = 1 .. K, (B * n, V) each: log-probabilities of the model at p+k, and the scores of
        the guess."""
        readout, ids = inputs.readout.detached(), inputs.batch.input_ids
        states = inputs.at(positions).detach()  # (B, n, D)
        for k in range(1, self.tokens + 1):
            at = (positions + k).clamp(max=ids.shape[1] - 1)  # (B, n); within T where valid
            states = self.follow(states, inputs.wide(F.embedding(ids.gather(1, at), readout.table)))
            with torch.no_grad():
                of_model = inputs.wide(readout(inputs.at(at).flatten(0, 1))).log_softmax(-1)
            yield of_model, inputs.wide(readout(states.flatten(0, 1)))
