"""Tokenizers: every text comes back, the end-of-document token cannot be written by a text, bytes
are counted right."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from pydantic import ValidationError

from core.data.chat import MARKERS
from core.data.tokenizer import END, Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.preset.settings import TokenizerSettings
from tests.project import NO_HUB, ROOT, story

HARD_TEXTS = [
    "",
    " ",
    "\n\n\t x\r\n",
    "naïve façade 日本語 🙂‍↔️ ﷽",
    f"before {END} after{END}",
    "\x00\x01\x7f\u200b\ufeff",
    "e\u0301 is not \u00e9",
    "a" * 5000,
]


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    settings = (
        TokenizerSettings(type="byte")
        if request.param == "byte"
        else TokenizerSettings(vocab_size=400)
    )
    return build_tokenizer(settings, [story(i) for i in range(20)])


def test_every_text_comes_back(tokenizer: Tokenizer) -> None:
    """Whatever Unicode holds: no unknown token, nothing normalised, nothing added."""
    for text, ids in zip(HARD_TEXTS, tokenizer.encode_batch(HARD_TEXTS)):
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size).all()


def test_a_text_cannot_write_the_special_token(tokenizer: Tokenizer) -> None:
    """An end-of-document mark inside a text is text, never the end of a document."""
    for ids in tokenizer.encode_batch([*HARD_TEXTS, END]):
        assert tokenizer.eos_id not in ids


def test_the_state_is_all_there_is(tokenizer: Tokenizer) -> None:
    """A tokenizer from a checkpoint (JSON and a number) does what the first one did."""
    again = Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())))
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    for one, other in zip(tokenizer.encode_batch(HARD_TEXTS), again.encode_batch(HARD_TEXTS)):
        assert np.array_equal(one, other)
    assert again.state() == tokenizer.state()


def test_bytes_are_bytes() -> None:
    """256 bytes and the end of a document: nothing is learnt."""
    tokenizer = build_tokenizer(TokenizerSettings(type="byte"), ["ignored"] * 100)
    assert tokenizer.vocab_size == 257
    assert [len(ids) for ids in tokenizer.encode_batch(HARD_TEXTS)] == [
        len(text.encode()) for text in HARD_TEXTS
    ]


def test_training_twice_gives_the_same_tokenizer() -> None:
    """So that two runs of one preset see the same tokens."""
    settings = TokenizerSettings(vocab_size=500)
    sample = [story(i) for i in range(30)]
    one, other = (build_tokenizer(settings, iter(sample)).state() for _ in range(2))
    assert one == other
    assert build_tokenizer(settings, iter([story(i) for i in range(100, 110)])).state() != one


def test_a_bpe_learns_merges_and_keeps_to_its_size() -> None:
    """A text like the sample takes far fewer tokens than bytes; a sample too small for the
    vocabulary gives a smaller one."""
    tokenizer = build_tokenizer(TokenizerSettings(vocab_size=400), [story(i) for i in range(30)])
    text = story(77)
    assert tokenizer.vocab_size == 400 and len(tokenizer.encode_batch([text])[0]) < 0.5 * len(
        text.encode()
    )
    assert 257 <= build_tokenizer(TokenizerSettings(vocab_size=8192), ["ab ab ab"]).vocab_size < 300
    with pytest.raises(ValidationError):
        TokenizerSettings(vocab_size=200)  # fewer than there are bytes


@pytest.mark.slow
def test_a_hub_tokenizer_without_a_network_says_so_at_once(tmp_path: Path) -> None:
    """Within seconds and in words: what could not be had, why, and what to write instead."""
    code = """
from core.data.tokenizer_build import build_tokenizer
from core.errors import UserError
from core.preset.settings import TokenizerSettings
try:
    build_tokenizer(TokenizerSettings(type="hub", name="nobody/has-this"), [])
except UserError as error:
    print(f"{error.exit_code} {error}")
"""
    env = {**os.environ, **NO_HUB, "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100
    )
    # a minute and more, when the library is left to its retries
    assert time.monotonic() - began < 30
    assert (
        done.stdout.startswith('2 tokenizer "nobody/has-this" could not be loaded')
        and "127.0.0.1" in done.stdout
    )
    assert '"tokenizer": {"type": "bpe"' in done.stdout and "Traceback" not in done.stderr


QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen3's tokenizer cuts a text first; transformers brings it with the class, whatever the
file says."""


def qwen_folder(folder: Path, eos_token: str) -> "tokenizers.Tokenizer":
    """A tokenizer of the shape of Qwen3's: the special tokens come after the vocabulary, then
    tokens that are none."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PIECES), "isolated")
    in_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([pieces, in_bytes])
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([story(1)], trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True) for text in (END, *MARKERS)]
    )
    backend.add_tokens([tokenizers.AddedToken("<think>", special=False)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": eos_token,
        "pad_token": END,
        "bos_token": None,
    }
    facts |= {
        "add_bos_token": False,
        "additional_special_tokens": list(MARKERS),
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return backend


@pytest.mark.slow
def test_a_tokenizer_folder_needs_no_network(tmp_path: Path) -> None:
    """A name may be a local folder in Hugging Face's form; its own end-of-text token is used.
    Qwen3's base models end a document with <|endoftext|>, 151643 of 151,669; a chat model's config
    says <|im_end|>, which is why the presets name a base model."""
    trained = build_tokenizer(TokenizerSettings(vocab_size=300), [story(1)])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text(trained.state()["json"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
    base, chat = qwen_folder(tmp_path / "base", END), qwen_folder(tmp_path / "chat", MARKERS[1])
    code = """
import json, sys
from core.data.tokenizer_build import build_tokenizer
from core.preset.settings import TokenizerSettings
for name in ("own", "base", "chat"):
    t = build_tokenizer(TokenizerSettings(type="hub", name=f"{sys.argv[1]}/{name}"), [])
    texts = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
    special = [t.special_id(text) for text in texts]
    print(json.dumps([t.eos_id, t.vocab_size, t.encode_batch([sys.argv[2]])[0].tolist(), special]))
"""
    env = {**os.environ, **NO_HUB, "HF_HOME": str(tmp_path / "cache")}
    run = [sys.executable, "-c", code, str(tmp_path), story(1)]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    own, *qwen = map(json.loads, done.stdout.splitlines())
    assert own[:3] == [trained.eos_id, 300, trained.encode_batch([story(1)])[0].tolist()]
    for found, backend, end in zip(qwen, (base, chat), (END, MARKERS[1]), strict=True):
        size, special = (
            backend.get_vocab_size(),
            [backend.token_to_id(text) for text in (END, *MARKERS)],
        )
        assert special == [size - 4, size - 3, size - 2]
        assert found[:3] == [backend.token_to_id(end), size, backend.encode(story(1)).ids]
        assert found[3] == [*special, None]
