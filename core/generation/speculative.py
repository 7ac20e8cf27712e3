"""Guesses of what a model will say next, for one pass of the model to verify (Leviathan et al.
2023, arXiv 2211.17192).

In:    a draft head; of each row the hidden state before its last token, that token, and how the row
       chooses
Out:   the rows' texts, a few guessed tokens longer
State: those hidden states; how many tokens were guessed, and how many of them were said

A guess is chosen as the row itself will choose, with the very random number that it will draw, but
from the head's scores. Where these are near the model's, so is the token. To verify is no more than
to say on: the row chooses from the model's scores as ever, and goes on for as long as it has said
what was guessed. So a draft can change how fast a text comes, and never what it says.

    said      t_1 .. t_n             the model has read t_1 .. t_(n-1), and its hidden state there
              begins the draft
    read      t_n d_1 .. d_k         one pass, scores after each of them
    said      t_(n+1) = d_1 .. t_(n+a) = d_a, and t_(n+a+1), which may be any; what was read after
              it is forgotten
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from core.contracts import ModelOutput, Readout, call_if_defined
from core.models.readout import full_scores

# B rows of a batch, n of them that guess, t positions, D hidden_size, V vocab_size


class Speaking(Protocol):
    """A row of core/generation/engine.py, as drafts see it."""

    ids: list[int]

    @property
    def over(self) -> bool: ...

    @property
    def left(self) -> int: ...  # tokens it may still say

    # scores (V,), which are changed -> the token it would say next
    def foresee(self) -> Callable[[Tensor], int]: ...


class Drafter:
    """Guesses with a draft head (core/heads/draft.py) of the model that speaks."""

    def __init__(self, head: Any):
        self._head = head
        self.tokens: int = head.tokens
        """Guessed at a time, at most."""
        self.passes = self.said = self.guessed = self.right = 0

    def guesses(
        self, states: Tensor, rows: Sequence[Speaking], readout: Readout, count: int
    ) -> list[list[int]]:
        """`count` tokens after the last one of each row. states (n, D): the model's hidden states
        before those."""
        choosers, last = [row.foresee() for row in rows], [row.ids[-1] for row in rows]
        found = []
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            for _ in range(count):
                # (n, D)
                tokens = F.embedding(torch.tensor(last, device=states.device), readout.table)
                states = self._head.follow(states, tokens.to(states.dtype))
                # (n, V); a head that is damaged guesses badly, no more
                scores = full_scores(readout, states).cpu().nan_to_num_()
                last = [choose(own) for choose, own in zip(choosers, scores)]
                found.append(last)
        return [list(each) for each in zip(*found)]

    def account(self) -> str | None:
        """For people: how the guesses were, so far."""
        if self.guessed == 0:
            return None
        share = (
            f"{self.right:,} of {self.guessed:,} guesses were right "
            f"({self.right / self.guessed:.0%})"
        )
        return f"drafts: {share}; {self.said / self.passes:.2f} tokens a pass of the model"


class Drafts:
    """What is known of one batch of rows; without a drafter nothing, and no guess is made."""

    def __init__(self, drafter: Drafter | None, rows: Sequence[Speaking], context: int):
        self._drafter, self._rows, self._context = drafter, rows, context
        self._states: list[Tensor | None] = [None] * len(rows)  # (D,) each
        self._readout: Readout | None = None
        self._lengths = [len(row.ids) for row in rows]

    def continued(self, length: int) -> list[list[int]]:
        """Each row's tokens, and guesses after them; `length`: of the shortest row that is not
        over."""
        self._lengths = [len(row.ids) for row in self._rows]
        texts = [row.ids for row in self._rows]
        waiting = [i for i, row in enumerate(self._rows) if not row.over]
        if self._drafter is None or self._readout is None:
            return texts
        # the token after the last guess ends it
        wanted = max(self._lengths[i] + self._rows[i].left - 1 for i in waiting)
        wanted = min(length + self._drafter.tokens, self._context, wanted)
        reach = min(wanted if self._states[i] is not None else self._lengths[i] for i in waiting)
        able = [i for i in waiting if self._lengths[i] < reach]
        if not able:
            return texts
        # (n, D)
        states = torch.stack([state for i in able if (state := self._states[i]) is not None])
        found = self._drafter.guesses(
            states, [self._rows[i] for i in able], self._readout, reach - length
        )
        for i, guess in zip(able, found):
            texts[i] = texts[i] + guess
        return texts

    def verified(self, output: ModelOutput, length: int) -> None:
        """After a pass, and what was said on it. Its hidden states (B, t, D) are those from token
        `length` of the rows on."""
        if self._drafter is None:
            return
        t, self._readout = output.hidden.shape[1], output.readout
        for i, (row, before) in enumerate(zip(self._rows, self._lengths)):
            said, guessed = len(row.ids) - before, length + t - 1 - before
            if said > 0:
                self._drafter.said += said
                self._drafter.passes += 1
                self._drafter.guessed += guessed
                self._drafter.right += said - 1
            place = len(row.ids) - 1 - length  # of the token before the last one
            if 0 <= place < t:
                self._states[i] = output.hidden[i, place]


def can_draft(model: Any) -> bool:
    """Whether a model's cache can forget what was guessed wrong."""
    return hasattr(call_if_defined(model, "new_cache"), "cut")
