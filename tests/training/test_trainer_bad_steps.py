"""Steps that go wrong: what is skipped, what a roll-back brings back, and when a run gives up."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import Diverged
from core.training.recovery import BAD_STEPS, ROLL_BACKS
from tests.project import Project, skipped_updates
from tests.training.runs import equal, events, finish, poison, session


@pytest.mark.skips_updates
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    """No update, no after_optimizer_step, a warning; the next step goes on from the same weights
    with other data."""
    built = session(tmp_path, train={"max_steps": 4})
    updates: list[int] = []
    built.trainer.model.after_optimizer_step = lambda: updates.append(
        built.trainer.progress.step + 1
    )
    seen = poison(built, lambda step: step == 2)
    assert finish(built) == "max_steps"
    assert updates == [1, 3, 4]
    assert equal(seen[1], seen[2]) and not equal(seen[2], seen[3])
    assert [event["skipped"] for event in events(tmp_path, "step")] == [0, 1, 1, 1]
    # what fails every test that has not asked for it
    assert list(skipped_updates([tmp_path]).values()) == [1]
    skipped = [event["loss"] is None for event in events(tmp_path, "step")]
    assert skipped == [False, True, False, False]
    (warning,) = events(tmp_path, "warning")
    assert "step 2" in warning["message"] and "update skipped" in warning["message"]
    assert all(p.isfinite().all() for p in built.trainer.model.parameters())


@pytest.mark.skips_updates
def test_bad_steps_in_a_row_go_back_to_the_checkpoint(tmp_path: Path) -> None:
    """Weights and optimizer are those of the checkpoint, training goes on with later data and
    reaches its end."""
    built = session(tmp_path, train={"max_steps": 12, "checkpoint_every_steps": 3})
    seen = poison(built, lambda step: 5 <= step < 5 + BAD_STEPS)
    assert finish(built) == "max_steps"
    assert equal(seen[4], seen[8]) and not equal(seen[4], seen[3])  # skipped steps change nothing
    assert equal(seen[9], seen[3]), "step 10 must start from the checkpoint of step 3"
    assert built.trainer.progress.skipped == BAD_STEPS and built.trainer.progress.step == 12
    assert any(
        "weights are back at t_current.pth, step 3" in event["message"]
        for event in events(tmp_path, "warning")
    )
    assert [event["step"] for event in events(tmp_path, "step")] == list(range(1, 13))


@pytest.mark.skips_updates
def test_weights_that_are_at_fault_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    """A checkpoint that falls due in a bad stretch waits: it is what the roll-back would find."""
    built = session(tmp_path, train={"max_steps": 14, "checkpoint_every_steps": 2})
    updates: list[int] = []

    def ruin() -> None:
        updates.append(built.trainer.progress.step + 1)
        if len(updates) == 5:
            with torch.no_grad():
                built.trainer.model.embedding.weight.fill_(math.inf)

    built.trainer.model.after_optimizer_step = ruin
    assert finish(built) == "max_steps"
    assert updates == [1, 2, 3, 4, 5, 11, 12, 13, 14]
    assert built.trainer.progress.skipped == BAD_STEPS
    assert all(p.isfinite().all() for p in built.trainer.model.parameters())
    assert any("t_current.pth, step 4" in event["message"] for event in events(tmp_path, "warning"))


@pytest.mark.skips_updates
def test_a_run_that_stays_bad_diverges(tmp_path: Path) -> None:
    """After the last roll-back it stops with a clear message; the checkpoints hold good weights
    still."""
    built = session(tmp_path, train={"max_steps": 100, "checkpoint_every_steps": 3})
    seen = poison(built, lambda step: step >= 5)
    with pytest.raises(
        Diverged, match=r"not finite 5 times in a row .* Lower train\.learning_rate"
    ):
        finish(built)
    assert built.trainer.progress.skipped == BAD_STEPS * (ROLL_BACKS + 1)
    assert events(tmp_path, "run_end")[-1]["reason"] == "diverged"
    assert equal(seen[3], Project(tmp_path).checkpoint()["model"]), (
        "the weights of the last good checkpoint"
    )


@pytest.mark.skips_updates
def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    built = session(tmp_path, train={"max_steps": 100})
    poison(built, lambda step: True)
    with pytest.raises(Diverged):
        finish(built)
    assert built.trainer.progress.skipped == BAD_STEPS
    assert not list((tmp_path / "checkpoints").glob("*.pth"))


@pytest.mark.skips_updates
def test_going_back_takes_a_checkpoint_as_a_resumed_run_does(tmp_path: Path) -> None:
    """Since it was written heads came and went, and rows became longer: weights are back, and the
    run ends."""
    heads = ({"enable_policy": True}, {"enable_value": True})
    before, now = (
        {"model": {"seq_length": length}, "auxiliary": own} for length, own in zip((32, 64), heads)
    )
    finish(session(tmp_path, **before, train={"max_steps": 3}))
    built = session(tmp_path, **now, train={"max_steps": 9})
    seen = poison(built, lambda step: 5 <= step < 5 + BAD_STEPS)
    assert finish(built) == "max_steps"
    assert any(
        "weights are back at t_current.pth, step 3" in event["message"]
        for event in events(tmp_path, "warning")
    )
    saved = Project(tmp_path).checkpoint("prev")["model"]
    assert all(
        torch.equal(value, saved[name])
        for name, value in seen[6].items()
        if name != "pos_embedding.weight"
    )


@pytest.mark.skips_updates
def test_where_what_is_new_is_at_fault_there_is_no_going_back(tmp_path: Path) -> None:
    """A head that the checkpoint does not have, with weights that are not finite: told, without a
    traceback."""
    finish(session(tmp_path, train={"max_steps": 3}))
    built = session(tmp_path, auxiliary={"enable_value": True}, train={"max_steps": 20})

    def ruin() -> None:
        with torch.no_grad():
            for p in built.trainer.objective.parameters():
                p.fill_(math.nan)

    built.trainer.model.after_optimizer_step = ruin
    with pytest.raises(
        Diverged, match=r"weights that t_current\.pth lacks \(auxiliary head value is new"
    ):
        finish(built)


@pytest.mark.skips_updates
def test_a_run_does_not_end_amid_bad_steps(tmp_path: Path) -> None:
    """Its end waits until it is known whether the weights are at fault: one finite step more, or a
    roll-back; or it diverged."""
    built = session(tmp_path / "one", train={"max_steps": 4})
    poison(built, lambda step: step == 4)
    assert finish(built) == "max_steps" and built.trainer.progress.step == 5
    built = session(tmp_path / "back", train={"max_steps": 6, "checkpoint_every_steps": 3})
    seen = poison(built, lambda step: step >= 5)
    assert finish(built) == "max_steps" and built.trainer.progress.step == 4 + BAD_STEPS
    assert equal(seen[3], Project(tmp_path / "back").checkpoint()["model"]), "the weights of step 3"
    built = session(tmp_path / "ruined", train={"max_steps": 5})
    poison(built, lambda step: step >= 3)
    with pytest.raises(Diverged):
        finish(built)
    assert not Project(tmp_path / "ruined").finished()


@pytest.mark.skips_updates
def test_stops_amid_bad_steps_leave_what_a_roll_back_needs(tmp_path: Path) -> None:
    """Each stop saves to where the one before it did; and to go back passes over it."""
    settings = {"train": {"max_steps": 12, "checkpoint_every_steps": 2}}
    for stop_at in (6, 7, 8, 99):
        built: list[Any] = []
        built.append(
            session(tmp_path, lambda: built[0].trainer.progress.step >= stop_at, **settings)  # noqa: B023
        )
        poison(built[0], lambda step: 5 <= step < 5 + BAD_STEPS)
        finish(built[0])
        if stop_at < 99:
            slots = ("current", "prev", "prev2")
            saved = [Project(tmp_path).checkpoint(slot)["progress"] for slot in slots]
            assert [progress["step"] for progress in saved] == [stop_at, 4, 2]
            assert saved[0]["bad_in_a_row"] == stop_at - 4
    assert any(
        "weights are back at t_prev.pth, step 4" in event["message"]
        for event in events(tmp_path, "warning")
    )
