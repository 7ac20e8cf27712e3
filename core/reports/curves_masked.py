"""The picture of a masked-token run: likelihoods, hits, pseudo-perplexities and the lie of the
prototypes, by tokens trained on.

In:    a metrics log, finished or still being written
Out:   masked.png
State: of the view, whether the run is one of masked tokens
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
"""Up to so many evaluations each has its mark."""

Points = list[tuple[int, float]]  # (tokens, value)


@dataclass(frozen=True)
class Line:
    """
    key        of an `eval` event
    digits     after the point, of the last value in the legend
    scale      what its values are multiplied by
    baseline   of the decoder kept beside: dashed
    right      on an axis of its own, on the right
    marks      whether each value has one, where there are few
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
    """Redraws masked.png at evaluations and at the end, where what is learned are masked tokens."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._masked = True  # until an event says otherwise: the log decides then

    def update(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("run_start", "eval"):
            self._masked = event.get("objective") == MASKED_TOKENS
        if kind in ("eval", "run_end") and self._masked:
            plot_masked(self._folder / LOG, self._folder / "masked.png")


def plot_masked(metrics_path: Path, out: Path) -> None:
    """Draw `metrics_path` into `out`, replaced whole or not at all. Draws nothing when the log
    holds no evaluation of masked tokens; a panel without numbers is left out."""
    events = events_of(metrics_path)
    evals = [
        event
        for event in events
        if event["event"] == "eval" and event.get("objective") == MASKED_TOKENS
    ]
    panels = [(panel, drawn) for panel in PANELS if (drawn := _drawn(panel.lines, evals))]
    if not panels:
        return
    first, drawn = panels[0]
    if first is PANELS[0] and (scheduled := _scheduled(events)):
        unit = ", ".join(line.label.removesuffix(" (right)") for line, _ in scheduled)
        panels[0] = (replace(first, right_unit=unit), drawn + scheduled)

    columns = 2 if len(panels) == 4 else len(panels)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(PANEL_WIDTH * columns + 0.4, PANEL_HEIGHT * rows + 0.5)
    figure.suptitle(title_of(events), x=0.01, ha="left", fontsize=13)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04, hspace=0.04)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (panel, lines) in zip(places, panels):
        _draw(axes, panel, lines, max(math.ceil(len(each) / LEGEND_COLUMNS) for _, each in panels))
    mark_beginnings(places, events)
    end = max([event["tokens"] for event in events if event["event"] in ("eval", "step")])
    for axes in places:
        axes.set_xlim(-0.015 * max(end, 1), 1.03 * max(end, 1))
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(engineering())
    save(figure, out)


def _drawn(lines: Iterable[Line], evals: list[dict]) -> list[tuple[Line, Points]]:
    """Those of which there is a number."""
    found = [
        (
            line,
            [
                (e["tokens"], line.scale * value)
                for e in evals
                if (value := number(e.get(line.key))) is not None
            ],
        )
        for line in lines
    ]
    return [(line, points) for line, points in found if points]


def _scheduled(events: list[dict]) -> list[tuple[Line, Points]]:
    """The exponents of distances in force at each step."""
    points: dict[str, Points] = {}
    for event in events:
        for name, value in (
            (event.get("scheduled") or {}).items() if event["event"] == "step" else ()
        ):
            if name.endswith("h_exp") and number(value) is not None:
                points.setdefault(name, []).append((event["tokens"], value))
    several = len(points) > 1
    labels = {
        name: f"{name if several else name.rpartition('.')[2]} in training (right)"
        for name in points
    }
    return [
        (Line(name, labels[name], PINK, 1, right=True, marks=False), found)
        for name, found in points.items()
    ]


def _draw(axes: Any, panel: Panel, lines: list[tuple[Line, Points]], legend_rows: int) -> None:
    """`legend_rows`: of the largest legend, so that all titles stand equally high."""
    from matplotlib.transforms import offset_copy

    dress(axes)
    other = axes.twinx() if any(line.right for line, _ in lines) else None
    handles = []
    for line, points in lines:
        look = (
            {"linestyle": (0, (4, 2)), "linewidth": 1.2, "zorder": 2, "markerfacecolor": "white"}
            if line.baseline
            else {}
        )
        look |= {"marker": "o", "markersize": 4.5} if line.marks and len(points) <= FEW else {}
        look = {"color": line.color, "linewidth": 1.8 if line.marks else 1.2, "zorder": 3} | look
        where = other if line.right and other is not None else axes
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
    # above the curves, under the title: inside the frame it would lie on some curve at some time
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


def _label(line: Line, points: Points) -> str:
    """With the last value: beside the curves two of them would often lie on each other."""
    value = text.number(points[-1][1], line.digits).replace("-", "−")
    return f"{line.label}   {value}{' %' if line.scale == 100 else ''}"


def _logarithmic(axes: Any, values: list[float]) -> None:
    """Over two decades or more ticks at powers of ten; below, where there may be none, at 1, 2 and
    5 of each."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = min(values), max(values)
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_minor_formatter(NullFormatter())
    if high < 100 * low and high < 1e6:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
