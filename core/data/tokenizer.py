"""Text to token ids and back, by one kind of object whatever its origin.

In:    a tokenizer section of a preset; for a BPE, sample texts of the preset's own sources
Out:   Tokenizer: encode_batch, decode, token_bytes, and `state()` for the checkpoint
State: the tokenizers-library JSON and the id of the end-of-document token
"""

import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from core.data.sources.hub import check_reachable
from core.errors import MissingPackage, SourceUnavailable, UserError
from core.preset import TokenizerSettings

END = "<|endoftext|>"
SAMPLE_CHARACTERS = 6_000_000
"""Text a BPE is trained on: beyond this the merges of a small vocabulary hardly change, and it takes seconds."""


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; `eos_id` stands before and after every document."""

    def __init__(self, backend: Any, eos_id: int):
        self._backend = backend
        self._backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text, never the end of a document
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes each token stands for, 0 for special tokens: what bits per byte divides by."""
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        byte_level = "ByteLevel" in json.dumps(json.loads(self._backend.to_str()).get("decoder") or {})
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in vocabulary.items():
            # a byte-level token has one character per byte; other kinds are measured by what they decode to
            size = len(token) if byte_level else len(self._backend.decode([index]).encode())
            lengths[index] = 0 if index in special or index == self.eos_id else size
        return lengths

    def state(self) -> dict[str, Any]:
        return {"json": self._backend.to_str(), "eos_id": self.eos_id}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tokenizer":
        import tokenizers

        return cls(tokenizers.Tokenizer.from_str(state["json"]), state["eos_id"])


def build_tokenizer(settings: TokenizerSettings, sample: Iterable[str]) -> Tokenizer:
    """A new tokenizer. `sample` is read only for a BPE. Raises UserError when a Hub tokenizer cannot be had."""
    if settings.type == "hub":
        return _from_hub(str(settings.name))
    return _byte_level(sample if settings.type == "bpe" else [], settings.vocab_size if settings.type == "bpe" else 257)


def _byte_level(sample: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): every text can be written; with no merges left to learn it is plain bytes."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer)
    return Tokenizer(backend, backend.token_to_id(END))


def _from_hub(name: str) -> Tokenizer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingPackage(f'tokenizer "{name}" needs the package transformers: pip install transformers') from None
    unreachable = ""
    try:
        check_reachable()
    except SourceUnavailable as error:  # it may be in the cache; asking the Hub would take a minute of retries
        unreachable = str(error)
    try:
        loaded = AutoTokenizer.from_pretrained(name, use_fast=True, local_files_only=bool(unreachable))
    except (OSError, ValueError) as error:
        reason = unreachable or str(error).strip().splitlines()[0]
        raise UserError(
            f'tokenizer "{name}" could not be loaded from the Hugging Face Hub: {reason}\n'
            'Check the name and the network, or write "tokenizer": {"type": "bpe", "vocab_size": 8192} to train one here.'
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f'tokenizer "{name}" has no fast version (tokenizer.json); choose another, or train a "bpe".')
    eos_id = next((i for i in (loaded.eos_token_id, loaded.sep_token_id) if i is not None), None)
    if eos_id is None:
        from tokenizers import AddedToken

        backend.add_special_tokens([AddedToken(END, special=True)])
        eos_id = backend.token_to_id(END)
    return Tokenizer(backend, eos_id)
