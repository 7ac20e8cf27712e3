"""A comparison whose trials diverge or are ended, and whose report cannot be written."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.comparison.outcome import read_outcome
from core.comparison.trials import Trial
from core.errors import UserError
from core.evaluation.held_out import Evaluator
from tests.jobs.comparisons import compare_here, job, preset_of
from tests.project import Project
from tests.training.runs import (
    Gone,
)


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
    assert project.finished("t/as_it_is/1")
    assert project.events("eval", "t/as_it_is/1")[-1]["step"] < 12
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
