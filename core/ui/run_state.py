"""What the dashboard shows, as lines: everything known of the run, laid out to fit a given width
and height.

In:    events, in order; then a size and the time
Out:   a rich Text of at most that many lines, none wider than the screen
State: the last event of each kind, recent and all losses, warnings and samples

The head is always there. Below it come sections in order of importance, each with the rows it needs
at least; what does not fit is left out from the bottom, and what is left over goes to the section
that can use it, last to the chart."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from core.metrics.table import BESIDE
from core.preset.settings import MASKED_TOKENS
from core.ui import text
from core.ui.plain import evaluation_title, left_out, machine, neighbors, scores
from core.ui.progress import Progress

QUIET_SECONDS = 10.0
"""After so long without any event the dashboard says so: a first step being compiled, an
evaluation, or something stuck."""
CHART_ROWS = 12
SAMPLE_ROWS = 9  # before the chart takes its part
SAMPLE_CHARACTERS = 2000
# cells of a name; of a number with its change in brackets; of one without
NAME, VALUE, LEAST_VALUE = 14, 16, 12
OF_MODELS = {
    "routing_entropy/mean": "static entropy",
    "dynamic_routing_entropy/mean": "route entropy",
}
"""Numbers a model reports of itself, by other names; those of single layers are in the log only."""
ENDINGS = {
    "budget": "finished",
    "max_steps": "finished",
    "max_epochs": "finished",
    "interrupted": "interrupted",
}


WIDE_SOURCES = 92
"""Columns from which on the sources' documents and epochs are shown too."""


@dataclass
class Section:
    least: int  # rows below which it is not worth showing
    lines: list[Text]


class RunState:
    """All that events have told of one run."""

    def __init__(self, start: dict):
        self.start, self.progress = start, Progress(start)
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
            self.warnings.append({**event, "message": f"skipped {left_out(event)}"})
        elif kind == "run_end":
            self.end = event

    def frame(self, width: int, height: int, now: float) -> Text:
        """At most `height` lines of at most `width` cells."""
        if self.end:
            now = self.end.get("time") or now
        lines = self._head(width, now)
        left = height - len(lines)
        sections = [
            self._evaluation(width),
            self._sources(width),
            self._saved(width, now),
            self._warnings(width),
            self._sample(width),
        ]
        rows = {}
        for i, section in enumerate(sections):
            if section.lines and section.least <= left:
                rows[i] = section.least
                left -= section.least
            elif section.lines:
                break

        def grow(i: int, at_most: int) -> None:
            nonlocal left
            more = max(0, min(left, len(sections[i].lines), at_most) - rows[i]) if i in rows else 0
            more = min(more, left)
            rows[i], left = rows.get(i, 0) + more, left - more

        sample = len(sections) - 1
        for i in list(rows):
            grow(i, SAMPLE_ROWS if i == sample else height)
        if left >= 4 and (chart := self._chart(width, min(left, CHART_ROWS))):
            lines, left = lines + chart, left - len(chart)
        if sample in rows:
            grow(sample, height)
        for i, n in rows.items():
            lines += sections[i].lines[:n]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return Text("\n", no_wrap=True).join(lines[:height])

    def _head(self, width: int, now: float) -> list[Text]:
        start, step = self.start, self.step
        name = Text.assemble(
            (text.clean(start.get("preset")), "bold cyan"),
            "  ",
            (f"lineage {text.clean(start.get('lineage'))}", ""),
        )
        name.append(f"  run {start.get('run')}", "")
        if start.get("resumed_from"):
            name.append(f"  resumed from {Path(text.clean(start['resumed_from'])).name}", "dim")
        elapsed = Text(f"{text.duration(now - (start.get('time') or now))} elapsed", "dim")
        out = [apart(name, elapsed, width), Text(machine(start), "dim")]

        progress = self.progress
        if self.end:
            left = ENDINGS.get(str(self.end.get("reason")), "stopped")
        elif not step:
            left = "preparing the first step"
        else:
            left = (
                f"{text.duration(progress.seconds_left)} left"
                if progress.seconds_left is not None
                else ""
            )
        after = Text.assemble(
            (f"  {progress.percent:>7}", "bold"), f"  {progress.counted}", (f"  {left}", "cyan")
        )
        out.append(bar(progress.fraction, max(8, width - after.cell_len)) + after)

        loss = Text.assemble(
            ("loss           ", "dim"), (f"{text.number(step.get('loss'), 4):<10}", "bold")
        )
        spark = text.chart(list(self.recent), max(8, width - loss.cell_len))[0]
        out += [Text(), loss + Text(spark, "green")]
        cells = [
            ("tokens/s", text.count(step.get("tokens_per_second"))),
            ("learning rate", text.number(step.get("learning_rate"))),
            ("grad norm", text.number(step.get("grad_norm"), 2)),
            ("step", f"{step.get('step', start.get('step', 0)):,}"),
            ("memory", text.memory(step.get("memory_mb"))),
        ]
        if step.get("skipped"):
            cells.append(("skipped", f"{step['skipped']} updates"))
        if len(losses := step.get("losses") or {}) > 1:
            cells += [(text.clean(key), text.number(value)) for key, value in losses.items()]
        cells += [
            (text.clean(name).rpartition(".")[2], text.number(v))
            for name, v in (step.get("scheduled") or {}).items()
        ]
        of_model = (step.get("model") or {}).items()
        cells += [
            (OF_MODELS.get(name, name), text.number(value))
            for name, value in of_model
            if "/layer_" not in name
        ]
        out += _grid(cells, width)
        if not self.end and now - self.last_event > QUIET_SECONDS:
            out.append(Text(f"no news for {text.duration(now - self.last_event)}", "yellow"))
        return out

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
        # of ours: a loss may have any name
        longest = max((len(name) for name, _ in cells), default=0)
        losses = {
            key: value
            for key, value in (event.get("losses") or {}).items()
            if key != "cross_entropy"
        }
        cells += [
            (text.clean(key), text.number(value))
            for key, value in (losses | (event.get("heads") or {})).items()
        ]
        names = max(NAME, longest)
        lines = [
            rule(evaluation_title(event), width),
            *_grid(cells, width, max(2, width // (names + VALUE)), names),
        ]
        return Section(min(len(lines), 3), lines)

    def _sources(self, width: int) -> Section:
        sources = self.step.get("sources") or {}
        if not sources:
            return Section(0, [])
        total = sum((each.get("tokens") or 0) for each in sources.values()) or 1
        wide = width >= WIDE_SOURCES
        bar_width = max(6, min(30, width - (82 if wide else 62)))
        name_width = max(10, min(30, width - bar_width - (54 if wide else 34)))
        heads = f"{'share':>{bar_width + 9}}{'weight':>9}{'loss':>9}" + (
            f"{'documents':>11}{'epoch':>7}" if wide else ""
        )
        lines = [rule("sources", width, heads + "  ")]
        for name, each in sorted(sources.items(), key=lambda item: -(item[1].get("tokens") or 0)):
            share = (each.get("tokens") or 0) / total
            label = Text("  " + text.clean(name))
            label.truncate(name_width, overflow="ellipsis", pad=True)
            numbers = f"{share * 100:>7.1f} %{text.number(each.get('weight')):>9}{text.number(each.get('loss')):>9}"
            if wide:
                numbers += (
                    f"{text.count(each.get('documents')):>11}{text.count(each.get('epochs')):>7}"
                )
            filled = round(share * bar_width)
            lines.append(
                label
                + Text(" " * (width - name_width - bar_width - len(numbers) - 2))
                + Text("█" * filled, "blue")
            )
            lines[-1].append("·" * (bar_width - filled), "dim").append(numbers)
        return Section(min(len(lines), 4), lines)

    def _saved(self, width: int, now: float) -> Section:
        if not self.checkpoint:
            return Section(0, [])
        event = self.checkpoint
        ago = text.duration(now - (event.get("time") or now))
        about = f"{text.clean(event.get('path'))}, {ago} ago"
        return Section(1, [rule("checkpoint", width, left=about)])

    def _warnings(self, width: int) -> Section:
        """The newest first, so that cropping takes the oldest."""
        lines = [
            Text("  " + text.clean(event.get("message"))[:500], "yellow")
            for event in reversed(self.warnings)
        ]
        return Section(2, [rule("warnings", width), *lines[:5]] if lines else [])

    def _sample(self, width: int) -> Section:
        lines: list[Text] = []
        # what fills a mask does not go on with the prompt
        gap = "  " if self.start.get("objective") == MASKED_TOKENS else ""
        for event in self.samples:
            prompt, continuation = (
                text.clean(event.get("prompt")),
                text.clean(str(event.get("text"))[:SAMPLE_CHARACTERS]),
            )
            # Some write the prompt again at the beginning of the text; once is enough here.
            both = Text.assemble((prompt[:200], "bold"), gap, continuation.removeprefix(prompt))
            lines += [Text("  ") + line for line in _folded(both, width - 4)]
        for event in self.neighbors:
            line = Text.assemble(
                "near ", (text.clean(event.get("word")), "bold"), f"  {neighbors(event)}"
            )
            lines += [Text("  ") + line for line in _folded(line, width - 4)]
        if not lines:
            return Section(0, [])
        what, last = (
            ("sample", self.samples[-1]) if self.samples else ("neighbors", self.neighbors[-1])
        )
        return Section(
            3, [rule(f"{what} at {text.count(last.get('tokens'))} tokens", width), *lines]
        )

    def _chart(self, width: int, rows: int) -> list[Text]:
        values = self.history.values
        if len(values) < 8:
            return []
        body = text.chart(values, width - 10, rows - 1)
        low, high = text.number(min(values), 2), text.number(max(values), 2)
        labels = [high, *[""] * (len(body) - 2), low]
        return [
            rule("loss of this session", width),
            *[Text(f"{at:>8}  ", "dim") + Text(row, "green") for at, row in zip(labels, body)],
        ]


def _with(events: list[dict], event: dict) -> list[dict]:
    """Those of the same evaluation, and one more; the first of another one leaves the others
    behind."""
    return [*events, event] if events and events[-1].get("step") == event.get("step") else [event]


def rule(title: str, width: int, right: str = "", left: str = "") -> Text:
    line = Text.assemble(("── ", "dim"), (title, "cyan"), " ", f"{left} " if left else "")
    dashes = max(0, width - line.cell_len - len(right) - (1 if right else 0))
    return line.append("─" * dashes + (" " if right else ""), "dim").append(right, "dim")


def apart(left: Text, right: Text, width: int) -> Text:
    """One at each side, or the left one alone where both do not fit."""
    gap = width - left.cell_len - right.cell_len
    return left + Text(" " * gap) + right if gap >= 2 else left


def bar(fraction: float, width: int) -> Text:
    done = int(fraction * width)
    return Text.assemble(("━" * done, "cyan"), ("━" * (width - done), "grey35"))


def _grid(
    cells: list[tuple[str, str]], width: int, columns: int = 3, names: int = NAME
) -> list[Text]:
    """Names and values in at most so many columns; `names`: cells of a name."""
    columns = max(1, min(columns, width // (names + LEAST_VALUE)))
    each = width // columns
    lines = []
    for i in range(0, len(cells), columns):
        line = Text()
        for name, value in cells[i : i + columns]:
            cell = Text.assemble((f"{name:<{names}} ", "dim"), value)
            cell.truncate(each - 1, overflow="ellipsis", pad=True)
            line.append_text(cell).append(" ")
        lines.append(line)
    return lines


def _folded(line: Text, width: int) -> list[Text]:
    """Broken at spaces where there are any; cells, not characters, are counted."""
    if cell_len(line.plain) <= width:
        return [line]
    return list(line.wrap(Console(width=width), width))
