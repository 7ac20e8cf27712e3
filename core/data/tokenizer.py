"""Text to token ids and back, by one kind of object whatever its origin.

In:    a tokenizer section of a preset; for a BPE, sample texts of the preset's own sources
Out:   Tokenizer: encode_batch, decode, and `state()` for the checkpoint
State: the tokenizers-library JSON and the id of the end-of-document token

No text acts as a control token, whatever the tokenizer calls it: the end of a document, a mask, a
marker of conversations, and all that is special. Where one of them is not marked special, it is
here; where a model's own vocabulary knows its name as a word, the word is spelled in smaller
pieces."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from core.data.vocabulary import Unread, is_complete, mended, unknown_of, unread
from core.errors import MissingPackage, SourceUnavailable, UserError
from core.files import own_path, read_json, write_file
from core.hf_hub import check_reachable, explain
from core.preset.settings import TokenizerSettings

END = "<|endoftext|>"
MASK = "[MASK]"
"""What stands where a token is hidden, for models that learn to find it; BERT's name for it."""
MARKERS = ("<|im_start|>", "<|im_end|>")
"""What stands around each message of a conversation (ChatML)."""
CONFIG = "tokenizer_config.json"
NAMED = (
    "bos_token",
    "eos_token",
    "pad_token",
    "mask_token",
    "cls_token",
    "sep_token",
    "unk_token",
    "additional_special_tokens",
)
"""Keys of a tokenizer_config.json that name control tokens."""
KNOWN_VOCABULARIES = {
    "gpt2": 50_257,
    "distilgpt2": 50_257,
    "Qwen/Qwen3-0.6B-Base": 151_669,
    "chandar-lab/NeoBERT": 30_522,
    "bert-base-uncased": 30_522,
}
"""Sizes of Hub tokenizers, for whoever asks before anything is downloaded."""
SAMPLE_CHARACTERS = 6_000_000
"""Text a BPE is trained on: beyond this the merges of a small vocabulary hardly change, and it
takes seconds."""

PROBE = "Two  words,\n\n\ta 1.5 \u00e9\u6f22\U0001f642 "
"""Holds what a tokenizer that does not keep every byte usually loses."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; `eos_id` stands before and after every document."""

    def __init__(self, backend: Any, eos_id: int):
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id = eos_id
        _mark_special(backend, (backend.id_to_token(eos_id), END, MASK, *MARKERS))
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
        """Token ids of each text, int32, without special tokens."""
        found = [
            np.array(encoding.ids, dtype=np.int32)
            for encoding in _encode(self._backend.encode_batch_fast, texts)
        ]
        return [self._spell(ids, None)[0] if self._control[ids].any() else ids for ids in found]

    def encode_with_spans(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, with the characters [begin, end) of the text that each token stands
        for: (n,) and (n, 2) int32.

        The bytes of one character all have its span.
        """
        encodings = _encode(self._backend.encode_batch, texts)
        found = [
            (np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2))
            for e in encodings
        ]
        return [
            self._spell(ids, spans) if self._control[ids].any() else (ids, spans)
            for ids, spans in found
        ]

    def _spell(self, ids: np.ndarray, spans: np.ndarray | None) -> tuple[np.ndarray, Any]:
        """The tokens with each control token, which a text only looks like, in smaller pieces; they
        have its span."""
        pieces = [
            self._spelling(token) if self._control[token] else [token] for token in ids.tolist()
        ]
        spelled = np.array([token for piece in pieces for token in piece], np.int32)
        return spelled, None if spans is None else np.repeat(
            spans, [len(piece) for piece in pieces], axis=0
        )

    def _spelling(self, token: int) -> list[int]:
        """The ids of a control token's name as text: of its first character, and of the rest of
        it."""
        if token not in self._spelled:
            name, found = self._backend.id_to_token(token), []
            for part in (name[:1], name[1:]) if len(name) > 1 and token != self.unknown_id else ():
                for piece in _pieces(self._backend.model, part):
                    shorter = piece != token and len(self._backend.id_to_token(piece)) < len(name)
                    found += (
                        [piece]
                        if not self._control[piece]
                        else self._spelling(piece)
                        if shorter
                        else []
                    )
            unknown = (
                [self.unknown_id]
                if self.unknown_id is not None and not self._control[self.unknown_id]
                else []
            )
            self._spelled[token] = found or unknown
        return self._spelled[token]

    def special_id(self, token: str) -> int | None:
        """The id of a special token, which no text is ever encoded to; None when there is no such
        token."""
        return self._special.get(token)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens: of ends and masks, and of what stands for unknown
        words."""
        return tuple(sorted(self._special.values()))

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _gives_back(self, texts: list[str]) -> bool:
        """Whether these come back from their tokens: an added token may swallow the spaces around
        it, or be no bytes."""
        return [self.decode(ids.tolist()) for ids in self.encode_batch(texts)] == texts

    def num_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text that tokens come back as: for those whose own text is not at
        hand."""
        return len(self.decode(ids.tolist()).encode())

    def unread(self, texts: list[str]) -> Unread:
        """What of some texts has no token."""
        return unread(texts, self.encode_with_spans(texts), self.unknown_id)

    def state(self) -> dict[str, Any]:
        return {"json": self._json, "eos_id": self.eos_id}

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
        """Stands for the first `size` tokens and their ids, whatever version of the tokenizers
        library is asked."""
        names = {
            index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()
        }
        return hashlib.sha256(
            json.dumps([names.get(index) for index in range(size)]).encode()
        ).hexdigest()

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


def build_tokenizer(
    settings: TokenizerSettings,
    sample: Iterable[str],
    markers: tuple[str, ...] = (),
    root: Path = Path(),
) -> Tokenizer:
    """A new tokenizer. `sample` is read, and `markers` become special tokens, only for a BPE:
    others are what they are, but that bytes can be masked too.

    The path of a `file` is relative to `root`. Raises UserError when a tokenizer cannot be had from
    the Hub or a file."""
    if settings.type == "hub":
        return _from_hub(str(settings.name))
    if settings.type == "file":
        return read_tokenizer(own_path(str(settings.path), root))
    if settings.type == "byte":
        masks = tuple(marker for marker in markers if marker == MASK)
        return _byte_level([], 257 + len(masks), masks)
    return _byte_level(sample, settings.vocab_size, markers)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizers-library JSON; the tokenizer_config.json beside it says which token ends a
    document. Raises UserError."""
    import tokenizers

    if not path.is_file():
        raise UserError(
            f"the tokenizer file {path} does not exist. Correct tokenizer.path, or write it "
            "first: run a preset with "
            '"job": "tokenize" (91_tokenize_local writes ./data/tokens/tokenizer.json).'
        )
    named = _named_tokens(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        facts = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise UserError(
            f"{path} is no tokenizer of the tokenizers library: {str(error)[:200]}"
        ) from None
    control = [name for names in named.values() for name in names]
    return _made_of(backend, facts, named.get("eos_token", [None])[0], control, str(path))


def _made_of(
    backend: Any, facts: dict[str, Any], end: str | None, control: list[str], where: str
) -> Tokenizer:
    """From a tokenizers-library JSON, also as a dict, and what others call its control tokens.
    Raises UserError."""
    if end is not None and backend.token_to_id(end) is None:
        raise UserError(
            f'{where}: {CONFIG} says "eos_token": "{end}", but the tokenizer has no such token'
        )
    if end is not None and len(end) == 1 and end.isascii():
        raise UserError(
            f'{where}: "eos_token": "{end}" is a character of texts: take one that no text is, '
            f'such as "{END}"'
        )
    _check_ids(backend, where)
    if (better := mended(facts, end or END, where)) is not None:
        backend = type(backend).from_str(json.dumps(better))
    _mark_special(backend, [name for name in control if len(name) > 1])
    eos_id = _end_of(backend) if end is None else backend.token_to_id(end)
    return Tokenizer(backend, eos_id)


def _check_ids(backend: Any, where: str) -> None:
    """Raises UserError where two tokens have one id: the library reads that, and loses one of them
    when it writes it."""
    names: dict[int, str] = {}
    for name, i in sorted(backend.get_vocab(with_added_tokens=True).items()):
        if (other := names.setdefault(i, name)) != name:
            raise UserError(
                f"{where} gives {other} and {name} one id, {i}: number its tokens apart"
            )


def _named_tokens(path: Path) -> dict[str, list[str]]:
    """The control tokens that the tokenizer_config.json beside a tokenizer file names, by their
    keys. Raises UserError."""
    config, found = path.with_name(CONFIG), {}
    try:
        facts = read_json(config) if config.exists() else {}
        items = facts.items()
    except (OSError, ValueError, RecursionError, AttributeError):
        raise UserError(
            f"{config} cannot be read as JSON, and it says which token ends a document: mend it, "
            "or delete it"
        ) from None
    for key, value in items:
        tokens = value if isinstance(value, list) else [value]
        # the Hub knows both forms
        names = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        if (
            key == "eos_token"
            and value is not None
            and not (len(names) == 1 and isinstance(names[0], str) and names[0])
        ):
            raise UserError(
                f'{config} says "eos_token": {json.dumps(value)[:80]}, which is no token: write '
                'its text, as "</s>"'
            )
        if key in NAMED:
            found |= {key: [name for name in names if isinstance(name, str) and name]}
    return {key: names for key, names in found.items() if names}


def tokenizer_facts(path: Path) -> dict[str, Any]:
    """What stands in the tokenizer_config.json beside a tokenizer file; {} where there is none that
    can be read."""
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


def _mark_special(backend: Any, names: Iterable[str]) -> None:
    """Those of these tokens that it has become special ones: no text is searched for them then."""
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
        return encode([_without_halves(text) for text in texts], add_special_tokens=False)
    except Exception as error:
        # the library raises Exception itself; what a file lacks was mended when it was read
        raise UserError(
            f"the tokenizer of this lineage cannot read a text ({error}); start a new lineage "
            "with another one"
        ) from None


def _without_halves(text: str) -> str:
    """The text with the usual stand-in for each half of a surrogate pair."""
    return _SURROGATE.sub("\ufffd", text)


def _pieces(model: Any, text: str) -> list[int]:
    try:
        return [token.id for token in model.tokenize(text)]
    except Exception:  # so the library says that it does not know a character
        return []


def _byte_level(sample: Iterable[str], vocab_size: int, markers: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): every text can be written; with no merges left to learn
    it is plain bytes."""
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
    backend.train_from_iterator(map(_without_halves, sample), trainer)
    return Tokenizer(backend, backend.token_to_id(END))


def _from_hub(name: str) -> Tokenizer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingPackage(
            f'tokenizer "{name}" needs the package transformers: pip install transformers'
        ) from None
    unreachable, here = "", Path(name).is_dir()
    if here:
        _named_tokens(Path(name) / "tokenizer.json")
    try:
        check_reachable()
    except SourceUnavailable as error:
        # it may be in the cache; asking the Hub would take a minute of retries
        unreachable = str(error)
    try:
        loaded = AutoTokenizer.from_pretrained(
            name, use_fast=True, local_files_only=bool(unreachable)
        )
    except Exception as error:
        # transformers raises whatever a file's odd content made it stumble over
        asked = isinstance(error, OSError | ValueError) and not here
        reason = (
            unreachable or explain(error, name, kind="")
            if asked
            else f"{type(error).__name__}: {str(error)[:200]}"
        )
        raise UserError(
            f'tokenizer "{name}" could not be loaded from the Hugging Face Hub: {reason}\n'
            'Check the name and the network, or write "tokenizer": {"type": "bpe", "vocab_size": '
            "8192} to train one here."
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f'tokenizer "{name}" has no fast version (tokenizer.json); choose another, or train a '
            '"bpe".'
        )
    end = next((token for token in (loaded.eos_token, loaded.sep_token) if token), None)
    return _made_of(
        backend,
        json.loads(backend.to_str()),
        end,
        list(loaded.all_special_tokens),
        f'tokenizer "{name}"',
    )
