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
    """Tokenize documents, in their order; those of one kind together. Raises UserError."""
    encoded: list[Encoded | None] = [document.encoded for document in documents]
    texts = [i for i, d in enumerate(documents) if d.encoded is None and d.messages is None]
    batch = tokenizer.encode_batch([documents[i].text for i in texts]) if texts else []
    for i, ids in zip(texts, batch):
        text = documents[i].text
        encoded[i] = Encoded(ids, None, documents[i].digest, len(text), num_bytes_of(text))
    chats = [i for i, d in enumerate(documents) if d.encoded is None and d.messages is not None]
    conversations = [documents[i].messages or () for i in chats]
    read_only = [documents[i].read_only for i in chats]
    talks = encode_chat(tokenizer, conversations, read_only) if chats else []
    for i, (ids, learned, num_bytes) in zip(chats, talks):
        encoded[i] = Encoded(ids, learned, documents[i].digest, len(documents[i].text), num_bytes)
    return [each for each in encoded if each is not None]  # each: a document is of one kind


def encode_each(
    encode: Callable[[Sequence[Document]], list[Encoded]], documents: Sequence[Document]
) -> list[Encoded | BaseException]:
    """Tokenize documents; give the error of each that the tokenizer cannot encode. Raise it if that
    is all of them."""
    try:
        return [*encode(documents)]
    except BaseException as error:  # a tokenizer that panics raises what is no Exception
        failure = error
    results: list[Encoded | BaseException] = []
    for document in documents:
        try:
            results += encode([document])
        except BaseException as error:
            results.append(error)
    # then it is not the documents
    if len(results) > 1 and not any(isinstance(each, Encoded) for each in results):
        raise failure
    return results


class MemoizedEncoder:
    """`encode`, with a memory of its latest results: a reader that goes back to another position
    does not wait for them again."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # by content, and what of a conversation is only read; the oldest first
        self._kept: dict[tuple[int, Any], Encoded] = {}
        self._tokens = 0

    def __call__(self, documents: Sequence[Document]) -> list[Encoded]:
        """Encode documents, as `encode` does."""
        keys = [(each.digest, each.messages and each.read_only) for each in documents]
        known = [d.encoded or self._kept.get(key) for d, key in zip(documents, keys)]
        unknown = [d for d, encoded in zip(documents, known) if encoded is None]
        new = iter(encode(self._tokenizer, unknown))
        result = [encoded or next(new) for encoded in known]
        for document, key, each in zip(documents, keys, result):
            if document.encoded is None and key not in self._kept:
                self._kept[key] = each
                self._tokens += len(each.ids)
        while self._tokens > KEPT_TOKENS:
            self._tokens -= len(self._kept.pop(next(iter(self._kept))).ids)
        return result


def shown(tokenizer: Tokenizer, input_ids: np.ndarray, labels: np.ndarray) -> str:
    """Write a row as text, what is learned in [[ ]], to show its mask. Both (T,) int32."""
    parts = []
    for learned, group in groupby(
        zip(input_ids[1:].tolist(), labels[:-1] >= 0), key=lambda pair: pair[1]
    ):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"[[{text}]]" if learned else text)
    return "".join(parts)
