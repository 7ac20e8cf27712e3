"""Steps in which nothing is learned, and readers that fail, on any number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.contracts import IGNORE_INDEX
from core.data.packing import Row
from core.data.position import Position
from core.errors import ReadingFailed
from tests.data.corpus import make_factory, make_loader, resumed, start, write_corpus
from tests.data.ranks import Ranks

ROWS = 4


class Silent:
    """A pipeline of whose rows most have nothing to learn, by what they hold; that of the lane
    `broken` fails after some."""

    def __init__(self, factory: Any, broken: int | None = None):
        self._factory, self._broken = factory, broken
        self.settings, self.sections, self.sources = (
            factory.settings,
            factory.sections,
            factory.sources,
        )

    def __call__(self, position: Position, lanes: list[int]) -> Iterator[Row]:
        for number, row in enumerate(self._factory(position, lanes)):
            if self._broken in lanes and number == 20:
                raise RuntimeError("a row that nobody can read")
            learned = int(row.input_ids.sum()) % 5 == 0
            yield row if learned else replace(row, labels=np.full_like(row.labels, IGNORE_INDEX))


def rows_of(factory: Silent, ranks: int, cuts: list[int]) -> tuple[list[tuple], dict]:
    """(the rows of the first steps by their numbers, the state after them), read in so many
    parts."""
    found, state = [], None
    for count in cuts:

        def job(
            parallel: Any, count: int = count, state: dict | None = state
        ) -> tuple[list[tuple], dict]:
            loader = make_loader(
                factory, start() if state is None else resumed(state, factory), ROWS, parallel
            )
            try:
                steps = [loader.next_step() for _ in range(count)]
                rows = [
                    (i, number, *row.tolist())
                    for i, step in enumerate(steps)
                    for number, row in zip(step.numbers, step.batch.input_ids)
                ]
                return rows, loader.state()
            finally:
                loader.close()

        parts = Ranks(ranks).run(job)
        found += sorted(row for rows, _ in parts for row in rows)
        state = parts[0][1]
    return found, state


def test_steps_without_targets_are_passed_over_alike_on_all_ranks_and_after_a_stop(
    tmp_path: Path,
) -> None:
    factory = Silent(make_factory(tmp_path, write_corpus(tmp_path, {"a": 60, "b": 60})))
    (one, state), (two, of_two), (cut, of_cut) = (
        rows_of(factory, *how) for how in ((1, [12]), (2, [12]), (1, [5, 4, 3]))
    )
    assert state["passed_over"] > 3
    assert [row[1:] for row in one] == [row[1:] for row in two] == [row[1:] for row in cut]
    assert state == of_two == of_cut


def test_what_begins_in_steps_passed_over_is_counted(tmp_path: Path) -> None:
    """Every document and epoch of the data, on any number of ranks: with the steps, or with those
    that teach nothing."""
    factory = make_factory(tmp_path, write_corpus(tmp_path, {"a": 60, "b": 60}), max_epochs=2)

    def job(parallel: Any, factory: Any) -> tuple[np.ndarray, np.ndarray]:
        loader, found = make_loader(factory, start(), ROWS, parallel), []
        while (step := loader.next_step()) is not None:
            found.append([step.documents, step.epochs])
        loader.close()
        passed = np.array([[documents, epochs] for _, documents, epochs in loader.begun]).reshape(
            -1, 2, 2
        )
        return np.sum(found, axis=0), passed.sum(axis=0).T

    ((everything, none),) = Ranks(1).run(lambda parallel: job(parallel, factory))
    assert not none.any() and everything[1].tolist() == [2, 2]
    for ranks in (1, 2):
        for of_steps, passed in Ranks(ranks).run(lambda parallel: job(parallel, Silent(factory))):
            assert passed[0].min() > 5 and (of_steps + passed == everything).all()


def test_a_step_that_is_given_back_is_read_again(tmp_path: Path) -> None:
    """The state is that of before it, and so are the rows that come next."""
    loader = make_loader(
        make_factory(tmp_path, write_corpus(tmp_path, {"a": 60, "b": 60})), start(), ROWS
    )
    for _ in range(6):
        loader.next_step()
    before, given = loader.state(), loader.next_step()
    assert loader.state() != before
    loader.give_back()
    assert loader.state() == before
    again = loader.next_step()
    loader.close()
    assert (again.batch.input_ids == given.batch.input_ids).all() and again.numbers == given.numbers


def test_what_fails_on_one_rank_stops_all_of_them_at_the_same_step(tmp_path: Path) -> None:
    """So that they can save together: none waits for a rank that is gone."""
    factory = Silent(make_factory(tmp_path, write_corpus(tmp_path, {"a": 60, "b": 60})), broken=1)

    def job(parallel: Any) -> tuple[str, dict]:
        loader = make_loader(factory, start(), ROWS, parallel)
        try:
            with pytest.raises(ReadingFailed) as raised:
                while True:
                    loader.next_step()
            return str(raised.value), loader.state()
        finally:
            loader.close()

    (other, state), (own, same) = Ranks(2).run(job)
    assert "a row that nobody can read" in own and "a row that nobody can read" in other
    assert state == same and state["rows"] > 0
