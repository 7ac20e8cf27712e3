"""Figures of a comparison: curves with bands over seeds, and paired differences with intervals.

In:    a Comparison
Out:   SVG for use inside HTML, one axes a figure, without legends: one key of colours serves all
       of them
State: none
"""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from core.comparison.outcome import Curve
from core.comparison.results import Comparison
from core.comparison.statistics import Difference
from core.comparison.verdict import percent
from core.reports.style import DASHES, INK, MARKERS, PAPER, SERIES, VARIABLES, drawing, dress
from core.ui.text import clean

WIDTH, HEIGHT = 4.3, 2.9
"""Inches; small, so that letters are legible where a phone scales the figure down."""
SHOWN_FROM = 0.1
"""Share of the run that the limits of an axis ignore: the values there are so much higher that they
would flatten the rest."""
SMOOTHED = 0.05
"""Share of the run that a point of a training curve is averaged over."""

Draw = Callable[[Any], None]


def evaluation_figure(comparison: Comparison, key: str, unit: str) -> str | None:
    """Draw a metric at every evaluation."""
    lines = [
        [outcome.curves.get(key, []) for outcome in variant.outcomes]
        for variant in comparison.variants
    ]
    return _curves(comparison, lines, unit, f"eval-{comparison.metrics.index(key)}")


def training_figure(comparison: Comparison, unit: str) -> str | None:
    """Draw the training loss, smoothed."""
    lines = [
        [_smooth(outcome.training) for outcome in variant.outcomes]
        for variant in comparison.variants
    ]
    return _curves(comparison, lines, unit, "training")


def difference_figure(comparison: Comparison, unit: str) -> str | None:
    """Draw the paired difference to the baseline at every evaluation."""
    key = comparison.metric
    baseline = {outcome.trial.seed: outcome for outcome in comparison.baseline.finished}
    lines: list[list[Curve]] = [[]]
    for variant in comparison.variants[1:]:
        pairs = [(o, baseline[o.trial.seed]) for o in variant.finished if o.trial.seed in baseline]
        lines.append(
            [
                _difference(outcome.curves.get(key, []), base.curves.get(key, []))
                for outcome, base in pairs
            ]
        )
    if not any(curve for group in lines for curve in group):
        return None

    def draw(axes: Any) -> None:
        axes.axhline(0, color=SERIES[0], linewidth=1.6)
        tops = [
            _draw_band(axes, i, [curve for curve in group if curve])
            for i, group in enumerate(lines)
        ]
        _limit(axes, [top for top in tops if top is not None], from_both=True)
        _tokens(axes, unit)

    return _svg(draw, "gap")


def forest_figure(comparison: Comparison) -> str | None:
    """Draw the paired differences in the primary metric: mean, interval, and a dot for each
    seed."""
    metric = comparison.primary
    rows = [
        (i, variant.name, difference)
        for i, variant in enumerate(comparison.variants)
        if i and (difference := variant.differences.get(comparison.metric)) and difference.values
    ]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        axes.axvline(0, color=SERIES[0], linewidth=1.6)
        for row, (i, name, difference) in enumerate(rows):
            _draw_difference(axes, -row, i, name, difference)
        axes.set_ylim(-len(rows) + 0.5, 0.65)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.08)
        unit = f" ({metric.unit})" if metric.unit else ""
        axes.set_xlabel(f"{_short(metric.name, 30)}, variant − baseline{unit}", parse_math=False)

    return _svg(draw, "forest", WIDTH * 1.25, 0.9 + 0.65 * len(rows))


def _draw_difference(axes: Any, y: float, i: int, name: str, difference: Difference) -> None:
    """Draw one variant's difference at a height: its name above it, the seeds below it."""
    color = _look(i)["color"]
    axes.annotate(
        _short(name),
        (0, y),
        xytext=(2, 12),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=9,
        parse_math=False,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
    )
    if difference.interval is not None:
        axes.plot(difference.interval, [y, y], color=color, linewidth=2.2)
        marker = MARKERS[i % len(MARKERS)]
        axes.plot([difference.mean], [y], color=color, marker=marker, markersize=8)
    rings = {"marker": "o", "markersize": 4.5, "markerfacecolor": "none"}
    rings |= {"markeredgecolor": INK, "markeredgewidth": 1}
    below = [y - 0.2] * len(difference.values)
    axes.plot(difference.values, below, linestyle="none", **rings)


def forest_caption(comparison: Comparison) -> str:
    """Return the caption of `forest_figure`."""
    sides = {-1: " Left of zero is better.", 1: " Right of zero is better.", 0: ""}
    side = sides[comparison.primary.better]
    return (
        f"Mark and line: mean paired difference and its {percent(comparison.confidence)} "
        f"interval. Rings: the seeds.{side}"
    )


# curves -------------------------------------------------------------------------------------------


def _curves(comparison: Comparison, lines: list[list[Curve]], unit: str, name: str) -> str | None:
    """Draw mean and band of each variant; each trial that is not finished is a thin line."""
    if not any(curve for group in lines for curve in group):
        return None

    def draw(axes: Any) -> None:
        finished, others = [], []
        for i, (variant, group) in enumerate(zip(comparison.variants, lines)):
            known = [(o.finished, curve) for o, curve in zip(variant.outcomes, group) if curve]
            finished.append(_draw_band(axes, i, [curve for done, curve in known if done]))
            for curve in [curve for done, curve in known if not done]:
                axes.plot(*zip(*curve), **_look(i) | {"linewidth": 0.9, "alpha": 0.8})
                others.append(np.array(curve, dtype=float).T)
        # diverged trials may be anywhere: the finished ones, if any, decide the limits
        _limit(axes, [shown for shown in finished if shown is not None] or others)
        _tokens(axes, unit)

    return _svg(draw, name)


def _draw_band(axes: Any, i: int, curves: list[Curve]) -> Any:
    """Draw the mean, and a band from the lowest to the highest seed. Return (tokens, *values) of
    what was drawn; None where there is nothing."""
    if not curves:
        return None
    points = [np.array(curve, dtype=float).T for curve in curves]
    start, end = max(p[0][0] for p in points), min(p[0][-1] for p in points)
    grid = points[0][0][(points[0][0] >= start) & (points[0][0] <= end)]
    if not len(grid):
        return None
    values = np.array([np.interp(grid, *p) for p in points])
    look = _look(i)
    if len(values) > 1:
        axes.fill_between(
            grid, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0
        )
    axes.plot(
        grid, values.mean(0), **look, marker=MARKERS[i % len(MARKERS)] if len(grid) == 1 else None
    )
    return np.array([grid, *values])


def _difference(curve: Curve, base: Curve) -> Curve:
    """Return the difference of two curves where both are known, at the tokens of the first."""
    if not curve or not base:
        return []
    tokens, values = zip(*base)
    known = [(t, v) for t, v in curve if tokens[0] <= t <= tokens[-1]]
    return [(t, v - float(np.interp(t, tokens, values))) for t, v in known]


def _smooth(curve: Curve) -> Curve:
    """Average each point with its neighbours; towards the ends there are fewer."""
    reach = round(len(curve) * SMOOTHED / 2)
    values = [value for _, value in curve]
    return [
        (t, float(np.mean(values[max(0, i - reach) : i + reach + 1])))
        for i, (t, _) in enumerate(curve)
    ]


def _limit(axes: Any, drawn: list[Any], from_both: bool = False) -> None:
    """Set the limits by what is drawn after the first tenth of the run.

    drawn       (tokens, *values) of each variant
    from_both   the start may be far off on either side
    """
    if not drawn:
        return
    end = max(d[0].max() for d in drawn)
    late = np.concatenate([d[1:][:, d[0] >= SHOWN_FROM * end].ravel() for d in drawn])
    early = np.concatenate([d[1:].ravel() for d in drawn])
    low, high = late.min(), late.max()
    if from_both:
        low, high = min(low, 0.0), max(high, 0.0)
    elif early.min() < low:  # a metric that rises: what is cut off is below
        low = max(early.min(), low - 0.15 * (high - low))
    margin = max(0.06 * (high - low), 1e-9 + 1e-3 * abs(high))
    axes.set_ylim(low - margin, high + margin)


def _look(i: int) -> dict[str, Any]:
    return {
        "color": SERIES[i % len(SERIES)],
        "linestyle": DASHES[i % len(DASHES)],
        "linewidth": 1.8,
    }


def _tokens(axes: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(left=0)
    axes.margins(x=0.01)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(_short(unit, 30), parse_math=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _short(name: str, length: int = 50) -> str:
    """Shorten a name to fit into the figure; the tables have the full one."""
    name = clean(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


# SVG ----------------------------------------------------------------------------------------------


def _svg(draw: Draw, name: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    from matplotlib.figure import Figure

    with drawing(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        dress(axes)
        draw(axes)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Return the `<svg>` element alone: without addresses, with identifiers of its own, and the
    page's variables as colours."""
    svg = svg[svg.index("<svg") :]
    end = svg.index(">")
    tag = re.sub(r' (xmlns|xmlns:xlink|version|width|height)="[^"]*"', "", svg[:end])
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag + svg[end:])
    svg = re.sub(r'style="[^"]*"', lambda style: _themed(style[0]), svg)
    return svg.replace("<svg", '<svg role="img"', 1).strip()


def _themed(style: str) -> str:
    for colour, variable in VARIABLES.items():
        style = style.replace(colour, f"var(--{variable})")
    return style
