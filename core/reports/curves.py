"""The figure of a run: losses, learning rate and gradient norm over the tokens trained on.

In:    a metrics log, finished or still being written
Out:   a PNG
State: none
"""

from pathlib import Path
from typing import Any

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


def plot_losses(metrics_path: Path, out: Path) -> None:
    """Draw a log into the PNG `out`, which is replaced whole or not at all. Draws nothing while the
    log holds no step."""
    events = events_of(metrics_path)
    steps = [
        event
        for event in events
        if event["event"] == "step" and number(event.get("loss")) is not None
    ]
    if not steps:
        return
    figure = new_figure(10, 7)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    _draw_losses(losses, steps, [event for event in events if event["event"] == "eval"])
    _draw_rates(rates, steps)
    mark_beginnings([losses, rates], events)
    losses.set_title(title_of(events), loc="left", fontsize=12)
    rates.set_xlabel("tokens")
    rates.xaxis.set_major_formatter(engineering())
    save(figure, out)


def _draw_losses(axes: Any, steps: list[dict], evals: list[dict]) -> None:
    tokens, raw = [event["tokens"] for event in steps], [event["loss"] for event in steps]
    smooth = _smoothed(raw)
    axes.plot(tokens, raw, color="#9ecae1", linewidth=0.6, alpha=0.8, label="training loss")
    axes.plot(tokens, smooth, color="#1f6fb4", linewidth=1.8, label="training loss, smoothed")
    points = [
        (event["tokens"], value)
        for event in evals
        if (value := number(event.get("cross_entropy"))) is not None
    ]
    if points:
        orange = "#d95f02"
        look = {"color": orange, "linewidth": 1.2, "marker": "o", "markersize": 4.5}
        axes.plot(*zip(*points), **look, label="evaluation cross-entropy")
        above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{points[-1][1]:.3f}", points[-1], **above, color=orange, fontsize=9)
    # the first few updates are so much higher that they would flatten the rest of the curve
    shown = sorted(smooth + [value for _, value in points])
    low = min(shown[0], sorted(raw)[len(raw) // 100])
    high = shown[min(len(shown) - 1, int(0.99 * len(shown)))]
    margin = max(0.05 * (high - low), 1e-3 * abs(high), 1e-9)
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.set_ylabel("loss (nats per token)")
    _dress(axes)


def _draw_rates(axes: Any, steps: list[dict]) -> None:
    tokens = [event["tokens"] for event in steps]
    rates = [number(event.get("learning_rate")) for event in steps]
    norms = [number(event.get("grad_norm")) for event in steps]
    lines = axes.plot(tokens, _gaps(rates), color="#1b9e77", linewidth=1.8, label="learning rate")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    other = axes.twinx()
    look = {"color": "#7570b3", "linewidth": 0.6, "alpha": 0.7}
    lines += other.plot(tokens, _gaps(norms), **look, label="grad norm")
    known = sorted(norm for norm in norms if norm is not None)
    if known:  # one spike must not hide every other value
        other.set_ylim(0, max(1.4 * known[int(0.99 * (len(known) - 1))], 1e-9))
    other.set_ylabel("grad norm")
    other.spines["top"].set_visible(False)
    _dress(axes, lines)


def _gaps(values: list[float | None]) -> list[float]:
    """Replace None by NaN, which leaves a gap in a line."""
    return [float("nan") if value is None else value for value in values]


def _dress(axes: Any, lines: list | None = None) -> None:
    dress(axes)
    axes.margins(x=0.01)
    axes.legend(handles=lines, loc="upper right", frameon=False, fontsize=9)


def _smoothed(values: list[float]) -> list[float]:
    """Compute the exponential mean over about a hundredth of the curve, without the bias towards
    its start."""
    decay = 1 - 1 / min(50, max(3, len(values) / 100))
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        smoothed.append(total / weight)
    return smoothed
