"""Documents of any kind to tokens.

In:    texts, conversations, and documents that are tokens already
Out:   Encoded, one for each
State: none, but for what a MemoizedEncoder keeps
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from core.data.chat import encode_chat
from core.data.documents import Document, Encoded, num_bytes_of
from core.data.tokenizer import Tokenizer

KEPT_TOKENS = 4_000_000
"""What a MemoizedEncoder keeps: 16 megabytes, more than is usually read ahead."""


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Encoded]:
    """The documents as tokens, in their order; those of one kind are tokenized together."""
    found: list[Encoded | None] = [document.encoded for document in documents]
    texts = [i for i, d in enumerate(documents) if d.encoded is None and d.messages is None]
    for i, ids in zip(
        texts, tokenizer.encode_batch([documents[i].text for i in texts]) if texts else []
    ):
        text = documents[i].text
        found[i] = Encoded(ids, None, documents[i].digest, len(text), num_bytes_of(text))
    chats = [i for i, d in enumerate(documents) if d.encoded is None and d.messages is not None]
    talks, read_only = (
        [documents[i].messages or () for i in chats],
        [documents[i].read_only for i in chats],
    )
    for i, (ids, learned, num_bytes) in zip(
        chats, encode_chat(tokenizer, talks, read_only) if chats else []
    ):
        found[i] = Encoded(ids, learned, documents[i].digest, len(documents[i].text), num_bytes)
    return found  # type: ignore[return-value]  # every place is filled: a document is of exactly one kind


def encode_each(
    encode: Callable[[Sequence[Document]], list[Encoded]], documents: Sequence[Document]
) -> list[Encoded | BaseException]:
    """The documents as tokens; of one that the tokenizer cannot do with, what it raised. Raises
    that where it is so with all."""
    try:
        return [*encode(documents)]
    except BaseException as error:  # a tokenizer that panics raises what is no Exception
        failure = error
    found: list[Encoded | BaseException] = []
    for document in documents:
        try:
            found += encode([document])
        except BaseException as error:
            found.append(error)
    # then it is not the documents
    if len(found) > 1 and not any(isinstance(each, Encoded) for each in found):
        raise failure
    return found


class MemoizedEncoder:
    """`encode`, with a memory of what it gave last: who goes back to read on from another position
    need not wait for it again."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # by content, and what of a conversation is only read; the oldest first
        self._kept: dict[tuple[int, Any], Encoded] = {}
        self._tokens = 0

    def __call__(self, documents: Sequence[Document]) -> list[Encoded]:
        """As `encode`."""
        keys = [
            (document.digest, document.messages and document.read_only) for document in documents
        ]
        known = [d.encoded or self._kept.get(key) for d, key in zip(documents, keys)]
        encoded = iter(
            encode(self._tokenizer, [d for d, found in zip(documents, known) if found is None])
        )
        result = [found or next(encoded) for found in known]
        for document, key, each in zip(documents, keys, result):
            if document.encoded is None and key not in self._kept:
                self._kept[key] = each
                self._tokens += len(each.ids)
        while self._tokens > KEPT_TOKENS:
            self._tokens -= len(self._kept.pop(next(iter(self._kept))).ids)
        return result


def shown(tokenizer: Tokenizer, input_ids: np.ndarray, labels: np.ndarray) -> str:
    """A row as text, what is learned in [[ ]]: for a person to see the mask. Both (T,)."""
    parts = []
    for learned, group in groupby(
        zip(input_ids[1:].tolist(), labels[:-1] >= 0), key=lambda pair: pair[1]
    ):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"[[{text}]]" if learned else text)
    return "".join(parts)
