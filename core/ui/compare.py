"""A comparison as it goes on: one picture for all of its trials on a terminal, lines elsewhere.

In:    what the compare job tells: the comparison so far, the trial that begins, its events
Out:   a table of variants and seeds with the running trial's dashboard below it; or lines
State: the comparison so far, the running trial's progress, how long trials took
"""

import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

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
FRAME_ROWS = 12
"""Rows left to the running trial where there are many variants."""
LINES_WIDTH = 110
QUIET_STEPS_SECONDS = 30.0
STATUS = {
    "waiting": ("·", "dim"),
    "running": ("begun", ""),
    "stopped early": ("stopped", "yellow"),
    "diverged": ("diverged", "red"),
}


class Board:
    """Where a comparison stands, as lines."""

    def __init__(self, title: str, clock: Callable[[], float]):
        self.title, self.clock = title, clock
        self.comparison: Comparison | None = None
        self.trial: Trial | None = None
        self._number = 0
        self._progress = RunProgress({})
        self._begun = self._opened = clock()
        # seconds of the trials that ran from their beginning to their end
        self._took: list[float] = []
        self._whole = False

    def show(self, comparison: Comparison) -> None:
        """The trial that ran has ended, or none has begun."""
        if (
            self.trial is not None
            and self._whole
            and any(_is(self.trial, o.trial) and o.finished for o in comparison.outcomes)
        ):
            self._took.append(self.clock() - self._begun)
        self.comparison, self.trial = comparison, None

    def begin(self, trial: Trial, number: int) -> None:
        """The `number`th trial begins."""
        self.trial, self._number, self._begun, self._whole = (
            trial,
            number,
            self.clock(),
            trial.status == "waiting",
        )
        self._progress = RunProgress({})

    def update(self, event: dict) -> None:
        if event.get("event") == "run_start":
            self._progress = RunProgress(event)
        self._progress.update(event)

    @property
    def where(self) -> str:
        """ "trial 4 of 9" """
        return f"trial {self._number} of {len(self.comparison.outcomes)}" if self.comparison else ""

    def head(self, width: int, rows: int) -> list[Text]:
        """Title, overall progress, and the table with at most so many variants."""
        if self.comparison is None:
            return [Text(self.title, "bold cyan")]
        outcomes = self.comparison.outcomes
        done = sum(outcome.trial.done for outcome in outcomes)
        share = (done + (self._progress.fraction if self.trial else 0.0)) / len(outcomes)
        told = self.where if self.trial else f"{done} of {len(outcomes)} trials done"
        left = self._seconds_left(len(outcomes) - done)
        after = Text.assemble((f"  {int(share * 1000) / 10:.1f} %", "bold"), f"  {told}")
        after.append(f"  {text.duration(left)} left" if left else "", "cyan")
        elapsed = Text(f"{text.duration(self.clock() - self._opened)} elapsed", "dim")
        title = Text.assemble(
            (self.title, "bold cyan"), f"  {len(self.comparison.variants)} variants"
        )
        lines = [
            apart(title, elapsed, width),
            bar(share, max(8, width - after.cell_len)) + after,
            *self.table(width, rows),
        ]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def table(self, width: int, rows: int) -> list[Text]:
        """A line for each variant: every seed's value, their mean, the mean difference to the
        baseline."""
        if self.comparison is None:
            return []
        variants, seeds = (
            self.comparison.variants,
            [o.trial.seed for o in self.comparison.baseline.outcomes],
        )
        title = rule(self.comparison.primary.name, 0)
        longest = max(
            title.cell_len, *(Text(text.clean(variant.name)).cell_len + 3 for variant in variants)
        )
        name_width = min(longest, LONGEST_NAME, max(4, width // 3))
        fit = max(1, (width - name_width - MEAN - DIFFERENCE) // CELL)
        first = max(0, (seeds.index(self.trial.seed) if self.trial else len(seeds) - 1) - fit + 1)
        shown = range(first, min(len(seeds), first + fit))
        heads = (
            "".join(f"{f'seed {seeds[i]}':>{CELL}}" for i in shown)
            + f"{'mean':>{MEAN}}{'difference':>{DIFFERENCE}} "
        )
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
        assert self.comparison is not None
        metric = self.comparison.metric
        line = Text("  " + text.clean(variant.name))
        line.truncate(name_width, overflow="ellipsis", pad=True)
        cells = [self._cell(variant.outcomes[i], metric) for i in shown]
        mean = variant.metrics[metric].mean if metric in variant.metrics else None
        cells.append((f"{text.number(mean, 4) if mean is not None else '':>{MEAN}}", "bold"))
        if variant is self.comparison.baseline:
            cells.append((f"{'baseline':>{DIFFERENCE}}", "dim"))
        elif metric in variant.differences and variant.differences[metric].mean is not None:
            cells.append(
                (f"{variant.differences[metric].mean:+.4f}".replace("-", "−").rjust(DIFFERENCE), "")
            )
        return line + Text.assemble(*cells)

    def _cell(self, outcome: Any, metric: str) -> tuple[str, str]:
        if self.trial is not None and _is(self.trial, outcome.trial):
            said, style = f"▸{self._progress.percent}", "cyan"
        elif outcome.finished:
            said, style = text.number(outcome.metrics.get(metric), 4), ""
        else:
            said, style = STATUS.get(outcome.trial.status, (outcome.trial.status, ""))
        return f"{said:>{CELL}}", style

    def _seconds_left(self, open_trials: int) -> float | None:
        """Of the whole comparison; None until a trial, or the running one's steps, have shown how
        long one takes."""
        now = self._progress.seconds_left if self.trial else 0.0
        whole = sum(self._took) / len(self._took) if self._took else None
        if whole is None and now is not None and self.trial and self._progress.fraction < 1:
            whole = now / (1 - self._progress.fraction)
        if whole is None:
            return None
        if now is None:
            now = whole * (1 - self._progress.fraction)
        return now + whole * (open_trials - (1 if self.trial else 0))


class ComparisonDashboard(Dashboard):
    """One picture from the first trial to the last; a trial's dashboard has the rows below the
    table."""

    def __init__(
        self,
        stream: TextIO,
        title: str,
        clock: Callable[[], float] = time.time,
        console: Console | None = None,
    ):
        super().__init__(stream, clock, console)
        self.board = Board(title, clock)
        self._early: list[dict] = []  # what a trial tells before it starts
        self._over = False

    def show(self, comparison: Comparison) -> None:
        with self._lock:
            self.board.show(comparison)
        if self._live is None:
            self.open()

    def begin(self, trial: Trial, number: int) -> None:
        with self._lock:
            self.board.begin(trial, number)
            self._state, self._early = None, []

    def update(self, event: dict) -> None:
        with self._lock:
            self.board.update(event)
            if event.get("event") == "run_start":
                self._state = RunState(event)
                for early in self._early:
                    self._state.update(early)
            elif self._state is None:
                self._early.append(event)
            else:
                self._state.update(event)

    def draw(self, width: int, height: int) -> Text:
        lines = self.board.head(width, max(3, height - FRAME_ROWS))
        if not self._over and self.board.trial is not None:
            lines.append(Text())
            left = height - len(lines)
            if self._state is None:
                trial = self.board.trial
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
    """Plain lines: which trial begins, how it goes, and the table after each."""

    def __init__(self, stream: TextIO, title: str, clock: Callable[[], float] = time.time):
        self.board, self._stream = Board(title, clock), stream
        self._plain = PlainLines(stream)
        self._told: set[str] = set()

    def show(self, comparison: Comparison) -> None:
        self.board.show(comparison)
        if any(outcome.trial.status != "waiting" for outcome in comparison.outcomes):
            seeds = len(comparison.baseline.outcomes)
            width = max(LINES_WIDTH, LONGEST_NAME + CELL * seeds + MEAN + DIFFERENCE)
            for line in self.board.table(width, len(comparison.variants)):
                write_line(self._stream, line.plain.rstrip())

    def begin(self, trial: Trial, number: int) -> None:
        self.board.begin(trial, number)
        self._plain = PlainLines(self._stream, step_seconds=QUIET_STEPS_SECONDS)
        write_line(
            self._stream, f"{self.board.where}: {text.clean(trial.variant)}, seed {trial.seed}"
        )

    def update(self, event: dict) -> None:
        """As a run's own lines, without what every trial would say again."""
        kind = event.get("event")
        if kind == "run_start":
            notes = [note for note in event.get("notes") or [] if note not in self._told]
            event = {**event, "notes": notes, "sources": [] if self._told else event.get("sources")}
            self._told |= {"", *notes}
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
    """The dashboard on a terminal that can show it, plain lines elsewhere."""
    title = text.clean(title)
    return (
        ComparisonDashboard(stream, title) if can_draw(stream) else ComparisonLines(stream, title)
    )


def _is(one: Trial, other: Trial) -> bool:
    return (one.variant, one.seed) == (other.variant, other.seed)
