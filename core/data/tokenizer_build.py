"""The origins of a tokenizer: the Hub, a file, training on the run's own text, or plain bytes.

In:    a tokenizer section of a preset; for a BPE, sample texts of the preset's own sources
Out:   a Tokenizer; UserError where there is none to be had
State: none
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.data.tokenizer import CONFIG, END, MASK, Tokenizer, mark_special, without_surrogates
from core.data.vocabulary import mended
from core.errors import MissingPackage, SourceUnavailable, UserError
from core.files import own_path, read_json
from core.hf_hub import check_reachable, explain
from core.preset.settings import TokenizerSettings

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


def build_tokenizer(
    settings: TokenizerSettings,
    sample: Iterable[str],
    markers: tuple[str, ...] = (),
    root: Path = Path(),
) -> Tokenizer:
    """Make the tokenizer that a preset asks for.

    sample    texts that a BPE is trained on; others do not read it
    markers   special tokens of a new BPE; bytes take only [MASK], others none
    root      folder that the path of a `file` is relative to

    Raises UserError when a tokenizer cannot be had from the Hub or a file.
    """
    if settings.type == "hub":
        return _from_hub(str(settings.name))
    if settings.type == "file":
        return read_tokenizer(own_path(str(settings.path), root))
    if settings.type == "byte":
        masks = tuple(marker for marker in markers if marker == MASK)
        return _byte_level([], 257 + len(masks), masks)
    return _byte_level(sample, settings.vocab_size, markers)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizers-library JSON; the tokenizer_config.json beside it says which token ends a
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
    """Make a Tokenizer of a library one.

    facts     its JSON, as a dict
    end       the token that ends documents; None: our own
    control   names of further control tokens
    where     its name in messages

    Raises UserError.
    """
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
    mark_special(backend, [name for name in control if len(name) > 1])
    return Tokenizer(backend, _end_of(backend) if end is None else backend.token_to_id(end))


def _check_ids(backend: Any, where: str) -> None:
    """Raise UserError where two tokens have one id: the library reads that, and loses one of them
    when it writes it."""
    names: dict[int, str] = {}
    for name, i in sorted(backend.get_vocab(with_added_tokens=True).items()):
        if (other := names.setdefault(i, name)) != name:
            raise UserError(
                f"{where} gives {other} and {name} one id, {i}: number its tokens apart"
            )


def _named_tokens(path: Path) -> dict[str, list[str]]:
    """Read the control tokens that the tokenizer_config.json beside a tokenizer file names, by
    their keys. Raises UserError."""
    config = path.with_name(CONFIG)
    named: dict[str, list[str]] = {}
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
        if key in NAMED and (texts := [name for name in names if isinstance(name, str) and name]):
            named[key] = texts
    return named


def tokenizer_facts(path: Path) -> dict[str, Any]:
    """Read the tokenizer_config.json beside a tokenizer file; {} where none can be read."""
    try:
        facts = read_json(path.with_name(CONFIG))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _end_of(backend: Any) -> int:
    """Return the id of our own end-of-document token; add it where the tokenizer has none."""
    from tokenizers import AddedToken

    if backend.token_to_id(END) is None:
        backend.add_special_tokens([AddedToken(END, special=True)])
    return backend.token_to_id(END)


def _byte_level(sample: Iterable[str], vocab_size: int, markers: tuple[str, ...] = ()) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019), which can write every text; with no merges
    left to learn, it is plain bytes."""
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
    backend.train_from_iterator(map(without_surrogates, sample), trainer)
    return Tokenizer(backend, _end_of(backend))


def _from_hub(name: str) -> Tokenizer:
    """Load a tokenizer of the Hub, or of a folder with transformers' files. Raises UserError."""
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
