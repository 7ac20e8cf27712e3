"""Choosing the next token from a model's scores: temperature, nucleus (top-p) sampling, and the
block of repeated n-grams.

In:    scores (V,), a random generator
Out:   a token id
State: NoRepeatNgram: the n-grams of a text so far

    scores -> block n-grams -> divide by temperature -> softmax -> nucleus -> Gumbel race -> token

V vocab_size, n some tokens of it
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.preset.settings import GenerateSettings

COLDEST, HOTTEST = 1e-20, 1e20
"""Scores divided by less or more are not finite in fp32. Long before, the likeliest token is
certain, or all tokens are alike."""

NUCLEUS_TOP_K = 1024
"""Tokens to look at before the whole vocabulary is sorted, which takes longer than a small model's
forward pass."""

DRAFT_TOP_K = 256
"""Tokens of a draft's scores to look at: with 16, far fewer drafted tokens were accepted where many
tokens are possible (docs/LOG.md)."""


@dataclass(frozen=True)
class SamplingParams:
    """The way in which text after a prompt is drawn, and where it ends."""

    until: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    max_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    """No n-gram of this length appears twice, those of the prompt included; 0: no block."""

    @classmethod
    def from_settings(cls, settings: GenerateSettings) -> "SamplingParams":
        return cls(
            until=tuple(settings.stop),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            no_repeat_ngram=settings.no_repeat_ngram,
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    def apply_temperature(self, scores: Tensor) -> Tensor:
        return scores / min(self.temperature, HOTTEST)


def sample_top_p(scores: Tensor, top_p: float, random: torch.Generator) -> int:
    """Draw a token by nucleus sampling: from the smallest set of most probable tokens whose
    probabilities reach `top_p`, the token that crosses it included (Holtzman et al. 2020).

    scores (V,)   logits, already divided by the temperature
    """
    probabilities = torch.softmax(scores, dim=-1)  # (V,)
    top, ids = probabilities.topk(min(NUCLEUS_TOP_K, len(probabilities)))
    if len(top) < len(probabilities) and top.sum() < top_p:
        top, ids = probabilities.sort(descending=True, stable=True)
    return gumbel_race(top, ids, top_p, len(scores), random)


def sample_draft(scores: Tensor, params: SamplingParams, random: torch.Generator) -> int:
    """Draw a token from a draft's scores (V,) as `sample_top_p` would, from its `DRAFT_TOP_K`
    likeliest: a token that is less likely is hardly what the model itself will draw."""
    top, ids = scores.topk(min(DRAFT_TOP_K, len(scores)))
    shares = torch.softmax(params.apply_temperature(top), dim=-1)
    return gumbel_race(shares, ids, params.top_p, len(scores), random)


def gumbel_race(
    probabilities: Tensor, ids: Tensor, top_p: float, vocab_size: int, random: torch.Generator
) -> int:
    """Draw from the nucleus of `probabilities` (n,), in descending order, of the tokens `ids` (n,).

    Each token of the vocabulary draws an exponential time, divided by its probability, and the
    first to arrive wins (the Gumbel-max trick). Therefore two distributions that are close to each
    other, a draft's and the model's, mostly draw the same token from the same random numbers
    (Daliri et al. 2024, arXiv 2408.07978): with a probability of at least (1 - d) / (1 + d), where
    d is their total variation distance."""
    # of fp32's draws, one in 16 million would be 0
    draws = torch.rand(vocab_size, generator=random, dtype=torch.float64)
    nucleus = (probabilities.cumsum(-1) - probabilities < top_p) & (probabilities > 0)
    times = -torch.log1p(-draws[ids[nucleus]]) / probabilities[nucleus]  # (n,)
    return int(ids[nucleus][times.argmin()])


class NoRepeatNgram:
    """The tokens that would complete an n-gram for the second time; none for n = 0."""

    def __init__(self, n: int, ids: list[int], before: "NoRepeatNgram | None" = None):
        """`before`: the n-grams of the text before `ids`."""
        self._n, self._before = n, before
        self._tail: tuple[int, ...] = () if before is None else before._tail  # last n - 1 tokens
        # for each n - 1 tokens, the tokens that came after them
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for token in ids if n else ():
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token to the text."""
        if self._n == 0:
            return
        if len(self._tail) == self._n - 1:
            self._followers.setdefault(self._tail, []).append(token)
        self._tail = (*self._tail, token)[-self._n + 1 :] if self._n > 1 else ()

    def blocked(self) -> list[int]:
        """Return the tokens that must not come next."""
        return self._followers_of(self._tail)

    def fork(self) -> "NoRepeatNgram":
        """Return one that begins where this one is, and leaves this one as it is."""
        return NoRepeatNgram(self._n, [], self)

    def _followers_of(self, tail: tuple[int, ...]) -> list[int]:
        earlier = [] if self._before is None else self._before._followers_of(tail)
        return self._followers.get(tail, []) + earlier
