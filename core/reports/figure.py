"""What the pictures of a run share: reading its log, the frame of a figure, its title, and writing
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
"""Events of each kind that a picture shows, about as many as it has columns: the memory that
drawing takes does not grow with the log. All of a log decoded were 170 MB more at 16 MB of it
(docs/LOG.md)."""


def events_of(metrics_path: Path) -> list[dict]:
    """The events of a log, but of a long one not every one."""
    return list(read_events(metrics_path, PLOTTED))


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, which needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title_of(events: list[dict]) -> str:
    """ "Best general · lineage", and what there is to remark."""
    start = next((event for event in reversed(events) if event["event"] == "run_start"), {})
    parts = [str(start[key]) for key in ("preset", "lineage") if start.get(key)]
    title = " · ".join([*parts, remark(start)] if remark(start) else parts)
    return title.replace("$", r"\$")  # matplotlib reads text between dollar signs as mathematics


def dress(axes: Any) -> None:
    """A grid behind, no line on top; the right side stays, it may be another scale's."""
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def mark_beginnings(panels: list[Any], events: list[dict]) -> None:
    """A dotted line where the second and later runs of the lineage began."""
    first: dict[Any, int] = {}
    for event in events:
        if event["event"] == "run_start":
            first.setdefault(event.get("run"), event["tokens"])
    for axes in panels:
        for tokens in first.values():
            if tokens > 0:
                axes.axvline(tokens, color="0.6", linewidth=0.8, linestyle=":", zorder=0)


def save(figure: Any, out: Path) -> None:
    """As a PNG, replaced whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file, warnings.catch_warnings():
        # a letter that the font lacks is drawn as a box
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format="png")


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def engineering() -> Any:
    """Ticks such as "1.5M"."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
