"""Training objectives: the one place where inputs and targets are aligned.

In:    one document as tokens, and its number among the documents drawn
Out:   (inputs, labels), equally long: labels[t] is the target of the output at t
State: none; which tokens are masked follows from seed and number
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.data.documents import Encoded
from core.data.tokenizer import MASK, Tokenizer
from core.errors import UserError
from core.preset.settings import MASKED_TOKENS, NEXT_TOKEN
from core.randomness import derive_seed

# the same number as core.contracts.IGNORE_INDEX; this floor of data workers must not import torch
IGNORE_INDEX = -100

Objective = Callable[[Encoded, int], tuple[np.ndarray, np.ndarray]]


def next_token(document: Encoded, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Predict each token from those before it, the first from the end-of-document token, which also
    closes the document.

    ids (n,) -> inputs (n+1,) = [eos, ids], labels (n+1,) = [ids, eos]. Every position has a target,
    unless the document says which tokens are learned: then only those are targets, and its end is
    none."""
    framed = _framed(document, eos_id, eos_id)
    if document.learned is None:
        return framed[:-1], framed[1:]
    labels = np.full(len(document.ids) + 1, IGNORE_INDEX, dtype=np.int32)
    np.copyto(labels[:-1], document.ids, where=document.learned)
    return framed[:-1], labels


@dataclass(frozen=True)
class MaskedTokens:
    """Predicts some tokens from all the others: each is replaced by [MASK] with the same
    probability, and is the target at its position.

    ids (n,) -> inputs (n+2,) = [begin, ids, end], labels (n+2,). As NeoBERT was trained: what is
    hidden always becomes [MASK], never a random token or itself; special tokens stay. Of a document
    that says which tokens are learned, only those are hidden."""

    begin_id: int
    end_id: int
    mask_id: int
    special: tuple[int, ...]
    fraction: float
    seed: int

    def __call__(self, document: Encoded, number: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(derive_seed(self.seed, "mask", number))
        hidden = random.random(len(document.ids)) < self.fraction
        hidden &= ~np.isin(document.ids, self.special)
        if document.learned is not None:
            hidden &= document.learned
        inputs = _framed(document, self.begin_id, self.end_id)
        labels = np.full(len(inputs), IGNORE_INDEX, dtype=np.int32)
        np.copyto(labels[1:-1], document.ids, where=hidden)
        inputs[1:-1][hidden] = self.mask_id
        return inputs, labels


def build_objective(kind: str, tokenizer: Tokenizer, mask_fraction: float, seed: int) -> Objective:
    """Return the objective of this name. Raises UserError for masked tokens with a tokenizer that
    has no [MASK]."""
    if kind == NEXT_TOKEN:
        return lambda document, number: next_token(document, tokenizer.eos_id)
    assert kind == MASKED_TOKENS, kind
    mask_id = tokenizer.special_id(MASK)
    if mask_id is None:
        raise UserError(
            f"this model learns masked tokens, and the tokenizer has no {MASK} among its special "
            "tokens. Take the tokenizer that its weights came with, or one made here: "
            '"tokenizer": {"type": "bpe", "vocab_size": 8192}.'
        )
    begin_id = tokenizer.special_id("[CLS]")
    begin_id = tokenizer.eos_id if begin_id is None else begin_id
    return MaskedTokens(
        begin_id, tokenizer.eos_id, mask_id, tokenizer.special_ids, mask_fraction, seed
    )


def _framed(document: Encoded, begin_id: int, end_id: int) -> np.ndarray:
    framed = np.empty(len(document.ids) + 2, dtype=np.int32)
    framed[0], framed[1:-1], framed[-1] = begin_id, document.ids, end_id
    return framed
