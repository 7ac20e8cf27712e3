"""What a model of masked tokens puts in the blanks, and which vectors of its readout lie near each
other.

In:    a model, a tokenizer; a text with [MASK] in it, or words
Out:   events for people to look at, as text
State: none
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.contracts import plain_batch
from core.data.tokenizer import MASK, Tokenizer
from core.models.embedding_geometry import nearest
from core.models.readout import full_scores

CHOICES = 5
"""How many tokens are told for each blank, and for each word."""


@torch.no_grad()
def fill(model: nn.Module, tokenizer: Tokenizer, text: str, context: int) -> tuple[str, str]:
    """(the text, its blanks' likeliest tokens): "paris 41 %, lyon 12 %" of logits, or with the
    cosine to each prototype.

    A text without [MASK] gets one at its end. Only its last `context` tokens are read. Blanks are
    kept apart by "|"."""
    text = text if MASK in text else f"{text.rstrip()} {MASK}"
    begin_id, mask_id = tokenizer.special_id("[CLS]"), tokenizer.special_id(MASK)
    assert mask_id is not None, "whoever trains on masked tokens has checked this"
    ids = [tokenizer.eos_id if begin_id is None else begin_id]
    for i, piece in enumerate(tokenizer.encode_batch(text.split(MASK))):
        ids += [mask_id] * (i > 0) + piece.tolist()
    ids = [*ids, tokenizer.eos_id][-context:]
    device = next(model.parameters()).device
    output = model(plain_batch(torch.tensor([ids], device=device)))
    blanks = [t for t, token in enumerate(ids) if token == mask_id]
    # (n, V)
    scores = full_scores(output.readout, output.hidden[0, blanks])[:, : tokenizer.vocab_size].cpu()
    return text, " | ".join(_told(tokenizer, row, output.readout.provides) for row in scores)


def _told(tokenizer: Tokenizer, scores: Tensor, what: str) -> str:  # (V,)
    if what == "logits":
        best, ids = scores.softmax(0).topk(CHOICES)
        return ", ".join(
            f"{_word(tokenizer, i)} {p:.0%}".replace("%", " %")
            for p, i in zip(best.tolist(), ids.tolist())
        )
    best, ids = scores.topk(CHOICES, largest=False)
    return ", ".join(
        f"{_word(tokenizer, i)} {1.0 - d / 2.0:.2f}" for d, i in zip(best.tolist(), ids.tolist())
    )


def _word(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token]).strip() or repr(tokenizer.decode([token]))


def word_ids(tokenizer: Tokenizer, words: list[str]) -> tuple[dict[str, int], list[str]]:
    """The words that are one token, alone or after a space, with its id; and those that are not."""
    found: dict[str, int] = {}
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer.encode_batch([text])[0]
            if len(ids) == 1:
                found[word] = int(ids[0])
                break
    return found, [word for word in words if word not in found]


@torch.no_grad()
def neighbors(
    model: nn.Module, tokenizer: Tokenizer, words: dict[str, int]
) -> list[dict[str, Any]]:
    """For each word the tokens whose vectors in the readout point the same way as its own: fields
    of a `neighbors` event."""
    if not words:
        return []
    device = next(model.parameters()).device
    readout = model(plain_batch(torch.tensor([[tokenizer.eos_id]], device=device))).readout
    table = readout.table if readout.linear is None else readout.linear[0]
    return [
        {
            "word": word,
            "neighbors": [
                (_word(tokenizer, i), cosine) for i, cosine in nearest(table, index, CHOICES)
            ],
        }
        for word, index in words.items()
    ]
