"""The order of the data is a function of seed and position alone: any number of ranks and workers,
any interruption.

Everything here reads real files through the real sources; ranks are threads, workers are processes.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data import pipeline
from core.data.documents import Document
from core.data.loader import Loader
from core.data.mixing import Mixer, MixSettings
from core.data.pipeline import share_of_lanes
from core.data.position import Position, resumed_position
from core.data.validation import HoldOut
from tests.data.corpus import (
    FINGERPRINT,
    LANES,
    as_array,
    byte_tokenizer,
    make_factory,
    make_loader,
    merged,
    resumed,
    same,
    start,
    steps,
    texts_of,
    write_corpus,
)
from tests.data.ranks import Ranks

STRATEGIES = ["round_robin", "sequential", "weighted"]
PACKINGS = ["documents", "padding"]
SIZES = {"a": 31, "b": 17, "c": 8}


def read_all(loader: Loader, count: int | None) -> list[np.ndarray]:
    try:
        return steps(loader, count)
    finally:
        loader.close()


def text_lines(folder: Path, name: str) -> list[str]:
    """The documents of a corpus, as written."""

    return [
        json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]


# ranks and workers --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_the_same_for_any_number_of_ranks(
    strategy: str, packing: str, tmp_path: Path
) -> None:
    """One rank, two, three: the same batches once put together, over more than two epochs of the
    smallest source."""
    sections = write_corpus(tmp_path, SIZES)
    one = read_all(make_loader(make_factory(tmp_path, sections, strategy, packing), start()), 40)
    for world_size in (2, 3):

        def job(parallel: object) -> list[np.ndarray]:
            factory = make_factory(tmp_path, sections, strategy, packing)
            return read_all(make_loader(factory, start(), parallel=parallel), 40)

        assert same(merged(Ranks(world_size).run(job)), one)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_the_same_for_any_number_of_workers(workers: int, tmp_path: Path) -> None:
    """Worker processes share the lanes out and change nothing; neither does going on with another
    number of them."""
    sections = write_corpus(tmp_path, SIZES)
    factory = make_factory(tmp_path, sections, "weighted")
    threaded = read_all(make_loader(factory, start()), 60)
    loader = make_loader(factory, start(), workers=workers)
    found = steps(loader, 25)
    state = loader.state()
    loader.close()
    assert same(found, threaded[:25])
    other = make_loader(factory, resumed(state, factory), workers=1 if workers == 3 else 0)
    assert same(read_all(other, 35), threaded[25:])


def test_what_one_rank_alone_meets_reaches_rank_0(tmp_path: Path) -> None:
    """The log is there. A file that several could not read is told once."""
    factory, shared = (
        make_factory(tmp_path, write_corpus(tmp_path, {"a": 30})),
        ("a", "f1", "no text"),
    )

    def job(parallel: Any) -> tuple:
        loader = make_loader(factory, start(), parallel=parallel)
        loader.warnings = ["a worker died"] if parallel.rank == 1 else []
        loader.skipped = [{shared: True}, {shared: False, ("a", "f2", "no text"): False}, {}][
            parallel.rank
        ]
        before = loader.has_unreported
        loader.gather_warnings()
        loader.close()
        return before, loader.has_unreported, loader.warnings, loader.skipped

    first, second, third = Ranks(3).run(job)
    assert first == (
        False,
        False,
        ["process 1: a worker died"],
        {shared: True, ("a", "f2", "no text"): False},
    )
    assert second[:3] == (True, False, []) and third[:3] == (False, False, [])


def test_no_document_is_on_two_ranks(tmp_path: Path) -> None:
    """The lanes of the ranks are disjoint, and so are their documents."""
    sections = write_corpus(tmp_path, {"a": 300, "b": 200})
    for world_size in (2, 3):
        seen = []
        for rank in range(world_size):
            lanes = share_of_lanes(LANES, world_size, rank)
            rows = iter(make_factory(tmp_path, sections)(start(), lanes))
            seen.append({segment.draw for _ in range(60) for segment in next(rows).segments})
        assert all(len(documents) > 12 for documents in seen)
        assert not set.intersection(*seen) and len(set.union(*seen)) == sum(map(len, seen))


def test_rows_of_all_lanes_come_in_turn(tmp_path: Path) -> None:
    """Row n is of lane n mod L, whatever the lengths of the documents; a reader of some lanes has
    exactly those rows."""
    sections = write_corpus(tmp_path, SIZES)
    factory = make_factory(tmp_path, sections)
    everything = iter(factory(start(), list(range(LANES))))
    rows = [next(everything) for _ in range(60)]
    assert [row.lane for row in rows] == [n % LANES for n in range(60)]
    some = iter(factory(start(), [1, 4]))
    for row in [row for row in rows if row.lane in (1, 4)]:
        assert np.array_equal(as_array(next(some)), as_array(row))


# interruptions ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resuming_anywhere_equals_not_stopping(
    strategy: str, packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at random steps, by way of JSON, over several epochs: the batches are the
    uninterrupted run's."""
    sections = write_corpus(tmp_path, SIZES)
    straight = read_all(
        make_loader(make_factory(tmp_path, sections, strategy, packing), start()), 120
    )
    points = random.Random(f"{strategy} {packing}")
    for snapshot_every in (3, 20, 256):
        monkeypatch.setattr(pipeline, "SNAPSHOT_EVERY", snapshot_every)
        position, done = start(), 0
        while done < len(straight):
            factory = make_factory(tmp_path, sections, strategy, packing)
            loader = make_loader(factory, position)
            count = min(points.choice([0, 1, 2, points.randint(3, 40)]), len(straight) - done)
            assert same(steps(loader, count), straight[done : done + count]), f"after {done} steps"
            done += count
            position = resumed(loader.state(), factory)
            loader.close()


def test_a_step_may_be_smaller_or_larger_than_the_lanes(tmp_path: Path) -> None:
    """Rows of a step need not be a multiple of the lanes; stopping in the middle of a round of
    lanes loses nothing."""
    sections = write_corpus(tmp_path, SIZES)
    whole = np.concatenate(
        read_all(make_loader(make_factory(tmp_path, sections), start(), rows=LANES), 40)
    )
    for rows in (1, 4, 7, 16):
        position, found = start(), []
        for count in (3, 1, 5):
            factory = make_factory(tmp_path, sections)
            loader = make_loader(factory, position, rows=rows)
            found += steps(loader, count)
            position = resumed(loader.state(), factory)
            loader.close()
        assert np.array_equal(np.concatenate(found), whole[: 9 * rows])


def test_a_long_run_reads_little_again(tmp_path: Path) -> None:
    """The saved snapshot follows behind: a resume reads at most some hundreds of documents twice,
    not the whole epoch."""
    sections = write_corpus(tmp_path, {"a": 3000}, low=5, high=20)
    loader = make_loader(make_factory(tmp_path, sections), start())
    steps(loader, 300)
    state = loader.state()
    loader.close()
    reached = min(after[0] for after in state["lanes"].values())
    assert (
        reached > 1000 and 0 <= reached - state["snapshot"]["index"] <= 2 * pipeline.SNAPSHOT_EVERY
    )


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_number_of_ranks_may_change_at_every_resume(packing: str, tmp_path: Path) -> None:
    """1, 2, 3, 2, 2, 1 ranks in turn, each going on from the state merged over all ranks: one
    uninterrupted order."""
    sections = write_corpus(tmp_path, SIZES)
    straight = read_all(
        make_loader(make_factory(tmp_path, sections, "weighted", packing), start()), 70
    )
    state, done = None, 0
    for world_size, count in ((1, 9), (2, 11), (3, 7), (2, 13), (2, 17), (1, 13)):

        def job(
            parallel: object, count: int = count, state: dict | None = state
        ) -> tuple[list[np.ndarray], dict]:
            factory = make_factory(tmp_path, sections, "weighted", packing)
            position = resumed(state, factory) if state is not None else start()
            loader = make_loader(factory, position, parallel=parallel)
            found = steps(loader, count)
            saved = loader.state()
            loader.close()
            return found, saved

        ranks = Ranks(world_size).run(job)
        assert same(merged([found for found, _ in ranks]), straight[done : done + count]), (
            f"{world_size} ranks, {done} steps"
        )
        assert all(saved == ranks[0][1] for _, saved in ranks), (
            "every rank must see the same merged state"
        )
        state, done = ranks[0][1], done + count


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_changed_data_section_trains_on_nothing_twice(
    strategy: str, packing: str, tmp_path: Path
) -> None:
    """Stopped in the first epochs and late in the last, changed, and stopped and changed once more:
    no document more often than max_epochs says, and what is left out is no more than the lanes held
    waiting."""
    sizes = {"a": 400, "b": 60, "c": 8}
    sections = write_corpus(tmp_path, sizes, low=20, high=60)
    contents = dict.fromkeys(sizes, "")
    for cuts, epochs in (((20, 9), 1), ((70, 40), 2), ((150, 1), 2)):
        position, found, lost = start(), [], 0
        for count in (*cuts, None):
            loader = make_loader(
                make_factory(tmp_path, sections, strategy, packing, max_epochs=epochs), position
            )
            loader._facts.contents = contents
            found += texts_of(steps(loader, count))
            state = json.loads(json.dumps(loader.state()))
            loader.close()
            used = [place[0] for place in state["lanes"].values()]
            lost += max(used) - min(used) + LANES if count else 0
            position, notes = resumed_position(state, "another", contents, epochs)
            assert count is None or "goes on where it was" in notes[0]
        read = Counter(found)
        assert max(read.values()) <= epochs, read.most_common(3)
        hold_out = HoldOut(0.05)
        every = [
            t
            for name in sizes
            for t in text_lines(tmp_path, name)
            if not hold_out.holds(Document(t, ""))
        ]
        assert sum(epochs - read[text] for text in every) <= lost < len(every) / 2


def test_a_file_that_changed_is_read_again_no_more_often_than_told(tmp_path: Path) -> None:
    """Its next epoch is the one after those begun, not after that of the last snapshot; after the
    last, it ends."""
    sections = write_corpus(tmp_path, {"a": 90, "b": 20}, low=20, high=60)
    for epochs, again in ((2, 0), (3, 1)):
        factory = make_factory(tmp_path, sections, max_epochs=epochs)
        loader = make_loader(factory, start())
        loader._facts.contents = {"a": "", "b": ""}
        begun = Counter(text for text in texts_of(steps(loader, 14)) if text.startswith("b "))
        state = json.loads(json.dumps(loader.state()))
        loader.close()
        # the snapshot is behind
        assert state["snapshot"]["cursors"]["b"].get("epoch", 0) == 0 and max(begun.values()) >= 2
        position, notes = resumed_position(state, FINGERPRINT, {"a": "", "b": "new"}, epochs)
        loader = make_loader(make_factory(tmp_path, sections, max_epochs=epochs), position)
        after = Counter(text for text in texts_of(steps(loader)) if text.startswith("b "))
        loader.close()
        assert ("b begins again, with all its files" in notes[0]) == bool(again), notes
        assert ("of b nothing more is read, as train.max_epochs is 2" in notes[0]) != bool(again), (
            notes
        )
        most = max((begun + after).values())
        assert most <= epochs and (most == epochs or not again)


# epochs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [1, 4, LANES, 16])
def test_max_epochs_reads_everything_so_many_times(
    strategy: str, packing: str, rows: int, tmp_path: Path
) -> None:
    """The data ends by itself, on every rank at once, and not before the longest lane is empty:
    nothing is left unread."""
    sections = write_corpus(tmp_path, SIZES)
    (tmp_path / "a.jsonl").open("a").write(
        '{"text": "a the last one is long ' + "y" * 3000 + '"}\n'
    )
    factory = make_factory(
        tmp_path, sections, strategy, packing, max_epochs=2, hold_out=HoldOut(0.0)
    )
    found = texts_of(read_all(make_loader(factory, start(), rows=rows), None))
    assert Counter(found) == Counter(
        2 * [text for name in SIZES for text in text_lines(tmp_path, name)]
    )


def test_epochs_come_in_another_order() -> None:
    """Seeded, so that it is the same order on every machine."""
    from core.data.sources.text import PythonStdlibSettings, PythonStdlibSource

    source = PythonStdlibSource(PythonStdlibSettings(), Path("."), 1)
    orders = [[unit.label for unit in source.order(epoch)] for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


# mixing -------------------------------------------------------------------------------------------


def draws(
    folder: Path,
    sizes: dict[str, int],
    settings: MixSettings,
    count: int,
    drops: dict | None = None,
) -> list[int]:
    sources = make_factory(folder, write_corpus(folder, sizes)).sources
    mixer = Mixer(sources, settings, lambda document: True, Position(drops=drops or {}))
    return [draw.source for draw, _ in zip(mixer, range(count))]


def test_round_robin_takes_one_from_each_in_turn(tmp_path: Path) -> None:
    assert (
        draws(tmp_path, {"a": 5, "b": 5, "c": 5}, MixSettings("round_robin", (1, 1, 1), 1), 9)
        == [0, 1, 2] * 3
    )


def test_sequential_reads_each_to_its_end_and_starts_again(tmp_path: Path) -> None:
    found = draws(tmp_path, {"a": 3, "b": 2}, MixSettings("sequential", (1, 1), 1), 12)
    assert found == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0]


def test_weighted_draws_come_in_the_given_shares(tmp_path: Path) -> None:
    """Shares of the documents drawn; a weight of 0 is never drawn; they are renormalised when a
    source is gone."""
    settings = MixSettings("weighted", (3.0, 1.0, 0.0), 7)
    found = draws(tmp_path, {"a": 50, "b": 50, "c": 50}, settings, 4000)
    counts = Counter(found)
    assert counts[2] == 0 and counts[0] / 4000 == pytest.approx(0.75, abs=0.03)
    assert found == draws(tmp_path / "again", {"a": 50, "b": 50, "c": 50}, settings, 4000)
    assert found != draws(
        tmp_path / "other",
        {"a": 50, "b": 50, "c": 50},
        MixSettings("weighted", (3.0, 1.0, 0.0), 8),
        4000,
    )
    dropped = draws(tmp_path / "dropped", {"a": 50, "b": 50, "c": 50}, settings, 300, {"a": 100})
    assert dropped[:100] == found[:100] and set(dropped[100:]) == {1}


def test_an_ended_source_leaves_its_turns_to_the_others(tmp_path: Path) -> None:
    """Under max_epochs: nobody waits for it, nothing is drawn twice."""
    found = draws(
        tmp_path, {"a": 2, "b": 6}, MixSettings("round_robin", (1, 1), 1, max_epochs=1), 100
    )
    assert Counter(found) == {0: 2, 1: 6}


def test_the_byte_tokenizer_of_these_tests_keeps_text_as_it_is() -> None:
    """texts_of reads rows back; it could not tell a lost character otherwise."""
    tokenizer = byte_tokenizer()
    text = "a 1: xé<|endoftext|>."
    assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text
