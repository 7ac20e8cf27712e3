"""The live view of a comparison: one dashboard for all of its trials on a terminal, lines
elsewhere.

In:    from the compare job: the comparison so far, the trial that begins, its events
Out:   a table of variants and seeds with the running trial's dashboard below it; or lines
State: the comparison so far, the running trial's progress, the durations of trials
"""

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.text import Text

from core.comparison.outcome import Outcome
from core.comparison.results import Comparison, Variant
from core.comparison.trials import Trial
from core.terminal import write_line
from core.ui import text
from core.ui.dashboard import Dashboard, can_draw
from core.ui.layout import apart, bar, rule
from core.ui.plain import PlainLines
from core.ui.progress import RunProgress
from core.ui.run_state import RunState

CELL, MEAN, DIFFERENCE = 10, 11, 12
LONGEST_NAME = 32
TRIAL_ROWS = 12
"""Rows that are kept for the running trial where there are many variants."""
LINES_WIDTH = 110
QUIET_STEPS_SECONDS = 30.0
STATUS = {
    "waiting": ("·", "dim"),
    "running": ("begun", ""),
    "stopped early": ("stopped", "yellow"),
    "diverged": ("diverged", "red"),
}


class ComparisonState:
    """The state of a comparison, and its head as lines: title, progress, table."""

    def __init__(self, title: str, clock: Callable[[], float]):
        self.title, self.clock = title, clock
        self.comparison: Comparison | None = None
        self.trial: Trial | None = None  # the one that runs
        self._number = 0
        self._progress = RunProgress({})
        self._trial_began = self._began = clock()
        # seconds of the trials that ran from their beginning to their end in this process
        self._durations: list[float] = []
        self._from_beginning = False

    def show(self, comparison: Comparison) -> None:
        """Take the results so far, when a trial has ended or before the first begins."""
        if self.trial is not None and self._from_beginning:
            ended = self.trial
            if any(_same(ended, o.trial) and o.finished for o in comparison.outcomes):
                self._durations.append(self.clock() - self._trial_began)
        self.comparison, self.trial = comparison, None

    def begin(self, trial: Trial, number: int) -> None:
        """Begin a trial, the `number`th of all, counted from 1."""
        self.trial, self._number, self._trial_began = trial, number, self.clock()
        self._from_beginning = trial.status == "waiting"
        self._progress = RunProgress({})

    def update(self, event: dict) -> None:
        """Take an event of the trial that runs."""
        if event.get("event") == "run_start":
            self._progress = RunProgress(event)
        self._progress.update(event)

    @property
    def position(self) -> str:
        """Return "trial 4 of 9"."""
        if self.comparison is None:
            return ""
        return f"trial {self._number} of {len(self.comparison.outcomes)}"

    def head(self, width: int, rows: int) -> list[Text]:
        """Return title, overall progress, and the table with at most so many variants."""
        if self.comparison is None:
            return [Text(self.title, "bold cyan")]
        outcomes = self.comparison.outcomes
        done = sum(outcome.trial.done for outcome in outcomes)
        share = (done + (self._progress.fraction if self.trial else 0.0)) / len(outcomes)
        position = self.position if self.trial else f"{done} of {len(outcomes)} trials done"
        left = self._seconds_left(len(outcomes) - done)
        after = Text.assemble((f"  {int(share * 1000) / 10:.1f} %", "bold"), f"  {position}")
        after.append(f"  {text.duration(left)} left" if left else "", "cyan")
        elapsed = Text(f"{text.duration(self.clock() - self._began)} elapsed", "dim")
        variants = f"  {len(self.comparison.variants)} variants"
        lines = [
            apart(Text.assemble((self.title, "bold cyan"), variants), elapsed, width),
            bar(share, max(8, width - after.cell_len)) + after,
            *self.table(width, rows),
        ]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def table(self, width: int, rows: int) -> list[Text]:
        """Return a line for each variant: the value of every seed, their mean, the mean difference
        to the baseline. Where there is no room for all, those around the running trial are
        shown."""
        if self.comparison is None:
            return []
        variants = self.comparison.variants
        seeds = [outcome.trial.seed for outcome in self.comparison.baseline.outcomes]
        title = rule(self.comparison.primary.name, 0)
        name_cells = [Text(text.clean(variant.name)).cell_len + 3 for variant in variants]
        longest = max(title.cell_len, *name_cells)
        name_width = min(longest, LONGEST_NAME, max(4, width // 3))
        fit = max(1, (width - name_width - MEAN - DIFFERENCE) // CELL)
        column = seeds.index(self.trial.seed) if self.trial else len(seeds) - 1
        first = max(0, column - fit + 1)
        shown = range(first, min(len(seeds), first + fit))
        heads = "".join(f"{f'seed {seeds[i]}':>{CELL}}" for i in shown)
        heads += f"{'mean':>{MEAN}}{'difference':>{DIFFERENCE}} "
        names = [variant.name for variant in variants]
        row = names.index(self.trial.variant) if self.trial else 0
        top = max(0, row - rows + 1)
        title.truncate(name_width, pad=True)
        lines = [title.append(heads, "dim")]
        lines[0].append("─" * (width - lines[0].cell_len), "dim")
        lines += [self._line(variant, name_width, shown) for variant in variants[top : top + rows]]
        if len(variants) > rows:
            lines.append(Text(f"  and {len(variants) - rows} more variants", "dim"))
        return lines

    def _line(self, variant: Variant, name_width: int, shown: range) -> Text:
        """Return one variant's line; `shown`: places of the seeds that have a column."""
        assert self.comparison is not None
        metric = self.comparison.metric
        line = Text("  " + text.clean(variant.name))
        line.truncate(name_width, overflow="ellipsis", pad=True)
        cells = [self._cell(variant.outcomes[i], metric) for i in shown]
        mean = variant.metrics[metric].mean if metric in variant.metrics else None
        cells.append((f"{text.number(mean, 4) if mean is not None else '':>{MEAN}}", "bold"))
        difference = variant.differences.get(metric)
        if variant is self.comparison.baseline:
            cells.append((f"{'baseline':>{DIFFERENCE}}", "dim"))
        elif difference is not None and difference.mean is not None:
            signed = f"{difference.mean:+.4f}".replace("-", "−")
            cells.append((f"{signed:>{DIFFERENCE}}", ""))
        return line + Text.assemble(*cells)

    def _cell(self, outcome: Outcome, metric: str) -> tuple[str, str]:
        """Return a trial's cell and its style: its value, its progress, or its status."""
        if self.trial is not None and _same(self.trial, outcome.trial):
            cell, style = f"▸{self._progress.percent}", "cyan"
        elif outcome.finished:
            cell, style = text.number(outcome.metrics.get(metric), 4), ""
        else:
            cell, style = STATUS.get(outcome.trial.status, (outcome.trial.status, ""))
        return f"{cell:>{CELL}}", style

    def _seconds_left(self, open_trials: int) -> float | None:
        """Return the time that the whole comparison still takes. None until a trial, or the steps
        of the running one, have shown how long one takes."""
        fraction = self._progress.fraction
        running = self._progress.seconds_left if self.trial else 0.0
        whole = sum(self._durations) / len(self._durations) if self._durations else None
        if whole is None and running is not None and self.trial and fraction < 1:
            whole = running / (1 - fraction)
        if whole is None:
            return None
        if running is None:
            running = whole * (1 - fraction)
        return running + whole * (open_trials - (1 if self.trial else 0))


class ComparisonDashboard(Dashboard):
    """One dashboard from the first trial to the last; that of the running trial has the rows below
    the table."""

    def __init__(
        self,
        stream: TextIO,
        title: str,
        clock: Callable[[], float] = time.time,
        console: Console | None = None,
    ):
        super().__init__(stream, clock, console)
        self.state = ComparisonState(title, clock)
        self._early: list[dict] = []  # events of a trial before its run_start
        self._over = False

    def show(self, comparison: Comparison) -> None:
        with self._lock:
            self.state.show(comparison)
        if self._live is None:
            self.open()

    def begin(self, trial: Trial, number: int) -> None:
        with self._lock:
            self.state.begin(trial, number)
            self._state, self._early = None, []

    def update(self, event: dict) -> None:
        with self._lock:
            self.state.update(event)
            if event.get("event") == "run_start":
                self._state = RunState(event)
                for early in self._early:
                    self._state.update(early)
            elif self._state is None:
                self._early.append(event)
            else:
                self._state.update(event)

    def draw(self, width: int, height: int) -> Text:
        lines = self.state.head(width, max(3, height - TRIAL_ROWS))
        if not self._over and self.state.trial is not None:
            lines.append(Text())
            left = height - len(lines)
            if self._state is None:
                trial = self.state.trial
                lines.append(
                    Text(f"preparing {text.clean(trial.variant)}, seed {trial.seed}", "dim")
                )
            elif left > 0:
                lines.append(self._state.draw(width, left, self.clock()))
        return Text("\n", no_wrap=True).join(lines[:height])

    def finish(self, lines: list[str]) -> None:
        """Leave the table on the screen, and these lines below it."""
        self._over = True
        self.close()
        for line in lines:
            self.console.print(Text(text.clean(line)), soft_wrap=False)


class ComparisonLines:
    """Plain lines: each trial as it begins, its steps, and the table after it."""

    def __init__(self, stream: TextIO, title: str, clock: Callable[[], float] = time.time):
        self.state, self._stream = ComparisonState(title, clock), stream
        self._plain = PlainLines(stream)
        self._known_notes: set[str] = set()

    def show(self, comparison: Comparison) -> None:
        self.state.show(comparison)
        if any(outcome.trial.status != "waiting" for outcome in comparison.outcomes):
            seeds = len(comparison.baseline.outcomes)
            width = max(LINES_WIDTH, LONGEST_NAME + CELL * seeds + MEAN + DIFFERENCE)
            for line in self.state.table(width, len(comparison.variants)):
                write_line(self._stream, line.plain.rstrip())

    def begin(self, trial: Trial, number: int) -> None:
        self.state.begin(trial, number)
        self._plain = PlainLines(self._stream, step_seconds=QUIET_STEPS_SECONDS)
        write_line(
            self._stream, f"{self.state.position}: {text.clean(trial.variant)}, seed {trial.seed}"
        )

    def update(self, event: dict) -> None:
        """Show an event as a run does, without what every trial would repeat."""
        kind = event.get("event")
        if kind == "run_start":
            notes = [note for note in event.get("notes") or [] if note not in self._known_notes]
            sources = [] if self._known_notes else event.get("sources")
            event = {**event, "notes": notes, "sources": sources}
            self._known_notes |= {"", *notes}  # not empty after the first trial
        if kind not in ("sample", "checkpoint"):
            self._plain.update(event)

    def finish(self, lines: list[str]) -> None:
        for line in lines:
            write_line(self._stream, text.clean(line))

    def close(self) -> None:
        self._plain.close()

    def __enter__(self) -> "ComparisonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def comparison_view(stream: TextIO, title: str) -> ComparisonDashboard | ComparisonLines:
    """Return the dashboard for a terminal that can show it, plain lines for any other stream."""
    view = ComparisonDashboard if can_draw(stream) else ComparisonLines
    return view(stream, text.clean(title))


def _same(one: Trial, other: Trial) -> bool:
    return (one.variant, one.seed) == (other.variant, other.seed)
