"""Whatever stops a run, or gets in its way: it is saved, and the next start goes on exactly."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from core.assembly.session import build_training
from core.errors import NoData, UserError
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from core.training.recovery import BAD_STEPS
from tests.data.ranks import Ranks
from tests.project import Project, merged, story, tiny_preset, train_here
from tests.training.runs import (
    EXACT,
    MEASURED,
    assert_same_checkpoint,
    events,
    finish,
    limit_rows,
    poison,
    session,
    slot,
    warnings_of,
)


@pytest.mark.parametrize("moment", ["forward", "reading", "saving"])
@pytest.mark.parametrize(
    "error", [RuntimeError("a kernel gave up"), UserError("a row that nobody can read")]
)
def test_every_stop_saves_and_the_next_start_goes_on_exactly(
    moment: str, error: Exception, tmp_path: Path
) -> None:
    """Whatever ends it, at whatever moment between two updates: raised, saved, and resumed bit for
    bit, nothing left out."""
    settings = {"train": {"max_steps": 8}}
    finish(session(tmp_path / "straight", **settings))
    root = tmp_path / "stopped"
    built = session(root, **settings)
    trainer = built.trainer

    failures = [error]

    def give_up(*_: Any) -> None:
        if trainer.progress.step == 5 and failures:
            raise failures.pop()

    if moment == "forward":
        trainer.model.register_forward_pre_hook(give_up)
    elif moment == "saving":
        trainer.saver.is_due_at = lambda run_step: run_step % 5 == 0
        trainer.log.sync = give_up
    else:
        next_step = trainer.loader.next_step
        trainer.loader.next_step = lambda *how: give_up() or next_step(*how)
    with pytest.raises(type(error)) as raised:
        finish(built)
    assert raised.value is error
    assert events(root, "run_end")[-1]["reason"] == "failed" and slot(root)["step"] == 5
    finish(session(root, **settings))
    assert_same_checkpoint(tmp_path / "straight", root)
    assert Project(root).steps() == list(range(1, 9))


def test_an_update_that_was_half_made_is_not_saved(tmp_path: Path) -> None:
    built = session(tmp_path, train={"max_steps": 8, "checkpoint_every_steps": 2})
    step, trainer = built.trainer.optimizer.step, built.trainer

    def fail_half_way(factor: float) -> None:
        if trainer.progress.step == 5:
            with torch.no_grad():
                trainer.model.embedding.weight.add_(1.0)
            raise RuntimeError("in the middle of an update")
        step(factor)

    trainer.optimizer.step = fail_half_way
    with pytest.raises(RuntimeError, match="in the middle"):
        finish(built)
    assert slot(tmp_path)["step"] == 4


def test_before_the_first_update_there_is_nothing_to_save(tmp_path: Path) -> None:
    """A checkpoint of step 0 would only hold on to a model that does not fit, or to a tokenizer of
    data that is mended next."""
    built = session(tmp_path)
    limit_rows(built, 0)
    with pytest.raises(UserError, match="not even one row fits"):
        finish(built)
    assert slot(tmp_path) is None


def test_when_a_source_fails_in_mid_run_it_is_saved(tmp_path: Path) -> None:
    """NoData is one of the stops."""
    built = session(tmp_path, train={"max_steps": 1000, "per_gpu_batch_size": 16})
    texts = tmp_path / "texts"
    built.trainer.model.after_optimizer_step = lambda: [path.unlink() for path in texts.iterdir()]
    with pytest.raises(NoData):
        finish(built)
    assert slot(tmp_path)["step"] == built.trainer.progress.step > 0
    (texts / "again.txt").write_text(story(1, 400))
    again = session(tmp_path, train={"max_steps": 1000, "per_gpu_batch_size": 16})
    assert not again.trainer.progress.evaluation_due


# weights that are not finite ----------------------------------------------------------------------


@pytest.mark.skips_updates
def test_an_evaluation_waits_for_a_finite_step(tmp_path: Path) -> None:
    """It falls due among bad steps: weights are rolled back, then it is made, and the run ends as
    it would have."""
    train = {"max_steps": 14, "checkpoint_every_steps": 3, "eval_every_tokens": 768}
    built = session(tmp_path, **merged(MEASURED, {"train": train}))
    updates: list[int] = []

    def ruin() -> None:
        updates.append(built.trainer.progress.step + 1)
        if len(updates) == 5:
            with torch.no_grad():
                built.trainer.model.embedding.weight.fill_(math.nan)

    built.trainer.model.after_optimizer_step = ruin
    assert finish(built) == "max_steps"
    # after the second roll-back of two: step 5 ruins what step 6's evaluation and save would have
    # met
    assert [e["step"] for e in events(tmp_path, "eval")] == [10, 12, 14]
    assert all(math.isfinite(e["cross_entropy"]) for e in events(tmp_path, "eval"))
    assert any("weights are back" in message for message in warnings_of(tmp_path))


@pytest.mark.skips_updates
def test_an_evaluation_of_weights_that_are_not_finite_ends_nothing(tmp_path: Path) -> None:
    """They are ruined by the update after a finite step, so nothing waits: the samples cannot be
    drawn, and that is all."""
    train = {"max_steps": 14, "checkpoint_every_steps": 3}
    built = session(tmp_path, **merged(MEASURED, {"train": train}))
    updates: list[int] = []

    def ruin() -> None:
        updates.append(built.trainer.progress.step + 1)
        if updates[-1] == 4:
            with torch.no_grad():
                built.trainer.model.embedding.weight.fill_(math.nan)

    built.trainer.model.after_optimizer_step = ruin
    assert finish(built) == "max_steps"
    ruined, *others = events(tmp_path, "eval")
    assert ruined["step"] == 4 and ruined["cross_entropy"] is None
    assert others and all(math.isfinite(e["cross_entropy"]) for e in others)
    failed = [message for message in warnings_of(tmp_path) if "samples failed" in message]
    assert sum("not finite" in message for message in failed) == 1


@pytest.mark.skips_updates
def test_bad_steps_are_counted_on_after_a_stop(tmp_path: Path) -> None:
    """Three before it and two after it are five in a row."""
    settings = {"train": {"max_steps": 12, "checkpoint_every_steps": 3}}
    for stop_at in (7, 99):
        built: list[Any] = []
        built.append(
            session(tmp_path, lambda: built[0].trainer.progress.step >= stop_at, **settings)  # noqa: B023
        )
        poison(built[0], lambda step: 5 <= step < 5 + BAD_STEPS)
        finish(built[0])
    (back,) = [e for e in events(tmp_path, "warning") if "weights are back" in e["message"]]
    assert back["step"] == 4 + BAD_STEPS - 1 and built[0].trainer.progress.skipped == BAD_STEPS


# the disk, and other ranks ------------------------------------------------------------------------


def test_a_mirror_that_cannot_be_made_is_told_and_the_run_is_saved(tmp_path: Path) -> None:
    """A folder in its place: set aside before the first step, and where it comes later, a warning;
    the run is finished."""
    mirror = tmp_path / "checkpoints" / "simple_lm_trained.pth"
    mirror.mkdir(parents=True)
    (mirror / "notes").write_text("somebody's")
    settings = merged(EXACT, {"lineage": "lm", "train": {"max_steps": 2}})
    train_here(tiny_preset(**settings), tmp_path)
    assert mirror.samefile(tmp_path / "checkpoints" / "lm_current.pth")
    aside = mirror.with_name("simple_lm_trained.pth.damaged")
    assert (aside / "notes").read_text() == "somebody's"
    built = session(tmp_path, **settings)
    mirror.unlink()
    mirror.mkdir()
    assert finish(built) == "max_steps"
    (warning,) = [e["message"] for e in Project(tmp_path).events("warning", "lm")]
    assert warning.startswith(
        "the checkpoint is saved, but simple_lm_trained.pth does not hold what lm_current.pth "
        "does: "
    )
    assert Project(tmp_path).finished("lm")
    assert Project(tmp_path).checkpoint(lineage="lm")["progress"]["run"] == 2
    assert [path.name for path in mirror.parent.iterdir() if path.name.startswith(".")] == []


class TwoRanks(Single):
    """The ranks as a trainer knows them; gradients are not shared, as nothing here is about
    them."""

    def __init__(self, rank: Any):
        self.rank, self.world_size = rank.rank, rank.world_size
        self.sum, self.gather, self.broadcast = rank.sum, rank.gather, rank.broadcast


def test_what_another_rank_alone_meets_is_told_in_the_log(tmp_path: Path) -> None:
    """A worker that was replaced there, a file that only its lanes met: once, with the rank; the
    log is rank 0's."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(story(number))
    preset = decode_preset(tiny_preset(**EXACT), Preset, "t", "t")

    def job(rank: Any) -> None:
        built = build_training(
            preset, detect_runtime(), TwoRanks(rank), tmp_path, lambda *_: [], lambda: False
        )
        if rank.rank == 1:
            built.trainer.loader.warnings.append("a data worker was ended; it is started again")
            built.trainer.loader.skipped[("texts", "a.txt", "has no text")] = False
        assert finish(built) == "max_steps"

    Ranks(2).run(job)
    assert warnings_of(tmp_path) == ["process 1: a data worker was ended; it is started again"]
    assert [(e["source"], e["file"], e["reason"]) for e in events(tmp_path, "skipped")] == [
        ("texts", "a.txt", "has no text")
    ]


# memory and the compiler --------------------------------------------------------------------------


def test_memory_that_runs_out_in_mid_run_takes_smaller_micro_batches(tmp_path: Path) -> None:
    """The step is made once more, of the same rows; the run is the same but for the order in which
    floats are added."""
    settings = {"train": {"per_gpu_batch_size": 8, "max_steps": 6}, "model": {"dropout": 0.0}}
    finish(session(tmp_path / "plain", **settings))
    built = session(tmp_path / "full", **settings)

    def hook(module: Any, inputs: Any) -> None:
        if built.trainer.progress.step == 3 and len(inputs[0].labels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    built.trainer.model.register_forward_pre_hook(hook)
    assert finish(built) == "max_steps" and built.trainer.passes.rows_at_once == 2
    losses = [[e["loss"] for e in events(tmp_path / name, "step")] for name in ("plain", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 6
    assert sum("out of memory" in message for message in warnings_of(tmp_path / "full")) == 2


def breaks(at: int, built: Any) -> Any:
    """A compiler that fails from that step on."""

    def compiler(graph: Any, inputs: Any) -> Any:
        if built.trainer.progress.step >= at:
            raise RuntimeError("the compiler's child was killed")
        return graph.forward

    return lambda: type(built.trainer.model).compile(
        built.trainer.model, backend=compiler, dynamic=False
    )


def test_a_compiler_that_fails_is_left_out_and_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint says what was really run: the run that goes on does not compile, the next run
    tries again."""
    monkeypatch.setattr("core.training.passes.shutil.which", lambda name: f"/usr/bin/{name}")
    settings = {"train": {"max_steps": 6, "compile": "always"}}
    built: list[Any] = []
    built.append(session(tmp_path, lambda: built[0].trainer.progress.step >= 4, **settings))
    built[0].trainer.model.compile = breaks(0, built[0])
    assert finish(built[0]) == "interrupted"
    (warning,) = warnings_of(tmp_path)
    assert "torch.compile failed, the run goes on without it" in warning and "killed" in warning
    assert Project(tmp_path).checkpoint()["compile_failed"] is True
    second = session(tmp_path, **settings)
    assert "failed earlier in this run" in second.start_event["compile"]
    finish(second)
    assert second.trainer.model._compiled_call_impl is None
    assert Project(tmp_path).checkpoint()["compile_failed"] is True
    third = session(tmp_path, **settings)
    assert third.start_event["compile"].startswith("compiled from step")
