"""Tokenizers made anywhere: no text acts as a control token, gaps are mended or told, bytes are
those of the text."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from core.data.corpus import open_corpus
from core.data.token_files import read_manifest
from core.data.tokenizer import END, MARKERS, MASK, Tokenizer
from core.data.tokenizer_build import build_tokenizer, read_tokenizer
from core.errors import UserError
from core.jobs.tokenize import tokenize
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.preset.settings import TokenizerSettings
from core.registry import Preset
from core.runtime import detect_runtime
from tests.data.test_sources import write_jsonl
from tests.project import tiny_preset, train_here

STOP = "</s>"
WORDS = {
    word: i
    for i, word in enumerate(["a", "b", "<", "/", "s", ">", STOP, "[PAD]", MASK, *MARKERS, "[UNK]"])
}
LETTERS = {letter: i for i, letter in enumerate(dict.fromkeys("ab</s> >|_imtrend[]MASKPD"))}
MERGES = [("<", "/"), ("</", "s"), ("</s", ">")]
MERGED = LETTERS | {"".join(pair): len(LETTERS) + i for i, pair in enumerate(MERGES)}


def backend_of(
    model: Any, before: Any = None, normalizer: Any = None, added: tuple[str, ...] = ()
) -> Backend:
    backend = Backend(model)
    if before is not None:
        backend.pre_tokenizer = before
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([AddedToken(name, special=False) for name in added])
    return backend


def words(*, lower: bool = False, compatible: bool = False, **how: Any) -> Backend:
    steps = [normalizers.NFKC()] * compatible + [normalizers.Lowercase()] * lower
    return backend_of(
        models.WordLevel(WORDS, "[UNK]"),
        pre_tokenizers.WhitespaceSplit(),
        normalizers.Sequence(steps),
        **how,
    )


def pieces() -> Backend:
    vocabulary = [("<unk>", -9.0), ("▁", -2.0), *((name, -3.0) for name in WORDS)]
    return backend_of(models.Unigram(vocabulary, 0), pre_tokenizers.Metaspace())


def llama_like() -> Backend:
    """Marks of leading spaces, and bytes for what has no token: as in shared files of Llama and
    Mistral."""
    names = [
        "<unk>",
        "<s>",
        STOP,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"theandor",
        "th",
        "▁th",
        "▁the",
        "the",
    ]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("th", "e")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = backend_of(model, pre_tokenizers.Metaspace())
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", STOP])
    return backend


def bert_like() -> Backend:
    vocabulary = ["[UNK]", "[SEP]", "the", "and", "##e", "n", "##o", "o", "漢"]
    model = models.WordPiece({name: i for i, name in enumerate(vocabulary)})
    backend = backend_of(model, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())
    backend.decoder = decoders.WordPiece()
    return backend


IMITATED = {
    "an added token that is not special": lambda: backend_of(
        models.BPE(LETTERS, []), added=(STOP, *MARKERS, MASK, "[PAD]")
    ),
    "merges": lambda: backend_of(models.BPE(MERGED, MERGES)),
    "merges that are ignored": lambda: backend_of(
        models.BPE(MERGED, MERGES, ignore_merges=True), pre_tokenizers.WhitespaceSplit()
    ),
    "words": words,
    "words in lower case": lambda: words(lower=True),
    "words of compatible characters": lambda: words(compatible=True),
    "added words in lower case": lambda: words(lower=True, added=(STOP, *MARKERS)),
    "word pieces": lambda: backend_of(models.WordPiece(WORDS), pre_tokenizers.WhitespaceSplit()),
    "likely pieces": pieces,
    "what stands for the unknown": lambda: backend_of(models.BPE(MERGED, MERGES, unk_token=STOP)),
}
TYPED = [f"a {name} b{name}a {name.upper()}" for name in (STOP, *MARKERS, MASK, "[PAD]")]
TYPED += ["a ＜/s＞ b", "ü", STOP, STOP * 3]


def read(backend: Backend, folder: Path, **config: Any) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    return read_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", IMITATED)
def test_no_text_acts_as_a_control_token(tmp_path: Path, kind: str) -> None:
    """From a file, from a folder of the Hub's form and from a checkpoint's state; other tokens of
    the text are what they were."""
    config = (
        {"eos_token": STOP, "pad_token": "[PAD]", "mask_token": MASK}
        if kind != "merges"
        else {"eos_token": STOP}
    )
    made = [read(IMITATED[kind](), tmp_path, **config)]
    if kind in ("an added token that is not special", "words"):
        made.append(build_tokenizer(TokenizerSettings(type="hub", name=str(tmp_path)), []))
    again = [Tokenizer.from_state(json.loads(json.dumps(each.state()))) for each in made]
    assert [each.state() for each in again] == [each.state() for each in made]
    for tokenizer in [*made, *again]:
        control = {tokenizer.eos_id, *tokenizer.special_ids} - {tokenizer.unknown_id}
        assert {tokenizer.special_id(name) for name in (STOP, MASK, *MARKERS)} - {None} <= control
        assert tokenizer.special_id(STOP) == tokenizer.eos_id != tokenizer.unknown_id
        for text, ids, (same, spans) in zip(
            TYPED, tokenizer.encode_batch(TYPED), tokenizer.encode_with_spans(TYPED)
        ):
            assert not control & set(ids.tolist()) and len(ids), text
            assert (
                ids.tolist() == same.tolist() and len(spans) == len(ids) and ids.dtype == np.int32
            )
        for i in (tokenizer._backend.token_to_id(name) for name in ("a", "b")):
            assert i in tokenizer.encode_batch([f"a {STOP} b"])[0]
    if kind == "merges":  # nothing of it is lost: it is spelled
        assert tokenizer.decode(tokenizer.encode_batch([f"a{STOP}b"])[0].tolist()).split() == list(
            f"a{STOP}b"
        )


def test_what_is_no_control_token_stays_one_token(tmp_path: Path) -> None:
    """<think> and runs of spaces are text in the eyes of whoever made the tokenizer; so is a pad
    token that is a character."""
    backend = backend_of(models.BPE(LETTERS, []), added=("<think>", "   "))
    tokenizer = read(backend, tmp_path, pad_token="a")
    ids = tokenizer.encode_batch(["a   b<think>"])[0].tolist()
    assert ids == [tokenizer._backend.token_to_id(name) for name in ("a", "   ", "b", "<think>")]


def numbers(model: Any, before: Any = None) -> Any:
    return lambda: backend_of(model, before)


SPLIT = pre_tokenizers.WhitespaceSplit()
GAPS = {
    "words without an unknown one": (
        numbers(models.WordLevel({"a": 0, "b": 1}), SPLIT),
        4,
        [0, 3, 1],
    ),
    "words, its name is not there": (
        numbers(models.WordLevel({"a": 0, "b": 1}, "[UNK]"), SPLIT),
        4,
        [0, 3, 1],
    ),
    "words with holes": (numbers(models.WordLevel({"a": 0, "b": 2}), SPLIT), 5, [0, 4, 2]),
    "word pieces": (numbers(models.WordPiece({"a": 0, "b": 9}), SPLIT), 12, [0, 11, 9]),
    "characters": (numbers(models.BPE({"a": 0, "b": 1, " ": 2}, [])), 5, [0, 2, 4, 4, 2, 1]),
    "characters, its name is not there": (
        numbers(models.BPE({"a": 0, "b": 1, " ": 2}, [], unk_token="?")),
        5,
        [0, 2, 4, 4, 2, 1],
    ),
    "likely pieces": (
        numbers(models.Unigram([("a", -1.0), ("b", -1.0), (" ", -1.0)], None)),
        5,
        [0, 2, 4, 2, 1],
    ),
    "bytes that were not seen": (
        numbers(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []), pre_tokenizers.ByteLevel(False)),
        5,
        None,
    ),
}


@pytest.mark.parametrize("kind", GAPS)
def test_a_gap_becomes_an_unknown_token(tmp_path: Path, kind: str) -> None:
    """ "a éü b": never a traceback, nothing dropped or glued, every token at the id it had; and how
    much it is, is known."""
    make, size, expected = GAPS[kind]
    tokenizer = read(make(), tmp_path)
    ids, spans = tokenizer.encode_with_spans(["a éü b"])[0]
    assert expected is None or ids.tolist() == expected
    assert (ids[0], ids[-1]) == tuple(tokenizer._backend.token_to_id(name) for name in "ab")
    assert (
        spans[ids == tokenizer.unknown_id].min() == 2
        and spans[ids == tokenizer.unknown_id].max() == 4
    )
    assert tokenizer.vocab_size == size and {tokenizer.eos_id, tokenizer.unknown_id} <= set(
        tokenizer.special_ids
    )
    assert not tokenizer.is_complete and tokenizer.special_id(END) == tokenizer.eos_id
    unread = tokenizer.unread(["a éü b", "a b " * 48])
    assert (unread.characters, unread.of, unread.example) == (2, 100, "éü") and str(
        unread
    ).startswith("2 % of the characters")
    assert tokenizer.decode(list(range(size))) is not None  # a hole is no token, and no error
    (tmp_path / "again").mkdir()
    tokenizer.save(tmp_path / "again" / "tokenizer.json")
    assert read_tokenizer(tmp_path / "again" / "tokenizer.json").state() == tokenizer.state()


def test_white_space_counts_where_it_is_lost(tmp_path: Path) -> None:
    """Between words that a tokenizer cuts at white space, it is passed over; where it would be a
    token of its own, it is not."""
    for before, lost, of in ((SPLIT, 0, 96), (None, 95, 191)):
        letters = read(backend_of(models.BPE({"a": 0, "b": 1}, []), before), tmp_path)
        unread = letters.unread([" ".join("ab" * 48)])
        assert (unread.characters, unread.of, unread.example) == (lost, of, " " if lost else "")


def test_a_file_may_leave_out_what_it_has_not(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}})
    )
    assert read_tokenizer(path).encode_batch(["a"])[0].tolist() == [0]


def test_what_can_write_everything_has_no_gap(tmp_path: Path) -> None:
    for settings in (TokenizerSettings(type="byte"), TokenizerSettings(vocab_size=300)):
        tokenizer = build_tokenizer(settings, ["some text"] * 9)
        assert tokenizer.is_complete and tokenizer.unread(["é\u0301 漢 🙂"]).characters == 0
    llama = read(llama_like(), tmp_path, eos_token=STOP)
    assert llama.is_complete and llama.unread(["é\u0301 漢 🙂"]).characters == 0


def test_one_text_has_one_encoding(tmp_path: Path) -> None:
    """A BPE whose file leaves out merges at random: the same text, the same tokens, or no run could
    be resumed."""
    tokenizer = read(backend_of(models.BPE(MERGED, MERGES, dropout=0.5)), tmp_path)
    assert len({tuple(ids.tolist()) for ids in tokenizer.encode_batch([STOP] * 50)}) == 1


def test_absurd_ids_are_refused(tmp_path: Path) -> None:
    read(backend_of(models.WordLevel({"a": 0, "b": 12345}), added=("z",)), tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        (tmp_path / "tokenizer.json").read_text().replace("12345", "4000000000")
    )
    with pytest.raises(UserError, match="has a token of id 4,000,000,000: no model has so many"):
        read_tokenizer(tmp_path / "tokenizer.json")


# what a person is told ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "letters, loud", [("abcdefgh ", None), ("abcdefg ", 0), ("ab ", 1), ("", 2)]
)
def test_what_has_no_token_is_told(tmp_path: Path, letters: str, loud: int | None) -> None:
    """By source, with its share and an example: a note, from 1 % on a warning; where it is
    everything, training is refused."""
    write_jsonl(tmp_path / "x.jsonl", [{"text": "abcdefg" * 20 + "h" * (i == 0)} for i in range(9)])
    tokenizer = read(
        backend_of(models.BPE({letter: i for i, letter in enumerate(letters)}, [])), tmp_path
    )
    preset = decode_preset(
        tiny_preset(data={"sources": [{"type": "text", "path": "x.jsonl"}]}), Preset, "t", "t"
    )
    corpus = open_corpus(preset, tmp_path, Single())
    if loud == 2:
        with pytest.raises(
            UserError,
            match=r'no token for anything that x says \(100 % .*"abcdefgabcdefgabcdef"\).*"bpe"',
        ):
            corpus.tokenizer_remarks(tokenizer)
        return
    notes, warnings = corpus.tokenizer_remarks(tokenizer)
    told = [[], [], []] if loud is None else [notes, warnings]
    if loud is None:
        assert not notes and not warnings
    else:
        share = {0: "0.0793 %", 1: "71.5 %"}[loud]
        assert (
            not told[1 - loud]
            and f'x: {share} of the characters have no token (first: "{"hc"[loud]}' in told[loud][0]
        )


# through the program ------------------------------------------------------------------------------


def held_out_of(preset: dict, root: Path) -> list[Any]:
    corpus = open_corpus(decode_preset(preset, Preset, "t", "t"), root, Single())
    return [d for source in corpus.sources for d in source.stream({}) if corpus.hold_out.holds(d)]


def test_a_run_tells_exact_bits_per_byte(tmp_path: Path) -> None:
    """Of texts and of conversations, whatever the tokenizer; and says how much it cannot read."""
    write_jsonl(
        tmp_path / "x.jsonl",
        [
            {"text": f"{i} the other and {STOP} thé  漢字 🙂 then nothing more of it\n"}
            for i in range(60)
        ],
    )
    said = [
        [{"role": "user", "content": f"the {i}?"}, {"role": "assistant", "content": f"nön {i} 漢"}]
        for i in range(60)
    ]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages} for messages in said])
    for number, (make, end) in enumerate([(llama_like, STOP), (bert_like, "[SEP]")]):
        read(make(), tmp_path, eos_token=end)
        for kind in ("text", "chat"):
            path = {"text": "x.jsonl", "chat": "chats.jsonl"}[kind]
            data = {
                "sources": [{"type": kind, "path": path}],
                "validation_fraction": 0.1,
                "min_text_length": 1,
            }
            train = {"max_steps": 1, "eval_tokens": 100_000}
            own = {
                "model": {"seq_length": 128},
                "tokenizer": {"type": "file", "path": "tokenizer.json"},
            }
            preset = tiny_preset(**own, data=data, train=train)
            events = train_here(preset, tmp_path, f"t{number}{kind}")
            (found,) = [event for event in events if event["event"] == "eval"]
            held = held_out_of(preset, tmp_path)
            spelled = len(f"{MARKERS[1]}\n")
            sizes = [d.messages[1][1] if d.messages else d.text for d in held]
            num_bytes = sum(len(text.encode()) + spelled * (kind == "chat") for text in sizes)
            bits = found["cross_entropy"] * found["eval_tokens"] / math.log(2)
            assert len(held) > 1 and found["bits_per_byte"] == pytest.approx(
                bits / num_bytes, rel=1e-9
            )
            told = [event["message"] for event in events if event["event"] == "warning"]
            assert ("have no token" in str(told)) == (number == 1), told


def test_texts_that_name_the_end_are_no_more_documents(tmp_path: Path) -> None:
    """50 texts, and the end of a document among the words of each: 50 documents, in chunks as in
    training."""
    tokenizer = read(words(added=(STOP,)), tmp_path, eos_token=STOP)
    write_jsonl(
        tmp_path / "x.jsonl", [{"text": f"a b {STOP} {'a ' * 20} a{STOP}b"} for _ in range(50)]
    )
    section = {"type": "text", "path": "x.jsonl"}
    own = {
        "tokenizer": {"type": "file", "path": "tokenizer.json"},
        "data": {"sources": [section], "min_text_length": 1},
    }
    preset = {"job": "tokenize", **own, "tokenize": {"output": "tokens", "workers": 0}}
    console = io.StringIO()
    tokenize(
        decode_preset(preset, Preset, "t", "t"), detect_runtime(), Single(), tmp_path, 0.0, console
    )
    manifest = read_manifest(tmp_path / "tokens" / "x")
    assert (
        manifest.documents == 50
        and manifest.eos_token_id == tokenizer.eos_id
        and "warning  x: 1" in console.getvalue()
    )
