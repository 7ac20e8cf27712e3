"""Text from a causal model: a batch of prompts of any length, each continued in its own way. The
only code that does it.

In:    a voice: a model and its tokenizer; rows: prompts as tokens, with what is wanted after them
       and a seed
Out:   the text after each prompt, whole or piece by piece
State: none beyond the rows; the same seed gives the same text, whatever the other rows of the batch
are

    read    scores of each row's next token     a cache reads each token once, as long as the text
            fits the context
    choose  block, temperature, nucleus         of the row's own, drawn with its own generator
    say     the token joins the row             its text ends at a stop string, an end token or the
            limit

A cache holds rows of one length. Prompts differ, so a batch is first read as far as its shortest
prompt goes, and the others follow with their own tokens from there: nothing is padded, and each row
sees exactly its tokens. Beyond the context, and without a cache, the whole context is read for each
new token: what falls out of it changes what every position in it has seen. With a memory, half a
context at a time becomes a summary instead, which stands before the rest and is cached with it.
Guesses (core/generation/speculative.py) are read as a longer prompt is, and the cache is cut where
the first one was wrong in any row."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.contracts import LanguageModel, ModelOutput, call_if_defined, plain_batch
from core.data.chat import MARKERS, STOP, encode_turn, read_turn
from core.data.tokenizer import Tokenizer
from core.errors import UserError
from core.generation.speculative import Drafter, Drafts
from core.generation.text_stream import Continuation
from core.heads.memory import Memory, Summary, read
from core.models.readout import full_scores
from core.preset.settings import GenerateSettings

Guide = Callable[[Tensor, Tensor], Tensor]
"""hidden (n, D), the model's scores (n, V) of the tokens after them -> scores (n, V) to draw from
instead."""


@dataclass(frozen=True)
class Voice:
    """What speaks."""

    model: LanguageModel
    tokenizer: Tokenizer
    context: int
    """Tokens the model can see; the oldest are left out beyond it."""
    guide: Guide | None = None
    """What changes its scores."""
    drafter: Drafter | None = None
    """What guesses tokens ahead, where the model's cache can forget them again; it changes no
    text."""
    memory: Memory | None = None
    """What compresses the oldest tokens, where they would be left out."""


COLDEST, HOTTEST = 1e-20, 1e20
"""Scores divided by less or more are not finite in fp32; long before, the likeliest token is
certain, or all are alike."""


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
        return cls(
            tuple(settings.stop),
            settings.max_tokens,
            settings.temperature,
            settings.top_p,
            settings.no_repeat_ngram,
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    def tempered(self, scores: Tensor) -> Tensor:
        return scores / min(self.temperature, HOTTEST)


class Row:
    """One prompt and what is said after it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        wish: Wish,
        seed: int,
        ends: Collection[int] = (),
    ):
        """ends   tokens that end the text besides the end of the document; they do not belong to
        it, and are never blocked"""
        assert prompt, "a model needs a token to begin with"
        self.ids = list(prompt)
        self.continuation = Continuation(tokenizer, wish.until)
        self._wish, self._left = wish, wish.max_tokens
        self._random = torch.Generator().manual_seed(seed)
        self._ends, self._known = {tokenizer.eos_id, *ends}, tokenizer.vocab_size
        self._repeats = Repeats(wish.no_repeat_ngram, self.ids)

    @property
    def text(self) -> str:
        """What was said so far, without what ended it."""
        return self.continuation.text

    @property
    def over(self) -> bool:
        return self.continuation.over

    @property
    def left(self) -> int:
        """Tokens it may still say."""
        return self._left

    def choose(self, scores: Tensor) -> int:
        """The next token. scores (V,), which are changed."""
        if not torch.isfinite(scores.max()):
            raise UserError(
                "the model's scores are not finite: its weights are damaged, or its training "
                "diverged"
            )
        self._block(scores, self._repeats)
        if self._wish.is_greedy:
            return int(scores.argmax())
        return sample_top_p(self._wish.tempered(scores), self._wish.top_p, self._random)

    def foresee(self) -> Callable[[Tensor], int]:
        """Chooses as the row will, one token after the other, from scores (V,) that are changed;
        nothing is said. It looks at few tokens, as one that is far from likely is hardly the row's
        choice, too."""
        random, repeats = torch.Generator(), self._repeats.fork()
        random.set_state(self._random.get_state())

        def choose(scores: Tensor) -> int:
            self._block(scores, repeats)
            if self._wish.is_greedy:
                token = int(scores.argmax())
            else:
                best, ids = scores.topk(min(LIKELY, len(scores)))
                shares = torch.softmax(self._wish.tempered(best), dim=-1)
                token = race(shares, ids, self._wish.top_p, len(scores), random)
            repeats.add(token)
            return token

        return choose

    def _block(self, scores: Tensor, repeats: "Repeats") -> None:
        scores[self._known :] = float("-inf")  # rows of a published table that no token has
        if blocked := [token for token in repeats.blocked() if token not in self._ends]:
            scores[blocked] = float("-inf")

    def follow(self, text: list[int], scores: Tensor) -> None:
        """Say what follows from scores (t, V) of the tokens after the last t of `text`. That begins
        as the row does, and may go on with guesses: the row says on for as long as what it has said
        stands there."""
        first = len(text) - len(scores)
        while (
            not self.over and len(self.ids) <= len(text) and self.ids[-1] == text[len(self.ids) - 1]
        ):
            self.say(self.choose(scores[len(self.ids) - 1 - first]))

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
    """Continue rows until all are over; comes back after each pass of the model, for whoever shows
    them or wants to stop."""
    reader, eos = Reader(voice), voice.tokenizer.eos_id
    drafts = Drafts(voice.drafter if reader.forgets else None, rows, voice.context)
    while waiting := [i for i, row in enumerate(rows) if not row.over]:
        length = min(len(rows[i].ids) for i in waiting)
        texts = drafts.continued(length)
        end = min(len(texts[i]) for i in waiting)
        # a row that is over goes on with any token: the cache keeps its rows
        texts = [text[:end] + [eos] * (end - len(text)) for text in texts]
        output, scores = reader.read(texts, end - length + 1)
        scores = scores.cpu()  # (B, t, V)
        for i in waiting:
            rows[i].follow(texts[i], scores[i])
        drafts.verified(output, length)
        yield


def stream(voice: Voice, row: Row) -> Iterator[str]:
    """A row's text in pieces, as they are settled: never half a character, nor what a stop string
    cuts off."""
    for _ in advance(voice, [row]):
        if piece := row.continuation.take():
            yield piece


def generate(
    voice: Voice,
    prompt: str,
    settings: GenerateSettings,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> str:
    """Continue `prompt` by up to `settings.max_tokens` tokens, or to the end of the document, or to
    a stop string.

    A prompt that is a conversation written out (ChatML) is answered: encoded as in training, to the
    end of the assistant's turn. `between`: called after each pass of the model; may raise, to stop.
    """
    row = _row_of_prompt(voice.tokenizer, prompt, Wish.of(settings), seed)
    for _ in advance(voice, [row]):
        between()
    return row.text


def document_start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a text that begins a document, as in training: after the end of the one before.
    Markers in it are text."""
    return [tokenizer.eos_id, *tokenizer.encode_batch([prompt])[0].tolist()]


def _row_of_prompt(tokenizer: Tokenizer, prompt: str, wish: Wish, seed: int) -> Row:
    turn = read_turn(prompt)
    if turn is None:
        return Row(tokenizer, document_start(tokenizer, prompt), wish, seed)
    if (stop := tokenizer.special_id(STOP)) is None:  # spelled out
        wish = replace(wish, until=(*wish.until, *MARKERS))
    ids = [tokenizer.eos_id, *encode_turn(tokenizer, turn)]
    return Row(tokenizer, ids, wish, seed, () if stop is None else (stop,))


# choosing -----------------------------------------------------------------------------------------


FIRST_LOOK = 1024
"""So many tokens are looked at before all of a vocabulary are sorted: that takes longer than a
small model's pass."""


LIKELY = 256
"""So many tokens of a draft's scores are looked at: of 16, far fewer guesses were right where much
is possible (docs/LOG.md)."""


def sample_top_p(scores: Tensor, top_p: float, random: torch.Generator) -> int:
    """One draw from the smallest set of most probable tokens that reaches `top_p`, the one that
    crosses it included (Holtzman et al. 2020). scores (V,).

    A race: each token arrives after a time drawn for it, and the sooner the more probable it is. So
    two distributions that are near each other, a draft's and the model's, mostly draw the same
    token from the same random numbers (Daliri et al. 2024, arXiv 2408.07978): with a probability of
    (1 - d) / (1 + d) at least where d is their total variation distance."""
    probabilities = torch.softmax(scores, dim=-1)  # (V,)
    best, ids = probabilities.topk(min(FIRST_LOOK, len(probabilities)))
    if len(best) < len(probabilities) and best.sum() < top_p:
        best, ids = probabilities.sort(descending=True, stable=True)
    return race(best, ids, top_p, len(scores), random)


def race(best: Tensor, ids: Tensor, top_p: float, vocab_size: int, random: torch.Generator) -> int:
    """The winner among the nucleus of `best` (n,), probabilities in order, and their `ids`. Every
    token has a draw of its own."""
    # of fp32's draws, one in 16 million would be 0
    draws = torch.rand(vocab_size, generator=random, dtype=torch.float64)
    kept = (best.cumsum(-1) - best < top_p) & (best > 0)
    times = -torch.log1p(-draws[ids[kept]]) / best[kept]  # (n,)
    return int(ids[kept][times.argmin()])


class Repeats:
    """Which tokens would say a sequence of `n` tokens a second time; none for n = 0."""

    def __init__(self, n: int, ids: list[int], known: "Repeats | None" = None):
        """`known`: what is before the first of these tokens."""
        self._n, self._tail = n, () if known is None else known._tail
        self._known = known
        # of each n - 1 tokens, those that came after them
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for token in ids if n else ():
            self.add(token)

    def add(self, token: int) -> None:
        if self._n == 0:
            return
        if len(self._tail) == self._n - 1:
            self._followers.setdefault(self._tail, []).append(token)
        self._tail = (*self._tail, token)[-self._n + 1 :] if self._n > 1 else ()

    def blocked(self) -> list[int]:
        return self._after(self._tail)

    def fork(self) -> "Repeats":
        """One that knows all of this one, and goes its own way from here."""
        return Repeats(self._n, [], self)

    def _after(self, tail: tuple[int, ...]) -> list[int]:
        return self._followers.get(tail, []) + (
            self._known._after(tail) if self._known is not None else []
        )


# reading ------------------------------------------------------------------------------------------


class Reader:
    """Reads texts that grow at their ends, all of one length."""

    def __init__(self, voice: Voice):
        self._model, self._context, self._guide, self._memory = (
            voice.model,
            voice.context,
            voice.guide,
            voice.memory,
        )
        self._device = next(voice.model.parameters()).device  # type: ignore[attr-defined]
        self._cache = call_if_defined(voice.model, "new_cache")
        self._read = 0  # tokens that are in the cache, or in the summary
        self._summary: Summary | None = None
        self._begin = 0  # tokens that are seen through it only
        assert voice.memory is None or voice.memory.slots < voice.context // 2, (
            "no room for a summary"
        )
        self.forgets = hasattr(self._cache, "cut")
        """Whether a text may become another one at its end, as long as all of it fits into the
        context."""

    def read(self, rows: list[list[int]], count: int) -> tuple[ModelOutput, Tensor]:
        """What the model makes of the last `count` tokens of each row, and scores (B, count, V) of
        those that follow them.

        Each row begins with what it was before, up to these.
        """
        length = len(rows[0])
        if self._memory is not None:
            self._compress(rows, length)
        if self._cache is not None and self._begin + self._room >= length:
            if self._read > length - count:
                self._read = length - count
                self._cache.cut(self._read)
            output = self._pass(rows, self._read, length, self._cache)
            self._read = length
        else:
            output = self._pass(rows, max(self._begin, length - self._context), length)
        hidden = output.hidden[:, -count:]  # (B, count, D)
        scores = full_scores(output.readout, hidden.flatten(0, 1))  # (B * count, V)
        if self._guide is not None:
            scores = self._guide(hidden.flatten(0, 1), scores)
        return ModelOutput(hidden, output.readout), scores.unflatten(0, (len(rows), count))

    @property
    def _room(self) -> int:
        """Tokens that fit into the context."""
        return self._context - (0 if self._summary is None else self._summary.vectors.shape[1])

    def _compress(self, rows: list[list[int]], length: int) -> None:
        """Until the rest fits: the oldest half context becomes one summary with what is in it
        already.

        Where it begins depends on the length alone, so a text that is read at once is read as one
        that grew."""
        while length - self._begin > self._room:
            end = self._begin + self._context // 2
            self._summary = self._memory.compress(
                self._model, self._tokens(rows, self._begin, end), self._summary
            )  # type: ignore[union-attr]
            self._cache, self._begin, self._read = (
                call_if_defined(self._model, "new_cache"),
                end,
                end,
            )

    def _pass(self, rows: list[list[int]], begin: int, end: int, cache: Any = None) -> ModelOutput:
        """Of the tokens from `begin` to `end`; behind the summary, where these are the first after
        it."""
        ids = self._tokens(rows, begin, end)
        if self._summary is not None and begin == self._begin:
            return read(self._model, ids, self._summary, cache)
        return self._model(plain_batch(ids)) if cache is None else self._model.extend(ids, cache)  # type: ignore[attr-defined]

    def _tokens(self, rows: list[list[int]], begin: int, end: int) -> Tensor:
        return torch.tensor([row[begin:end] for row in rows], device=self._device)  # (B, t)
