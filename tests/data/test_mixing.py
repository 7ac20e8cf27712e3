"""The mix: shares that are schedules, shares of tokens, and horizons, all of them functions of the
place alone."""

import json
from pathlib import Path

import pytest

from core.data.mixing import Draw, Mixer, MixSettings, is_beginning
from core.data.position import Position
from core.data.sources import build_source
from core.schedules import Piece
from tests.data.corpus import write_corpus

FALLING = [
    Piece(start=0.9, shape="constant", end=0.5),
    Piece(start=0.9, to=0.1, begin=0.5, end=0.6),
]
RISING = [Piece(start=0.1, shape="constant", end=0.5), Piece(start=0.1, to=0.9, begin=0.5, end=0.6)]
LENGTH = 99  # characters of every document: 100 tokens by the rate below


def mixer(
    folder: Path,
    settings: MixSettings,
    snapshot: dict | None = None,
    renewals: tuple[int, ...] = (),
) -> Mixer:
    sections = write_corpus(folder, {"a": 400, "b": 400})
    sources = [build_source(section, folder, 1) for section in sections]

    position = Position(snapshot=snapshot, renewals=list(renewals))
    return Mixer(sources, settings, lambda _: True, position)


def share_of_first(draws: list[Draw]) -> float:
    return sum(draw.source == 0 for draw in draws) / len(draws)


def taken(mixer: Mixer, count: int) -> list[Draw]:
    return [next(mixer) for _ in range(count)]


def tokens_of(draws: list[Draw]) -> int:
    return sum(len(draw.document.text) + 1 for draw in draws if draw.document)


def scheduled(horizon: int = 200_000) -> MixSettings:
    return MixSettings("weighted", (FALLING, RISING), 3, horizon_tokens=horizon, rates=(1.0, 1.0))


def test_shares_follow_their_schedules(tmp_path: Path) -> None:
    """By the tokens drawn: nine to one in the first half of the horizon, one to nine after six
    tenths of it."""
    draws = taken(mixer(tmp_path, scheduled()), 2400)
    done, early, late = 0, [], []
    for draw in draws:
        if done < 100_000:
            early.append(draw)
        elif done > 120_000:
            late.append(draw)
        done += tokens_of([draw])
    assert done > 200_000 and len(early) > 500 and len(late) > 500
    assert share_of_first(early) == pytest.approx(0.9, abs=0.04) and share_of_first(
        late
    ) == pytest.approx(0.1, abs=0.04)


def test_a_new_horizon_begins_its_schedules_anew(tmp_path: Path) -> None:
    draws = taken(mixer(tmp_path, scheduled(), renewals=(2400,)), 3000)
    assert share_of_first(draws[2100:2400]) == pytest.approx(0.1, abs=0.06)
    assert share_of_first(draws[2400:3000]) == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize("unit", ["documents", "tokens"])
def test_any_snapshot_goes_on_alike(unit: str, tmp_path: Path) -> None:
    """Also across a new horizon, and under a preset whose horizon or rates are others meanwhile:
    they count from the next on."""
    settings = MixSettings(
        "weighted", (FALLING, RISING), 3, unit=unit, horizon_tokens=20_000, rates=(1.0, 1.0)
    )
    straight = mixer(tmp_path, settings, renewals=(300,))
    snapshots, draws = [], []
    for _ in range(500):
        snapshots.append(json.loads(json.dumps(straight.snapshot())))
        draws.append(next(straight))
    for at in (0, 1, 77, 299, 300, 301, 450):
        again = mixer(tmp_path, settings, snapshots[at], renewals=(300,))
        assert taken(again, 500 - at) == draws[at:]
    other = MixSettings(
        "weighted", (FALLING, RISING), 3, unit=unit, horizon_tokens=7, rates=(0.3, 2.0)
    )
    assert taken(mixer(tmp_path, other, snapshots[350]), 150) == draws[350:]


def test_shares_of_tokens(tmp_path: Path) -> None:
    """A source whose documents are ten times as long is drawn a tenth as often: its tokens are what
    has the share."""
    write_corpus(tmp_path / "short", {"a": 300}, low=20, high=40)
    write_corpus(tmp_path / "long", {"b": 300}, low=200, high=400)
    from core.data.sources.text import TextSettings

    sections = [TextSettings(path="short/a.jsonl"), TextSettings(path="long/b.jsonl")]
    for unit in ("documents", "tokens"):
        sources = [build_source(section, tmp_path, 1) for section in sections]
        settings = MixSettings("weighted", (0.5, 0.5), 3, unit=unit, rates=(1.0, 1.0))
        draws = taken(Mixer(sources, settings, lambda _: True, Position()), 4000)
        mine = [draw for draw in draws if draw.source == 0]
        share = tokens_of(mine) / tokens_of(draws)
        assert share == pytest.approx(0.5, abs=0.04) if unit == "tokens" else share < 0.2


def test_each_epoch_is_opened_once(tmp_path: Path) -> None:
    """By its first document, whether a resume lies between or not."""
    settings = MixSettings("round_robin", (1.0, 1.0), 3)
    straight = mixer(tmp_path, settings)
    opened = []
    for at in range(1700):
        if at % 97 == 0:
            straight = mixer(tmp_path, settings, json.loads(json.dumps(straight.snapshot())))
        draw = next(straight)
        opened += [(draw.index, draw.source)] * draw.opens_epoch
    assert opened == [(0, 0), (1, 1), (800, 0), (801, 1), (1600, 0), (1601, 1)]
    assert (
        is_beginning({})
        and is_beginning({"epoch": 3})
        and is_beginning({"epoch": 3, "unit": 0, "piece": 0})
    )
    assert not is_beginning({"epoch": 0, "unit": 0, "piece": 1})
