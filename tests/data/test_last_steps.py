"""The steps of a finite run once lanes have ended: filled up from the lanes that have not, the same
for any number of ranks."""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core.data.validation import HoldOut
from tests.data.corpus import make_factory, make_loader, resumed, start, texts_of, write_corpus
from tests.data.corpus import steps as as_they_were_read
from tests.data.ranks import Ranks
from tests.project import Project, differences, tiny_preset, train_here
from tests.training.runs import finish, session

# lanes, rows of a step, documents
CASES = [(24, 16, 5), (24, 8, 1), (6, 4, 9), (6, 6, 2), (4, 16, 3), (12, 8, 20)]


def factory_of(folder: Path, lanes: int, documents: int) -> Any:
    sections = write_corpus(folder, {"a": documents}, low=300, high=3000)
    return make_factory(folder, sections, max_epochs=2, hold_out=HoldOut(0.0), lanes=lanes)


def read(
    factory: Any, rows: int, ranks: int = 1, cut: int = 10**9, workers: int = 0
) -> tuple[list[list[tuple]], dict]:
    """(rows that hold anything of each step with their numbers, the state after them); begun anew
    after every `cut` steps."""
    found: list[list[tuple]] = []
    state: dict | None = None
    ended = False
    while not ended:

        def job(parallel: Any, state: dict | None = state) -> tuple:
            position = start() if state is None else resumed(state, factory)
            loader, own = make_loader(factory, position, rows, parallel, workers), []
            try:
                while len(own) < cut and (step := loader.next_step()) is not None:
                    b = step.batch
                    assert len(step.numbers) == len(b.labels) > 0
                    filled = (b.source_ids >= 0).any(1)
                    assert filled.all() or len(filled) == 1  # a rank that has nothing keeps one row
                    learned = [
                        (number, *ids, *labels)
                        for number, ids, labels, any_ in zip(
                            step.numbers, b.input_ids.tolist(), b.labels.tolist(), filled
                        )
                        if any_
                    ]
                    own.append(
                        (
                            learned,
                            step.num_targets,
                            step.num_tokens,
                            step.source_tokens,
                            step.documents,
                            step.epochs,
                        )
                    )
                return own, loader.state()
            finally:
                loader.close()

        parts = Ranks(ranks).run(job)
        assert all(
            [step[1:] for step in part[0]] == [step[1:] for step in parts[0][0]] for part in parts
        )
        for each in zip(*(part[0] for part in parts)):
            together = sorted(row for step in each for row in step[0])
            assert each[0][1] == sum(
                label >= 0 for row in together for label in row[1 + len(row) // 2 :]
            )
            found.append([*together, each[0][1:]])
        ended, state = len(parts[0][0]) < cut, parts[0][1]
    assert state is not None
    return found, state


@pytest.mark.parametrize(("lanes", "rows", "documents"), CASES)
def test_steps_are_full_to_the_end(lanes: int, rows: int, documents: int, tmp_path: Path) -> None:
    """Every document is trained once in each epoch, in steps of half the rows at least, and never
    of more than all."""
    factory = factory_of(tmp_path, lanes, documents)
    found, state = read(factory, rows)
    sizes = [len(step) - 1 for step in found]
    assert max(sizes) == rows and all(2 * size >= rows for size in sizes[:-1]), sizes
    assert all(size + after > rows for size, after in zip(sizes, sizes[1:])), (
        "two steps would have been one"
    )
    assert state["rows"] > sum(sizes), "no lane ended before the others: this tells nothing"
    texts = Counter(texts_of(as_they_were_read(make_loader(factory, start(), rows)), lanes))
    assert len(texts) == documents and set(texts.values()) == {2}


@pytest.mark.parametrize(("lanes", "rows", "documents"), CASES)
def test_they_are_the_same_on_all_ranks_and_after_every_stop(
    lanes: int, rows: int, documents: int, tmp_path: Path
) -> None:
    """The same rows under the same numbers, the same counts, the same state after the last."""
    factory = factory_of(tmp_path, lanes, documents)
    straight = read(factory, rows)
    assert read(factory, rows, ranks=2) == straight
    assert read(factory, rows, cut=1) == straight
    assert read(factory, rows, ranks=2, cut=3) == straight


def test_a_step_of_several_groups_is_given_back_whole(tmp_path: Path) -> None:
    loader = make_loader(factory_of(tmp_path, 24, 5), start(), 16)
    for _ in range(4):
        loader.next_step()
    before, given = loader.state(), loader.next_step()
    assert loader.state()["rows"] > before["rows"] + 16
    loader.give_back()
    assert loader.state() == before
    again, after = loader.next_step(), loader.next_step()
    loader.close()
    assert (again.batch.input_ids == given.batch.input_ids).all() and again.numbers == given.numbers
    assert (again.num_targets, again.documents) == (
        given.num_targets,
        given.documents,
    ) and after is not None


@pytest.mark.slow
def test_a_worker_that_dies_there_changes_nothing(tmp_path: Path) -> None:
    """Killed between the groups of a step: they are read again, and the step is the same."""
    factory = factory_of(tmp_path, 24, 5)
    straight, _ = read(factory, 16)
    loader = make_loader(factory, start(), 16, workers=2)
    found, agreed = [], loader._agreed

    def kill_at_the_third(item: Any) -> Any:
        group = agreed(item)
        kill_at_the_third.groups += 1  # type: ignore[attr-defined]
        if kill_at_the_third.groups == 3:  # type: ignore[attr-defined]
            for worker in loader._workers:
                os.kill(worker._process.pid, signal.SIGKILL)
                worker._process.join()
        return group

    kill_at_the_third.groups = 0  # type: ignore[attr-defined]
    loader._agreed = kill_at_the_third
    while (step := loader.next_step()) is not None:
        found.append(
            [(number, *ids) for number, ids in zip(step.numbers, step.batch.input_ids.tolist())]
        )
    state = loader.state()
    loader.close()
    assert len(loader.warnings) == 1, loader.warnings
    expected = [[row[: 1 + len(row) // 2] for row in step[:-1]] for step in straight]
    assert [sorted(step) for step in found] == expected and state == read(factory, 16)[1]


@pytest.mark.parametrize("curriculum", [False, True])
def test_a_run_by_epochs_on_one_text(curriculum: bool, tmp_path: Path) -> None:
    """Steps of the whole batch, where each had one row; a curriculum chooses within whole groups,
    as before."""
    train: dict[str, Any] = {
        "max_steps": None,
        "max_epochs": 1,
        "per_gpu_batch_size": 8,
        "eval_tokens": 0,
    }
    if curriculum:
        train["curriculum"] = {"candidates": 2, "bucket_weights": [1.0, 1.0]}
    (tmp_path / "one.txt").write_text(
        "".join(f"Sentence {i} of a text that is read once. " for i in range(80))
    )
    data = {"sources": [{"type": "text", "path": "one.txt"}], "lanes": 24}
    train_here(tiny_preset(train=train, data=data), tmp_path)
    steps = Project(tmp_path).events("step")
    tokens = [event["tokens"] for event in steps]
    sizes = [after - before for before, after in zip([0, *tokens], tokens)]
    assert (set(sizes[:-1]) == {8 * 32}) is not curriculum and sizes[-1] <= 8 * 32


def test_stopped_there_and_resumed_it_ends_in_the_same_weights(tmp_path: Path) -> None:
    """With heads, whose places follow from the rows' numbers, and dropout."""
    train = {"max_steps": None, "max_epochs": 1, "per_gpu_batch_size": 8, "eval_tokens": 0}
    data = {"sources": [{"type": "text", "path": "texts/story0[0-4].txt"}], "lanes": 12}
    preset: dict[str, Any] = {
        "train": train,
        "data": data,
        "model": {"dropout": 0.1},
        "auxiliary": {"enable_policy": True},
    }
    whole = session(tmp_path / "whole", **preset)
    finish(whole)
    count = whole.trainer.progress.step
    assert whole.trainer.loader.position.rows > 8 * count + 40, "no step had more than one group"
    for _ in range(3):
        part = session(tmp_path / "parts", **preset)
        stop_at = part.trainer.progress.step + count // 4
        part.trainer.should_stop = lambda part=part, stop_at=stop_at: (
            part.trainer.progress.step >= stop_at
        )
        assert finish(part) == "interrupted"
    finish(session(tmp_path / "parts", **preset))
    whole_state, parts_state = (
        Project(tmp_path / name).checkpoint() for name in ("whole", "parts")
    )
    assert differences(whole_state, parts_state) == []
