"""Common parts of the figures of a run: reading its log, an empty figure, its title, and writing
it.

In:    a metrics log, finished or still being written
Out:   matplotlib figures, and a PNG of each
State: none
"""

import warnings
from pathlib import Path
from typing import Any

from core.files import replacing
from core.metrics.events import read_events
from core.ui.plain import remark

PLOTTED = 2000
"""Events of each kind that a figure shows, about as many as it has columns, so that the memory for
drawing does not grow with the log. Decoding a whole log of 16 MB took 170 MB more (docs/LOG.md)."""


def events_of(metrics_path: Path) -> list[dict]:
    """Read the events of a log; of a long log, evenly spaced ones."""
    return list(read_events(metrics_path, PLOTTED))


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure that needs no screen. `width` and `height` are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title_of(events: list[dict]) -> str:
    """Return "Best general · lineage", with the remark on its model, if any."""
    start: dict = next((event for event in reversed(events) if event["event"] == "run_start"), {})
    parts = [str(start[key]) for key in ("preset", "lineage") if start.get(key)]
    title = " · ".join(part for part in (*parts, remark(start)) if part)
    return title.replace("$", r"\$")  # matplotlib reads text between dollar signs as mathematics


def dress(axes: Any) -> None:
    """Draw a grid behind the axes, and no line at their top; the right side may have a second
    scale."""
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def mark_beginnings(panels: list[Any], events: list[dict]) -> None:
    """Draw a dotted line where the second and later runs of the lineage began."""
    first: dict[Any, int] = {}
    for event in events:
        if event["event"] == "run_start":
            first.setdefault(event.get("run"), event["tokens"])
    for axes in panels:
        for tokens in first.values():
            if tokens > 0:
                axes.axvline(tokens, color="0.6", linewidth=0.8, linestyle=":", zorder=0)


def save(figure: Any, out: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file, warnings.catch_warnings():
        # a letter that the font lacks is drawn as a box
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format="png")


def number(value: Any) -> float | None:
    """Return a value of the log as a float; None if it is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def engineering() -> Any:
    """Return a formatter for ticks such as "1.5M"."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
