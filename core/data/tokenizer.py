"""Text to token ids and back: one class for every tokenizer; tokenizer_build.py makes them.

In:    a `tokenizers.Tokenizer`, and the id of the token that ends documents
Out:   Tokenizer: encode_batch, decode, and `state()` for the checkpoint
State: the tokenizers-library JSON and the id of the end-of-document token

No text is ever encoded to a control token: the end of a document, a mask, a marker of
conversations, or any other special token. Those that a tokenizer does not mark as special are
marked here. Where a model's own vocabulary has the name of one as a word, the word is spelled in
smaller pieces.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from core.data.vocabulary import Unread, is_complete, unknown_of, unread
from core.errors import UserError
from core.files import write_file

END = "<|endoftext|>"
MASK = "[MASK]"
"""What stands where a token is hidden, for models that learn to find it; BERT's name for it."""
MARKERS = ("<|im_start|>", "<|im_end|>")
"""What stands around each message of a conversation (ChatML)."""
CONFIG = "tokenizer_config.json"
PROBE = "Two  words,\n\n\ta 1.5 \u00e9\u6f22\U0001f642 "
"""Contains what a tokenizer that does not keep every byte usually loses."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; `eos_id` stands before and after every document."""

    def __init__(self, backend: Any, eos_id: int):
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id = eos_id
        mark_special(backend, (backend.id_to_token(eos_id), END, MASK, *MARKERS))
        self._json = backend.to_str()
        # "<|endoftext|>" inside a text is text, never the end of a document
        backend.encode_special_tokens = True
        # what it would add is not wanted; what it would cut off the spans of tokens is
        backend.post_processor = None
        facts = json.loads(self._json)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.is_complete = is_complete(facts)
        """Whether every text can be written."""
        unknown = unknown_of(facts["model"])
        self.unknown_id = None if unknown is None else backend.token_to_id(unknown)
        self._special = {
            token.content: i
            for i, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        # by id: what no text may be encoded to
        self._control = np.zeros(self.vocab_size, dtype=bool)
        self._control[
            [i for name, i in self._special.items() if i != self.unknown_id and len(name) > 1]
        ] = True
        self._control[eos_id] = True
        self._spelled: dict[int, list[int]] = {}
        plain = facts["normalizer"] is None and '"add_prefix_space": true' not in json.dumps(
            facts["pre_tokenizer"]
        )
        probes = [
            PROBE,
            *(f"a {token.content} b" for token in backend.get_added_tokens_decoder().values()),
        ]
        self.is_lossless = (
            self.is_complete
            and plain
            and "ByteLevel" in json.dumps(facts["decoder"])
            and self._gives_back(probes)
        )
        """Whether every text comes back from its tokens, to the byte."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, (n,) int32, without special tokens. Raises
        UserError."""
        encodings = _encode(self._backend.encode_batch_fast, texts)
        encoded = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return [self._spell(ids, None)[0] if self._control[ids].any() else ids for ids in encoded]

    def encode_with_spans(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the token ids of each text, and the characters [begin, end) of the text that each
        token stands for: (n,) and (n, 2) int32. Raises UserError.

        The bytes of one character all have its span.
        """
        result = []
        for encoding in _encode(self._backend.encode_batch, texts):
            ids = np.array(encoding.ids, np.int32)
            spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            result.append(self._spell(ids, spans) if self._control[ids].any() else (ids, spans))
        return result

    def _spell(self, ids: np.ndarray, spans: np.ndarray | None) -> tuple[np.ndarray, Any]:
        """Replace each control token, which the text only looks like, by smaller pieces with the
        same span."""
        pieces = [
            self._spelling(token) if self._control[token] else [token] for token in ids.tolist()
        ]
        spelled = np.array([token for piece in pieces for token in piece], np.int32)
        if spans is not None:
            spans = np.repeat(spans, [len(piece) for piece in pieces], axis=0)
        return spelled, spans

    def _spelling(self, token: int) -> list[int]:
        """Return the ids of a control token's name as text: its first character, then the rest."""
        if token in self._spelled:
            return self._spelled[token]
        name, ids = self._backend.id_to_token(token), list[int]()
        for part in (name[:1], name[1:]) if len(name) > 1 and token != self.unknown_id else ():
            for piece in _pieces(self._backend.model, part):
                if not self._control[piece]:
                    ids.append(piece)
                elif piece != token and len(self._backend.id_to_token(piece)) < len(name):
                    ids += self._spelling(piece)
        if not ids and self.unknown_id is not None and not self._control[self.unknown_id]:
            ids = [self.unknown_id]
        self._spelled[token] = ids
        return ids

    def special_id(self, token: str) -> int | None:
        """Return the id of a special token, which no text is ever encoded to; None when there is
        no such token."""
        return self._special.get(token)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens, also of the one for unknown words."""
        return tuple(sorted(self._special.values()))

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def _gives_back(self, texts: list[str]) -> bool:
        """Return whether texts come back from their tokens: an added token may swallow the spaces
        around it, or be no bytes."""
        return [self.decode(ids.tolist()) for ids in self.encode_batch(texts)] == texts

    def num_bytes(self, ids: np.ndarray) -> int:
        """Return the UTF-8 bytes of the text that tokens (n,) decode to: for documents whose own
        text is not at hand."""
        return len(self.decode(ids.tolist()).encode())

    def unread(self, texts: list[str]) -> Unread:
        """Return how much of some texts has no token."""
        return unread(texts, self.encode_with_spans(texts), self.unknown_id)

    def state(self) -> dict[str, Any]:
        """Return the tokenizer as JSON, for checkpoints and worker processes."""
        return {"json": self._json, "eos_id": self.eos_id}

    def fingerprint(self) -> str:
        """Return a hash that is equal exactly when the tokens of every text are."""
        return hashlib.sha256(json.dumps(self.state()).encode()).hexdigest()[:16]

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tokenizer":
        """Read what `state` returned. Raises UserError."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(state["json"])
        except Exception as error:  # the library raises Exception itself
            raise UserError(
                f"the tokenizer in a checkpoint cannot be read: {str(error)[:200]}"
            ) from None
        if backend.id_to_token(state["eos_id"]) is None:
            raise UserError(
                f"the tokenizer in a checkpoint has no token {state['eos_id']}, which is to end "
                "documents"
            )
        return cls(backend, state["eos_id"])

    def vocabulary_sha256(self, size: int) -> str:
        """Return a hash of the first `size` tokens and their ids, the same for every version of the
        tokenizers library."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        names = {index: token for token, index in vocabulary.items()}
        listed = json.dumps([names.get(index) for index in range(size)])
        return hashlib.sha256(listed.encode()).hexdigest()

    def save(self, path: Path, **facts: Any) -> None:
        """Write `path`, a tokenizer.json that a "file" tokenizer and other programs load, and
        tokenizer_config.json beside it.

        facts  more to keep in the latter
        """
        about = {
            "eos_token": self._backend.id_to_token(self.eos_id),
            "vocab_size": self.vocab_size,
            **facts,
        }
        config = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        # `path` last: both are there then
        for file, text in ((path.with_name(CONFIG), config), (path, self._json)):
            write_file(file, text)


def mark_special(backend: Any, names: Iterable[str]) -> None:
    """Make these tokens special where the tokenizer has them: no text is searched for them then."""
    from tokenizers import AddedToken

    special = {
        token.content for token in backend.get_added_tokens_decoder().values() if token.special
    }
    there = [
        name
        for name in dict.fromkeys(names)
        if name not in special and backend.token_to_id(name) is not None
    ]
    backend.add_special_tokens([AddedToken(name, special=True) for name in there])


def _encode(encode: Any, texts: list[str]) -> list[Any]:
    try:
        return encode(texts, add_special_tokens=False)
    except TypeError:  # half a surrogate pair: JSON may hold one, UTF-8 may not
        return encode([without_surrogates(text) for text in texts], add_special_tokens=False)
    except Exception as error:
        # the library raises Exception itself; what a file lacks was mended when it was read
        raise UserError(
            f"the tokenizer of this lineage cannot read a text ({error}); start a new lineage "
            "with another one"
        ) from None


def without_surrogates(text: str) -> str:
    """Replace each half of a surrogate pair by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def _pieces(model: Any, text: str) -> list[int]:
    try:
        return [token.id for token in model.tokenize(text)]
    except Exception:  # so the library says that it does not know a character
        return []
