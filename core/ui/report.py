"""The picture of a run: losses, learning rate and gradient norm over the tokens trained on.

In:    a metrics log, finished or still being written
Out:   a PNG
State: none
"""

import os
import warnings
from pathlib import Path
from typing import Any

from core.metrics import read_events
from core.ui.plain import NOT_CAUSAL

LOG_BYTES = 16 << 20
"""Of a longer log only every n-th step line is decoded, so that drawing at each evaluation of a long run stays cheap."""


def plot_losses(metrics_path: Path, out: Path) -> None:
    """Draw `metrics_path` into `out`, replaced whole or not at all. Draws nothing when the log holds no step yet."""
    size = metrics_path.stat().st_size if metrics_path.exists() else 0
    events = list(read_events(metrics_path, step_stride=1 + size // LOG_BYTES))
    steps = [event for event in events if event["event"] == "step" and _number(event.get("loss")) is not None]
    if not steps:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    _draw_losses(losses, steps, [event for event in events if event["event"] == "eval"])
    _draw_rates(rates, steps)
    for run in _beginnings(events):
        losses.axvline(run, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        rates.axvline(run, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    start = next((event for event in reversed(events) if event["event"] == "run_start"), {})
    remarks = [] if start.get("causal", True) else [NOT_CAUSAL]
    title = " · ".join([str(start[key]) for key in ("preset", "lineage") if start.get(key)] + remarks)
    losses.set_title(_plain(title), loc="left", fontsize=12)
    rates.set_xlabel("tokens")
    rates.xaxis.set_major_formatter(_engineering())

    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a letter that the font lacks is drawn as a box
            figure.savefig(aside, format="png")
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def _draw_losses(axes: Any, steps: list[dict], evals: list[dict]) -> None:
    tokens, raw = [event["tokens"] for event in steps], [event["loss"] for event in steps]
    smooth = _smoothed(raw)
    axes.plot(tokens, raw, color="#9ecae1", linewidth=0.6, alpha=0.8, label="training loss")
    axes.plot(tokens, smooth, color="#1f6fb4", linewidth=1.8, label="training loss, smoothed")
    points = [(event["tokens"], value) for event in evals if (value := _number(event.get("cross_entropy"))) is not None]
    if points:
        axes.plot(*zip(*points), color="#d95f02", linewidth=1.2, marker="o", markersize=4.5, label="evaluation cross-entropy")
        last, value = points[-1]
        axes.annotate(
            f"{value:.3f}", (last, value), xytext=(0, 8), textcoords="offset points", color="#d95f02", ha="right", fontsize=9
        )
    # The first few updates are so much higher than everything after them that they would flatten the rest of the curve.
    shown = sorted(smooth + [value for _, value in points])
    low, high = min(shown[0], sorted(raw)[len(raw) // 100]), shown[min(len(shown) - 1, int(0.99 * len(shown)))]
    margin = max(0.05 * (high - low), 1e-3 * abs(high), 1e-9)
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.set_ylabel("loss (nats per token)")
    _dress(axes)


def _draw_rates(axes: Any, steps: list[dict]) -> None:
    tokens = [event["tokens"] for event in steps]
    rate = [_number(event.get("learning_rate")) for event in steps]
    norm = [_number(event.get("grad_norm")) for event in steps]
    nan = float("nan")
    lines = axes.plot(tokens, [nan if v is None else v for v in rate], color="#1b9e77", linewidth=1.8, label="learning rate")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    other = axes.twinx()
    lines += other.plot(
        tokens, [nan if v is None else v for v in norm], color="#7570b3", linewidth=0.6, alpha=0.7, label="grad norm"
    )
    known = sorted(v for v in norm if v is not None)
    if known:  # one spike must not hide every other value
        other.set_ylim(0, max(1.4 * known[int(0.99 * (len(known) - 1))], 1e-9))
    other.set_ylabel("grad norm")
    other.spines["top"].set_visible(False)
    _dress(axes, lines)


def _dress(axes: Any, lines: list | None = None) -> None:
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)
    axes.margins(x=0.01)
    axes.legend(handles=lines, loc="upper right", frameon=False, fontsize=9)


def _beginnings(events: list[dict]) -> list[int]:
    """Tokens at which the second and later runs of the lineage began."""
    first: dict[Any, int] = {}
    for event in events:
        if event["event"] == "run_start":
            first.setdefault(event.get("run"), event["tokens"])
    return [tokens for tokens in first.values() if tokens > 0]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean over about a hundredth of the curve, without the bias towards its start."""
    keep = 1 - 1 / min(50, max(3, len(values) / 100))
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append(total / weight)
    return out


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _plain(title: str) -> str:
    """matplotlib reads text between dollar signs as mathematics."""
    return title.replace("$", r"\$")


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
