"""Text from a causal model: nucleus sampling with n-gram blocking.

In:    a model, a tokenizer, a prompt
Out:   the continuation, as text
State: none; the same seed gives the same text
"""

import torch
from torch import Tensor

from core.contracts import Batch, LanguageModel
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
    for _ in range(settings.max_tokens):
        scores = _next_scores(model, ids[-context:], device).float().cpu()  # (V,)
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


def _next_scores(model: LanguageModel, ids: list[int], device: torch.device) -> Tensor:
    row = torch.tensor([ids], device=device)  # (1, t)
    positions = torch.arange(len(ids), device=device)[None]
    zeros = torch.zeros_like(row, dtype=torch.int32)
    output = model(Batch(row, row, positions, zeros, zeros, packed=False))
    return output.readout(output.hidden[0, -1:])[0]  # (V,)


def _completes_ngram(ids: list[int], n: int) -> list[int]:
    """Tokens that would repeat a sequence of `n` tokens already in `ids`."""
    if n < 1 or len(ids) < n:
        return []
    tail = tuple(ids[len(ids) - n + 1 :])
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if tuple(ids[i : i + n - 1]) == tail]
