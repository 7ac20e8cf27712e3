"""Nothing is lost: what is saved before what may fail, and what the next start makes of it.

Every trainer here is assembled from a preset, as main.py does it; trouble comes in through hooks.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from core.metrics.events import evaluation_is_missing
from core.preset.decode import decode_preset
from core.preview import resume_lines
from core.registry import Preset
from tests.project import merged, tiny_preset, train_here
from tests.training.runs import (
    EXACT,
    MEASURED,
    Gone,
    assert_same_checkpoint,
    events,
    finish,
    same_log,
    session,
    slot,
    warnings_of,
)


def test_whatever_is_due_is_saved_before_anything_is_evaluated(tmp_path: Path) -> None:
    """On the disk, not only begun, at the end; begun, where training goes on."""
    built = session(tmp_path, **MEASURED)
    trainer, inspection, seen = built.trainer, built.trainer.inspector.inspection, []
    evaluate = inspection.evaluate

    def look(*how: Any) -> Any:
        if trainer.progress.finished:
            assert trainer.store._thread is None
        trainer.store.wait()
        seen.append((trainer.progress.step, slot(tmp_path)["step"], slot(tmp_path)["finished"]))
        return evaluate(*how)

    inspection.evaluate = look
    finish(built)
    assert seen == [(4, 4, False), (8, 8, False), (10, 10, True)]


@pytest.mark.parametrize("part", ["evaluate", "show"])
def test_what_fails_in_looking_at_the_model_is_told_once_and_costs_nothing(
    part: str, tmp_path: Path
) -> None:
    straight = session(tmp_path / "straight", **MEASURED)
    built = session(tmp_path / "failing", **MEASURED)
    finish(straight)

    def fail(model: Any, _: Any) -> Any:
        model.eval()  # and never back
        raise IndexError("nothing to choose from {here}")

    setattr(built.trainer.inspector.inspection, part, fail)
    assert finish(built) == "max_steps"
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "failing")
    what = {"evaluate": "evaluation", "show": "samples"}[part]
    assert warnings_of(tmp_path / "failing") == [
        f"{what} failed, the run goes on without: nothing to choose from {{here}}"
    ]
    assert [e["step"] for e in events(tmp_path / "failing", "sample")] == (
        [4, 8, 10] if part == "evaluate" else []
    )


def test_sampling_settings_that_no_float_holds_lose_no_run(tmp_path: Path) -> None:
    """Case 13: a temperature that divides scores to infinity. Nor does it lose the samples."""
    found = train_here(tiny_preset(generate={"temperature": 1e-40}), tmp_path)
    assert found[-1]["reason"] == "max_steps"
    assert slot(tmp_path)["finished"] and slot(tmp_path)["step"] == 5
    assert len(events(tmp_path, "sample")) == 1 and warnings_of(tmp_path) == []


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
        trainer = built.trainer
        whole = getattr(trainer.inspector.inspection, part)

        def end(*how: Any, trainer: Any = trainer, whole: Any = whole) -> Any:
            if trainer.progress.finished:
                raise Gone
            return whole(*how)

        setattr(trainer.inspector.inspection, part, end)
        with pytest.raises(Gone):
            finish(built)
        assert slot(root)["finished"] and not events(root, "run_end")
        line = resume_lines(preset, root)[-1]
        assert "evaluates run 1, which was trained to its end, step 10" in line
        built = session(root, **MEASURED)
        assert any("not evaluated" in note for note in built.notes)
        assert finish(built) == "max_steps" and same_log(tmp_path / "straight", root)
        assert_same_checkpoint(tmp_path / "straight", root)
        assert "starts run 2" in resume_lines(preset, root)[-1]
        assert session(root, **MEASURED).trainer.progress.run == 2


def test_an_evaluation_that_was_ended_is_made_again_where_training_goes_on(tmp_path: Path) -> None:
    """In the middle of a run: killed in the evaluation that follows a save, after the log has part
    of it."""
    finish(session(tmp_path / "straight", **MEASURED))
    root = tmp_path / "ended"
    for at, part in ((4, "evaluate"), (8, "show")):
        built = session(root, **MEASURED)
        trainer = built.trainer
        whole = getattr(trainer.inspector.inspection, part)

        def end(*how: Any, trainer: Any = trainer, whole: Any = whole, at: int = at) -> Any:
            if trainer.progress.step == at:
                raise Gone
            return whole(*how)

        setattr(trainer.inspector.inspection, part, end)
        with pytest.raises(Gone):
            finish(built)
        assert slot(root)["step"] == at
    finish(session(root, **MEASURED))
    assert same_log(tmp_path / "straight", root)
    assert_same_checkpoint(tmp_path / "straight", root)


def test_who_asks_to_stop_does_not_wait_for_an_evaluation(tmp_path: Path) -> None:
    """In the middle of a run and at its end: saved, evaluated by the next start, and then as if
    nothing had happened."""
    finish(session(tmp_path / "straight", **MEASURED))
    root, reasons = tmp_path / "stopped", []
    for at in (4, 10, 99):
        built: list[Any] = []
        batches: list[int] = []

        def asked(built: list[Any] = built, batches: list[int] = batches, at: int = at) -> bool:
            trainer = built[0].trainer
            evaluating = not trainer.model.training
            if evaluating and trainer.progress.step == at:
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
    assert_same_checkpoint(tmp_path / "straight", root)


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
            one_row = len(inputs[0].labels) == 1
            if not module.training and built.trainer.progress.step == 4 and one_row:
                after.append(1)
                asked.extend([1] * (len(after) == 3))

        built.trainer.model.register_forward_pre_hook(pass_made)
    else:
        built.trainer.inspector.inspection.evaluate = (
            lambda *how, evaluate=built.trainer.inspector.inspection.evaluate: (
                asked.append(1) or evaluate(*how)
            )
        )
        built.trainer.model.register_forward_pre_hook(
            lambda module, _: None if module.training else after.append(1)
        )
    assert finish(built) == "interrupted"
    assert slot(root)["step"] == 4 and slot(root)["evaluation_due"]
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
    assert_same_checkpoint(tmp_path / "straight", root)


def test_what_the_log_says_of_an_evaluation(tmp_path: Path) -> None:
    """Missing only where the log ends at that step; a log that is gone says nothing."""
    log = tmp_path / "metrics.jsonl"
    step = '{"event": "step", "step": 7}\n'
    over = '{"event": "run_end", "step": 7, "reason": "%s"}\n'
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
