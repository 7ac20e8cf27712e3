"""Initial weights in comparisons, in trained models that are looked at, and on several ranks."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.weights import fraction_of
from core.comparison.fairness import unfairness
from core.comparison.outcome import Outcome
from core.comparison.trials import Trial, plan
from core.data.tokenizer_build import build_tokenizer
from core.errors import UserError
from core.jobs.compare import preview_compare
from core.models.simple_lm import SimpleLM
from core.parallel.ranks import on_rank_zero, rank_zero_first
from core.preset.decode import decode_preset
from core.preset.settings import TokenizerSettings
from core.registry import Preset
from core.runtime import detect_runtime
from core.trained import load_trained
from tests.checkpoint.conftest import SOURCE
from tests.checkpoint.test_weights import (
    assembled,
    long_keys,
    same,
    short_keys,
    source_state,
)
from tests.project import Project, merged, train_here

pytestmark = pytest.mark.usefixtures("no_plots")


def test_every_trial_starts_from_the_same_weights(root: Path) -> None:
    variants = [{"name": "tuned"}, {"name": "high", "set": {"train": {"learning_rate": 0.1}}}]
    variants.append({"name": "from nothing", "set": {"init_from": None}})
    preset = decode_preset(
        merged(
            SOURCE,
            {
                "job": "compare",
                "init_from": "t",
                "variants": variants,
                "seeds": [1],
                "train": {"eval_tokens": 50},
            },
        ),
        Preset,
        "c",
        "c",
    )
    trials = plan(preset, root)
    sessions = [assembled(root, trial.preset) for trial in trials]
    states = [session.trainer.model.state_dict() for session in sessions]
    assert [same(state, source_state(root)["model"]) for state in states] == [True, True, False]
    assert "each starts from the weights of t" in preview_compare(preset, root)


def test_weights_trained_further_between_trials_are_told() -> None:
    presets = {name: {"init_from": "t"} for name in ("a", "b")}
    outcomes = [
        Outcome(
            Trial(name, 1, presets[name], Path(), "finished"),
            init_from=f"t_current.pth, step {step}",
        )
        for name, step in (("a", 3), ("b", 6))
    ]
    (told,) = unfairness(presets, outcomes, "cross_entropy", "cross_entropy")
    assert told.startswith(
        "Trials did not begin with the same weights of t (t_current.pth, step 3; t_current.pth, "
        "step 6)"
    )
    assert unfairness(presets, [outcomes[0], outcomes[0]], "cross_entropy", "cross_entropy") == []


# a trained model ----------------------------------------------------------------------------------


@pytest.fixture
def told_progress(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    told: list[float] = []
    monkeypatch.setattr(
        SimpleLM, "set_progress", lambda self, progress: told.append(progress), raising=False
    )
    return told


def loaded(root: Path, **changes: Any) -> Any:
    return load_trained(
        decode_preset(merged(SOURCE, changes), Preset, "b", "b"), root, detect_runtime()
    )


@pytest.mark.parametrize(
    "how", [{"init_from": "t"}, {"lineage": "t"}], ids=["init_from", "own lineage"]
)
def test_a_trained_model(how: dict, root: Path, told_progress: list[float]) -> None:
    """As it was saved: weights, tokenizer, and the section `model` of the preset it was trained
    with."""
    found = loaded(root, **how, model={"num_layers": 4, "seq_length": 16}, train={"seed": 5})
    assert same(found.model.state_dict(), source_state(root)["model"]) and not found.model.training
    assert found.tokenizer.state() == source_state(root)["tokenizer"]
    assert (
        found.preset.model.num_layers,
        found.preset.model.seq_length,
        found.preset.train.seed,
    ) == (2, 32, 5)
    assert (found.where, found.step) == ("t_current.pth", 3)
    (note,) = found.notes
    assert note.startswith("the model is as in t_current.pth, not as the preset says: ")
    assert "model.num_layers was 2, is 4" in note and "model.seq_length was 32, is 16" in note
    assert told_progress == [1.0]


def test_a_trained_model_is_where_its_schedules_were(
    root: Path, told_progress: list[float]
) -> None:
    """Stopped half way; and of checkpoints that do not say so yet, the end if the run was over."""
    state = source_state(root)
    for progress in ({"fraction": 0.5, "finished": False}, {"finished": True}, {"finished": False}):
        old = {key: value for key, value in state["progress"].items() if key != "fraction"}
        torch.save({**state, "progress": {**old, **progress}}, root / "old.pth")
        loaded(root, init_from="old.pth")
    assert told_progress == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("write", [short_keys, long_keys])
def test_a_published_model(write: Callable, root: Path, told_progress: list[float]) -> None:
    """The preset says what it is; the temperature in the file says how far it had come."""
    write(source_state(root), root / "portable.pt")
    found = loaded(root, init_from="portable.pt")
    assert same(found.model.state_dict(), source_state(root)["model"])
    assert (found.where, found.step, found.notes) == ("portable.pt", 7, [])
    assert found.tokenizer.state() == build_tokenizer(TokenizerSettings(type="byte"), []).state()
    assert told_progress == [pytest.approx(0.5)]
    assert fraction_of(1.0) == 0.0 and fraction_of(0.1) == fraction_of(0.05) == 1.0


def test_nothing_trained_yet(root: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"checkpoints/b_current.pth is not there: run a preset of lineage \"b\" first",
    ):
        loaded(root)


@pytest.mark.slow
def test_two_ranks_start_from_the_same_weights(
    trained: Path, make_project: Callable[..., Project]
) -> None:
    """The first losses are those of one rank with twice the accumulation."""
    preset = merged(SOURCE, {"init_from": "t", "train": {"max_steps": 2, "precision": "fp32"}})
    project = make_project({"b": preset})
    shutil.copytree(trained / "checkpoints", project.folder / "checkpoints")
    result = project.run(
        "b",
        command=[
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
        ],
    )
    assert result.code == 0 and "weights from t_current.pth, step 3" in result.text, result.text
    train_here(merged(preset, {"train": {"accumulation_steps": 2}}), project.folder, "one")
    two, one = (
        [event["loss"] for event in project.events("step", lineage)] for lineage in ("b", "one")
    )
    assert len(two) == 2 and two == pytest.approx(one, abs=1e-5)


# ranks --------------------------------------------------------------------------------------------


class Rank:
    """One of two ranks, which hears what rank 0 has said."""

    world_size = 2

    def __init__(self, rank: int, said: list[Any]):
        self.rank, self._said = rank, said

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self._said.append(value)
        return self._said[-1]


def test_a_mistake_of_rank_zero_is_everybodys() -> None:
    def fail() -> None:
        raise UserError("no such file")

    for together in (on_rank_zero, rank_zero_first):
        said: list[Any] = []
        for rank in (0, 1):
            with pytest.raises(UserError, match="no such file"):
                together(Rank(rank, said), fail)
    said, calls = [], []
    assert [on_rank_zero(Rank(rank, said), lambda: calls.append(0) or 5) for rank in (0, 1)] == [
        5,
        5,
    ] and len(calls) == 1
    said, calls = [], []
    assert [rank_zero_first(Rank(rank, said), lambda: calls.append(0) or 5) for rank in (0, 1)] == [
        5,
        5,
    ] and len(calls) == 2
