"""Filling masks: the likeliest tokens at each [MASK] of a text, and the tokens whose vectors in the
readout are closest to a word's.

In:    a model of masked tokens, a tokenizer; a text with [MASK] in it, or words
Out:   text, and fields of events
State: none
"""

import torch
from torch import Tensor, nn

from core.contracts import plain_batch
from core.data.tokenizer import MASK, Tokenizer
from core.models.embedding_geometry import nearest
from core.models.readout import full_scores

CHOICES = 5
"""Tokens shown for each mask, and for each word."""


@torch.no_grad()
def fill_masks(model: nn.Module, tokenizer: Tokenizer, text: str, context: int) -> tuple[str, str]:
    """Return (the text, the likeliest tokens at its masks): "paris 41 %, lyon 12 %" from logits, or
    with the cosine to each prototype. Masks are separated by "|".

    A text without [MASK] gets one at its end. Only its last `context` tokens are read."""
    text = text if MASK in text else f"{text.rstrip()} {MASK}"
    begin_id, mask_id = tokenizer.special_id("[CLS]"), tokenizer.special_id(MASK)
    assert mask_id is not None, "a run that trains on masked tokens has checked this"
    ids = [tokenizer.eos_id if begin_id is None else begin_id]
    for i, piece in enumerate(tokenizer.encode_batch(text.split(MASK))):
        ids += [mask_id] * (i > 0) + piece.tolist()
    ids = [*ids, tokenizer.eos_id][-context:]
    device = next(model.parameters()).device
    output = model(plain_batch(torch.tensor([ids], device=device)))
    masks = [t for t, token in enumerate(ids) if token == mask_id]
    scores = full_scores(output.readout, output.hidden[0, masks])  # (n, V)
    scores = scores[:, : tokenizer.vocab_size].cpu()
    return text, " | ".join(_choices(tokenizer, row, output.readout.provides) for row in scores)


def _choices(tokenizer: Tokenizer, scores: Tensor, provides: str) -> str:
    """Describe the best tokens of scores (V,)."""
    if provides == "logits":
        best, ids = scores.softmax(0).topk(CHOICES)
        values = [f"{p:.0%}".replace("%", " %") for p in best.tolist()]
    else:
        best, ids = scores.topk(CHOICES, largest=False)
        values = [f"{1.0 - distance / 2.0:.2f}" for distance in best.tolist()]
    return ", ".join(f"{_word(tokenizer, i)} {value}" for i, value in zip(ids.tolist(), values))


def _word(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token]).strip() or repr(tokenizer.decode([token]))


def word_ids(tokenizer: Tokenizer, words: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return the words that are one token, alone or after a space, with its id; and those that are
    not."""
    known: dict[str, int] = {}
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer.encode_batch([text])[0]
            if len(ids) == 1:
                known[word] = int(ids[0])
                break
    return known, [word for word in words if word not in known]


@torch.no_grad()
def neighbors(
    model: nn.Module, tokenizer: Tokenizer, words: dict[str, int]
) -> list[dict[str, object]]:
    """Return, for each word, the tokens whose vectors in the readout have the highest cosine with
    its own: fields of a `neighbors` event."""
    if not words:
        return []
    device = next(model.parameters()).device
    readout = model(plain_batch(torch.tensor([[tokenizer.eos_id]], device=device))).readout
    table = readout.table if readout.linear is None else readout.linear[0]
    events: list[dict[str, object]] = []
    for word, index in words.items():
        closest = [(_word(tokenizer, i), cosine) for i, cosine in nearest(table, index, CHOICES)]
        events.append({"word": word, "neighbors": closest})
    return events
