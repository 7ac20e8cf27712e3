"""Masked tokens: what is hidden and what never is, that it follows from seed and place alone, and
which tokenizers can do it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.data import pipeline
from core.data.documents import Encoded
from core.data.objectives import IGNORE_INDEX, MaskedTokens, build_objective, next_token
from core.data.packing import Row
from core.data.pipeline import PipelineSettings
from core.data.pipeline_factory import PipelineFactory
from core.data.tokenizer import MASK, Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.data.validation import PSEUDO_CONTEXT, PSEUDO_TOKENS, HoldOut, hide_one, validation_rows
from core.errors import UserError
from core.preset.settings import TokenizerSettings
from tests.data.corpus import (
    Stretch,
    byte_tokenizer,
    check_accounts,
    history,
    make_factory,
    write_corpus,
)
from tests.project import story

BEGIN, END, HIDDEN, SPECIAL = 101, 102, 103, (0, 100, 101, 102, 103)
"""BERT's: [CLS], [SEP], [MASK], and with [PAD] and [UNK] all that no text is made of."""
SIZES = {"a": 31, "b": 17, "c": 8}


def masked(fraction: float = 0.2, seed: int = 42) -> MaskedTokens:
    return MaskedTokens(BEGIN, END, HIDDEN, SPECIAL, fraction, seed)


def document(length: int, seed: int = 0, learned: np.ndarray | None = None) -> Encoded:
    """Words, and here and there a special token, as documents that were tokenized elsewhere may
    hold them."""
    random = np.random.default_rng(seed)
    ids = random.integers(104, 30522, length).astype(np.int32)
    ids[random.random(length) < 0.1] = 100
    return Encoded(ids, learned, 0, 0)


def assert_masked(inputs: np.ndarray, labels: np.ndarray, whole: np.ndarray) -> None:
    """Where a label is, [MASK] stands and the label is what stood there; everywhere else all is as
    it was; special tokens stay. It asks nothing of where labels are, so that it holds for anybody's
    masking."""
    hidden = labels != IGNORE_INDEX
    assert inputs.shape == labels.shape == whole.shape and hidden.any()
    assert (inputs[hidden] == HIDDEN).all() and np.array_equal(labels[hidden], whole[hidden])
    assert (
        np.array_equal(inputs[~hidden], whole[~hidden])
        and not np.isin(labels[hidden], SPECIAL).any()
    )


# what is hidden -----------------------------------------------------------------------------------


def test_hidden_tokens_become_mask_and_all_others_stay() -> None:
    """In documents that hold special tokens, [CLS] before and [SEP] behind."""
    for number in range(50):
        given = document(80, number)
        inputs, labels = masked()(given, number)
        assert_masked(inputs, labels, np.array([BEGIN, *given.ids, END]))
        assert inputs.dtype == labels.dtype == np.int32


def test_the_published_collator_keeps_the_same_promises() -> None:
    """The golden example of NeoBERT's own masking: what is asked of ours holds for theirs."""
    io = load_file(Path(__file__).parent.parent / "golden" / "neobert" / "io.safetensors")
    whole, special = io["mlm_in"], io["mlm_special"].astype(bool)
    assert_masked(io["mlm_masked_seed99"], io["mlm_labels_seed99"], whole)
    assert np.array_equal(np.isin(whole, SPECIAL), special), "what it calls special is what we do"
    ours = [
        masked()(Encoded(row[1:-1].astype(np.int32), None, 0, 0), i) for i, row in enumerate(whole)
    ]
    inputs, labels = (np.stack(each) for each in zip(*ours))
    assert_masked(inputs, labels, whole)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_the_share_of_hidden_tokens_is_the_one_asked_for(fraction: float) -> None:
    """Each token is hidden with that probability, on its own: mean and variance are a binomial's;
    every place is hidden alike."""
    length, count = 100, 4000
    given = Encoded(np.arange(200, 200 + length, dtype=np.int32), None, 0, 0)
    hidden = np.stack(
        [masked(fraction)(given, number)[1][1:-1] != IGNORE_INDEX for number in range(count)]
    )
    variance = fraction * (1 - fraction)
    assert abs(hidden.mean() - fraction) < 4 * (variance / hidden.size) ** 0.5
    assert np.abs(hidden.mean(axis=0) - fraction).max() < 5 * (variance / count) ** 0.5
    assert hidden.sum(axis=1).var() == pytest.approx(length * variance, rel=0.15)


def test_a_mask_follows_from_seed_and_number_alone() -> None:
    given = document(200)
    first = masked()(given, 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, masked()(given, 7)))
    for other in (masked()(given, 8), masked(seed=43)(given, 7), masked(0.3)(given, 7)):
        assert not np.array_equal(first[1], other[1])


def test_only_what_is_learned_of_a_document_is_hidden() -> None:
    learned = np.arange(400) % 3 == 0
    given = document(400, learned=learned)
    inputs, labels = masked(0.5)(given, 1)
    assert_masked(inputs, labels, np.array([BEGIN, *given.ids, END]))
    hidden = labels[1:-1] != IGNORE_INDEX
    assert not hidden[~learned].any() and 40 < hidden.sum() < 90
    _, labels = masked(0.5)(document(400, learned=np.zeros(400, dtype=bool)), 1)
    assert (labels == IGNORE_INDEX).all()


def test_an_empty_document_is_its_two_ends() -> None:
    inputs, labels = masked()(Encoded(np.empty(0, dtype=np.int32), None, 0, 0), 0)
    assert inputs.tolist() == [BEGIN, END] and labels.tolist() == [IGNORE_INDEX] * 2


# tokenizers ---------------------------------------------------------------------------------------


def made(kind: str) -> Tokenizer:
    settings = (
        TokenizerSettings(type="byte") if kind == "byte" else TokenizerSettings(vocab_size=400)
    )
    return build_tokenizer(settings, [story(i) for i in range(20)], (MASK,))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenizers_made_here_can_mask(kind: str) -> None:
    """[MASK] is a token that no text can write; it survives a checkpoint; documents stand between
    ends of document."""
    tokenizer = made(kind)
    mask_id = tokenizer.special_id(MASK)
    assert tokenizer.vocab_size == {"byte": 258, "bpe": 400}[kind] and tokenizer.special_ids == (
        tokenizer.eos_id,
        mask_id,
    )
    (ids,) = tokenizer.encode_batch([f"a {MASK} of text"])
    assert mask_id not in ids and tokenizer.decode(ids.tolist()) == f"a {MASK} of text"
    assert Tokenizer.from_state(tokenizer.state()).special_id(MASK) == mask_id
    inputs, labels = build_objective("masked_tokens", tokenizer, 0.5, 1)(
        Encoded(ids, None, 0, 0), 0
    )
    assert (inputs[0], inputs[-1]) == (tokenizer.eos_id, tokenizer.eos_id)
    assert np.array_equal(np.where(labels >= 0, labels, inputs)[1:-1], ids)
    assert 0 < (inputs == mask_id).sum() == (labels >= 0).sum() < len(ids)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenizers_made_without_need_of_a_mask_are_what_they_were(kind: str) -> None:
    """Other presets keep their vocabulary: 257 bytes, and a BPE whose first merge has the id it
    always had."""
    settings = (
        TokenizerSettings(type="byte") if kind == "byte" else TokenizerSettings(vocab_size=400)
    )
    tokenizer = build_tokenizer(settings, [story(i) for i in range(20)])
    assert tokenizer.special_id(MASK) is None and tokenizer.special_ids == (0,)
    assert tokenizer.vocab_size == {"byte": 257, "bpe": 400}[kind]


def write_wordpiece(folder: Path, mask: str = MASK) -> Path:
    """A tokenizer as BERT's: words of small letters, [CLS] before and [SEP] behind a text, which is
    what ends a document."""
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", mask]
    words = ["the", "river", "met", "a", "captain", "##s", ".", "[", "]", "mask"]
    backend = Backend(
        models.WordPiece({word: i for i, word in enumerate([*special, *words])}, unk_token="[UNK]")
    )
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "[SEP]", "mask_token": mask})
    )
    return folder / "tokenizer.json"


def test_a_bert_tokenizer_frames_documents_as_bert_does(tmp_path: Path) -> None:
    """[CLS] ids [SEP], once, whatever the file's own post-processor would add; unknown words are
    special, and stay."""
    write_wordpiece(tmp_path)
    tokenizer = build_tokenizer(
        TokenizerSettings(type="file", path="tokenizer.json"), [], root=tmp_path
    )
    (ids,) = tokenizer.encode_batch(["The river met captains QWERTY."])
    assert ids.tolist() == [5, 6, 7, 9, 10, 1, 11] and tokenizer.special_ids == (0, 1, 2, 3, 4)
    found = build_objective("masked_tokens", tokenizer, 0.9, 1)
    assert isinstance(found, MaskedTokens) and (found.begin_id, found.end_id, found.mask_id) == (
        2,
        3,
        4,
    )
    for number in range(30):
        inputs, labels = found(Encoded(ids, None, 0, 0), number)
        assert np.where(labels >= 0, labels, inputs).tolist() == [2, *ids.tolist(), 3]
        assert labels[6] == IGNORE_INDEX and inputs[6] == 1
    assert 4 not in tokenizer.encode_batch(["the [MASK] river"])[0]


def test_a_tokenizer_without_a_mask_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_wordpiece(tmp_path, mask="[HOLE]")
    tokenizer = build_tokenizer(
        TokenizerSettings(type="file", path="tokenizer.json"), [], root=tmp_path
    )
    with pytest.raises(UserError, match=r'no \[MASK\] among its special tokens.*"type": "bpe"'):
        build_objective("masked_tokens", tokenizer, 0.2, 1)
    assert (
        build_objective("next_token", tokenizer, 0.2, 1)(document(5), 0)[0][0] == tokenizer.eos_id
    )


# one token hidden at a time -----------------------------------------------------------------------


def held_out(
    folder: Path, sizes: dict[str, int], seq_length: int = 32, low: int = 20, high: int = 200
) -> list[Row]:
    tokenizer = byte_tokenizer(masks=True)
    factory = make_factory(
        folder,
        write_corpus(folder, sizes, low, high),
        hold_out=HoldOut(0.9999999),
        mask_fraction=0.2,
    )
    objective = build_objective("masked_tokens", tokenizer, 0.2, 5)
    return validation_rows(
        factory.sources, factory.hold_out, tokenizer, objective, seq_length, 10**9, 1
    )


def test_each_row_hides_one_token_and_every_token_has_its_turn(tmp_path: Path) -> None:
    """Of few rows all tokens, in order, but special ones and padding; the rest of the row is the
    text as it was."""
    tokenizer = byte_tokenizer(masks=True)
    # a token that may well be masked stands for padding: what pads is no token, whatever it looks
    # like
    rows = [
        replace(row, input_ids=np.where(row.source_ids < 0, 70, row.input_ids))
        for row in held_out(tmp_path, {"a": 4})
    ]
    assert 5 <= len(rows) <= PSEUDO_TOKENS / 32 and any((row.source_ids < 0).any() for row in rows)
    found = iter(hide_one(rows, tokenizer))
    for row in rows:
        whole = np.where(row.labels >= 0, row.labels, row.input_ids)
        for t in np.flatnonzero((row.source_ids >= 0) & (whole != tokenizer.eos_id)):
            one = next(found)
            assert (
                np.flatnonzero(one.labels != IGNORE_INDEX).tolist()
                == [t]
                == np.flatnonzero(one.input_ids != whole).tolist()
            )
            assert one.labels[t] == whole[t] and one.input_ids[t] == tokenizer.special_id(MASK)
            for name in ("position_ids", "document_ids", "source_ids"):
                assert np.array_equal(getattr(one, name), getattr(row, name))
    assert next(found, None) is None


@pytest.mark.parametrize("count", [9, 12, 15, 17, 40, 300])
def test_hidden_tokens_come_from_all_over_and_are_at_most_so_many(
    count: int, tmp_path: Path
) -> None:
    """Rows of every source, when there are more than would do: sources lie one after another."""
    rows = held_out(tmp_path, {"a": 2 * count, "b": 2 * count}, PSEUDO_CONTEXT, low=300, high=400)
    half = len(rows) // 2
    rows = rows[half - count // 2 :][:count]
    assert len(rows) == count and {int(row.source_ids[0]) for row in rows} == {0, 1}
    found = hide_one(rows, byte_tokenizer(masks=True))
    assert PSEUDO_TOKENS / 3 < len(found) <= PSEUDO_TOKENS
    by_source = [sum(int(row.source_ids[0]) == source for row in found) for source in (0, 1)]
    assert min(by_source) > 0.3 * len(found), by_source


def test_rows_are_as_long_as_the_context_at_most(tmp_path: Path) -> None:
    found = hide_one(held_out(tmp_path, {"a": 40}, 4 * PSEUDO_CONTEXT), byte_tokenizer(masks=True))
    sizes = {
        len(getattr(row, name))
        for row in found
        for name in ("input_ids", "labels", "document_ids", "source_ids")
    }
    assert sizes == {PSEUDO_CONTEXT}


# in the pipeline ----------------------------------------------------------------------------------


def maker(folder: Path, **changes: Any) -> Callable[[int], PipelineFactory]:
    sections = write_corpus(folder, SIZES)
    return lambda number: make_factory(
        folder, sections, "weighted", **{"mask_fraction": 0.3, **changes}
    )


@pytest.mark.parametrize("packing", ["documents", "best_fit", "padding"])
def test_resuming_anywhere_masks_the_same_tokens(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at any step, with another number of ranks each time, over more than one epoch: the same
    rows, masks included, and all of every document."""
    monkeypatch.setattr(pipeline, "SNAPSHOT_EVERY", 5)
    make = maker(tmp_path, packing=packing)
    straight = history(make, [Stretch(60)])
    check_accounts(straight, make(0))
    assert (
        max(straight.epochs) > 1
        and sum((row.labels >= 0).sum() for row in straight.rows.values()) > 1000
    )
    assert (
        history(
            make,
            [
                Stretch(1),
                Stretch(7, ranks=2),
                Stretch(11, ranks=3),
                Stretch(2),
                Stretch(39, ranks=2),
            ],
        )
        == straight
    )


@pytest.mark.slow
def test_workers_mask_the_same_tokens(tmp_path: Path) -> None:
    make = maker(tmp_path)
    assert history(
        make, [Stretch(9, workers=2), Stretch(8, ranks=2, workers=1), Stretch(13)]
    ) == history(make, [Stretch(30)])


def hidden_of(rows: dict[int, Row]) -> dict[int, dict[int, list[int]]]:
    """{document: {draw: places of it that are hidden}}"""
    found: dict[int, dict[int, list[int]]] = {}
    for row in rows.values():
        at = 0
        for segment in row.segments:
            places = np.flatnonzero(row.labels[at : at + segment.length] >= 0) + segment.start
            found.setdefault(segment.digest, {}).setdefault(segment.draw, []).extend(
                places.tolist()
            )
            at += segment.length
    return found


def test_another_epoch_hides_other_tokens(tmp_path: Path) -> None:
    """Every document is met again with another mask: what is learned of it is not one fifth for
    ever."""
    found = hidden_of(history(maker(tmp_path, max_epochs=3), [Stretch(None)]).rows)
    assert len(found) > 40
    for draws in found.values():
        places = [tuple(sorted(each)) for each in draws.values()]
        assert len(places) == 3 and len(set(places)) == 3
        assert len(set().union(*places)) > max(map(len, places))


def test_another_seed_hides_other_tokens(tmp_path: Path) -> None:
    """Of one source and one lane, which are read in the same order whatever the seed: the same
    text, and other blanks."""
    sections, found = write_corpus(tmp_path, {"a": 20}), []
    for seed in (1, 2, 1):
        factory = make_factory(tmp_path, sections, lanes=1, mask_fraction=0.3)
        factory.settings = replace(factory.settings, mix=replace(factory.settings.mix, seed=seed))
        found.append(
            list(
                history(
                    lambda number, factory=factory: factory, [Stretch(20, rows=1)]
                ).rows.values()
            )
        )
    labels = [np.stack([row.labels for row in rows]) for rows in found]
    texts = [
        np.where(of >= 0, of, np.stack([row.input_ids for row in rows]))
        for of, rows in zip(labels, found)
    ]
    assert np.array_equal(texts[0], texts[1]) and not np.array_equal(labels[0], labels[1])
    assert np.array_equal(labels[0], labels[2])


# fingerprints -------------------------------------------------------------------------------------


def test_next_token_runs_keep_the_fingerprint_they_had(tmp_path: Path) -> None:
    """Or every checkpoint from before there were masked tokens would begin its mix anew."""
    factory = make_factory(tmp_path, write_corpus(tmp_path, SIZES), "weighted")
    before = [
        each for each in fields(PipelineSettings) if each.name not in ("objective", "mask_fraction")
    ]
    assert [each.name for each in before] == [
        "mix",
        "lanes",
        "seq_length",
        "packing",
        "min_text_length",
    ]
    old = make_dataclass(
        "PipelineSettings", [(each.name, each.type) for each in before], frozen=True
    )
    mix = replace(factory.settings.mix, rates=(), horizon_tokens=0)
    described = [
        repr(old(mix, *(getattr(factory.settings, each.name) for each in before[1:]))),
        [section.model_dump(mode="json") for section in factory.sections],
        factory.hold_out.fraction,
        factory.shuffle,
        hashlib.sha256(factory.tokenizer_state["json"].encode()).hexdigest(),
    ]
    assert factory.fingerprint() == hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    factory.settings = replace(factory.settings, mask_fraction=0.7)
    assert (
        factory.fingerprint() == make_factory(tmp_path, factory.sections, "weighted").fingerprint()
    )


def test_what_is_masked_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    sections = write_corpus(tmp_path, SIZES)
    factories = [
        make_factory(tmp_path, sections, mask_fraction=fraction) for fraction in (0.2, 0.2, 0.3)
    ]
    same, again, other = (factory.fingerprint() for factory in factories)
    factories[0].settings = replace(factories[0].settings, objective="next_token")
    assert same == again and len({same, other, factories[0].fingerprint()}) == 3


def test_next_token_predicts_each_token_from_those_before_it() -> None:
    given = Encoded(np.array([5, 6, 7], dtype=np.int32), None, 0, 0)
    inputs, labels = next_token(given, 0)
    assert (inputs.tolist(), labels.tolist()) == ([0, 5, 6, 7], [5, 6, 7, 0])
    given = replace(given, learned=np.array([False, True, False]))
    assert next_token(given, 0)[1].tolist() == [IGNORE_INDEX, 6, IGNORE_INDEX, IGNORE_INDEX]
