"""Trials that come to nothing: they diverge, they are hopeless, there is no data."""

import json
from pathlib import Path

import pytest

from core.errors import NoData, UserError
from core.jobs.compare import BaselineCurve, EarlyStopping
from tests.jobs.comparisons import compare_here, files, preset_of
from tests.project import Project, merged


@pytest.mark.skips_updates
@pytest.mark.slow
def test_a_variant_that_diverges_is_recorded_and_the_others_go_on(
    tmp_path: Path, no_plots: None
) -> None:
    """Each of its seeds is run; a new start does not try them again, and does run what is new."""
    wild = {"name": "wild", "set": {"train": {"learning_rate": 100.0, "weight_decay": 100.0}}}
    preset = preset_of(
        variants=[{"name": "as it is"}, wild, preset_of()["variants"][1]], train={"max_steps": 12}
    )
    told = compare_here(preset, tmp_path)
    state = json.loads((tmp_path / "logs" / "t" / "state.json").read_text())
    assert {key: entry["status"] for key, entry in state["trials"].items()} == {
        "wild/1": "diverged",
        "wild/2": "diverged",
    }
    assert "not finite" in state["trials"]["wild/1"]["note"] and "wild, seed 1: diverged" in told
    assert (
        Project(tmp_path).finished("t/higher/2")
        and Project(tmp_path).events("run_end", "t/wild/2")[0]["reason"] == "diverged"
    )
    before = files(tmp_path)
    told = compare_here(preset, tmp_path)
    assert files(tmp_path) == before and "done already" in told and "wild, seed 1: diverged" in told
    tamed = merged(
        preset,
        {
            "variants": [
                preset["variants"][0],
                merged(wild, {"set": {"train": {"learning_rate": 0.001}}}),
            ]
        },
    )
    with pytest.raises(UserError, match=r"wild, seed 1: train.learning_rate was 100.0, is 0.001"):
        compare_here(tamed, tmp_path)


@pytest.mark.slow
def test_a_hopeless_variant_is_stopped_and_not_run_with_other_seeds(
    tmp_path: Path, no_plots: None
) -> None:
    """From a third of the budget on, compared with the baseline at the same tokens; never the
    baseline."""
    slow = {"name": "slow", "set": {"train": {"learning_rate": 1e-9}}}
    changes = {
        "max_steps": 12,
        "learning_rate": 0.005,
        "eval_every_tokens": 256,
        "schedule": {"type": "constant", "warmup": 0.0},
    }
    preset = preset_of(
        variants=[{"name": "as it is"}, slow], train=changes, compare={"stop_worse_by": 0.2}
    )
    told = compare_here(preset, tmp_path)
    project = Project(tmp_path)
    evals = project.events("eval", "t/slow/1")
    assert evals[-1]["tokens"] == project.events("run_end", "t/slow/1")[0]["tokens"] == 512, (
        "a third of 1536, not before"
    )
    assert project.events("run_end", "t/slow/1")[0]["reason"] == "interrupted"
    assert not (tmp_path / "logs" / "t" / "slow" / "2").exists() and project.finished(
        "t/as_it_is/2"
    )
    assert (
        "slow, seed 1: stopped early" in told
        and "nats worse than as it is after 512 of 1,536 tokens" in told
    )
    assert "slow, seed 2: stopped early: not run, as seed 1 was stopped early" in told
    before = files(tmp_path)
    assert "done already" in compare_here(preset, tmp_path) and files(tmp_path) == before
    compare_here(merged(preset, {"compare": {"stop_worse_by": None}}), tmp_path)
    assert project.steps("t/slow/1") == list(range(1, 13)), (
        "without the rule it goes on where it was stopped"
    )
    assert project.finished("t/slow/1") and project.finished("t/slow/2")


def test_a_verdict_that_a_kill_left_unrecorded_is_found_again() -> None:
    curve = BaselineCurve("base", [(100, 3.0), (200, 2.0), (300, 1.0)])
    stopping = EarlyStopping(0.5, curve)
    for tokens, value, hopeless in (
        (90, 9.0, False),
        (100, 3.4, False),
        (200, None, False),
        (300, 9.0, False),
        (200, 2.6, True),
    ):
        stopping.update({"event": "eval", "tokens": tokens, "cross_entropy": value})
        assert bool(stopping.verdict) == hopeless
    assert stopping.verdict == "0.600 nats worse than base after 200 of 300 tokens"
    lenient = EarlyStopping(None, BaselineCurve("base", [(300, 1.0)]))
    lenient.update({"event": "eval", "tokens": 200, "cross_entropy": 99.0})
    assert not lenient.verdict


def test_without_data_the_comparison_ends(tmp_path: Path, no_plots: None) -> None:
    with pytest.raises(NoData):
        compare_here(preset_of(data={"sources": [{"type": "text", "path": "nowhere"}]}), tmp_path)
