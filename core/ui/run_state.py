"""The state of a run, and its dashboard as lines that fit a given width and height.

In:    events, in order; then a size and the time
Out:   a rich Text of at most that many lines, none wider than the screen
State: the last event of each kind, recent and all losses, warnings and samples

The head is always shown. Below it come sections in order of importance, each with the rows that it
needs at least. Sections that do not fit are dropped from the bottom; rows that are left over go to
the sections that can use them, last to the chart."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from core.metrics.table import BESIDE
from core.preset.settings import MASKED_TOKENS
from core.ui import text
from core.ui.layout import NAME_CELLS, VALUE_CELLS, apart, bar, folded, grid, rule
from core.ui.plain import evaluation_title, machine, neighbors, scores, skipped_file
from core.ui.progress import RunProgress

QUIET_SECONDS = 10.0
"""After so long without an event the dashboard says so: a first step is being compiled, an
evaluation runs, or something is stuck."""
CHART_ROWS = 12
LEAST_CHART_ROWS = 4
SAMPLE_ROWS = 9  # before the chart takes its part
SAMPLE_CHARACTERS = 2000
MODEL_VALUES = {
    "routing_entropy/mean": "static entropy",
    "dynamic_routing_entropy/mean": "route entropy",
}
"""Short names of numbers that a model reports; those of single layers are in the log only."""
ENDINGS = {
    "budget": "finished",
    "max_steps": "finished",
    "max_epochs": "finished",
    "interrupted": "interrupted",
}
WIDE_SOURCES = 92
"""Width from which on the sources' documents and epochs are shown, too."""


@dataclass
class Section:
    """A part of the dashboard; without lines it is not shown."""

    min_rows: int  # with fewer rows it is not worth showing
    lines: list[Text]


class RunState:
    """The state of one run, as its events have told it so far."""

    def __init__(self, start: dict):
        self.start, self.progress = start, RunProgress(start)
        self.step: dict = {}
        self.evals: deque[dict] = deque(maxlen=2)
        self.samples: list[dict] = []
        self.neighbors: list[dict] = []
        self.checkpoint: dict = {}
        self.warnings: deque[dict] = deque(maxlen=20)
        self.recent: deque[float] = deque(maxlen=300)
        self.history = text.History()
        self.last_event = start.get("time") or 0.0
        self.end: dict = {}

    def update(self, event: dict) -> None:
        self.progress.update(event)
        self.last_event = event.get("time") or self.last_event
        kind = event.get("event")
        if kind == "step":
            self.step = event
            if (loss := event.get("loss")) is not None:
                self.recent.append(loss)
                self.history.add(loss)
        elif kind == "eval":
            self.evals.append(event)
        elif kind == "sample":
            self.samples = _with(self.samples, event)
        elif kind == "neighbors":
            self.neighbors = _with(self.neighbors, event)
        elif kind == "checkpoint":
            self.checkpoint = event
        elif kind == "warning":
            self.warnings.append(event)
        elif kind == "skipped":
            self.warnings.append({**event, "message": f"skipped {skipped_file(event)}"})
        elif kind == "run_end":
            self.end = event

    def draw(self, width: int, height: int, now: float) -> Text:
        """Return at most `height` lines of at most `width` cells.

        now   unix time; ignored once the run is over
        """
        if self.end:
            now = self.end.get("time") or now
        lines = self._head(width, now)
        sections = [
            self._evaluation(width),
            self._sources(width),
            self._saved(width, now),
            self._warnings(width),
            self._sample(width),
        ]
        rows, chart_rows = _share_rows(sections, height - len(lines), len(self.history.values) >= 8)
        if chart_rows:
            lines += self._chart(width, chart_rows)
        for section, count in zip(sections, rows):
            lines += section.lines[:count]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return Text("\n", no_wrap=True).join(lines[:height])

    def _head(self, width: int, now: float) -> list[Text]:
        """Return the run's name, its machine, its progress, and the numbers of the last step."""
        start, progress = self.start, self.progress
        name = Text.assemble(
            (text.clean(start.get("preset")), "bold cyan"),
            f"  lineage {text.clean(start.get('lineage'))}  run {start.get('run')}",
        )
        if start.get("resumed_from"):
            name.append(f"  resumed from {Path(text.clean(start['resumed_from'])).name}", "dim")
        elapsed = Text(f"{text.duration(now - (start.get('time') or now))} elapsed", "dim")
        after = Text.assemble(
            (f"  {progress.percent:>7}", "bold"),
            f"  {progress.counted}",
            (f"  {self._time_left()}", "cyan"),
        )
        loss = Text.assemble(
            ("loss           ", "dim"), (f"{text.number(self.step.get('loss'), 4):<10}", "bold")
        )
        curve = text.chart(list(self.recent), max(8, width - loss.cell_len))[0]
        lines = [
            apart(name, elapsed, width),
            Text(machine(start), "dim"),
            bar(progress.fraction, max(8, width - after.cell_len)) + after,
            Text(),
            loss + Text(curve, "green"),
            *grid(self._step_values(), width),
        ]
        if not self.end and now - self.last_event > QUIET_SECONDS:
            lines.append(Text(f"no news for {text.duration(now - self.last_event)}", "yellow"))
        return lines

    def _time_left(self) -> str:
        """Return how much time is left, or how the run ended."""
        if self.end:
            return ENDINGS.get(str(self.end.get("reason")), "stopped")
        if not self.step:
            return "preparing the first step"
        seconds = self.progress.seconds_left
        return f"{text.duration(seconds)} left" if seconds is not None else ""

    def _step_values(self) -> list[tuple[str, str]]:
        """Return names and values of the last step's numbers."""
        step = self.step
        cells = [
            ("tokens/s", text.count(step.get("tokens_per_second"))),
            ("learning rate", text.number(step.get("learning_rate"))),
            ("grad norm", text.number(step.get("grad_norm"), 2)),
            ("step", f"{step.get('step', self.start.get('step', 0)):,}"),
            ("memory", text.memory(step.get("memory_mb"))),
        ]
        if step.get("skipped"):
            cells.append(("skipped", f"{step['skipped']} updates"))
        if len(losses := step.get("losses") or {}) > 1:
            cells += [(text.clean(key), text.number(value)) for key, value in losses.items()]
        cells += [
            (text.clean(name).rpartition(".")[2], text.number(value))
            for name, value in (step.get("scheduled") or {}).items()
        ]
        return cells + [
            (MODEL_VALUES.get(name, name), text.number(value))
            for name, value in (step.get("model") or {}).items()
            if "/layer_" not in name
        ]

    def _evaluation(self, width: int) -> Section:
        if not self.evals:
            return Section(0, [])
        event, before = self.evals[-1], self.evals[0] if len(self.evals) == 2 else {}
        cells = [
            (name.replace("pseudo-perplexity", "pseudo-ppl"), value)
            for name, value in scores(event, before)
        ]
        cells += [
            (metric.screen_name(), text.number(value, 3 if value < 100 else 1))
            for metric in BESIDE
            if (value := event.get(metric.key)) is not None
        ]
        # the names above are ours and short; that of a loss may be anything
        name_cells = max([NAME_CELLS, *(len(name) for name, _ in cells)])
        losses = {**(event.get("losses") or {}), **(event.get("heads") or {})}
        cells += [
            (text.clean(key), text.number(value))
            for key, value in losses.items()
            if key != "cross_entropy"
        ]
        columns = max(2, width // (name_cells + VALUE_CELLS))
        lines = [rule(evaluation_title(event), width), *grid(cells, width, columns, name_cells)]
        return Section(min(len(lines), 3), lines)

    def _sources(self, width: int) -> Section:
        """Return a line for each source: its share of the tokens, as a bar, and its numbers."""
        sources = self.step.get("sources") or {}
        if not sources:
            return Section(0, [])
        total = sum((source.get("tokens") or 0) for source in sources.values()) or 1
        wide = width >= WIDE_SOURCES
        bar_width = max(6, min(30, width - (82 if wide else 62)))
        name_width = max(10, min(30, width - bar_width - (54 if wide else 34)))
        heads = f"{'share':>{bar_width + 9}}{'weight':>9}{'loss':>9}"
        heads += f"{'documents':>11}{'epoch':>7}" if wide else ""
        lines = [rule("sources", width, heads + "  ")]
        for name, source in sorted(sources.items(), key=lambda item: -(item[1].get("tokens") or 0)):
            share = (source.get("tokens") or 0) / total
            label = Text("  " + text.clean(name))
            label.truncate(name_width, overflow="ellipsis", pad=True)
            weight, loss = text.number(source.get("weight")), text.number(source.get("loss"))
            numbers = f"{share * 100:>7.1f} %{weight:>9}{loss:>9}"
            if wide:
                documents, epochs = source.get("documents"), source.get("epochs")
                numbers += f"{text.count(documents):>11}{text.count(epochs):>7}"
            gap = width - name_width - bar_width - len(numbers) - 2
            filled = round(share * bar_width)
            line = label + Text(" " * gap) + Text("█" * filled, "blue")
            lines.append(line.append("·" * (bar_width - filled), "dim").append(numbers))
        return Section(min(len(lines), 4), lines)

    def _saved(self, width: int, now: float) -> Section:
        if not self.checkpoint:
            return Section(0, [])
        event = self.checkpoint
        ago = text.duration(now - (event.get("time") or now))
        path_and_age = f"{text.clean(event.get('path'))}, {ago} ago"
        return Section(1, [rule("checkpoint", width, left=path_and_age)])

    def _warnings(self, width: int) -> Section:
        """Return the newest warnings first, so that the oldest are cropped."""
        lines = [
            Text("  " + text.clean(event.get("message"))[:500], "yellow")
            for event in reversed(self.warnings)
        ]
        return Section(2, [rule("warnings", width), *lines[:5]] if lines else [])

    def _sample(self, width: int) -> Section:
        lines: list[Text] = []
        # the fillings of masks do not continue the prompt
        gap = "  " if self.start.get("objective") == MASKED_TOKENS else ""
        for event in self.samples:
            prompt = text.clean(event.get("prompt"))
            answer = text.clean(str(event.get("text"))[:SAMPLE_CHARACTERS])
            # some texts begin with the prompt; once is enough here
            both = Text.assemble((prompt[:200], "bold"), gap, answer.removeprefix(prompt))
            lines += [Text("  ") + line for line in folded(both, width - 4)]
        for event in self.neighbors:
            word = (text.clean(event.get("word")), "bold")
            near = Text.assemble("near ", word, f"  {neighbors(event)}")
            lines += [Text("  ") + line for line in folded(near, width - 4)]
        if not lines:
            return Section(0, [])
        kind, last = "neighbors", (self.samples or self.neighbors)[-1]
        if self.samples:
            kind = "sample"
        title = f"{kind} at {text.count(last.get('tokens'))} tokens"
        return Section(3, [rule(title, width), *lines])

    def _chart(self, width: int, rows: int) -> list[Text]:
        """Return the losses of this session as a chart of so many rows, the title included."""
        values = self.history.values
        body = text.chart(values, width - 10, rows - 1)
        low, high = text.number(min(values), 2), text.number(max(values), 2)
        labels = [high, *[""] * (len(body) - 2), low]
        return [
            rule("loss of this session", width),
            *[Text(f"{at:>8}  ", "dim") + Text(row, "green") for at, row in zip(labels, body)],
        ]


def _with(events: list[dict], event: dict) -> list[dict]:
    """Append an event to those of its evaluation; the first of a new evaluation replaces the
    others."""
    return [*events, event] if events and events[-1].get("step") == event.get("step") else [event]


def _share_rows(sections: list[Section], left: int, has_chart: bool) -> tuple[list[int], int]:
    """Return the rows of each section, and those of the chart below the head.

    sections   in order of importance; the last one is the sample
    left       rows to share
    """
    rows = [0] * len(sections)
    shown = []
    for i, section in enumerate(sections):
        if section.lines and section.min_rows > left:
            break
        if section.lines:
            shown.append(i)
            rows[i] = section.min_rows
            left -= section.min_rows

    def grow(i: int, most: int) -> None:
        nonlocal left
        more = max(0, min(left, len(sections[i].lines), most) - rows[i])
        rows[i], left = rows[i] + more, left - more

    sample = len(sections) - 1
    for i in shown:
        grow(i, SAMPLE_ROWS if i == sample else left)
    chart_rows = min(left, CHART_ROWS) if has_chart and left >= LEAST_CHART_ROWS else 0
    left -= chart_rows
    if sample in shown:
        grow(sample, left)
    return rows, chart_rows
