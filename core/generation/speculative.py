"""Speculative decoding: a draft head proposes tokens ahead, and one pass of the model verifies them
(Leviathan et al. 2023, arXiv 2211.17192).

In:    a draft head; for each row the hidden state before its last token, that token, and how the
       row chooses
Out:   the rows' tokens, with a few drafted ones after them
State: those hidden states; how many tokens were proposed, and how many accepted

A token is drafted as the row itself will choose, with the very random number that it will draw, but
from the head's scores. Where these are close to the model's, so is the token. Verifying is no more
than generating: the row chooses from the model's scores as ever, and goes on for as long as its
choice is the drafted token. Therefore a draft can change how fast a text comes, but never the text.

    text so far     t_1 .. t_n            the model has read t_1 .. t_(n-1), and its hidden state
                                          there begins the draft
    read            t_n d_1 .. d_k        one pass, scores after each of them
    accepted        t_(n+1) = d_1 .. t_(n+a) = d_a, and t_(n+a+1), which may be any token; what was
                    read after it is cut from the cache

B rows of a batch, n of them that draft, t positions, D hidden_size, V vocab_size
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from core.contracts import ModelOutput, Readout, call_if_defined
from core.heads.draft import Draft
from core.models.readout import full_scores


class DraftedRow(Protocol):
    """A row of core/generation/engine.py, as drafts see it."""

    ids: list[int]

    @property
    def finished(self) -> bool: ...

    @property
    def remaining(self) -> int: ...  # tokens that may still come

    # scores (V,), which are changed -> the token that the row would choose next
    def draft_sampler(self) -> Callable[[Tensor], int]: ...


class Drafter:
    """Proposes tokens with a draft head (core/heads/draft.py) of the model that generates."""

    def __init__(self, head: Draft):
        self._head = head
        self.tokens: int = head.tokens
        """Proposed at a time, at most."""
        self.passes = self.emitted = self.proposed = self.accepted = 0

    def propose(
        self, states: Tensor, rows: Sequence[DraftedRow], readout: Readout, count: int
    ) -> list[list[int]]:
        """Return `count` tokens after the last one of each row. states (n, D): the model's hidden
        states before those."""
        samplers, last = [row.draft_sampler() for row in rows], [row.ids[-1] for row in rows]
        drafted = []
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            for _ in range(count):
                # (n, D)
                tokens = F.embedding(torch.tensor(last, device=states.device), readout.table)
                states = self._head.follow(states, tokens.to(states.dtype))
                # (n, V); a head that is damaged drafts badly, no more
                scores = full_scores(readout, states).cpu().nan_to_num_()
                last = [sample(each) for sample, each in zip(samplers, scores)]
                drafted.append(last)
        return [list(each) for each in zip(*drafted)]

    def summary(self) -> str | None:
        """Return one line on how many proposals were accepted so far; None before the first."""
        if self.proposed == 0:
            return None
        share = (
            f"{self.accepted:,} of {self.proposed:,} guesses were right "
            f"({self.accepted / self.proposed:.0%})"
        )
        return f"drafts: {share}; {self.emitted / self.passes:.2f} tokens a pass of the model"


class DraftBatch:
    """The drafts of one batch of rows; without a drafter, nothing is proposed."""

    def __init__(self, drafter: Drafter | None, rows: Sequence[DraftedRow], context: int):
        self._drafter, self._rows, self._context = drafter, rows, context
        self._states: list[Tensor | None] = [None] * len(rows)  # (D,) each
        self._readout: Readout | None = None
        self._lengths = [len(row.ids) for row in rows]

    def extended(self, length: int) -> list[list[int]]:
        """Return each row's tokens with drafted ones after them. `length`: of the shortest row that
        is not finished."""
        self._lengths = [len(row.ids) for row in self._rows]
        texts = [row.ids for row in self._rows]
        waiting = [i for i, row in enumerate(self._rows) if not row.finished]
        if self._drafter is None or self._readout is None:
            return texts
        # the token after the last drafted one ends the text
        target = max(self._lengths[i] + self._rows[i].remaining - 1 for i in waiting)
        target = min(length + self._drafter.tokens, self._context, target)
        reach = min(target if self._states[i] is not None else self._lengths[i] for i in waiting)
        drafting = [i for i in waiting if self._lengths[i] < reach]
        if not drafting:
            return texts
        # (n, D)
        states = torch.stack([state for i in drafting if (state := self._states[i]) is not None])
        rows = [self._rows[i] for i in drafting]
        drafted = self._drafter.propose(states, rows, self._readout, reach - length)
        for i, tokens in zip(drafting, drafted):
            texts[i] = texts[i] + tokens
        return texts

    def record(self, output: ModelOutput, length: int) -> None:
        """Note the hidden states of a pass, after the rows have accepted its tokens. They are
        (B, t, D), those from token `length` of the rows on."""
        if self._drafter is None:
            return
        t, self._readout = output.hidden.shape[1], output.readout
        for i, (row, before) in enumerate(zip(self._rows, self._lengths)):
            emitted, proposed = len(row.ids) - before, length + t - 1 - before
            if emitted > 0:
                self._drafter.emitted += emitted
                self._drafter.passes += 1
                self._drafter.proposed += proposed
                self._drafter.accepted += emitted - 1
            position = len(row.ids) - 1 - length  # of the token before the last one
            if 0 <= position < t:
                self._states[i] = output.hidden[i, position]


def can_draft(model: Any) -> bool:
    """Return whether a model's cache can be cut where a drafted token is rejected."""
    return hasattr(call_if_defined(model, "new_cache"), "cut")
