"""Dealing documents to lanes: no lane starves, and none piles up what it cannot use."""

from itertools import islice
from pathlib import Path

import pytest

from core.data import pipeline
from core.data.pipeline import Dealer
from core.data.validation import HoldOut
from tests.data.corpus import LANES, make_factory, start, write_corpus


def test_every_lane_gets_one_document_of_each_round() -> None:
    dealer = Dealer(5, seed=3)
    rounds = [[dealer.lane(5 * block + place) for place in range(5)] for block in range(40)]
    assert all(sorted(order) == list(range(5)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 20
    again = Dealer(5, seed=3)
    assert [again.lane(i) for i in (199, 3, 77)] == [rounds[39][4], rounds[0][3], rounds[15][2]]


@pytest.mark.parametrize("documents", [LANES, LANES * 2, LANES * 4])
def test_a_corpus_as_long_as_the_lanes_starves_none(tmp_path: Path, documents: int) -> None:
    """One held-out document at the same place of every epoch must not be the same lane's every
    time."""
    (section,) = write_corpus(tmp_path, {"a": documents})
    factory = make_factory(tmp_path, [section])
    held = next(iter(factory.sources[0].stream({}))).digest
    factory.hold_out = HoldOut(0.0, {"a": [held]})
    rows = list(islice(iter(factory(start(), list(range(LANES)))), LANES * 50))
    assert {row.lane for row in rows if (row.source_ids >= 0).all()} == set(range(LANES))


def test_sources_of_unlike_lengths_leave_no_pile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many sources as divide the lanes, each lane still sees all of them, so no lane lags
    ever further behind."""
    # what is read ahead waits too, and is not what is asked
    monkeypatch.setattr(pipeline, "READ_AHEAD", 32)
    sections = write_corpus(tmp_path / "long", {"long": 40}, low=1500, high=2500)
    sections += write_corpus(tmp_path / "long", {"short": 40}, low=20, high=40)
    factory = make_factory(tmp_path / "long", sections)
    reader = factory(start(), list(range(LANES)))
    rows = list(islice(iter(reader), LANES * 2000))
    for lane in range(LANES):
        assert {
            source for row in rows if row.lane == lane for source in row.source_ids.tolist()
        } == {0, 1}
    used = sum(int((row.source_ids >= 0).sum()) for row in rows)
    waiting = sum(packer._positions for packer in reader._packers.values())
    assert waiting < 0.25 * used, f"{waiting} positions wait, {used} were used"
