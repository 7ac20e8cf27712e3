"""Adaptive weights of sources: the formula, what counts and what does not, the mix that follows,
whole runs."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from core.data.mixing import Mixer, MixSettings
from core.data.position import Position
from core.data.sources import build_source
from core.errors import PresetError, UserError
from core.preset.settings import AuxiliarySettingsBase
from core.schedules import Piece
from core.training.source_weights import SourceWeights, adapted
from tests.data.corpus import write_corpus
from tests.project import Project, differences, merged
from tests.training.runs import assert_same_checkpoint, events, finish, poison, session


def settings(**changes: Any) -> AuxiliarySettingsBase:
    return AuxiliarySettingsBase(
        **{"enable_adaptive_sources": True, "adaptive_interval_tokens": 100, **changes}
    )


# the factors --------------------------------------------------------------------------------------


def test_the_formula() -> None:
    """w = clip(l / mean l, min, max), 0.9 of the old factor and 0.1 of w, as the specification's
    preset has it."""
    old = {"a": 1.0, "b": 2.0, "c": 0.7, "absent": 1.7}
    # over their mean: 0.2, 0.4, 2.4
    new = adapted(old, {"a": 1.0, "b": 2.0, "c": 12.0}, settings())
    assert new == pytest.approx({"a": 0.9 + 0.05, "b": 1.8 + 0.05, "c": 0.63 + 0.24})
    loose = settings(adaptive_min_weight=0.1, adaptive_max_weight=2.0, adaptive_smoothing=0.0)
    assert adapted(old, {"a": 1.0, "b": 2.0, "c": 12.0}, loose) == pytest.approx(
        {"a": 0.2, "b": 0.4, "c": 2.0}
    )
    assert adapted(old, {}, loose) == {} == adapted(old, {"a": 0.0}, loose)


def test_an_interval_is_counted_in_tokens_and_keeps_what_it_has_through_a_checkpoint() -> None:
    """Means over targets, not over steps; a source without any keeps its factor, and does not pull
    the mean."""
    how = settings(adaptive_smoothing=0.0)

    def resumed(weights: SourceWeights) -> SourceWeights:
        return SourceWeights(
            {"a": 1.0, "b": 1.0, "c": 1.0}, how, json.loads(json.dumps(weights.state()))
        )

    weights = SourceWeights({"a": 1.0, "b": 1.0}, how, {"factors": {"b": 2.5, "elsewhere": 1.9}})
    assert weights.factors == {"a": 1.0, "b": 2.5}
    assert weights.after_step([("a", 10.0, 10), ("b", 90.0, 30)], 60) is None
    assert weights.factors["b"] == 2.5
    weights = resumed(weights)
    # 30 / 30 and 210 / 70: 1 and 3, over their mean 2
    assert weights.after_step([("a", 20.0, 20), ("b", 120.0, 40), ("c", 0.0, 0)], 60) == {
        "a": 1.0,
        "b": 3.0,
    }
    assert weights.factors == {"a": 0.5, "b": 1.5, "c": 1.0}
    assert weights.state()["factors"]["elsewhere"] == 1.9
    weights = resumed(weights)
    assert weights.after_step([("a", 7.0, 10)], 79) is None, (
        "20 tokens of the last step belong to this interval, no more"
    )
    assert weights.after_step([], 1) == {"a": 0.7}
    assert weights.factors == {
        "a": 1.0,
        "b": 1.5,
        "c": 1.0,
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_do_not_count(bad: float) -> None:
    good = [("a", 30.0, 10), ("b", 10.0, 10)]
    with_bad, without = (SourceWeights({"a": 1.0, "b": 1.0}, settings()) for _ in range(2))
    assert with_bad.after_step([("a", bad, 10), ("b", 10.0, 10)], 50) is None
    without.after_step([("b", 10.0, 10)], 50)
    assert with_bad.after_step(good, 50) == without.after_step(good, 50)
    assert with_bad.state() == without.state() and with_bad.factors == {"a": 1.05, "b": 0.95}
    assert with_bad.after_step([("a", bad, 10), ("b", bad, 10)], 100) == {}
    assert with_bad.factors == without.factors


def test_shares_are_weights_times_factors_of_the_sources_left() -> None:
    saved = {"factors": {"a": 0.5, "b": 3.0}}
    falling = {"a": [Piece(start=0.8, to=0.2)], "b": 0.2, "c": 0.0}
    shares = SourceWeights(falling, settings(), saved).shares(0.5, [])
    assert shares["a"] == {"weight": pytest.approx(0.25 / 0.85), "factor": 0.5}
    assert shares["c"] == {
        "weight": 0.0,
        "factor": 1.0,
    }
    assert SourceWeights(falling, settings(), saved).shares(0.5, ["b"])["a"]["weight"] == 1.0
    off = SourceWeights(falling, AuxiliarySettingsBase(), saved)
    assert off.factors == {} == off.state() and off.after_step([("a", 1.0, 1)], 10**9) is None
    assert off.shares(1.0, []) == {"a": {"weight": 0.5}, "b": {"weight": 0.5}, "c": {"weight": 0.0}}


# the mix ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["documents", "tokens"])
def test_the_mix_follows_from_the_draw_on_and_from_any_snapshot(unit: str, tmp_path: Path) -> None:
    """One half, then nine tenths, then one half; what is drawn before a change is what is drawn
    without it."""
    sections = write_corpus(tmp_path, {"a": 300, "b": 300})
    changes = {400: {"a": 3.0, "b": 1 / 3}, 1000: {}}
    how = MixSettings("weighted", (1.0, 1.0), 3, unit=unit, rates=(1.0, 1.0))

    def mixer(snapshot: dict | None = None, factors: Any = changes) -> Mixer:
        sources = [build_source(section, tmp_path, 1) for section in sections]
        return Mixer(
            sources, how, lambda _: True, Position(snapshot=snapshot, factors=factors or {})
        )

    straight, snapshots, draws = mixer(), {}, []
    for at in range(1600):
        if at in (0, 399, 400, 401, 700, 1000, 1100):
            snapshots[at] = json.loads(json.dumps(straight.snapshot()))
        draws.append(next(straight))
    for first, last, share in ((0, 400, 0.5), (400, 1000, 0.9), (1000, 1600, 0.5)):
        found = sum(draw.source == 0 for draw in draws[first:last]) / (last - first)
        assert found == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / (last - first))
        )
    unchanged = mixer(factors={})
    assert [next(unchanged) for _ in range(400)] == draws[:400]
    # with what a position keeps: changes from the snapshot on
    for at, snapshot in snapshots.items():
        again = mixer(snapshot, {draw: factors for draw, factors in changes.items() if draw >= at})
        assert [next(again) for _ in range(1600 - at)] == draws[at:], f"from {at}"


# whole runs ---------------------------------------------------------------------------------------

MIX: dict[str, Any] = {
    "train": {"max_steps": 48, "per_gpu_batch_size": 8, "learning_rate": 3e-3},
    "auxiliary": {
        "enable_adaptive_sources": True,
        "adaptive_interval_tokens": 5 * 8 * 32,
        "adaptive_smoothing": 0.2,
        "adaptive_min_weight": 0.5,
        "adaptive_max_weight": 1.5,
    },
    "data": {
        "sources": [
            {"type": "text", "path": "easy", "name": "easy"},
            {"type": "text", "path": "hard", "name": "hard"},
        ],
        "mix_strategy": "weighted",
        "source_weights": [0.75, 0.25],
    },
}


def write_easy_and_hard(root: Path) -> None:
    """One file says one letter over and over; the letters of the others follow from nothing."""
    draw = random.Random(5)
    for name, letters in (("easy", "a"), ("hard", "".join(map(chr, range(33, 127))))):
        (root / name).mkdir(parents=True)
        for i in range(60):
            (root / name / f"{i}.txt").write_text(
                f"{i} " + "".join(draw.choice(letters) for _ in range(75))
            )


def test_what_is_hard_is_read_more_up_to_the_limit(tmp_path: Path) -> None:
    """Its factor rises to the highest, the easy one's falls to the lowest, and so do the tokens
    that are read of them; an interruption anywhere changes nothing, and what is told is what is
    done."""
    for name in ("whole", "parts", "off"):
        write_easy_and_hard(tmp_path / name)
    finish(session(tmp_path / "whole", **MIX))
    # within and at the end of an interval; what is read ahead is thrown away each time
    stops = [3, 11, 21, 40]
    for stop in [*stops, None]:
        part = session(tmp_path / "parts", **MIX)
        part.trainer.should_stop = lambda part=part, stop=stop: part.trainer.progress.step == stop
        assert finish(part) == ("interrupted" if stop else "max_steps")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")

    steps, changes = events(tmp_path / "whole", "step"), events(tmp_path / "whole", "reweighted")
    per_step = steps[0]["tokens"]
    assert [event["step"] for event in changes] == [
        s for s in range(1, 49) if s * per_step // 1280 > (s - 1) * per_step // 1280
    ]
    assert {name: each["factor"] for name, each in steps[-1]["sources"].items()} == {
        "easy": 0.5,
        "hard": 1.5,
    }
    assert steps[-1]["sources"]["hard"]["weight"] == 0.5
    assert (
        steps[0]["sources"]["hard"] | {"weight": 0.25, "factor": 1.0}
        == (steps[0]["sources"]["hard"])
    )
    for before, after in zip(changes, changes[1:]):
        inside = [e["sources"] for e in steps if before["step"] < e["step"] <= after["step"]]
        assert all(each["hard"]["factor"] == before["sources"]["hard"]["factor"] for each in inside)
        assert after["sources"]["hard"]["loss"] > after["sources"]["easy"]["loss"]
    finish(
        session(tmp_path / "off", **merged(MIX, {"auxiliary": {"enable_adaptive_sources": False}}))
    )
    plain = events(tmp_path / "off", "step")
    assert not events(tmp_path / "off", "reweighted")
    assert "factor" not in plain[0]["sources"]["hard"]
    share = [
        found[-1]["sources"]["hard"]["tokens"] / found[-1]["tokens"] for found in (steps, plain)
    ]
    assert share[0] > 1.25 * share[1], share
    assert [e["loss"] for e in steps[: changes[0]["step"]]] == [
        e["loss"] for e in plain[: changes[0]["step"]]
    ]


@pytest.mark.skips_updates
def test_bad_steps_do_not_spoil_the_factors(tmp_path: Path) -> None:
    """Losses that are not a number, up to going back to a checkpoint: the intervals go on, and no
    factor is spoiled."""
    write_easy_and_hard(tmp_path)
    built = session(
        tmp_path, **merged(MIX, {"train": {"max_steps": 24, "checkpoint_every_steps": 4}})
    )
    poison(built, lambda step: 6 <= step < 11)
    finish(built)
    told = events(tmp_path, "reweighted")
    assert [
        event["message"]
        for event in events(tmp_path, "warning")
        if "weights are back" in event["message"]
    ]
    factors = [each["factor"] for event in told for each in event["sources"].values()]
    assert len(told) > 3 and all(0.5 <= factor <= 1.5 for factor in factors) and max(factors) > 1.1


def test_factors_go_by_name_and_only_while_they_are_wanted(tmp_path: Path) -> None:
    """After a change of the sources the ones known go on, a new one begins at 1; switched off, the
    mix is that of the preset."""
    write_easy_and_hard(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file.txt").write_text("something else, and that again and again. " * 50)
    finish(session(tmp_path, **merged(MIX, {"train": {"max_steps": 20}})))
    before = Project(tmp_path).checkpoint()["adaptive"]
    sources = [{"type": "text", "path": "new", "name": "new"}, *MIX["data"]["sources"]]
    more = merged(
        MIX,
        {
            "train": {"max_steps": 1},
            "data": {"sources": sources, "source_weights": [0.5, 0.25, 0.25]},
        },
    )
    built = session(tmp_path, **more)
    factors = {
        "new": 1.0,
        **{name: float(f"{factor:.3g}") for name, factor in before["factors"].items()},
    }
    assert built.trainer.loader.position.latest_factors == factors and max(factors.values()) > 1.1
    finish(built)
    assert {
        name: each["factor"] for name, each in events(tmp_path, "step")[-1]["sources"].items()
    } == factors
    saved = Project(tmp_path).checkpoint()
    assert saved["adaptive"]["factors"] == {"new": 1.0, **before["factors"]}
    assert saved["adaptive"]["tokens"] > before["tokens"]
    off = session(tmp_path, **merged(more, {"auxiliary": {"enable_adaptive_sources": False}}))
    position = off.trainer.loader.position
    assert position.latest_factors == {} == position.factors[position.first_unused()]
    finish(off)
    assert Project(tmp_path).checkpoint()["adaptive"] == {}


def test_a_checkpoint_from_before_there_were_factors_goes_on(tmp_path: Path) -> None:
    """Without the keys that are new, the order is the one that it was."""
    write_easy_and_hard(tmp_path / "new")
    write_easy_and_hard(tmp_path / "old")
    off = merged(MIX, {"train": {"max_steps": 12}, "auxiliary": {"enable_adaptive_sources": False}})
    for name in ("new", "old"):
        part = session(tmp_path / name, **off)
        part.trainer.should_stop = lambda part=part: part.trainer.progress.step == 7
        finish(part)
    path = tmp_path / "old/checkpoints/t_current.pth"
    state = torch.load(path, weights_only=True)
    del state["adaptive"], state["data"]["factors"], state["data"]["snapshot"]["factors"]
    torch.save(state, path)
    for name in ("new", "old"):
        finish(session(tmp_path / name, **off))
    assert differences(*(Project(tmp_path / name).checkpoint() for name in ("new", "old"))) == []


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        (
            {"data": {"mix_strategy": "round_robin", "source_weights": None}},
            UserError,
            r'Set it to "weighted".*\[1, 1\]',
        ),
        (
            {"auxiliary": {"adaptive_min_weight": 2.0}},
            PresetError,
            "adaptive_min_weight is 2, above adaptive_max_weight, 1.5",
        ),
    ],
)
def test_what_means_nothing_is_refused(
    changes: dict, kind: type[Exception], told: str, tmp_path: Path
) -> None:
    write_easy_and_hard(tmp_path)
    with pytest.raises(kind, match=told):
        session(tmp_path, **merged(MIX, changes))
    assert not (tmp_path / "checkpoints").exists()


def test_one_source_is_told_to_change_nothing(tmp_path: Path) -> None:
    alone = session(
        tmp_path, **{**MIX, "data": {"mix_strategy": "weighted", "source_weights": [1.0]}}
    )
    assert [note for note in alone.notes if "there is one source only" in note]
    alone.log.close()
