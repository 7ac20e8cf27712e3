"""Text from a causal model: a batch of prompts of any length, each continued in its own way. The only code that does it.

In:    a voice: a model and its tokenizer; rows: prompts as tokens, with what is wanted after them and a seed
Out:   the text after each prompt, whole or piece by piece
State: none beyond the rows; the same seed gives the same text, whatever the other rows of the batch are

    read    scores of each row's next token     a cache reads each token once, as long as the text fits the context
    choose  block, temperature, nucleus         of the row's own, drawn with its own generator
    say     the token joins the row             its text ends at a stop string, an end token or the limit

A cache holds rows of one length. Prompts differ, so a batch is first read as far as its shortest prompt goes, and the others
follow with their own tokens from there: nothing is padded, and each row sees exactly its tokens. Beyond the context, and without
a cache, the whole context is read for each new token: what falls out of it changes what every position in it has seen. A draft
of several tokens would be read as a longer prompt is: `Reader.next_scores` takes any number of new ones.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.continuation import Continuation
from core.contracts import Batch, LanguageModel, Readout, call_if_defined
from core.data.chat import MARKERS, STOP, encode_turn, read_turn
from core.data.tokenizer import Tokenizer
from core.errors import UserError
from core.settings import GenerateSettings

Guide = Callable[[Tensor, Tensor], Tensor]
"""hidden (n, D), the model's scores (n, V) of the tokens after them -> scores (n, V) to draw from instead."""


@dataclass(frozen=True)
class Voice:
    """What speaks."""

    model: LanguageModel
    tokenizer: Tokenizer
    context: int
    """Tokens the model can see; the oldest are left out beyond it."""
    guide: Guide | None = None
    """What changes its scores."""


@dataclass(frozen=True)
class Wish:
    """What is wanted after a prompt."""

    until: tuple[str, ...] = ()
    """Strings that end the text; they do not belong to it."""
    max_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    """No sequence of so many tokens twice, the prompt's included; 0: no block."""

    @classmethod
    def of(cls, settings: GenerateSettings) -> "Wish":
        return cls(tuple(settings.stop), settings.max_tokens, settings.temperature, settings.top_p, settings.no_repeat_ngram)


class Row:
    """One prompt and what is said after it."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], wish: Wish, seed: int, ends: Collection[int] = ()):
        """ends   tokens that end the text besides the end of the document; they do not belong to it, and are never blocked"""
        assert prompt, "a model needs a token to begin with"
        self.ids = list(prompt)
        self.continuation = Continuation(tokenizer, wish.until)
        self._wish, self._left = wish, wish.max_tokens
        self._random = torch.Generator().manual_seed(seed)
        self._ends = {tokenizer.eos_id, *ends}
        self._repeats = Repeats(wish.no_repeat_ngram, self.ids)

    @property
    def text(self) -> str:
        """What was said so far, without what ended it."""
        return self.continuation.text

    @property
    def over(self) -> bool:
        return self.continuation.over

    def choose(self, scores: Tensor) -> int:
        """The next token. scores (V,), which are changed."""
        if not torch.isfinite(scores.max()):
            raise UserError("the model's scores are not finite: its weights are damaged, or its training diverged")
        scores[[token for token in self._repeats.blocked() if token not in self._ends]] = float("-inf")
        if self._wish.temperature == 0.0:
            return int(scores.argmax())
        return sample_top_p(scores / self._wish.temperature, self._wish.top_p, self._random)

    def say(self, token: int) -> None:
        """It joins the text, or ends it."""
        if token not in self._ends:
            self.ids.append(token)
            self._repeats.add(token)
            self.continuation.add(token)
            self._left -= 1
        if token in self._ends or self._left <= 0:
            self.continuation.finish()


@torch.no_grad()
def advance(voice: Voice, rows: list[Row]) -> Iterator[None]:
    """Continue rows until all are over; comes back after each pass of the model, for whoever shows them or wants to stop."""
    reader, tokenizer = Reader(voice), voice.tokenizer
    while waiting := [row for row in rows if not row.over]:
        length = min(len(row.ids) for row in waiting)
        # a row that is over goes on with any token: the cache keeps its rows
        read = [row.ids[:length] + [tokenizer.eos_id] * (length - len(row.ids)) for row in rows]
        scores = reader.next_scores(read).cpu()  # (B, V)
        scores[:, tokenizer.vocab_size :] = float("-inf")  # rows of a published table that no token has
        for row, own in zip(rows, scores):
            if not row.over and len(row.ids) == length:
                row.say(row.choose(own))
        yield


def stream(voice: Voice, row: Row) -> Iterator[str]:
    """A row's text in pieces, as they are settled: never half a character, nor what a stop string cuts off."""
    for _ in advance(voice, [row]):
        if piece := row.continuation.take():
            yield piece


def generate(voice: Voice, prompt: str, settings: GenerateSettings, seed: int) -> str:
    """Continue `prompt` by up to `settings.max_tokens` tokens, or to the end of the document, or to a stop string.

    A prompt that is a conversation written out (ChatML) is answered: encoded as in training, to the end of the assistant's turn.
    """
    row = _row_of_prompt(voice.tokenizer, prompt, Wish.of(settings), seed)
    for _ in advance(voice, [row]):
        pass
    return row.text


def document_start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a text that begins a document, as in training: after the end of the one before. Markers in it are text."""
    return [tokenizer.eos_id, *tokenizer.encode_batch([prompt])[0].tolist()]


def _row_of_prompt(tokenizer: Tokenizer, prompt: str, wish: Wish, seed: int) -> Row:
    turn = read_turn(prompt)
    if turn is None:
        return Row(tokenizer, document_start(tokenizer, prompt), wish, seed)
    if (stop := tokenizer.special_id(STOP)) is None:  # spelled out
        wish = replace(wish, until=(*wish.until, *MARKERS))
    ids = [tokenizer.eos_id, *encode_turn(tokenizer, turn)]
    return Row(tokenizer, ids, wish, seed, () if stop is None else (stop,))


# choosing ------------------------------------------------------------------------------------------------------------


FIRST_LOOK = 1024
"""So many tokens are looked at before all of a vocabulary are sorted: that takes longer than a small model's pass."""


def sample_top_p(scores: Tensor, top_p: float, random: torch.Generator) -> int:
    """One draw from the smallest set of most probable tokens that reaches `top_p`, the one that crosses it included
    (Holtzman et al. 2020). scores (V,)."""
    probabilities = torch.softmax(scores, dim=-1)  # (V,)
    best, ids = probabilities.topk(min(FIRST_LOOK, len(probabilities)))
    if len(best) < len(probabilities) and best.sum() < top_p:
        best, ids = probabilities.sort(descending=True, stable=True)
    kept = (best.cumsum(-1) - best < top_p) & (best > 0)
    ids, order = ids[kept].sort()  # in the vocabulary's order: in that of the probabilities, rounding could swap equal ones
    reached = best[kept][order].double().cumsum(-1)
    place = torch.searchsorted(reached, torch.rand(1, generator=random, dtype=torch.float64) * reached[-1], right=True)
    return int(ids[min(int(place), len(ids) - 1)])


class Repeats:
    """Which tokens would say a sequence of `n` tokens a second time; none for n = 0."""

    def __init__(self, n: int, ids: list[int]):
        self._n, self._tail = n, ()
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of each n - 1 tokens, those that came after them
        for token in ids if n else ():
            self.add(token)

    def add(self, token: int) -> None:
        if self._n == 0:
            return
        if len(self._tail) == self._n - 1:
            self._followers.setdefault(self._tail, []).append(token)
        self._tail = (*self._tail, token)[-self._n + 1 :] if self._n > 1 else ()

    def blocked(self) -> list[int]:
        return self._followers.get(self._tail, [])


# reading -------------------------------------------------------------------------------------------------------------


class Reader:
    """Reads texts that grow at their ends, all of one length."""

    def __init__(self, voice: Voice):
        self._model, self._context, self._guide = voice.model, voice.context, voice.guide
        self._device = next(voice.model.parameters()).device  # type: ignore[attr-defined]
        self._cache = call_if_defined(voice.model, "new_cache")
        self._read = 0  # tokens the cache holds

    def next_scores(self, rows: list[list[int]]) -> Tensor:
        """Scores (B, V) of the token that follows each row. Each begins with what it was before."""
        length = len(rows[0])
        if self._cache is not None and length <= self._context:
            new = torch.tensor([row[self._read :] for row in rows], device=self._device)  # (B, t)
            output = self._model.extend(new, self._cache)  # type: ignore[attr-defined]
            self._read = length
        else:
            output = self._model(plain_batch(torch.tensor([row[-self._context :] for row in rows], device=self._device)))
        hidden = output.hidden[:, -1]  # (B, D)
        scores = full_scores(output.readout, hidden)  # (B, V)
        return scores if self._guide is None else self._guide(hidden, scores)


def full_scores(readout: Readout, hidden: Tensor) -> Tensor:
    """Scores (n, V) of hidden states (n, D) in fp32 at least, whatever the model computes in: bf16 has three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return readout(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))


def plain_batch(input_ids: Tensor) -> Batch:
    """Rows (B, T) of one text each, that nobody learns from."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    zeros = torch.zeros_like(input_ids, dtype=torch.int32)
    return Batch(input_ids, input_ids, positions, zeros, zeros, packed=False)
