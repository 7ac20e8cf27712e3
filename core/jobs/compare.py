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
from typing import Any, TextIO

from core.assembly.network import check_parts
from core.assembly.session import build_training
from core.checkpoint.lineage import owned
from core.comparison.results import Comparison, collect
from core.comparison.standing import standing_trials, stop_hopeless_variants, trial_store
from core.comparison.trials import Trial, plan, read_outcomes, write_json, write_outcomes
from core.errors import Diverged, Interrupted, UserError
from core.files import cause, read_json
from core.jobs.train import train_to_the_end, views_of
from core.metrics.events import LOG, read_events
from core.metrics.log import View
from core.parallel.protocol import Parallel
from core.parallel.ranks import on_rank_zero
from core.preset.base import PresetBase
from core.preset.decode import decode_preset
from core.reports.comparison import write_report
from core.runtime import Runtime, forget_peak_memory
from core.signals import StopRequest
from core.ui.compare import ComparisonDashboard, ComparisonLines, comparison_view

EARLIEST_STOP = 1 / 3
"""Share of the baseline's tokens before which no variant is called hopeless: learning rates warm
up, ideas start slowly."""

VALIDATION_SEED = 0
"""All trials are measured on the same text. If each had its own, the differences between seeds
would be the differences between texts, too."""

NO_PEAK = (
    "memory_mb counts earlier trials of this process as well: this system cannot forget a peak"
)


def compare(
    preset: PresetBase,
    runtime: Runtime,
    parallel: Parallel,
    root: Path,
    started: float,
    console: TextIO,
) -> None:
    """Run every trial that is not done. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP, with
    all saved and reported."""
    with ExitStack() as locks:
        on_rank_zero(parallel, lambda: locks.enter_context(owned(root, preset.lineage, preset.job)))
        on_rank_zero(parallel, lambda: refuse_variants(preset, root, runtime))
        trials = on_rank_zero(parallel, lambda: standing_trials(preset, root, parallel.world_size))
        reporter = (
            ComparisonReporter(preset, root, parallel, console) if parallel.rank == 0 else None
        )
        with StopRequest() as stop, reporter.view if reporter else nullcontext():
            runner = TrialRunner(preset, runtime, parallel, root, stop, reporter)
            _run_trials(runner, trials)


def _run_trials(runner: "TrialRunner", trials: list[Trial]) -> None:
    """Run the trials that are not done, one after the other, and report after each."""
    reporter = runner.reporter
    nothing_to_do = all(trial.done for trial in trials)
    if reporter:
        for trial in trials:  # the process may have been killed before it got here
            if trial.status == "finished":
                trial_store(runner.root, trial).keep_newest()
        reporter.show(trials)
        if not nothing_to_do:
            _load_libraries()
    for i in range(len(trials)):
        if trials[i].done:
            continue
        if runner.parallel.sum([float(runner.stop())])[0]:
            raise Interrupted(
                "interrupted between two trials; everything is saved, start again to go on"
            )
        if reporter:
            reporter.view.begin(trials[i], i + 1)
        trials[i] = runner.run(trials[i], trials)
        trials = stop_hopeless_variants(trials, runner.preset.compare.stop_worse_by)
        if reporter:
            reporter.record(trials[i])
            reporter.show(trials)
        if trials[i].status == "running":
            raise Interrupted(
                f"interrupted in trial {i + 1} of {len(trials)} ({trials[i].variant}, seed "
                f"{trials[i].seed}); everything is saved, start again to go on"
            )
    if reporter:
        reporter.finish(trials, nothing_to_do)


def _load_libraries() -> None:
    """Import the libraries that reports need before the first trial: imported after it, they would
    count as memory of the later trials."""
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg  # noqa: F401
    import scipy.stats  # noqa: F401


def refuse_variants(preset: PresetBase, root: Path, runtime: Runtime) -> None:
    """Raise UserError with every variant that cannot be trained, before any of them is."""
    problems = []
    for trial in plan(preset, root)[: len(preset.variants)]:  # those of the first seed
        try:
            check_parts(_trial_preset(trial, preset), runtime)
        except UserError as error:
            problems.append(f"  {trial.variant}: {error}")
    if problems:
        raise UserError("nothing was trained, as this could not be:\n" + "\n".join(problems))


def preview_compare(preset: PresetBase, root: Path) -> list[str]:
    """Return what the menu shows before the job is chosen."""
    names, seeds = [variant.name for variant in preset.variants], preset.seeds
    lines = [
        f"compares {', '.join(names[1:])} with {names[0]}, each with "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}: "
        f"{len(names) * len(seeds)} runs"
    ]
    if origin := preset.init_from or getattr(preset.model, "published", None):
        lines.append(f"each starts from the weights of {origin}")
    try:
        trials = standing_trials(preset, root)
    except UserError as error:
        return [*lines, str(error).split("\n")[0]]
    done = sum(trial.done for trial in trials)
    begun = any(trial.status == "running" for trial in trials)
    if not done and not begun:
        return [*lines, "starts fresh"]
    next_part = "writes the report anew" if done == len(trials) else "goes on there"
    one_is_begun = ", one is begun" if begun else ""
    return [*lines, f"{done} of {len(trials)} runs are done{one_is_begun}; {next_part}"]


def _trial_preset(trial: Trial, preset: PresetBase) -> PresetBase:
    """Decode the preset of one trial of a comparison."""
    return decode_preset(trial.preset, type(preset), trial.variant, preset.lineage)


# one trial ----------------------------------------------------------------------------------------


@dataclass
class TrialRunner:
    """Runs a trial as the train job would; every rank has one."""

    preset: PresetBase
    runtime: Runtime
    parallel: Parallel
    root: Path
    stop: Callable[[], bool]
    reporter: "ComparisonReporter | None"  # on rank 0

    def run(self, trial: Trial, trials: list[Trial]) -> Trial:
        """Return the trial with its new status: still "running" after an interruption."""
        preset = _trial_preset(trial, self.preset)
        peak_forgotten = forget_peak_memory(self.runtime)
        stopping = EarlyStopping(self.preset.compare.stop_worse_by, _baseline_of(trial, trials))
        reporter = self.reporter
        views: list[View] = [stopping, Forwarder(reporter.view)] if reporter else []
        tokenizer_file = _tokenizer_file(self.root, self.preset.lineage, trial)
        tokenizer = on_rank_zero(self.parallel, lambda: _read_json(tokenizer_file))
        session = build_training(
            preset,
            self.runtime,
            self.parallel,
            self.root,
            make_views=views_of(preset, self.root, time.time(), lambda: views),
            should_stop=lambda: self.stop() or bool(stopping.verdict),
            tokenizer_state=tokenizer,
            validation_seed=VALIDATION_SEED,
        )
        if reporter:
            session.notes += [] if peak_forgotten else [NO_PEAK]
            stopping.replay(trial.folder)
            if tokenizer is None:
                write_json(tokenizer_file, session.trainer.extra_state["tokenizer"])
        try:
            reason = train_to_the_end(session, preset.train.runs)
        except Diverged as error:
            return replace(trial, status="diverged", note=str(error))
        verdict = self.parallel.broadcast(stopping.verdict)
        if reason == "interrupted":
            return replace(trial, status="stopped early" if verdict else "running", note=verdict)
        if reporter:
            session.trainer.store.keep_newest()
        return replace(trial, status="finished")


@dataclass
class BaselineCurve:
    """The evaluations of a seed's baseline trial; none until it is finished."""

    name: str
    points: list[tuple[int, float]]  # (tokens, cross-entropy)


@dataclass
class EarlyStopping:
    """A view of a trial's events that says, in words, when the trial is hopeless.

    worse_by   nats per token by which it may be worse than the baseline; None: never hopeless
    verdict    why it is hopeless; "" while it is not
    """

    worse_by: float | None
    baseline: BaselineCurve
    verdict: str = field(default="", init=False)

    def replay(self, folder: Path) -> None:
        """Read the events that the trial has logged in earlier starts."""
        for event in read_events(folder / LOG):
            self.update(event)

    def update(self, event: dict[str, Any]) -> None:
        """Compare an evaluation with the baseline's last one at as many tokens or fewer."""
        value, tokens, curve = event.get("cross_entropy"), event["tokens"], self.baseline.points
        if event["event"] != "eval" or self.worse_by is None or value is None or not curve:
            return
        end = curve[-1][0]
        reached = [baseline for at, baseline in curve if at <= tokens]
        if EARLIEST_STOP * end <= tokens < end and reached and value - reached[-1] > self.worse_by:
            self.verdict = (
                f"{value - reached[-1]:.3f} nats worse than {self.baseline.name} after "
                f"{tokens:,} of {end:,} tokens"
            )


@dataclass
class Forwarder:
    """Hands events on to a view that outlives the trial, and so must not be closed with it."""

    view: View

    def update(self, event: dict[str, Any]) -> None:
        self.view.update(event)


def _baseline_of(trial: Trial, trials: list[Trial]) -> BaselineCurve:
    """Return the baseline's evaluations with the trial's seed; none for the baseline itself, or
    until that is finished."""
    baseline = next(other for other in trials if other.seed == trial.seed)
    if baseline.variant == trial.variant or baseline.status != "finished":
        return BaselineCurve(baseline.variant, [])
    events = [event for event in read_events(baseline.folder / LOG) if event["event"] == "eval"]
    points = [
        (event["tokens"], event["cross_entropy"])
        for event in events
        if event.get("cross_entropy") is not None
    ]
    return BaselineCurve(baseline.variant, points)


def _tokenizer_file(root: Path, lineage: str, trial: Trial) -> Path:
    """Return where trials of this tokenizer section and these sources keep the tokenizer they
    share.

    Its training takes minutes and depends on the order of the data: if each trial made its own, it
    would differ with the seed, and a token would not be the same thing everywhere.
    """
    sections = [trial.preset["tokenizer"], trial.preset["data"]["sources"]]
    digest = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()
    return root / "checkpoints" / lineage / f"tokenizer_{digest[:12]}.json"


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


# on rank 0 ----------------------------------------------------------------------------------------


class ComparisonReporter:
    """Records and shows a comparison: outcomes, report, view."""

    def __init__(self, preset: PresetBase, root: Path, parallel: Parallel, console: TextIO):
        self._preset, self._root, self._folder = preset, root, root / "logs" / preset.lineage
        world_size = parallel.world_size
        self._outcomes = replace(read_outcomes(self._folder, world_size), world_size=world_size)
        self._comparison: Comparison | None = None
        self._failure: Exception | None = None
        self.view: ComparisonDashboard | ComparisonLines = comparison_view(console, preset.name)
        write_outcomes(self._folder, self._outcomes)

    def record(self, trial: Trial) -> None:
        """Write down an outcome that no checkpoint shows."""
        self._outcomes.trials.pop(trial.key, None)
        if trial.status in ("diverged", "stopped early"):
            self._outcomes.trials[trial.key] = {
                "status": trial.status,
                "note": trial.note,
                "preset": trial.preset,
            }
        write_outcomes(self._folder, self._outcomes)

    def show(self, trials: list[Trial]) -> None:
        """Show where the comparison stands, and write the report once a trial has begun. `finish`
        raises what went wrong here."""
        preset, self._failure = self._preset, None
        try:
            self._comparison = collect(
                trials,
                name=preset.name,
                description=preset.description,
                metric=preset.compare.metric,
                confidence=preset.compare.confidence,
            )
            self.view.show(self._comparison)
            if any(trial.status != "waiting" for trial in trials):
                write_report(self._comparison, self._folder)
        except Exception as error:  # the trials that are left need no report
            self._failure = error

    def finish(self, trials: list[Trial], nothing_was_done: bool) -> None:
        """Show the verdicts. Raises what kept the report from being written, as UserError where it
        was the disk."""
        if isinstance(self._failure, OSError):
            raise UserError(
                f"the report in {self._folder} cannot be written: "
                f"{cause(self._failure, self._folder / 'report.html')} "
                "Every trial is saved: start again for the report."
            ) from None
        if self._failure is not None:
            raise self._failure
        comparison = self._comparison
        assert comparison is not None
        lines = [verdict.sentence for verdict in comparison.verdicts]
        lines += [f"warning  {warning}" for warning in comparison.warnings]
        lines += [
            f"{trial.variant}, seed {trial.seed}: {trial.status}: {trial.note}"
            for trial in trials
            if trial.note and trial.status != "finished"
        ]
        if nothing_was_done:
            lines.append(
                f"All {len(trials)} trials were done already. To run more, add seeds or variants "
                'to the preset, or give it another "lineage".'
            )
        lines.append(f"report: {(self._folder / 'report.html').relative_to(self._root)}")
        self.view.finish(lines)
