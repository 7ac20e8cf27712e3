"""The trials of a comparison as earlier starts have left them.

In:    a preset of job `compare`; checkpoints, logs and state.json of its trials
Out:   the trials with their status; UserError where what was left belongs to other trials
State: none; nothing is written
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from core.checkpoint.slots import CheckpointStore
from core.checkpoint.state import NewestState
from core.comparison.trials import Trial, plan, read_outcomes, trial_changes
from core.errors import UserError
from core.metrics.events import LOG, evaluation_is_missing
from core.preset.base import PresetBase

SHOWN_REASONS = 4
"""A refusal gives the reason for so many trials, and only counts the others."""


def standing_trials(preset: PresetBase, root: Path, world_size: int | None = None) -> list[Trial]:
    """Return every trial with the status that earlier starts gave it.

    Raises UserError when the trials they left have other settings, have lost their logs, or were
    trained on another number of processes.

    world_size   processes of this start; None for a preview
    """
    outcomes = read_outcomes(root / "logs" / preset.lineage, world_size or 1)
    trials: list[Trial] = []
    changed: list[tuple[Trial, str]] = []
    lost: list[tuple[Trial, str]] = []
    for trial in plan(preset, root):
        newest = trial_store(root, trial).peek()
        outcome = outcomes.trials.get(trial.key)
        trained: Any = outcome["preset"] if outcome else newest["preset"] if newest else None
        if trained is not None and (changes := trial_changes(trained, trial.preset)):
            changed.append((trial, "; ".join(changes)))
        if outcome and _still_holds(outcome, preset):
            trial = replace(trial, status=outcome["status"], note=outcome["note"])
        elif newest is not None:
            log_file = trial.folder / LOG
            ended = _is_trained(newest, trial)
            if ended and not log_file.is_file():
                lost.append((trial, f"its log {log_file} is gone"))
            evaluated = not _lacks_evaluation(newest, log_file)
            trial = replace(trial, status="finished" if ended and evaluated else "running")
        trials.append(trial)
    _refuse(preset, changed, lost)
    begun = any(trial.status != "waiting" for trial in trials)
    if begun and world_size is not None and outcomes.world_size != world_size:
        raise UserError(
            f"this comparison was begun on {outcomes.world_size} processes and this is "
            f"{world_size}: a step would have another number of rows. Start it on "
            f'{outcomes.world_size}, or give the preset another "lineage".'
        )
    return stop_hopeless_variants(trials, preset.compare.stop_worse_by)


def stop_hopeless_variants(trials: list[Trial], stop_worse_by: float | None) -> list[Trial]:
    """Mark the trials left of a variant that was stopped early with one seed as stopped, too."""
    if stop_worse_by is None:
        return trials
    stopped = {
        trial.variant: trial.seed for trial in reversed(trials) if trial.status == "stopped early"
    }

    def judged(trial: Trial) -> Trial:
        if trial.done or trial.variant not in stopped:
            return trial
        note = f"not run, as seed {stopped[trial.variant]} was stopped early"
        return replace(trial, status="stopped early", note=note)

    return [judged(trial) for trial in trials]


def trial_store(root: Path, trial: Trial) -> CheckpointStore:
    """Return the store of a trial's checkpoints."""
    return CheckpointStore(root / "checkpoints", trial.preset["lineage"])


def _still_holds(outcome: dict[str, Any], preset: PresetBase) -> bool:
    """Tell whether a recorded outcome counts: one that was stopped early does while that rule is
    on."""
    return outcome["status"] == "diverged" or preset.compare.stop_worse_by is not None


def _is_trained(newest: NewestState, trial: Trial) -> bool:
    progress = newest["progress"]
    return progress["finished"] and progress["horizon_runs"] >= trial.preset["train"]["runs"]


def _lacks_evaluation(newest: NewestState, log_file: Path) -> bool:
    progress = newest["progress"]
    return progress.get("evaluation_due", False) and evaluation_is_missing(
        log_file, progress["step"]
    )


def _refuse(
    preset: PresetBase, changed: list[tuple[Trial, str]], lost: list[tuple[Trial, str]]
) -> None:
    """Raise UserError where trials were begun with other settings, or have lost their logs.

    changed, lost   the trials, each with what is wrong with it
    """
    problems = changed + lost if changed else lost
    if not problems:
        return
    if changed:
        what, or_else = "was begun with other settings than these", ""
    else:
        what = "has runs that are over, but what they measured is gone with their logs"
        or_else = " Or put the logs back."
    reasons = [f"  {trial.variant}, seed {trial.seed}: {why}" for trial, why in problems]
    shown = reasons[:SHOWN_REASONS]
    if len(reasons) > SHOWN_REASONS:
        shown.append(f"  ... and {len(reasons) - SHOWN_REASONS} more")
    slugs = dict.fromkeys(trial.key.split("/")[0] for trial, _ in problems)
    folders = [
        f"  {place}/{preset.lineage}/{slug}" for slug in slugs for place in ("logs", "checkpoints")
    ]
    raise UserError(
        "\n".join(
            [
                f'the comparison "{preset.lineage}" {what}:',
                *shown,
                'Give the preset another "lineage" to begin a new one, or delete these folders to '
                "run their trials anew:",
                *folders,
                f"Adding seeds or variants needs neither.{or_else}",
            ]
        )
    )
