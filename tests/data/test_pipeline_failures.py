"""Sources that fail in mid-run are dropped at one draw on all ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.data.validation import HoldOut
from core.errors import NoData
from tests.data.corpus import (
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
from tests.data.ranks import Fails, Ranks
from tests.data.test_pipeline import STRATEGIES, read_all, text_lines

# sources that fail --------------------------------------------------------------------------------


def without(found: list[np.ndarray], source: int) -> bool:
    return all((step[:, 4] != source).all() for step in found)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_source_that_fails_is_dropped_at_one_draw_on_all_ranks(
    strategy: str, world_size: int, tmp_path: Path
) -> None:
    """No rank reads it beyond that draw, the others go on, a second run does the same, and so does
    a resumed one."""
    sections = write_corpus(tmp_path, {"a": 100, "b": 200, "c": 200}, low=5, high=40)

    def factory_now() -> object:
        return make_factory(
            tmp_path, sections, strategy, wrap=lambda s: Fails(s, 60) if s.name == "b" else s
        )

    def job(parallel: object) -> tuple[list[np.ndarray], list, dict, dict]:
        loader = make_loader(factory_now(), start(), parallel=parallel)
        found = steps(loader, 60)
        middle = loader.state()
        found += steps(loader, 40)
        loader.close()
        return found, loader.dropped, loader.position.drops, middle

    ranks = Ranks(world_size).run(job)
    drops = ranks[0][2]
    assert set(drops) == {"b"} and all(rank[2] == drops for rank in ranks)
    assert all(rank[1] == [("b", "the disk is broken here")] for rank in ranks)
    straight = merged([rank[0] for rank in ranks])
    assert same(merged([rank[0] for rank in Ranks(world_size).run(job)]), straight)
    assert not without(straight[:60], 1) and without(straight[60:], 1)
    assert not without(straight[60:], 0) or not without(straight[60:], 2)

    def go_on(parallel: object) -> list[np.ndarray]:
        factory = factory_now()
        return read_all(make_loader(factory, resumed(ranks[0][3], factory), parallel=parallel), 40)

    assert same(merged(Ranks(world_size).run(go_on)), straight[60:])


def test_no_document_of_the_other_sources_is_lost_when_one_fails(tmp_path: Path) -> None:
    """All that the others hold is read, once, whatever was read ahead when the failure came."""
    sections = write_corpus(tmp_path, {"a": 60, "b": 60, "c": 60})
    factory = make_factory(
        tmp_path,
        sections,
        max_epochs=1,
        hold_out=HoldOut(0.0),
        wrap=lambda s: Fails(s, 25) if s.name == "b" else s,
    )
    loader = make_loader(factory, start())
    found = texts_of(read_all(loader, None))
    others = Counter(text for text in found if not text.startswith("b "))
    assert others == Counter(text_lines(tmp_path, "a") + text_lines(tmp_path, "c"))
    assert {text for text in found if text.startswith("b ")} <= set(text_lines(tmp_path, "b")[:26])


def test_when_the_last_source_fails_there_is_no_data(tmp_path: Path) -> None:
    """NoData on every rank, after all that could be read was read."""
    sections = write_corpus(tmp_path, {"a": 50, "b": 50})

    def job(parallel: object) -> str:
        factory = make_factory(tmp_path, sections, wrap=lambda s: Fails(s, 20))
        loader = make_loader(factory, start(), parallel=parallel)
        with pytest.raises(NoData, match="no source is left to read from"):
            steps(loader, 1000)
        loader.close()
        return "seen"

    assert Ranks(2).run(job) == ["seen", "seen"]


@pytest.mark.slow
def test_files_that_vanish_are_dropped_with_workers_too(tmp_path: Path) -> None:
    """Worker processes open the sources anew after a drop: the lost one must not stop them again
    and again."""
    sections = write_corpus(tmp_path, {"a": 30, "b": 30})
    loader = make_loader(make_factory(tmp_path, sections), start(), workers=1)
    assert len(steps(loader, 2)) == 2
    state = loader.state()
    loader.close()
    (tmp_path / "b.jsonl").unlink()
    factory = make_factory(tmp_path, sections[:1])
    factory.sections = sections
    loader = make_loader(factory, resumed(state, factory), workers=1)
    found = read_all(loader, 60)
    assert len(found) == 60 and without(found[-20:], 1)
    assert [name for name, _ in loader.dropped] == ["b"]
