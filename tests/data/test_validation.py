"""Which documents are held out, and what an evaluation reads of them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.data import validation
from core.data.documents import Document, digest_of, held_out_by_hash
from core.data.sources.text import TextSettings
from core.data.validation import SMALL_CORPUS, HoldOut, plan_hold_out, shortfall, validation_rows
from tests.data.corpus import (
    NEXT_TOKEN,
    SEQ_LENGTH,
    as_array,
    make_factory,
    make_loader,
    start,
    texts_of,
    write_corpus,
)
from tests.data.test_pipeline import read_all, text_lines


def test_held_out_documents_never_appear_in_training_rows(tmp_path: Path) -> None:
    """By hash: no document is in both, none is in neither."""
    sections = write_corpus(tmp_path, {"a": 400, "b": 350})
    factory = make_factory(tmp_path, sections, max_epochs=2, hold_out=HoldOut(0.1))
    trained = texts_of(read_all(make_loader(factory, start()), None))
    rows = validation_rows(
        factory.sources, factory.hold_out, factory.tokenizer, NEXT_TOKEN, SEQ_LENGTH, 10**9, 1
    )
    held = texts_of([np.stack([as_array(row)]) for row in rows], lanes=1)
    everything = text_lines(tmp_path, "a") + text_lines(tmp_path, "b")
    assert (
        set(held)
        == {text for text in everything if held_out_by_hash(digest_of(text.encode()), 0.1)}
        and len(held) > 40
    )
    assert Counter(trained) == Counter(2 * [text for text in everything if text not in set(held)])


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.4])
@pytest.mark.parametrize("count", [2, 3, 12, 72, 290, 310])
def test_a_small_corpus_holds_out_the_fraction_asked(
    count: int, fraction: float, tmp_path: Path
) -> None:
    """Of its different texts, neither more nor fewer than is said; at least one. No size at which
    that jumps."""
    factory = make_factory(tmp_path, write_corpus(tmp_path, {"a": count}))
    plan = plan_hold_out(factory.sources, fraction, 1)
    held = [text for text in text_lines(tmp_path, "a") if plan.holds(Document(text, ""))]
    assert len(held) == min(max(1, round(fraction * count)), count - 1)
    assert plan.notes == [f"a holds out {len(held)} of its {count} texts for validation"]
    if count == 72 and fraction == 0.1:
        factory = make_factory(tmp_path, factory.sections, max_epochs=1, hold_out=plan)
        trained = texts_of(read_all(make_loader(factory, start()), None))
        assert Counter(trained) == Counter(text_lines(tmp_path, "a")) - Counter(held)
        rows = validation_rows(
            factory.sources, plan, factory.tokenizer, NEXT_TOKEN, SEQ_LENGTH, 10**9, 1
        )
        assert sorted(texts_of([np.stack([as_array(row)]) for row in rows], lanes=1)) == sorted(
            held
        )


def test_beyond_a_small_corpus_the_hash_decides(tmp_path: Path) -> None:
    """About as many as of one that is a little smaller."""
    found = {}
    for count in (SMALL_CORPUS - 10, SMALL_CORPUS + 10):
        factory = make_factory(
            tmp_path / str(count), write_corpus(tmp_path / str(count), {"a": count}, 20, 40)
        )
        plan = plan_hold_out(factory.sources, 0.05, 1)
        found[count] = sum(
            plan.holds(Document(text, "")) for text in text_lines(tmp_path / str(count), "a")
        )
        assert bool(plan.notes) == (count < SMALL_CORPUS) == bool(plan.held)
    assert found[SMALL_CORPUS - 10] == 50 and 30 < found[SMALL_CORPUS + 10] < 70


@pytest.mark.parametrize(
    "texts", [["one"], ["one"] * 100, ["one"] * 99 + ["two"], ["one", "two"] * 30, ["one"] * 700]
)
def test_copies_of_a_text_count_once_and_not_all_is_held_out(
    texts: list[str], tmp_path: Path
) -> None:
    """100 equal rows are how everybody looks whether a model can overfit: holding them out would
    leave nothing to learn from."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    factory = make_factory(tmp_path, [TextSettings(path="a.jsonl", name="a")])
    for fraction in (0.01, 0.499999):  # "one" is below the second
        plan = plan_hold_out(factory.sources, fraction, 1)
        held = {text for text in texts if plan.holds(Document(text, ""))}
        assert len(held) == len(set(texts)) - 1
        assert held <= {"two"} or texts.count("one") == texts.count("two")
        copies = f" ({len(texts)} documents)" if len(texts) > 1 else ""
        assert plan.notes == [
            f"a holds out 1 of its 2 texts{copies} for validation"
            if held
            else f"a has only one text{copies}: nothing of it can be held out for validation"
        ]


def test_sources_that_share_texts_are_never_held_out_whole(tmp_path: Path) -> None:
    """Two of them, one of which is a part of the other, and one that holds nothing but what another
    needs."""
    sections = write_corpus(tmp_path, {"a": 100})
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    by_hash = sorted(range(100), key=lambda i: digest_of(json.loads(lines[i])["text"].encode()))
    for name, numbers in (("b", by_hash[:1]), ("c", by_hash[1:3]), ("d", by_hash[:10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[i] for i in numbers))
        sections.append(TextSettings(path=f"{name}.jsonl", name=name))
    sources = make_factory(tmp_path, sections).sources
    for order in (sources, sources[::-1]):
        plan = plan_hold_out(order, 0.05, 1)
        held = {
            name: sum(plan.holds(Document(text, "")) for text in text_lines(tmp_path, name))
            for name in "abcd"
        }
        assert held["b"] == 0 and held["c"] == 1 and 1 <= held["d"] <= 5 and held["a"] == 5


def test_a_text_is_held_out_of_every_source_or_of_none(tmp_path: Path) -> None:
    """What a small source holds out is not trained on from a large one either, and what it needs is
    trained on from both."""
    sections = write_corpus(tmp_path, {"small": 40, "large": SMALL_CORPUS + 60}, 20, 40)
    small, large = text_lines(tmp_path, "small"), text_lines(tmp_path, "large")
    by_hash = [text for text in large if held_out_by_hash(digest_of(text.encode()), 0.05)]
    with (tmp_path / "large.jsonl").open("a") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in small)
    (tmp_path / "small.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*by_hash[:4], *small])
    )
    plan = plan_hold_out(make_factory(tmp_path, sections).sources, 0.05, 1)
    trained = set(
        texts_of(
            read_all(
                make_loader(make_factory(tmp_path, sections, max_epochs=1, hold_out=plan), start()),
                None,
            )
        )
    )
    held = {text for text in {*small, *large} if plan.holds(Document(text, ""))}
    assert len(held & {*by_hash[:4], *small}) == len(plan.held["small"]) == 2 and not trained & held
    assert trained == {*small, *large} - held and set(by_hash[4:]) <= held


def test_what_was_held_out_stays_so_when_files_are_added(tmp_path: Path) -> None:
    """Otherwise an evaluation would meet documents that were trained on before. Of what is added
    the hash decides."""
    write_corpus(tmp_path, {"a": 60})
    section = TextSettings(path="*.jsonl", name="a")
    before = plan_hold_out(make_factory(tmp_path, [section]).sources, 0.05, 1)
    trained = {text for text in text_lines(tmp_path, "a") if not before.holds(Document(text, ""))}
    saved = json.loads(json.dumps(before.state()))
    for name, count in (("b", 100), ("c", SMALL_CORPUS)):  # then it is small no more
        write_corpus(tmp_path, {name: count}, 20, 40)
        after = plan_hold_out(make_factory(tmp_path, [section]).sources, 0.05, 1, saved)
        assert after.held == before.held and len(after.held["a"]) == 3
        assert not any(after.holds(Document(text, "")) for text in trained)
        new = [text for text in text_lines(tmp_path, name) if after.holds(Document(text, ""))]
        assert (
            new
            == [
                text
                for text in text_lines(tmp_path, name)
                if held_out_by_hash(digest_of(text.encode()), 0.05)
            ]
            != []
        )
        saved = json.loads(json.dumps(after.state()))
    for name in "ac":
        # and when nothing of it is left, it is what was held out before of the rest
        (tmp_path / f"{name}.jsonl").unlink()
    left = plan_hold_out(make_factory(tmp_path, [section]).sources, 0.05, 1, saved)
    texts = [Document(text, "") for text in text_lines(tmp_path, "b")]
    assert [left.holds(text) for text in texts] == [after.holds(text) for text in texts] and any(
        map(left.holds, texts)
    )


def test_what_was_trained_on_is_never_held_out_later(tmp_path: Path) -> None:
    """A larger validation_fraction, new sources with copies, a source of which every held-out text
    was taken away."""

    def files(contents: dict[str, list[str]]) -> list:
        for name, texts in contents.items():
            (tmp_path / f"{name}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts)
            )
        return make_factory(
            tmp_path, [TextSettings(path=f"{name}.jsonl", name=name) for name in contents]
        ).sources

    def split(plan: HoldOut, texts: list[str]) -> tuple[set[str], set[str]]:
        held = {text for text in texts if plan.holds(Document(text, ""))}
        return held, set(texts) - held

    many, few = [f"many {i}" for i in range(SMALL_CORPUS + 400)], [f"few {i}" for i in range(60)]
    for known in ({"a": many}, {"a": few}, {"a": many, "b": few}):
        texts = [text for each in known.values() for text in each]
        state = json.loads(json.dumps((first := plan_hold_out(files(known), 0.01, 1)).state()))
        held, trained = split(first, texts)
        assert held
        for fraction, copies in (
            (0.2, {}),
            (0.01, {"new": few[:30]}),
            (0.2, {"new": [*many[:20], *few[:20]], "own": ["x", "y", "z"]}),
        ):
            plan = plan_hold_out(files(known | copies), fraction, 1, state)
            assert split(plan, texts) == (held, trained), (known.keys(), fraction, copies.keys())
            assert (fraction == 0.2) == any(
                "as before: the rest of 0.2 has been trained on" in note for note in plan.notes
            )
            assert (
                len(known) > 1
                or len(texts) > 60
                or "own" not in copies
                or len(plan.held["own"]) == 1
            )
            again = plan_hold_out(files(known), 0.2, 1, json.loads(json.dumps(plan.state())))
            assert split(again, texts) == (held, trained)
        left = {name: [text for text in each if text not in held] for name, each in known.items()}
        assert not split(plan_hold_out(files(left), 0.2, 1, state), texts)[0] & trained


def test_plans_of_older_checkpoints_stand(tmp_path: Path) -> None:
    """They held out the last twentieth of fewer than 300 documents, and whatever the hash said; of
    more, what the hash said."""
    sections = write_corpus(tmp_path, {"a": 60, "b": 400})
    a, b = text_lines(tmp_path, "a"), text_lines(tmp_path, "b")
    old = {"held": {"a": [digest_of(text.encode()) for text in a[57:]]}, "released": []}
    plan = plan_hold_out(make_factory(tmp_path, sections).sources, 0.05, 1, old)
    for texts, last in ((a, a[57:]), (b, [])):
        held = [text for text in texts if plan.holds(Document(text, ""))]
        assert (
            held
            == [
                text
                for text in texts
                if text in last or held_out_by_hash(digest_of(text.encode()), 0.05)
            ]
            != []
        )


def test_evaluation_finds_the_tokens_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many documents that takes, and from the other sources where one has too few; or it
    says how many there are."""
    factory = make_factory(
        tmp_path, write_corpus(tmp_path, {"few": 10, "many": 3000, "more": 2000})
    )
    plan = plan_hold_out(factory.sources, 0.01, 1)

    def found(tokens: int) -> tuple[int, list[int], str | None]:
        rows = validation_rows(
            factory.sources, plan, factory.tokenizer, NEXT_TOKEN, SEQ_LENGTH, tokens, 1
        )
        counts = [sum(int((row.source_ids == n).sum()) for row in rows) for n in range(3)]
        return sum(counts), counts, shortfall(rows, tokens)

    total, counts, told = found(3000)
    assert (
        3000 <= total < 3500
        and 0 < counts[0] < 250
        and abs(counts[1] - counts[2]) < 250
        and told is None
    )
    total, counts, told = found(1_000_000)
    assert (
        total < 10_000
        and told is not None
        and told.startswith(f"{total:,} tokens are evaluated, not the 1,000,000 of")
    )
    for source in factory.sources:
        source.finite = False
    # what is searched of a stream has an end
    monkeypatch.setattr(validation, "SCAN_STREAM", 20_000)
    fewer, _, told = found(1_000_000)
    assert 0 < fewer < total / 5 and told is not None


def test_the_hash_never_changes() -> None:
    """A changed hash would put trained documents into validation: these stay as they are for
    ever."""
    texts = [f"document number {i}" for i in range(2000)]
    held = [i for i, text in enumerate(texts) if held_out_by_hash(digest_of(text.encode()), 0.01)]
    assert held == HELD_AT_ONE_PERCENT
    assert set(held) < {
        i for i, text in enumerate(texts) if held_out_by_hash(digest_of(text.encode()), 0.05)
    }
    assert not any(held_out_by_hash(digest_of(text.encode()), 0.0) for text in texts)
    assert Document("\ud800 lone surrogate", "").digest > 0


HELD_AT_ONE_PERCENT = [
    144,
    163,
    219,
    314,
    376,
    446,
    482,
    563,
    588,
    652,
    801,
    979,
    1006,
    1124,
    1173,
    1176,
    1401,
    1413,
    1427,
    1483,
    1652,
]
