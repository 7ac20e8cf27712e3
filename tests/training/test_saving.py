"""Nothing is lost: what is saved before what may fail, and what the next start makes of it.

Every trainer here is assembled from a preset, as main.py does it; trouble comes in through hooks.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from core.assembly.session import build_training
from core.checkpoint.store import CheckpointStore
from core.comparison.outcome import read_outcome
from core.comparison.trials import Trial
from core.data.pipeline import Dealer
from core.data.unlearned import Unlearned
from core.errors import NoData, UserError
from core.evaluation.held_out import Evaluator
from core.metrics.events import evaluation_is_missing
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.preview import resume_lines
from core.registry import Preset
from core.runtime import detect_runtime
from core.signals import STOP_SIGNALS, StopRequest, signals_held
from core.training.recovery import BAD_STEPS
from tests.data.corpus import Ranks
from tests.jobs.comparisons import compare_here, job, preset_of
from tests.project import Project, differences, merged, story, tiny_preset, train_here
from tests.training.test_trainer import EXACT, events, finish, limit_rows, poison, session

MEASURED = {
    "train": {
        "eval_tokens": 200,
        "eval_every_tokens": 512,
        "max_steps": 10,
        "checkpoint_every_steps": 4,
    }
}
"""An evaluation at steps 4, 8 and 10, each where a checkpoint is due."""


class Gone(BaseException):
    """The program is ended here, as a kill would."""


def slot(root: Path) -> dict[str, Any] | None:
    """The progress in the newest checkpoint."""
    state = CheckpointStore(root / "checkpoints", "t").load()[0]
    return None if state is None else state["progress"]


def told(root: Path) -> list[str]:
    """The warnings, but for the one that so little text holds less out than is asked for."""
    messages = [event["message"] for event in events(root, "warning")]
    return [message for message in messages if "train.eval_tokens" not in message]


def same_log(one: Path, other: Path) -> bool:
    """Every step, evaluation and sample once, with the same numbers."""
    kinds = {
        "step": ("loss", "grad_norm"),
        "eval": ("cross_entropy",),
        "sample": ("text",),
        "run_end": ("reason", "receipt"),
    }
    found = [
        [
            (kind, e["step"], *(e[key] for key in keys))
            for kind, keys in kinds.items()
            for e in events(root, kind)
        ]
        for root in (one, other)
    ]
    return found[0] == found[1]


# save first ---------------------------------------------------------------------------------------


def test_whatever_is_due_is_saved_before_anything_is_evaluated(tmp_path: Path) -> None:
    """On the disk, not only begun, at the end; begun, where training goes on."""
    built = session(tmp_path, **MEASURED)
    trainer, evaluate, seen = built.trainer, built.trainer.evaluate, []

    def look(*how: Any) -> Any:
        if trainer.progress.finished:
            assert trainer.store._thread is None
        trainer.store.wait()
        seen.append((trainer.progress.step, slot(tmp_path)["step"], slot(tmp_path)["finished"]))
        return evaluate(*how)

    trainer.evaluate = look
    finish(built)
    assert seen == [(4, 4, False), (8, 8, False), (10, 10, True)]


@pytest.mark.parametrize("part", ["evaluate", "show"])
def test_what_fails_in_looking_at_the_model_is_told_once_and_costs_nothing(
    part: str, tmp_path: Path
) -> None:
    straight, built = (
        session(tmp_path / "straight", **MEASURED),
        session(tmp_path / "failing", **MEASURED),
    )
    finish(straight)

    def fail(model: Any, _: Any) -> Any:
        model.eval()  # and never back
        raise IndexError("nothing to choose from {here}")

    setattr(built.trainer, part, fail)
    assert finish(built) == "max_steps"
    assert (
        differences(*(Project(tmp_path / name).checkpoint() for name in ("straight", "failing")))
        == []
    )
    what = {"evaluate": "evaluation", "show": "samples"}[part]
    assert told(tmp_path / "failing") == [
        f"{what} failed, the run goes on without: nothing to choose from {{here}}"
    ]
    assert [e["step"] for e in events(tmp_path / "failing", "sample")] == (
        [4, 8, 10] if part == "evaluate" else []
    )


def test_sampling_settings_that_no_float_holds_lose_no_run(tmp_path: Path) -> None:
    """Case 13: a temperature that divides scores to infinity. Nor does it lose the samples."""
    found = train_here(tiny_preset(generate={"temperature": 1e-40}), tmp_path)
    assert (
        found[-1]["reason"] == "max_steps"
        and slot(tmp_path)["finished"]
        and slot(tmp_path)["step"] == 5
    )
    assert len(events(tmp_path, "sample")) == 1 and told(tmp_path) == []


def test_an_end_without_its_evaluation_is_evaluated_by_the_next_start_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is ended in each part of the last evaluation; then it is as if nothing had
    happened, and then comes run 2."""
    finish(session(tmp_path / "straight", **MEASURED))
    preset = decode_preset(tiny_preset(**merged(EXACT, MEASURED)), Preset, "t", "t")
    for part in ("evaluate", "show"):
        root = tmp_path / part
        built = session(root, **MEASURED)
        trainer, whole = built.trainer, getattr(built.trainer, part)

        def end(*how: Any, trainer: Any = trainer, whole: Any = whole) -> Any:
            if trainer.progress.finished:
                raise Gone
            return whole(*how)

        setattr(trainer, part, end)
        with pytest.raises(Gone):
            finish(built)
        assert slot(root)["finished"] and not events(root, "run_end")
        line = resume_lines(preset, root)[-1]
        assert "evaluates run 1, which was trained to its end, step 10" in line
        built = session(root, **MEASURED)
        assert any("not evaluated" in note for note in built.notes)
        assert finish(built) == "max_steps" and same_log(tmp_path / "straight", root)
        assert (
            differences(*(Project(folder).checkpoint() for folder in (tmp_path / "straight", root)))
            == []
        )
        assert "starts run 2" in resume_lines(preset, root)[-1]
        assert session(root, **MEASURED).trainer.progress.run == 2


def test_an_evaluation_that_was_ended_is_made_again_where_training_goes_on(tmp_path: Path) -> None:
    """In the middle of a run: killed in the evaluation that follows a save, after the log has part
    of it."""
    finish(session(tmp_path / "straight", **MEASURED))
    root = tmp_path / "ended"
    for at, part in ((4, "evaluate"), (8, "show")):
        built = session(root, **MEASURED)
        trainer, whole = built.trainer, getattr(built.trainer, part)

        def end(*how: Any, trainer: Any = trainer, whole: Any = whole, at: int = at) -> Any:
            if trainer.progress.step == at:
                raise Gone
            return whole(*how)

        setattr(trainer, part, end)
        with pytest.raises(Gone):
            finish(built)
        assert slot(root)["step"] == at
    finish(session(root, **MEASURED))
    assert same_log(tmp_path / "straight", root)
    assert (
        differences(*(Project(folder).checkpoint() for folder in (tmp_path / "straight", root)))
        == []
    )


def test_who_asks_to_stop_does_not_wait_for_an_evaluation(tmp_path: Path) -> None:
    """In the middle of a run and at its end: saved, evaluated by the next start, and then as if
    nothing had happened."""
    finish(session(tmp_path / "straight", **MEASURED))
    root, reasons = tmp_path / "stopped", []
    for at in (4, 10, 99):
        built: list[Any] = []
        batches: list[int] = []

        def asked(built: list[Any] = built, batches: list[int] = batches, at: int = at) -> bool:
            if (evaluating := not built[0].trainer.model.training) and built[
                0
            ].trainer.progress.step == at:
                batches.append(1)
            return len(batches) > 0 and (evaluating or at < 10)

        built.append(session(root, asked, **MEASURED))
        reasons.append(finish(built[0]))
        assert len(batches) <= 1, "the first batch of an evaluation is the last"
        assert slot(root)["step"] == min(at, 10)
    assert reasons == ["interrupted", "interrupted", "max_steps"]
    ends = [(event["step"], event["reason"]) for event in events(root, "run_end")]
    assert ends == [(4, "interrupted"), (10, "interrupted"), (10, "max_steps")]
    evaluations = [
        [(e["step"], e["cross_entropy"]) for e in events(folder, "eval")]
        for folder in (tmp_path / "straight", root)
    ]
    assert evaluations[0] == evaluations[1]
    assert (
        differences(*(Project(folder).checkpoint() for folder in (tmp_path / "straight", root)))
        == []
    )


@pytest.mark.parametrize("moment", ["held-out rows", "samples"])
def test_who_asks_to_stop_waits_neither_for_rows_nor_for_samples(
    moment: str, tmp_path: Path
) -> None:
    """Asked while the first evaluation looks for its rows, or between two tokens of a sample: the
    next start evaluates."""
    settings = merged(MEASURED, {"generate": {"prompts": ["The ", "A "], "max_tokens": 60}})
    finish(session(tmp_path / "straight", **settings))
    root, asked = tmp_path / "stopped", []
    built = session(root, lambda: bool(asked), **settings)
    after = []
    if moment == "samples":

        def pass_made(module: Any, inputs: Any) -> None:
            if (
                not module.training
                and built.trainer.progress.step == 4
                and len(inputs[0].labels) == 1
            ):
                after.append(1)
                asked.extend([1] * (len(after) == 3))

        built.trainer.model.register_forward_pre_hook(pass_made)
    else:
        built.trainer.evaluate = lambda *how, evaluate=built.trainer.evaluate: (
            asked.append(1) or evaluate(*how)
        )
        built.trainer.model.register_forward_pre_hook(
            lambda module, _: None if module.training else after.append(1)
        )
    assert (
        finish(built) == "interrupted" and slot(root)["step"] == 4 and slot(root)["evaluation_due"]
    )
    assert len(after) == (3 if moment == "samples" else 0), "no pass more is made"
    finish(session(root, **settings))
    looked = [
        [
            (e["step"], e.get("cross_entropy"), e.get("text"))
            for kind in ("eval", "sample")
            for e in events(folder, kind)
        ]
        for folder in (tmp_path / "straight", root)
    ]
    assert looked[0] == looked[1]
    assert (
        differences(*(Project(folder).checkpoint() for folder in (tmp_path / "straight", root)))
        == []
    )


def test_what_the_log_says_of_an_evaluation(tmp_path: Path) -> None:
    """Missing only where the log ends at that step; a log that is gone says nothing."""
    log = tmp_path / "metrics.jsonl"
    step, over = (
        '{"event": "step", "step": 7}\n',
        '{"event": "run_end", "step": 7, "reason": "%s"}\n',
    )
    cases = {
        step: True,
        step + '{"event": "eval", "step": 7}\n{"event": "sample", "step": 7}\n': True,
        step + over % "interrupted": True,
        step + over % "max_steps": False,
        step + '{"event": "step", "step": 8}\n': False,
        step + over % "max_steps" + '{"event": "run_start", "step": 7}\n': False,
    }
    for text, missing in cases.items():
        log.write_text(text)
        assert evaluation_is_missing(log, 7) == missing, text
    log.unlink()
    assert not evaluation_is_missing(log, 7) and evaluation_is_missing(log, 0)
    os.mkfifo(log)
    assert not evaluation_is_missing(log, 7) and evaluation_is_missing(log, 0), (
        "a pipe hangs nobody"
    )
    log.unlink()  # a look at all logs follows each test


# stops --------------------------------------------------------------------------------------------


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
        trainer.settings = trainer.settings.model_copy(update={"checkpoint_every_steps": 5})
        trainer.log.sync = give_up
    else:
        next_step = trainer.loader.next_step
        trainer.loader.next_step = lambda *how: give_up() or next_step(*how)
    with pytest.raises(type(error)) as raised:
        finish(built)
    assert raised.value is error
    assert events(root, "run_end")[-1]["reason"] == "failed" and slot(root)["step"] == 5
    finish(session(root, **settings))
    assert (
        differences(*(Project(folder).checkpoint() for folder in (tmp_path / "straight", root)))
        == []
    )
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


# weights that are not finite ----------------------------------------------------------------------


@pytest.mark.skips_updates
def test_an_evaluation_waits_for_a_finite_step(tmp_path: Path) -> None:
    """It falls due among bad steps: weights are rolled back, then it is made, and the run ends as
    it would have."""
    built = session(
        tmp_path,
        **merged(
            MEASURED,
            {"train": {"max_steps": 14, "checkpoint_every_steps": 3, "eval_every_tokens": 768}},
        ),
    )
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
    assert any("weights are back" in message for message in told(tmp_path))


@pytest.mark.skips_updates
def test_an_evaluation_of_weights_that_are_not_finite_ends_nothing(tmp_path: Path) -> None:
    """They are ruined by the update after a finite step, so nothing waits: the samples cannot be
    drawn, and that is all."""
    built = session(
        tmp_path, **merged(MEASURED, {"train": {"max_steps": 14, "checkpoint_every_steps": 3}})
    )
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
    assert (
        sum("samples failed" in message and "not finite" in message for message in told(tmp_path))
        == 1
    )


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
    (back,) = [
        event for event in events(tmp_path, "warning") if "weights are back" in event["message"]
    ]
    assert back["step"] == 4 + BAD_STEPS - 1 and built[0].trainer.progress.skipped == BAD_STEPS


def test_a_mirror_that_cannot_be_made_is_told_and_the_run_is_saved(tmp_path: Path) -> None:
    """A folder in its place: set aside before the first step, and where it comes later, a warning;
    the run is finished."""
    mirror = tmp_path / "checkpoints" / "simple_lm_trained.pth"
    mirror.mkdir(parents=True)
    (mirror / "notes").write_text("somebody's")
    settings = merged(EXACT, {"lineage": "lm", "train": {"max_steps": 2}})
    train_here(tiny_preset(**settings), tmp_path)
    assert mirror.samefile(tmp_path / "checkpoints" / "lm_current.pth")
    assert (
        tmp_path / "checkpoints" / "simple_lm_trained.pth.damaged" / "notes"
    ).read_text() == "somebody's"
    built = session(tmp_path, **settings)
    mirror.unlink()
    mirror.mkdir()
    assert finish(built) == "max_steps"
    (warning,) = [e["message"] for e in Project(tmp_path).events("warning", "lm")]
    assert warning.startswith(
        "the checkpoint is saved, but simple_lm_trained.pth does not hold what lm_current.pth "
        "does: "
    )
    assert (
        Project(tmp_path).finished("lm")
        and Project(tmp_path).checkpoint(lineage="lm")["progress"]["run"] == 2
    )
    assert [path.name for path in mirror.parent.iterdir() if path.name.startswith(".")] == []


class TwoRanks(Single):
    """What a trainer asks of its ranks; gradients stay each one's own, as nothing here is about
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
    assert told(tmp_path) == ["process 1: a data worker was ended; it is started again"]
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
    assert sum("out of memory" in message for message in told(tmp_path / "full")) == 2


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
    (warning,) = told(tmp_path)
    assert "torch.compile failed, the run goes on without it" in warning and "killed" in warning
    assert Project(tmp_path).checkpoint()["compile_failed"] is True
    second = session(tmp_path, **settings)
    assert "failed earlier in this run" in second.start_event["compile"]
    finish(second)
    assert (
        second.trainer.model._compiled_call_impl is None
        and Project(tmp_path).checkpoint()["compile_failed"] is True
    )
    third = session(tmp_path, **settings)
    assert third.start_event["compile"].startswith("compiled from step")


# steps without anything to learn ------------------------------------------------------------------


def write_chats(root: Path, learned: Collection[int], count: int = 40) -> dict[str, Any]:
    """Rows of one conversation each, most of them longer than a row before the assistant says a
    word."""
    chats = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": (f"Hi {i}. " if i in learned else f"{i} " + "Listen to me. " * 100),
                },
                YES,
            ]
        }
        for i in range(count)
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    data = {
        "sources": [{"type": "chat", "path": "chats.jsonl"}],
        "packing": "padding",
        "lanes": 4,
        "min_text_length": 1,
    }
    return {"model": {"seq_length": 96}, "data": data}


YES = {"role": "assistant", "content": "Yes."}


def test_a_step_that_teaches_nothing_is_passed_over_and_counted(tmp_path: Path) -> None:
    """Case 02: the run goes on, says so once with an example, and a stop in between changes
    nothing."""
    train = {"max_steps": 6, "per_gpu_batch_size": 1}
    for name, stops in (("straight", (99,)), ("stopped", (2, 3, 99))):
        for stop_at in stops:
            root, built = tmp_path / name, []
            changes = write_chats(root, range(0, 40, 5)) | {
                "train": train,
                "tokenizer": {"type": "byte"},
            }
            built.append(
                session(root, lambda: built[0].trainer.progress.step >= stop_at, **changes)  # noqa: B023
            )
            finish(built[0])
    one, other = Project(tmp_path / "straight"), Project(tmp_path / "stopped")
    assert one.steps() == list(range(1, 7)) == other.steps()
    assert differences(one.checkpoint(), other.checkpoint()) == []
    passed_over = [event["passed_over"] for event in one.events("step")]
    assert passed_over == sorted(passed_over) and passed_over[-1] > 6
    saved, dealer = one.checkpoint(), Dealer(4, 42)
    begun = [
        dealer.lane(i) == int(lane)
        for lane, (following, _) in saved["data"]["lanes"].items()
        for i in range(following)
    ]
    ledger = saved["progress"]["ledger"]["chats"]
    assert (ledger["documents"], ledger["epochs"]) == (sum(begun), 1) and one.events("run_end")[-1][
        "ledger"
    ]["chats"] == ledger
    (warning,) = told(tmp_path / "straight")
    assert (
        "no token of it is learned" in warning
        and "Listen to m" in warning
        and "[[Yes" not in warning
    )


def test_data_that_teaches_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an example; before the first update nothing is saved, after it everything is."""
    monkeypatch.setattr("core.data.unlearned.MOST_TOKENS", 500)
    monkeypatch.setattr("core.data.unlearned.MOST_STEPS", 5)
    for name, learned in (("never", range(0)), ("first", [i for i in range(40) if i % 4])):
        with pytest.raises(
            UserError, match=r"no token of 5 steps in a row, [0-9,]+ tokens, is learned"
        ) as raised:
            train_here(
                tiny_preset(**write_chats(tmp_path / name, learned), train={"max_steps": 50}),
                tmp_path / name,
            )
        assert "Listen to m" in str(raised.value) and "[[Yes" not in str(raised.value)
    assert (
        slot(tmp_path / "never") is None
        and slot(tmp_path / "first")["step"] == Project(tmp_path / "first").steps()[-1] > 0
    )


def test_where_all_of_the_data_teaches_nothing_its_end_is_no_end_of_a_run() -> None:
    for learned, of_chance in ((False, False), (True, False), (False, True)):
        passed = Unlearned(learned, of_chance)
        passed.add(100)
        with (
            nullcontext()
            if learned or of_chance
            else pytest.raises(UserError, match="no token of 1 steps")
        ):
            passed.end()


def test_when_a_source_fails_in_mid_run_it_is_saved(tmp_path: Path) -> None:
    """NoData is one of the stops."""
    built = session(tmp_path, train={"max_steps": 1000, "per_gpu_batch_size": 16})
    built.trainer.model.after_optimizer_step = lambda: [
        path.unlink() for path in (tmp_path / "texts").iterdir()
    ]
    with pytest.raises(NoData):
        finish(built)
    assert slot(tmp_path)["step"] == built.trainer.progress.step > 0
    (tmp_path / "texts" / "again.txt").write_text(story(1, 400))
    assert not session(
        tmp_path, train={"max_steps": 1000, "per_gpu_batch_size": 16}
    ).trainer.progress.evaluation_due


# signals ------------------------------------------------------------------------------------------


def test_what_asks_the_program_to_stop_does_not_end_its_compiler() -> None:
    """A terminal sends Ctrl-C, and a dropped connection SIGHUP, to the whole group: the children go
    on, and this one is asked."""
    for number in STOP_SIGNALS:
        with StopRequest() as stop:
            with signals_held():
                child = subprocess.Popen(
                    [sys.executable, "-c", "print('begun', flush=True); input()"],
                    stdin=-1,
                    stdout=-1,
                )
                assert child.stdout is not None and child.stdout.readline() == b"begun\n"
                child.send_signal(number)
                os.kill(os.getpid(), number)
            assert stop(), "once what is held is let go"
            child.communicate(b"\n", timeout=60)
            assert child.returncode == 0, f"ended by {number}"
    assert len(STOP_SIGNALS) == 3


def test_a_signal_that_nohup_keeps_away_stays_away() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
    finally:
        signal.signal(signal.SIGHUP, before)


# comparisons --------------------------------------------------------------------------------------


@pytest.mark.skips_updates
def test_a_comparison_survives_what_its_trials_and_its_report_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant whose evaluations fall due while its weights are not finite is recorded as
    diverged; a report that cannot be written is told after the last trial; a trial that was ended
    before its last evaluation is evaluated, not counted without."""
    wild = {"name": "wild", "set": {"train": {"learning_rate": 100.0, "weight_decay": 100.0}}}
    calm = {"name": "calm", "set": {"train": {"learning_rate": 1e-4}}}
    train = {"max_steps": 12, "eval_every_tokens": 128}
    preset = preset_of(seeds=[1], variants=[{"name": "as it is"}, wild, calm], train=train)
    for place in ("core.reports.run_card.plot_losses", "core.reports.curves_masked.plot_masked"):
        monkeypatch.setattr(place, lambda *_: [])
    monkeypatch.setattr(job, "forget_peak_memory", lambda runtime: True)

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "write_report", no_room)
    evaluate = Evaluator.run

    def ended(self: Evaluator, model: Any, progress: float, *how: Any) -> Any:
        if progress == 1.0:
            raise Gone
        return evaluate(self, model, progress, *how)

    with monkeypatch.context() as patch, pytest.raises(Gone):
        patch.setattr(Evaluator, "run", ended)
        compare_here(preset, tmp_path)
    project = Project(tmp_path)
    assert (
        project.finished("t/as_it_is/1") and project.events("eval", "t/as_it_is/1")[-1]["step"] < 12
    )
    with pytest.raises(
        UserError, match=r"the report .* cannot be written: No space left on device"
    ):
        compare_here(preset, tmp_path)
    state = json.loads((tmp_path / "logs" / "t" / "state.json").read_text())
    assert {key: entry["status"] for key, entry in state["trials"].items()} == {
        "wild/1": "diverged"
    }
    assert project.finished("t/calm/1") and project.steps("t/as_it_is/1") == list(range(1, 13))
    assert [project.events("eval", f"t/{name}/1")[-1]["step"] for name in ("as_it_is", "calm")] == [
        12,
        12,
    ]
    assert "done already" in (
        monkeypatch.setattr(job, "write_report", lambda *_: None) or compare_here(preset, tmp_path)
    )


def test_a_trial_whose_last_evaluation_failed_has_no_numbers(tmp_path: Path) -> None:
    """Those of the evaluation before are of a model that was trained less than the others."""
    evaluation = {"event": "eval", "step": 4, "tokens": 400, "cross_entropy": 2.0}
    log = [
        {"event": "step", "step": 4, "tokens": 400},
        evaluation,
        {"event": "step", "step": 5, "tokens": 500},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    for status, metrics in (("running", {"cross_entropy": 2.0}), ("finished", {})):
        assert read_outcome(Trial("a", 1, {}, tmp_path, status)).metrics == metrics
