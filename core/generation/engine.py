"""The text generation engine: continues a batch of prompts of any length with a causal model. The
only code that does it.

In:    a TextGenerator (a model and its tokenizer); rows: prompts as tokens, each with its sampling
       parameters and its seed
Out:   the text after each prompt, whole or piece by piece
State: none beyond the rows; the same seed gives the same text, whatever the other rows of the batch
       are

    read     scores of each row's next token      a cache reads each token once, as long as the text
             fits the context
    choose   core/generation/sampling.py          with the row's own parameters and random numbers
    append   the token joins the row              the text ends at a stop string, an end token or
             max_tokens

A cache holds rows of one length. Prompts differ, so a batch is first read as far as its shortest
prompt goes, and from there the other rows follow with their own tokens: nothing is padded, and each
row sees exactly its tokens. Beyond the context, and without a cache, the whole context is read for
each new token: what falls out of it changes what every position in it has seen. With a memory, half
a context at a time becomes a summary instead, which stands before the rest and is cached with it.
Drafted tokens (core/generation/speculative.py) are read as a longer prompt is, and the cache is cut
at the first one that any row rejects."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.contracts import LanguageModel, ModelOutput, call_if_defined, plain_batch
from core.data.chat import STOP, encode_turn, read_turn
from core.data.tokenizer import MARKERS, Tokenizer
from core.errors import UserError
from core.generation.sampling import NoRepeatNgram, SamplingParams, sample_draft, sample_top_p
from core.generation.speculative import DraftBatch, Drafter
from core.generation.text_stream import TextStream
from core.heads.memory import Memory, Summary, read
from core.models.readout import full_scores
from core.preset.settings import GenerateSettings

Guide = Callable[[Tensor, Tensor], Tensor]
"""hidden (n, D), the model's scores (n, V) of the tokens after them -> the scores (n, V) to draw
from instead."""


@dataclass(frozen=True)
class TextGenerator:
    """A causal model in evaluation mode, its tokenizer, and what helps it to generate."""

    model: LanguageModel
    tokenizer: Tokenizer
    context: int
    """Tokens that the model can see; the oldest are left out beyond it."""
    guide: Guide | None = None
    """Changes the model's scores."""
    drafter: Drafter | None = None
    """Drafts tokens ahead, where the model's cache can be cut; it changes no text."""
    memory: Memory | None = None
    """Compresses the oldest tokens where they would be left out."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class GenerationRow:
    """One prompt and the text after it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        ends: Collection[int] = (),
    ):
        """`ends`: tokens that end the text, besides the end of the document. They are not part of
        it, and are never blocked."""
        assert prompt, "a model needs a token to begin with"
        self.ids = list(prompt)
        self.stream = TextStream(tokenizer, params.until)
        self._params, self._remaining = params, params.max_tokens
        self._random = torch.Generator().manual_seed(seed)
        self._ends, self._vocab_size = {tokenizer.eos_id, *ends}, tokenizer.vocab_size
        self._ngrams = NoRepeatNgram(params.no_repeat_ngram, self.ids)

    @property
    def text(self) -> str:
        """The text so far, without what ended it."""
        return self.stream.text

    @property
    def finished(self) -> bool:
        return self.stream.finished

    @property
    def remaining(self) -> int:
        """The number of tokens that may still come."""
        return self._remaining

    def choose(self, scores: Tensor) -> int:
        """Return the next token. scores (V,), which are changed. Raises UserError where they are
        not finite."""
        if not torch.isfinite(scores.max()):
            raise UserError(
                "the model's scores are not finite: its weights are damaged, or its training "
                "diverged"
            )
        self._block(scores, self._ngrams)
        if self._params.is_greedy:
            return int(scores.argmax())
        tempered = self._params.apply_temperature(scores)
        return sample_top_p(tempered, self._params.top_p, self._random)

    def draft_sampler(self) -> Callable[[Tensor], int]:
        """Return a function that chooses as the row will, one token after the other, from scores
        (V,) that are changed. The row stays as it is."""
        random, ngrams = torch.Generator(), self._ngrams.fork()
        random.set_state(self._random.get_state())

        def choose(scores: Tensor) -> int:
            self._block(scores, ngrams)
            if self._params.is_greedy:
                token = int(scores.argmax())
            else:
                token = sample_draft(scores, self._params, random)
            ngrams.add(token)
            return token

        return choose

    def _block(self, scores: Tensor, ngrams: NoRepeatNgram) -> None:
        scores[self._vocab_size :] = float("-inf")  # rows of a published table without a token
        if blocked := [token for token in ngrams.blocked() if token not in self._ends]:
            scores[blocked] = float("-inf")

    def accept(self, ids: list[int], scores: Tensor) -> None:
        """Append what follows from scores (t, V) after each of the last t of `ids`. These begin as
        the row does, and may go on with drafted tokens: the row grows for as long as the tokens it
        chooses are the drafted ones, and by one token more."""
        first = len(ids) - len(scores)
        while (
            not self.finished
            and len(self.ids) <= len(ids)
            and self.ids[-1] == ids[len(self.ids) - 1]
        ):
            self.append(self.choose(scores[len(self.ids) - 1 - first]))

    def append(self, token: int) -> None:
        """Add a token to the text, or end the text with it."""
        if token not in self._ends:
            self.ids.append(token)
            self._ngrams.add(token)
            self.stream.add(token)
            self._remaining -= 1
        if token in self._ends or self._remaining <= 0:
            self.stream.finish()


@torch.no_grad()
def advance(generator: TextGenerator, rows: list[GenerationRow]) -> Iterator[None]:
    """Continue rows until all are finished. Yields after each pass of the model, so that the caller
    can show them or stop."""
    runner, eos = ModelRunner(generator), generator.tokenizer.eos_id
    drafter = generator.drafter if runner.can_cut else None
    drafts = DraftBatch(drafter, rows, generator.context)
    while waiting := [i for i, row in enumerate(rows) if not row.finished]:
        length = min(len(rows[i].ids) for i in waiting)
        texts = drafts.extended(length)
        end = min(len(texts[i]) for i in waiting)
        # a finished row goes on with any token: the cache keeps its rows
        texts = [text[:end] + [eos] * (end - len(text)) for text in texts]
        output, scores = runner.read(texts, end - length + 1)
        scores = scores.cpu()  # (B, t, V)
        for i in waiting:
            rows[i].accept(texts[i], scores[i])
        drafts.record(output, length)
        yield


def stream_text(generator: TextGenerator, row: GenerationRow) -> Iterator[str]:
    """Yield a row's text in pieces, as soon as they are final: never half a character, nor what a
    stop string cuts off."""
    for _ in advance(generator, [row]):
        if piece := row.stream.take():
            yield piece


def generate_text(
    generator: TextGenerator,
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
    params = SamplingParams.from_settings(settings)
    row = row_of_prompt(generator.tokenizer, prompt, params, seed)
    for _ in advance(generator, [row]):
        between()
    return row.text


def document_start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a text that begins a document, as in training: after the end of the
    document before. Markers in it are text."""
    return [tokenizer.eos_id, *tokenizer.encode_batch([prompt])[0].tolist()]


def row_of_prompt(
    tokenizer: Tokenizer, prompt: str, params: SamplingParams, seed: int
) -> GenerationRow:
    """Return a row that begins with a prompt, as `generate_text` reads it."""
    turn = read_turn(prompt)
    if turn is None:
        return GenerationRow(tokenizer, document_start(tokenizer, prompt), params, seed)
    if (stop := tokenizer.special_id(STOP)) is None:  # the markers are spelled out
        params = replace(params, until=(*params.until, *MARKERS))
    ids = [tokenizer.eos_id, *encode_turn(tokenizer, turn)]
    return GenerationRow(tokenizer, ids, params, seed, () if stop is None else (stop,))


class ModelRunner:
    """Runs the model on texts that grow at their ends, all of one length."""

    def __init__(self, generator: TextGenerator):
        memory = generator.memory
        assert memory is None or memory.slots < generator.context // 2, "no room for a summary"
        self._model, self._context = generator.model, generator.context
        self._guide, self._memory = generator.guide, memory
        self._device = generator.device
        self._cache = call_if_defined(generator.model, "new_cache")
        self._cached = 0  # tokens that are in the cache, or in the summary
        self._summary: Summary | None = None
        self._summarised = 0  # tokens that are seen through the summary only
        self.can_cut = hasattr(self._cache, "cut")
        """Whether a text may change at its end, as long as all of it fits into the context."""

    def read(self, rows: list[list[int]], count: int) -> tuple[ModelOutput, Tensor]:
        """Return the model's output for the last `count` tokens of each row, and scores
        (B, count, V) of the tokens after them.

        Up to these tokens, each row is as it was in the call before.
        """
        length = len(rows[0])
        if self._memory is not None:
            self._compress(self._memory, rows, length)
        if self._cache is not None and self._summarised + self._room >= length:
            if self._cached > length - count:
                self._cached = length - count
                self._cache.cut(self._cached)
            output = self._forward(rows, self._cached, length, self._cache)
            self._cached = length
        else:
            output = self._forward(rows, max(self._summarised, length - self._context), length)
        hidden = output.hidden[:, -count:]  # (B, count, D)
        scores = full_scores(output.readout, hidden.flatten(0, 1))  # (B * count, V)
        if self._guide is not None:
            scores = self._guide(hidden.flatten(0, 1), scores)
        return ModelOutput(hidden, output.readout), scores.unflatten(0, (len(rows), count))

    @property
    def _room(self) -> int:
        """Tokens that fit into the context."""
        return self._context - (0 if self._summary is None else self._summary.vectors.shape[1])

    def _compress(self, memory: Memory, rows: list[list[int]], length: int) -> None:
        """Compress the oldest half context, together with the summary so far, into one summary,
        until the rest fits.

        Where a half begins depends on the length alone, so a text that is read at once is read as
        one that grew."""
        while length - self._summarised > self._room:
            end = self._summarised + self._context // 2
            ids = self._tokens(rows, self._summarised, end)
            self._summary = memory.compress(self._model, ids, self._summary)
            self._cache = call_if_defined(self._model, "new_cache")
            self._summarised = self._cached = end

    def _forward(
        self, rows: list[list[int]], begin: int, end: int, cache: Any = None
    ) -> ModelOutput:
        """Run the tokens from `begin` to `end`; behind the summary, where they are the first after
        it."""
        ids = self._tokens(rows, begin, end)
        if self._summary is not None and begin == self._summarised:
            return read(self._model, ids, self._summary, cache)
        if cache is None:
            return self._model(plain_batch(ids))
        return call_if_defined(self._model, "extend", ids, cache)

    def _tokens(self, rows: list[list[int]], begin: int, end: int) -> Tensor:
        return torch.tensor([row[begin:end] for row in rows], device=self._device)  # (B, t)
