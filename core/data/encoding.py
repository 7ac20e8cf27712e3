"""Documents of any kind to tokens.

In:    texts, conversations, and documents that are tokens already
Out:   Encoded, one for each
State: none
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from core.data.chat import encode_chat
from core.data.documents import Document, Encoded
from core.data.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Encoded]:
    """The documents as tokens, in their order; those of one kind are tokenized together."""
    found: list[Encoded | None] = [document.encoded for document in documents]
    texts = [i for i, d in enumerate(documents) if d.encoded is None and d.messages is None]
    for i, ids in zip(texts, tokenizer.encode_batch([documents[i].text for i in texts]) if texts else []):
        found[i] = Encoded(ids, None, documents[i].digest, len(documents[i].text))
    chats = [i for i, d in enumerate(documents) if d.encoded is None and d.messages is not None]
    for i, (ids, learned) in zip(chats, encode_chat(tokenizer, [documents[i].messages or () for i in chats]) if chats else []):
        found[i] = Encoded(ids, learned, documents[i].digest, len(documents[i].text))
    return found  # type: ignore[return-value]  # every place is filled: a document is of exactly one kind


def shown(tokenizer: Tokenizer, input_ids: np.ndarray, labels: np.ndarray) -> str:
    """A row as text, what is learned in [[ ]]: for a person to see the mask. Both (T,)."""
    parts = []
    for learned, group in groupby(zip(input_ids[1:].tolist(), labels[:-1] >= 0), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"[[{text}]]" if learned else text)
    return "".join(parts)
