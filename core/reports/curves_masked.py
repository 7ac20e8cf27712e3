"""The figure of a masked-token run: likelihoods, accuracies, pseudo-perplexities and prototypes, by
tokens trained on.

In:    a metrics log, finished or still being written
Out:   masked.png
State: of the view, the objective of the run
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.metrics.events import LOG
from core.preset.settings import MASKED_TOKENS
from core.reports.figure import (
    dress,
    engineering,
    events_of,
    mark_beginnings,
    new_figure,
    number,
    save,
    title_of,
)
from core.reports.style import SERIES
from core.ui import text

GREY, BLUE, ORANGE, GREEN, PINK = SERIES[:5]
PANEL_WIDTH, PANEL_HEIGHT = 6.2, 4.3  # inches
LEGEND_COLUMNS, LEGEND_ROW = 2, 15  # of the legend over each panel: columns, and points of a row
FEW = 25
"""Each evaluation has a mark where there are at most so many."""

Points = list[tuple[int, float]]  # (tokens, value)


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    key        of an `eval` event
    digits     after the point, of the last value in the legend
    scale      factor of its values
    baseline   of the original decoder, which the model keeps: dashed
    right      on an axis of its own, on the right
    marks      whether values have marks, where there are few
    """

    key: str
    label: str
    color: str
    digits: int = 3
    scale: float = 1.0
    baseline: bool = False
    right: bool = False
    marks: bool = True


@dataclass(frozen=True)
class Panel:
    """One of the figure's axes."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    right_unit: str = ""
    logarithmic: bool = False


PANELS = (
    Panel(
        "Masked tokens: negative log-likelihood",
        "nats per masked token",
        (
            Line("cross_entropy", "cross-entropy", BLUE),
            Line("nll_h12", "at h = −12", BLUE),
            Line("nll_h4", "at h = −4", ORANGE),
            Line("decoder_cross_entropy", "decoder", GREY, baseline=True),
        ),
    ),
    Panel(
        "Masked tokens: accuracy",
        "% of masked tokens",
        (
            Line("top5_accuracy", "top-5", GREEN, 1, 100),
            Line("token_accuracy", "top-1", BLUE, 1, 100),
            Line("decoder_top5_accuracy", "decoder top-5", GREEN, 1, 100, baseline=True),
            Line("decoder_accuracy", "decoder top-1", BLUE, 1, 100, baseline=True),
        ),
    ),
    Panel(
        "Pseudo-perplexity: one token masked at a time",
        "pseudo-perplexity, logarithmic",
        (
            Line("pseudo_perplexity", "pseudo-perplexity", BLUE, 1),
            Line("pseudo_perplexity_h12", "at h = −12", BLUE, 1),
            Line("pseudo_perplexity_h4", "at h = −4", ORANGE, 1),
            Line("decoder_pseudo_perplexity", "decoder", GREY, 1, baseline=True),
        ),
        logarithmic=True,
    ),
    Panel(
        "Prototypes on the sphere",
        "cosine",
        (
            Line("prototype_cosine", "mean cosine of two", BLUE),
            Line("prototype_spread", "its standard deviation", ORANGE),
            Line("prototype_drift", "drift, 1 − cos to embedding", GREEN),
            Line("prototype_dimensions", "directions used (right)", PINK, 0, right=True),
        ),
        right_unit="effective number of directions",
    ),
)


class MaskedPlot:
    """Redraws masked.png at evaluations and at the end of a run that predicts masked tokens."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._masked = True  # until an event says otherwise, the log decides

    def update(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("run_start", "eval"):
            self._masked = event.get("objective") == MASKED_TOKENS
        if kind in ("eval", "run_end") and self._masked:
            plot_masked(self._folder / LOG, self._folder / "masked.png")


def plot_masked(metrics_path: Path, out: Path) -> None:
    """Draw a log into the PNG `out`, which is replaced whole or not at all. Draws nothing without
    an evaluation of masked tokens; a panel without numbers is left out."""
    events = events_of(metrics_path)
    evals = [
        event
        for event in events
        if event["event"] == "eval" and event.get("objective") == MASKED_TOKENS
    ]
    panels = [(panel, lines) for panel in PANELS if (lines := _with_points(panel.lines, evals))]
    if not panels:
        return
    first, lines = panels[0]
    if first is PANELS[0] and (scheduled := _scheduled(events)):
        unit = ", ".join(line.label.removesuffix(" (right)") for line, _ in scheduled)
        panels[0] = (replace(first, right_unit=unit), lines + scheduled)

    columns = 2 if len(panels) == 4 else len(panels)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(PANEL_WIDTH * columns + 0.4, PANEL_HEIGHT * rows + 0.5)
    figure.suptitle(title_of(events), x=0.01, ha="left", fontsize=13)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04, hspace=0.04)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    legend_rows = max(math.ceil(len(lines) / LEGEND_COLUMNS) for _, lines in panels)
    for axes, (panel, lines) in zip(all_axes, panels):
        _draw(axes, panel, lines, legend_rows)
    mark_beginnings(all_axes, events)
    end = max(event["tokens"] for event in events if event["event"] in ("eval", "step"))
    for axes in all_axes:
        axes.set_xlim(-0.015 * max(end, 1), 1.03 * max(end, 1))
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(engineering())
    save(figure, out)


def _with_points(lines: Iterable[Line], evals: list[dict]) -> list[tuple[Line, Points]]:
    """Return the lines that have a number, each with its points."""
    drawn = []
    for line in lines:
        values = [(event["tokens"], number(event.get(line.key))) for event in evals]
        points = [(tokens, line.scale * value) for tokens, value in values if value is not None]
        if points:
            drawn.append((line, points))
    return drawn


def _scheduled(events: list[dict]) -> list[tuple[Line, Points]]:
    """Return the exponents of distances that were in force at each step."""
    points: dict[str, Points] = {}
    for event in events:
        scheduled = event.get("scheduled") if event["event"] == "step" else None
        for name, value in (scheduled or {}).items():
            if name.endswith("h_exp") and number(value) is not None:
                points.setdefault(name, []).append((event["tokens"], value))
    lines = []
    for name, values in points.items():
        short = name if len(points) > 1 else name.rpartition(".")[2]
        label = f"{short} in training (right)"
        lines.append((Line(name, label, PINK, digits=1, right=True, marks=False), values))
    return lines


def _draw(axes: Any, panel: Panel, lines: list[tuple[Line, Points]], legend_rows: int) -> None:
    """Draw one panel.

    legend_rows   of the largest legend, so that all titles stand equally high
    """
    from matplotlib.transforms import offset_copy

    dress(axes)
    other = axes.twinx() if any(line.right for line, _ in lines) else None
    handles = []
    for line, points in lines:
        where = other if line.right and other is not None else axes
        look = _look(line, len(points))
        handles += where.plot(*zip(*points), label=_label(line, points), **look)
    axes.set_ylabel(panel.unit)
    if panel.logarithmic:
        _logarithmic(axes, [value for _, points in lines for _, value in points])
    else:
        axes.margins(y=0.08)
    if other is not None:
        color = next(line.color for line, _ in lines if line.right)
        other.set_ylabel(panel.right_unit, color=color)
        other.tick_params(axis="y", colors=color)
        other.spines["top"].set_visible(False)
        other.margins(y=0.08)
    else:
        axes.spines["right"].set_visible(False)
    # the legend stands above the curves: inside the frame it would cover one sooner or later
    top = offset_copy(axes.transAxes, axes.figure, y=LEGEND_ROW * legend_rows + 4, units="points")
    axes.set_title(panel.title, loc="left", fontsize=11, pad=LEGEND_ROW * legend_rows + 8)
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.01, 1.0),
        bbox_transform=top,
        ncols=LEGEND_COLUMNS,
        frameon=False,
        fontsize=9,
        borderaxespad=0,
    )


def _look(line: Line, points: int) -> dict[str, Any]:
    """Return how matplotlib draws a line of so many points."""
    look = {"color": line.color, "linewidth": 1.8 if line.marks else 1.2, "zorder": 3}
    if line.baseline:
        dashes = (0, (4, 2))
        look |= {"linestyle": dashes, "linewidth": 1.2, "zorder": 2, "markerfacecolor": "white"}
    if line.marks and points <= FEW:
        look |= {"marker": "o", "markersize": 4.5}
    return look


def _label(line: Line, points: Points) -> str:
    """Return the label with the last value: values written beside the curves would often
    overlap."""
    value = text.number(points[-1][1], line.digits).replace("-", "−")
    return f"{line.label}   {value}{' %' if line.scale == 100 else ''}"


def _logarithmic(axes: Any, values: list[float]) -> None:
    """Make the axis logarithmic, with ticks at powers of ten; below two decades, where there may be
    none of these, at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = min(values), max(values)
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_minor_formatter(NullFormatter())
    if high < 100 * low and high < 1e6:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
