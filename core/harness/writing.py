"""Continuations of many prompts at once, until one of some strings comes up.

In:    a model, a tokenizer; prompts, each with what ends it and how it is drawn
Out:   the text after each prompt, without what ended it
State: none; a draw depends on the seed, the prompt and how often it was asked before, never on its batch

A cache holds rows of one length. Prompts differ, so a batch begins with as many tokens as its shortest prompt has, and every
row takes one token at a time from there: its prompt's, as long as that lasts, and then its own. Nothing is padded, and each
row sees exactly its own tokens. Prompts of similar length go together, so that this costs few steps.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.data.tokenizer import Tokenizer
from core.generation import Reader, sample_top_p
from core.harness.scoring import Told
from core.randomness import derive_seed


@dataclass(frozen=True)
class Wish:
    """What is wanted after a prompt."""

    until: tuple[str, ...] = ()
    """Strings that end the text; they do not belong to it."""
    max_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0


@dataclass
class Row:
    """One prompt and what has been said after it."""

    number: int
    ids: list[int]
    start: int  # tokens of the prompt
    wish: Wish
    random: torch.Generator
    text: str | None = None  # once it is over


@dataclass(frozen=True)
class Writer:
    """Writes with a model in evaluation mode."""

    model: Any  # a LanguageModel
    tokenizer: Tokenizer
    context: int  # tokens it can see
    batch_size: int
    dtype: torch.dtype = torch.float32
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def write(self, asked: list[tuple[str, Wish]], told: Told = lambda done, total: None) -> list[str]:
        """The text after each prompt, in the order they came."""
        texts, done = [""] * len(asked), 0
        for rows in self._batches(asked):
            self._continue(rows, partial(told, done, len(asked)))
            for row in rows:
                texts[row.number] = row.text or ""
            done += len(rows)
            told(done, len(asked))
        return texts

    def _batches(self, asked: list[tuple[str, Wish]]) -> Iterator[list[Row]]:
        """Longest prompts first."""
        before: Counter[str] = Counter()
        rows = []
        for number, ((prompt, wish), ids) in enumerate(zip(asked, self.tokenizer.encode_batch([prompt for prompt, _ in asked]))):
            wish, kept = self._fitted(wish, ids.tolist() or [self.tokenizer.eos_id])
            digest = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()
            random = torch.Generator().manual_seed(derive_seed(self.seed, "harness", digest, before[prompt]))
            before[prompt] += 1
            rows.append(Row(number, kept, len(kept), wish, random))
        rows.sort(key=lambda row: row.start, reverse=True)
        for i in range(0, len(rows), self.batch_size):
            yield rows[i : i + self.batch_size]

    def _fitted(self, wish: Wish, ids: list[int]) -> tuple[Wish, list[int]]:
        """So that both fit into the context. The prompt loses its beginning, but it keeps half of the context if it needs it."""
        kept = ids[-max(self.context - wish.max_tokens, min(len(ids), self.context // 2)) :]
        limit = min(wish.max_tokens, self.context - len(kept))
        note = f"the model sees {self.context:,} tokens: texts of up to {wish.max_tokens:,} tokens end earlier here"
        if limit < wish.max_tokens and note not in self.notes:
            self.notes.append(note)
        return replace(wish, max_tokens=limit), kept

    @torch.no_grad()
    def _continue(self, rows: list[Row], told: Callable[[], None]) -> None:
        """Write until every row is over."""
        device = next(self.model.parameters()).device
        reader = Reader(self.model, self.context, device)
        length = min(row.start for row in rows)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            while any(row.text is None for row in rows):
                scores = reader.next_scores([row.ids[:length] for row in rows]).cpu()  # (B, V)
                scores[:, self.tokenizer.vocab_size :] = float("-inf")  # rows of a published table that no token has
                for row, own in zip(rows, scores):
                    if len(row.ids) == length:
                        self._say(row, own)
                length += 1
                told()

    def _say(self, row: Row, scores: Tensor) -> None:
        """The row's next token; of one that is over, any. scores (V,)."""
        if row.text is not None:
            row.ids.append(self.tokenizer.eos_id)
            return
        wish = row.wish
        greedy = wish.temperature == 0.0
        token = int(scores.argmax()) if greedy else sample_top_p(scores / wish.temperature, wish.top_p, row.random)
        row.ids.append(token)
        said = row.ids[row.start :]
        over = token == self.tokenizer.eos_id
        text = self.tokenizer.decode(said[:-1] if over else said)
        cut = first_stop(text, wish.until)
        if over or cut is not None or len(said) >= wish.max_tokens:
            row.text = text[:cut]


def first_stop(text: str, until: tuple[str, ...]) -> int | None:
    """Where the first of some strings begins in a text; None where there is none of them."""
    return min((at for at in (text.find(stop) for stop in until if stop) if at >= 0), default=None)
