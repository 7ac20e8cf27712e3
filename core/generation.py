"""Text from a causal model: nucleus sampling with n-gram blocking.

In:    a model, a tokenizer, a prompt
Out:   the continuation, as text
State: none; the same seed gives the same text

A model that has a cache reads each token once, as long as the text fits its context. Beyond that, and without a cache, it
reads the whole context for each new token: what falls out of the context changes what every position in it has seen.
"""

import torch
from torch import Tensor

from core.contracts import Batch, LanguageModel, Readout, call_if_defined
from core.data.tokenizer import Tokenizer
from core.settings import GenerateSettings


@torch.no_grad()
def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str, settings: GenerateSettings, context: int, seed: int) -> str:
    """Continue `prompt` by up to `settings.max_tokens` tokens, or to the end of the document.

    context   tokens the model can see; the oldest are left out beyond it
    """
    device = next(model.parameters()).device  # type: ignore[attr-defined]
    random = torch.Generator().manual_seed(seed)
    ids = [tokenizer.eos_id, *tokenizer.encode_batch([prompt])[0].tolist()]
    start = len(ids)
    reader = Reader(model, context, device)
    for _ in range(settings.max_tokens):
        scores = reader.next_scores([ids])[0].cpu()  # (V,)
        scores[tokenizer.vocab_size :] = float("-inf")  # rows of a published table that no token has
        blocked = _completes_ngram(ids[1:], settings.no_repeat_ngram)
        scores[blocked] = float("-inf")
        token = sample_top_p(scores / settings.temperature, settings.top_p, random)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def sample_top_p(scores: Tensor, top_p: float, random: torch.Generator) -> int:
    """One draw from the smallest set of most probable tokens that reaches `top_p`, the one that crosses it included
    (Holtzman et al. 2020). scores (V,)."""
    probabilities, order = torch.softmax(scores, dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < top_p)
    return int(order[torch.multinomial(kept, 1, generator=random)])


class Reader:
    """Reads texts that grow at their ends, all of one length."""

    def __init__(self, model: LanguageModel, context: int, device: torch.device):
        self._model, self._context, self._device = model, context, device
        self._cache = call_if_defined(model, "new_cache")
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
        return full_scores(output.readout, output.hidden[:, -1])  # (B, V)


def full_scores(readout: Readout, hidden: Tensor) -> Tensor:
    """Scores (n, V) of hidden states (n, D) in fp32 at least, whatever the model computes in: bf16 has three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return readout(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))


def plain_batch(input_ids: Tensor) -> Batch:
    """Rows (B, T) of one text each, that nobody learns from."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    zeros = torch.zeros_like(input_ids, dtype=torch.int32)
    return Batch(input_ids, input_ids, positions, zeros, zeros, packed=False)


def _completes_ngram(ids: list[int], n: int) -> list[int]:
    """Tokens that would repeat a sequence of `n` tokens already in `ids`."""
    if n < 1 or len(ids) < n:
        return []
    tail = tuple(ids[len(ids) - n + 1 :])
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if tuple(ids[i : i + n - 1]) == tail]
