"""Text to token ids and back, by one kind of object whatever its origin.

In:    a tokenizer section of a preset; for a BPE, sample texts of the preset's own sources
Out:   Tokenizer: encode_batch, decode, token_bytes, and `state()` for the checkpoint
State: the tokenizers-library JSON and the id of the end-of-document token
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import MissingPackage, SourceUnavailable, UserError
from core.files import read_json, write_file
from core.hub import check_reachable, explain
from core.settings import TokenizerSettings

END = "<|endoftext|>"
MASK = "[MASK]"
"""What stands where a token is hidden, for models that learn to find it; BERT's name for it."""
CONFIG = "tokenizer_config.json"
KNOWN_VOCABULARIES = {
    "gpt2": 50_257,
    "distilgpt2": 50_257,
    "Qwen/Qwen3-0.6B-Base": 151_669,
    "chandar-lab/NeoBERT": 30_522,
    "bert-base-uncased": 30_522,
}
"""Sizes of Hub tokenizers, for whoever asks before anything is downloaded."""
SAMPLE_CHARACTERS = 6_000_000
"""Text a BPE is trained on: beyond this the merges of a small vocabulary hardly change, and it takes seconds."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; `eos_id` stands before and after every document."""

    def __init__(self, backend: Any, eos_id: int):
        self._backend = backend
        self._backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text, never the end of a document
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""
        return [np.array(encoding.ids, dtype=np.int32) for encoding in _encode(self._backend.encode_batch_fast, texts)]

    def encode_with_spans(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, with the characters [begin, end) of the text that each token stands for: (n,) and (n, 2) int32.

        The bytes of one character all have its span.
        """
        encodings = _encode(self._backend.encode_batch, texts)
        return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2)) for e in encodings]

    def special_id(self, token: str) -> int | None:
        """The id of a special token, which no text is ever encoded to; None when there is no such token."""
        return self._special.get(token)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens: of ends and masks, and of what stands for unknown words."""
        return tuple(sorted(self._special.values()))

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes each token stands for, 0 for special tokens: what bits per byte divides by."""
        special = set(self._special.values())
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

    def fingerprint(self) -> str:
        """Equal exactly when the tokens of every text are."""
        return hashlib.sha256(json.dumps(self.state()).encode()).hexdigest()[:16]

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tokenizer":
        """Of a checkpoint. Raises UserError."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(state["json"])
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"the tokenizer in a checkpoint cannot be read: {str(error)[:200]}") from None
        if backend.id_to_token(state["eos_id"]) is None:
            raise UserError(f"the tokenizer in a checkpoint has no token {state['eos_id']}, which is to end documents")
        return cls(backend, state["eos_id"])

    def vocabulary_sha256(self, size: int) -> str:
        """Stands for the first `size` tokens and their ids, whatever version of the tokenizers library is asked."""
        names = {index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()}
        return hashlib.sha256(json.dumps([names.get(index) for index in range(size)]).encode()).hexdigest()

    def save(self, path: Path, **facts: Any) -> None:
        """Write `path`, a tokenizer.json that a "file" tokenizer and other programs load, and tokenizer_config.json beside it.

        facts  more to keep in the latter
        """
        about = {"eos_token": self._backend.id_to_token(self.eos_id), "vocab_size": self.vocab_size, **facts}
        config = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        for file, text in ((path.with_name(CONFIG), config), (path, self._backend.to_str())):  # `path` last: both are there then
            write_file(file, text)


def build_tokenizer(
    settings: TokenizerSettings, sample: Iterable[str], markers: tuple[str, ...] = (), root: Path = Path()
) -> Tokenizer:
    """A new tokenizer. `sample` is read, and `markers` become special tokens, only for a BPE: others are what they are, but that
    bytes can be masked too.

    The path of a `file` is relative to `root`. Raises UserError when a tokenizer cannot be had from the Hub or a file.
    """
    if settings.type == "hub":
        return _from_hub(str(settings.name))
    if settings.type == "file":
        return read_tokenizer(root / Path(str(settings.path)).expanduser())
    if settings.type == "byte":
        masks = tuple(marker for marker in markers if marker == MASK)
        return _byte_level([], 257 + len(masks), masks)
    return _byte_level(sample, settings.vocab_size, markers)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizers-library JSON; the tokenizer_config.json beside it says which token ends a document. Raises UserError."""
    import tokenizers

    if not path.is_file():
        raise UserError(
            f"the tokenizer file {path} does not exist. Correct tokenizer.path, or write it first: run a preset with "
            '"job": "tokenize" (91_tokenize_local writes ./data/tokens/tokenizer.json).'
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path} is no tokenizer of the tokenizers library: {str(error)[:200]}") from None
    token = tokenizer_facts(path).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token  # the Hub knows both forms
    if token is not None and (not isinstance(token, str) or backend.token_to_id(token) is None):
        raise UserError(f'{path.with_name(CONFIG)} says "eos_token": {json.dumps(token)}, but {path.name} has no such token')
    return Tokenizer(backend, backend.token_to_id(token) if token is not None else _end_of(backend))


def tokenizer_facts(path: Path) -> dict[str, Any]:
    """What stands in the tokenizer_config.json beside a tokenizer file; {} where there is none that can be read."""
    try:
        facts = read_json(path.with_name(CONFIG))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _end_of(backend: Any) -> int:
    """The id of our own end-of-document token, added where the tokenizer has none."""
    from tokenizers import AddedToken

    if backend.token_to_id(END) is None:
        backend.add_special_tokens([AddedToken(END, special=True)])
    return backend.token_to_id(END)


def _encode(encode: Any, texts: list[str]) -> list[Any]:
    try:
        return encode(texts, add_special_tokens=False)
    except TypeError:  # half a surrogate pair: JSON may hold one, UTF-8 may not
        return encode([_SURROGATE.sub("\ufffd", text) for text in texts], add_special_tokens=False)


def _byte_level(sample: Iterable[str], vocab_size: int, markers: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): every text can be written; with no merges left to learn it is plain bytes."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (END, *markers)],
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
        reason = unreachable or explain(error, name, kind="")
        raise UserError(
            f'tokenizer "{name}" could not be loaded from the Hugging Face Hub: {reason}\n'
            'Check the name and the network, or write "tokenizer": {"type": "bpe", "vocab_size": 8192} to train one here.'
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f'tokenizer "{name}" has no fast version (tokenizer.json); choose another, or train a "bpe".')
    eos_id = next((i for i in (loaded.eos_token_id, loaded.sep_token_id) if i is not None), None)
    return Tokenizer(backend, _end_of(backend) if eos_id is None else eos_id)
