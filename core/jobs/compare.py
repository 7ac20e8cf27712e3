"""The `compare` job: every variant of a preset with every seed, on the same data in the same order,
stopped and resumed as one.

In:    a preset: its variants, its seeds, its section `compare`
Out:   logs/<lineage>/report.html, report.md, metrics.json; for each trial what a run leaves, under
       <lineage>/<variant>/<seed>
State: each trial's checkpoints; logs/<lineage>/state.json; checkpoints/<lineage>/tokenizer_*.json,
which trials share

    plan --> what is done already? --> trial --> report --> trial --> report --> ...
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.assembly import build_training, check_parts
from core.checkpoint.lineage import owned
from core.checkpoint.store import CheckpointStore
from core.comparison.results import Comparison, collect
from core.comparison.trials import Trial, plan, read_outcomes, write_json, write_outcomes
from core.errors import Diverged, Interrupted, UserError
from core.files import cause, read_json
from core.jobs.train import train_to_the_end, views_of
from core.metrics.log import LOG, evaluation_is_missing, read_events
from core.parallel.ranks import on_rank_zero
from core.preset.changes import describe_changes
from core.preset.decode import decode_preset
from core.reports.comparison import write_report
from core.runtime import Runtime, forget_peak_memory
from core.signals import StopRequest
from core.ui.compare import ComparisonDashboard, ComparisonLines, comparison_view

EARLIEST_STOP = 1 / 3
"""Share of the baseline's tokens before which no variant is called hopeless: learning rates warm
up, ideas start slowly."""

VALIDATION_SEED = 0
"""Every trial is measured on the same text: with each its own, what seeds differ by would be the
texts' difference too."""

NO_PEAK = (
    "memory_mb counts earlier trials of this process as well: this system cannot forget a peak"
)


def compare(
    preset: Any, runtime: Runtime, parallel: Any, root: Path, started: float, console: Any
) -> None:
    """Run every trial that is not done. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP, with
    all saved and reported."""
    with ExitStack() as held:
        on_rank_zero(parallel, lambda: held.enter_context(owned(root, preset.lineage, preset.job)))
        _compare(preset, runtime, parallel, root, console)


def _compare(preset: Any, runtime: Runtime, parallel: Any, root: Path, console: Any) -> None:
    on_rank_zero(parallel, lambda: refuse_variants(preset, root, runtime))
    trials = on_rank_zero(parallel, lambda: standing(preset, root, parallel.world_size))
    desk = Desk(preset, root, parallel.world_size, console) if parallel.rank == 0 else None
    with StopRequest() as stop, desk.view if desk else nullcontext():
        nothing_to_do = all(trial.done for trial in trials)
        if desk:
            for trial in trials:  # a kill may have come between a trial's end and this
                if trial.status == "finished":
                    _store(root, trial).keep_newest()
            desk.show(trials)
            if not nothing_to_do:
                _load_libraries()
        for i in range(len(trials)):
            if trials[i].done:
                continue
            if parallel.sum([float(stop())])[0]:
                raise Interrupted(
                    "interrupted between two trials; everything is saved, start again to go on"
                )
            if desk:
                desk.view.begin(trials[i], i + 1)
            trials[i] = Runner(preset, runtime, parallel, root, stop, desk).run(trials[i], trials)
            trials = without_the_hopeless(trials, preset.compare.stop_worse_by)
            if desk:
                desk.keep(trials[i])
                desk.show(trials)
            if trials[i].status == "running":
                raise Interrupted(
                    f"interrupted in trial {i + 1} of {len(trials)} ({trials[i].variant}, seed "
                    f"{trials[i].seed}); everything is "
                    "saved, start again to go on"
                )
        if desk:
            desk.finish(trials, nothing_to_do)


def _load_libraries() -> None:
    """What reports are made with, before the first trial: loaded after it, they would count as
    memory of the later ones."""
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg  # noqa: F401
    import scipy.stats  # noqa: F401


def refuse_variants(preset: Any, root: Path, runtime: Runtime) -> None:
    """Raises UserError with every variant that cannot be trained, before the first one is."""
    problems = []
    for trial in plan(preset, root)[: len(preset.variants)]:  # those of the first seed
        try:
            check_parts(
                decode_preset(trial.preset, type(preset), trial.variant, preset.lineage), runtime
            )
        except UserError as error:
            problems.append(f"  {trial.variant}: {error}")
    if problems:
        raise UserError("nothing was trained, as this could not be:\n" + "\n".join(problems))


def preview_compare(preset: Any, root: Path) -> list[str]:
    """What the menu tells before the job is chosen."""
    names, seeds = [variant.name for variant in preset.variants], preset.seeds
    lines = [
        f"compares {', '.join(names[1:])} with {names[0]}, each with "
        f"{'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, seeds))}: {len(names) * len(seeds)} runs"
    ]
    if origin := preset.init_from or getattr(preset.model, "published", None):
        lines.append(f"each starts from the weights of {origin}")
    try:
        trials = standing(preset, root)
    except UserError as error:
        return [*lines, str(error).split("\n")[0]]
    done, begun = (
        sum(trial.done for trial in trials),
        sum(trial.status == "running" for trial in trials),
    )
    if not done and not begun:
        return [*lines, "starts fresh"]
    told = "writes the report anew" if done == len(trials) else "goes on there"
    return [
        *lines,
        f"{done} of {len(trials)} runs are done{', one is begun' if begun else ''}; {told}",
    ]


# where a comparison stands ------------------------------------------------------------------------


def standing(preset: Any, root: Path, world_size: int | None = None) -> list[Trial]:
    """Every trial as earlier starts have left it. Raises UserError when what they left is of other
    trials than these.

    world_size   of this start, if it is one
    """
    folder = root / "logs" / preset.lineage
    outcomes = read_outcomes(folder, world_size or 1)
    trials, differences, lost = [], [], []
    for trial in plan(preset, root):
        found = _store(root, trial).peek()
        entry = outcomes.trials.get(trial.key)
        begun_with = entry["preset"] if entry else found["preset"] if found else None
        if begun_with is not None and (changes := describe_changes(begun_with, trial.preset)):
            differences.append((trial, "; ".join(changes)))
        if entry and (entry["status"] == "diverged" or preset.compare.stop_worse_by is not None):
            trial = replace(trial, status=entry["status"], note=entry["note"])
        elif found is not None:
            progress, runs = found["progress"], trial.preset["train"]["runs"]
            over, log_file = (
                progress["finished"] and progress["horizon_runs"] >= runs,
                trial.folder / LOG,
            )
            if over and not log_file.is_file():
                lost.append((trial, f"its log {log_file} is gone"))
            unmeasured = progress.get("evaluation_due", False) and evaluation_is_missing(
                log_file, progress["step"]
            )
            trial = replace(trial, status="finished" if over and not unmeasured else "running")
        trials.append(trial)
    if differences:
        raise UserError(
            _refusal(preset, differences + lost, "was begun with other settings than these")
        )
    if lost:
        what = "has runs that are over, but what they measured is gone with their logs"
        raise UserError(_refusal(preset, lost, what, " Or put the logs back."))
    begun = any(trial.status != "waiting" for trial in trials)
    if begun and world_size is not None and outcomes.world_size != world_size:
        raise UserError(
            f"this comparison was begun on {outcomes.world_size} processes and this is "
            f"{world_size}: a step would have another "
            f"number of rows. Start it on {outcomes.world_size}, or give the preset another "
            '"lineage".'
        )
    return without_the_hopeless(trials, preset.compare.stop_worse_by)


def without_the_hopeless(trials: list[Trial], stop_worse_by: float | None) -> list[Trial]:
    """A variant that was stopped early with one seed is not run with the others."""
    if stop_worse_by is None:
        return trials
    stopped = {
        trial.variant: trial.seed for trial in reversed(trials) if trial.status == "stopped early"
    }
    return [
        replace(
            trial,
            status="stopped early",
            note=f"not run, as seed {stopped[trial.variant]} was stopped early",
        )
        if trial.variant in stopped and not trial.done
        else trial
        for trial in trials
    ]


def _refusal(
    preset: Any, differences: list[tuple[Trial, str]], what: str, or_else: str = ""
) -> str:
    told = [f"  {trial.variant}, seed {trial.seed}: {why}" for trial, why in differences]
    more = f"\n  ... and {len(told) - 4} more" if len(told) > 4 else ""
    variants = dict.fromkeys(trial.key.split("/")[0] for trial, _ in differences)
    folders = [
        f"{place}/{preset.lineage}/{variant}"
        for variant in variants
        for place in ("logs", "checkpoints")
    ]
    return (
        f'the comparison "{preset.lineage}" {what}:\n'
        + "\n".join(told[:4])
        + more
        + '\nGive the preset another "lineage" to begin a new one, or delete these folders to run '
        "their trials anew:\n  "
        + "\n  ".join(folders)
        + "\nAdding seeds or variants needs neither."
        + or_else
    )


def _store(root: Path, trial: Trial) -> CheckpointStore:
    return CheckpointStore(root / "checkpoints", trial.preset["lineage"])


# one trial ----------------------------------------------------------------------------------------


@dataclass
class Runner:
    """Runs a trial as the train job would; every rank has one."""

    preset: Any
    runtime: Runtime
    parallel: Any
    root: Path
    stop: Callable[[], bool]
    desk: "Desk | None"  # on rank 0

    def run(self, trial: Trial, trials: list[Trial]) -> Trial:
        """The trial with what became of it: still "running" after an interruption."""
        own = decode_preset(trial.preset, type(self.preset), trial.variant, self.preset.lineage)
        forgotten = forget_peak_memory(self.runtime)
        watch = Watch(self.preset.compare.stop_worse_by, *_baseline_of(trial, trials))
        views = views_of(
            own, self.root, time.time(), lambda: [watch, Feed(self.desk.view)] if self.desk else []
        )
        tokenizer_file = _tokenizer_file(self.root, self.preset.lineage, trial)
        tokenizer = on_rank_zero(self.parallel, lambda: _read_json(tokenizer_file))
        session = build_training(
            own,
            self.runtime,
            self.parallel,
            self.root,
            views,
            lambda: self.stop() or bool(watch.verdict),
            tokenizer,
            VALIDATION_SEED,
        )
        if self.desk:
            session.notes += [] if forgotten else [NO_PEAK]
            watch.read(trial.folder)
            if tokenizer is None:
                write_json(tokenizer_file, session.trainer.extra_state["tokenizer"])
        try:
            reason = train_to_the_end(session, own.train.runs)
        except Diverged as error:
            return replace(trial, status="diverged", note=str(error))
        verdict = self.parallel.broadcast(watch.verdict)
        if reason == "interrupted":
            return replace(trial, status="stopped early" if verdict else "running", note=verdict)
        if self.desk:
            session.trainer.store.keep_newest()
        return replace(trial, status="finished")


@dataclass
class Watch:
    """A view of a trial's events that says, in words, when the trial is hopeless."""

    worse_by: float | None
    baseline: str = ""
    # (tokens, cross-entropy) of the baseline with the same seed
    curve: list[tuple[int, float]] = field(default_factory=list)
    verdict: str = ""

    def read(self, folder: Path) -> None:
        """What an earlier start has seen of the trial."""
        for event in read_events(folder / LOG):
            self.update(event)

    def update(self, event: dict[str, Any]) -> None:
        value, tokens = event.get("cross_entropy"), event["tokens"]
        if event["event"] != "eval" or self.worse_by is None or value is None or not self.curve:
            return
        end = self.curve[-1][0]
        reached = [other for at, other in self.curve if at <= tokens]
        if EARLIEST_STOP * end <= tokens < end and reached and value - reached[-1] > self.worse_by:
            self.verdict = (
                f"{value - reached[-1]:.3f} nats worse than {self.baseline} after "
                f"{tokens:,} of {end:,} tokens"
            )


@dataclass
class Feed:
    """Hands events on to a view that outlives the trial, and so must not be closed with it."""

    view: Any

    def update(self, event: dict[str, Any]) -> None:
        self.view.update(event)


def _baseline_of(trial: Trial, trials: list[Trial]) -> tuple[str, list[tuple[int, float]]]:
    """Name and evaluations of the baseline with the trial's seed; none for the baseline itself, or
    until that is finished."""
    base = next(other for other in trials if other.seed == trial.seed)
    if base.variant == trial.variant or base.status != "finished":
        return base.variant, []
    evals = [event for event in read_events(base.folder / LOG) if event["event"] == "eval"]
    return base.variant, [
        (e["tokens"], e["cross_entropy"]) for e in evals if e.get("cross_entropy") is not None
    ]


def _tokenizer_file(root: Path, lineage: str, trial: Trial) -> Path:
    """Where trials of this tokenizer section and these sources keep the tokenizer they share.

    Its training takes minutes and follows the order of the data: made for each trial, it would
    differ with the seed, and with it what a token is.
    """
    shared = json.dumps(
        [trial.preset["tokenizer"], trial.preset["data"]["sources"]], sort_keys=True
    )
    return (
        root
        / "checkpoints"
        / lineage
        / f"tokenizer_{hashlib.sha256(shared.encode()).hexdigest()[:12]}.json"
    )


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


# on rank 0 ----------------------------------------------------------------------------------------


class Desk:
    """What is kept and shown of a comparison: outcomes, report, view."""

    def __init__(self, preset: Any, root: Path, world_size: int, console: Any):
        self._preset, self._root, self._folder = preset, root, root / "logs" / preset.lineage
        self._outcomes = replace(read_outcomes(self._folder, world_size), world_size=world_size)
        self._shown: Comparison | None = None
        self._failure: Exception | None = None
        self.view: ComparisonDashboard | ComparisonLines = comparison_view(console, preset.name)
        write_outcomes(self._folder, self._outcomes)

    def keep(self, trial: Trial) -> None:
        """Remember an outcome that no checkpoint tells of."""
        self._outcomes.trials.pop(trial.key, None)
        if trial.status in ("diverged", "stopped early"):
            self._outcomes.trials[trial.key] = {
                "status": trial.status,
                "note": trial.note,
                "preset": trial.preset,
            }
        write_outcomes(self._folder, self._outcomes)

    def show(self, trials: list[Trial]) -> None:
        """Show where the comparison stands, and write the report once there is something to tell. A
        failure waits for the end."""
        preset, self._failure = self._preset, None
        about = {"name": preset.name, "description": preset.description}
        try:
            self._shown = collect(
                trials, **about, metric=preset.compare.metric, confidence=preset.compare.confidence
            )
            self.view.show(self._shown)
            if any(trial.status != "waiting" for trial in trials):
                write_report(self._shown, self._folder)
        except Exception as error:  # the trials that are left need no report
            self._failure = error

    def finish(self, trials: list[Trial], nothing_was_done: bool) -> None:
        """Say what came of it. Raises what kept the report from being written."""
        if isinstance(self._failure, OSError):
            raise UserError(
                f"the report in {self._folder} cannot be written: "
                f"{cause(self._failure, self._folder / 'report.html')} "
                "Every trial is saved: start again for the report."
            ) from None
        if self._failure is not None:
            raise self._failure
        found = self._shown
        assert found is not None
        lines = [verdict.sentence for verdict in found.verdicts] + [
            f"warning  {warning}" for warning in found.warnings
        ]
        lines += [
            f"{t.variant}, seed {t.seed}: {t.status}: {t.note}"
            for t in trials
            if t.note and t.status != "finished"
        ]
        if nothing_was_done:
            lines.append(
                f"All {len(trials)} trials were done already. To run more, add seeds or variants "
                "to the preset, or give it "
                'another "lineage".'
            )
        self.view.finish(
            [*lines, f"report: {(self._folder / 'report.html').relative_to(self._root)}"]
        )
