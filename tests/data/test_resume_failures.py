"""Resume ≡ no resume while sources fail: all ranks keep one order."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pytest

from core.data import pipeline
from core.data.documents import Document
from core.data.pipeline_factory import PipelineFactory
from core.data.position import Position
from core.errors import SourceUnavailable
from tests.data.corpus import (
    History,
    Recorder,
    Reweighting,
    Stretch,
    check_accounts,
    history,
    make_factory,
    write_corpus,
)
from tests.data.ranks import Fails
from tests.data.resume_setup import MOSTLY_SLOW, PACKINGS, STRATEGIES, mix_of

# sources that fail --------------------------------------------------------------------------------


def broken_run(
    tmp_path: Path,
    strategy: str,
    packing: str,
    wraps: Callable[[], Callable[[Any], Any]],
    seed: int = 1,
) -> tuple[History, PipelineFactory, set[int]]:
    """Two ranks of one lane each, which soon stand far apart, until b fails; "annealed" ones are
    adapted meanwhile, too.

    What they consumed, a factory of what they would have read, and the draws of b before its drop.
    """
    sections = write_corpus(tmp_path, {"b": 100, "a": 60, "c": 60}, low=5, high=900)

    def make(number: int, wrap: Callable[[Any], Any] = lambda source: source) -> PipelineFactory:
        mix = replace(mix_of(strategy, 3), seed=seed, horizon_tokens=40_000)
        if strategy == "weighted":
            mix = replace(mix, weights=(3.0, 1.0, 1.0))
        return make_factory(tmp_path, sections, packing=packing, mix=mix, lanes=2, wrap=wrap)

    plan = [Stretch(60, 2, rows=12), Stretch(20, 1, rows=12), Stretch(30, 2, rows=12)]
    recorder = Reweighting if strategy == "annealed" else Recorder
    found = history(lambda number: make(number, wraps()), plan, recorder=recorder)
    assert {name for name, _ in found.dropped} == {"b"} == set(found.state["drops"])
    drop, mixed = (
        found.state["drops"]["b"],
        make(0)(Position(drops=found.state["drops"], factors=found.factors), [])._mixer,
    )
    return found, make(0), {draw.index for draw in islice(mixed, drop) if draw.source == 0}


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failure_leaves_all_ranks_one_order(
    strategy: str, packing: str, tmp_path: Path, small: None
) -> None:
    """A document that no rank can read: all that could be is consumed, and the ranks go on in one
    order."""
    found, whole, _ = broken_run(
        tmp_path, strategy, packing, lambda: lambda s: Fails(s, 8) if s.name == "b" else s
    )
    check_accounts(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize("packing", MOSTLY_SLOW)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failure_on_one_rank_leaves_all_one_order(
    strategy: str, packing: str, tmp_path: Path, small: None
) -> None:
    """What the others have read and used of it meanwhile is lost to that rank, and nothing else is
    lost or read twice."""
    for rank in (0, 1):
        broken = chain([rank == 0, rank == 1], repeat(False))

        def wraps(broken: Iterator[bool] = broken) -> Callable[[Any], Any]:
            fails = next(broken)
            return lambda s: Fails(s, 8) if s.name == "b" and fails else s

        found, whole, before = broken_run(tmp_path / str(rank), strategy, packing, wraps)
        check_accounts(found, whole, before)


class Vanishes:
    """A source that is gone for every reader once one of them has come to document `at`: not even
    read again."""

    def __init__(self, source: Any, at: int, gone: threading.Event):
        self._source, self._at, self._gone = source, at, gone
        self.name, self.finite, self.notes = source.name, source.finite, source.notes

    def stream(self, cursor: dict) -> Any:
        return _Vanishing(self._source.stream(cursor), self._at, self._gone)

    def open(self) -> None:
        self._source.open()


class _Vanishing:
    def __init__(self, stream: Any, at: int, gone: threading.Event):
        self._stream, self._at, self._gone = stream, at, gone

    def __iter__(self) -> "_Vanishing":
        return self

    def __next__(self) -> Document:
        if self._stream.cursor()["piece"] >= self._at:
            self._gone.set()
        if self._gone.is_set():
            raise SourceUnavailable("it is gone")
        return next(self._stream)

    def cursor(self) -> dict:
        return self._stream.cursor()


@pytest.mark.slow
@pytest.mark.parametrize("packing", MOSTLY_SLOW)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_source_that_vanishes_leaves_all_ranks_one_order(
    strategy: str, packing: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it can be read again, not even what a rank needs to find its place: the others
    lose nothing all the same."""
    monkeypatch.setattr(pipeline, "SNAPSHOT_EVERY", 60)
    for seed in range(2):
        gone = threading.Event()
        wrap = partial(Vanishes, at=(10, 6)[seed], gone=gone)
        found, whole, before = broken_run(
            tmp_path,
            strategy,
            packing,
            lambda wrap=wrap: lambda s: wrap(s) if s.name == "b" else s,
            seed,
        )
        check_accounts(found, whole, before)
