"""Bits per byte divide by the bytes of the text, whatever tokenizer reads it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from core.data.chat import encode_chat
from core.data.objectives import build_objective
from core.data.tokenizer import MARKERS, Tokenizer
from core.data.tokenizer_build import build_tokenizer, read_tokenizer
from core.data.validation import HoldOut, validation_rows
from core.errors import UserError
from core.preset.settings import TokenizerSettings
from tests.data.test_vocabulary import LETTERS, STOP, WORDS, backend_of, bert_like, llama_like, read

# bytes --------------------------------------------------------------------------------------------


BYTES = {  # the same whatever reads it, counted by hand
    "the other and the": 17,
    "thé  nön\n": 11,
    " 漢字 🙂 ": 13,
    "e\u0301 \ufb01": 7,
    "\tno\r\n\n": 6,
    "a \ud800 b": 7,  # half a pair: three bytes, as what stands for it
}
READERS = {
    "byte": lambda folder: build_tokenizer(TokenizerSettings(type="byte"), []),
    "bpe": lambda folder: build_tokenizer(TokenizerSettings(vocab_size=300), [*BYTES] * 9),
    "llama": lambda folder: read(llama_like(), folder, eos_token=STOP),
    "bert": lambda folder: read(bert_like(), folder, eos_token="[SEP]"),
}


class Held:
    """A source of some texts, all of them held out."""

    name, finite = "held", True

    def __init__(self, documents: list[Any]):
        self.documents = documents

    def stream(self, cursor: dict) -> Any:
        return iter(self.documents)


def bytes_of(tokenizer: Tokenizer, documents: list[Any]) -> int:
    objective = build_objective("next_token", tokenizer, 0.2, 0)
    rows = validation_rows([Held(documents)], HoldOut(1.0), tokenizer, objective, 8, 10_000, 0)  # type: ignore[list-item]
    assert len(rows) > 1, "documents go on from row to row"
    return sum(row.num_bytes for row in rows)


@pytest.mark.parametrize("kind", READERS)
def test_bits_per_byte_divide_by_the_bytes_of_the_text(tmp_path: Path, kind: str) -> None:
    """Not by those of tokens decoded one by one; dropped and unknown characters were in the text,
    too."""
    from core.data.documents import Document

    tokenizer = READERS[kind](tmp_path)
    assert bytes_of(
        tokenizer, [Document(text, text.encode("utf-8", "replace").decode()) for text in BYTES]
    ) == sum(BYTES.values())


@pytest.mark.parametrize("kind", READERS)
def test_of_a_conversation_only_what_is_learned_counts(tmp_path: Path, kind: str) -> None:
    """The answers, the line end behind each, and the markers where they are spelled out."""
    said = (
        ("user", "the 漢 other"),
        ("assistant", "thé  nön"),
        ("user", "and"),
        ("assistant", "no"),
    )
    ((_, learned, num_bytes),) = encode_chat(READERS[kind](tmp_path), [said])
    assert learned.any() and num_bytes == 10 + 2 + 2 * len(f"{MARKERS[1]}\n")


def test_tokens_without_text_count_as_they_are_written(tmp_path: Path) -> None:
    """Chunks keep no text: the whole document is decoded; exact, but that marks of leading spaces
    drop one that was there."""
    from core.data.documents import Document, Encoded

    texts = [text for text in BYTES if "\ud800" not in text]
    for kind in ("byte", "bpe", "llama"):
        tokenizer = READERS[kind](tmp_path)
        encoded = [Encoded(ids, None, i, 0) for i, ids in enumerate(tokenizer.encode_batch(texts))]
        assert bytes_of(
            tokenizer, [Document("", str(i), encoded=each) for i, each in enumerate(encoded)]
        ) == 54 - (kind == "llama")


def test_a_tokenizer_that_swallows_something_is_not_lossless() -> None:
    """Added tokens that take the spaces around them, or are no bytes, and words without what is
    between them."""
    plain = READERS["byte"](Path())
    assert plain.is_lossless

    def other(*added: AddedToken, before: Any = None) -> Tokenizer:
        backend = Backend.from_str(plain.state()["json"])
        backend.add_tokens([*added])
        backend.pre_tokenizer = before or backend.pre_tokenizer
        return Tokenizer(backend, plain.eos_id)

    assert other(AddedToken("world"), AddedToken("<|x|>", lstrip=True, special=True)).is_lossless
    swallows = other(AddedToken("world", lstrip=True))
    assert (
        swallows.decode(swallows.encode_batch(["hello world"])[0].tolist()) == "helloworld"
        and not swallows.is_lossless
    )
    assert (
        not other(AddedToken("b", rstrip=True)).is_lossless
        and not other(AddedToken("\u00e9")).is_lossless
    )
    in_words = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert not other(before=in_words).is_lossless


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
def test_two_tokens_of_one_id_are_refused(kind: str, tmp_path: Path) -> None:
    """The library would write one of them only, and a checkpoint could read no text."""
    model = models.WordLevel(WORDS, "[UNK]") if kind == "WordLevel" else models.BPE(LETTERS, [])
    facts = json.loads(backend_of(model).to_str())
    facts["model"]["vocab"] |= {"twice": facts["model"]["vocab"]["a"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(
        UserError, match=r"tokenizer.json gives a and twice one id, \d+: number its tokens apart"
    ):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_spans_are_not_trimmed() -> None:
    """RoBERTa's post-processor takes leading spaces off spans: a token that reaches into the header
    would be learned."""
    tokenizer = build_tokenizer(TokenizerSettings(vocab_size=270), ["\n\n\n\n" * 50], MARKERS)
    facts = tokenizer.state()
    backend = Backend.from_str(facts["json"])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming = Tokenizer(backend, facts["eos_id"])
    said = (("user", "q"), ("assistant", "\n\nb"))
    for one, other in zip(encode_chat(trimming, [said])[0], encode_chat(tokenizer, [said])[0]):
        assert np.array_equal(one, other)
