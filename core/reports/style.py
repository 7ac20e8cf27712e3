"""The style of reports: colours for light and dark, the style sheet, and matplotlib's settings.

In:    nothing
Out:   STYLE, the colours and dashes of figures, a context to draw them in
State: none
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK, GRID, PAPER = "#1f2328", "#d8dbe0", "#fefefe"
"""Colours that figures are drawn in. In a report each becomes a variable that dark mode sets to
another colour."""

SERIES = ["#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#b4578f", "#8a6d00", "#3f9fd0", "#7a4fc9"]
"""Grey for the baseline, then colours after Okabe and Ito, which can be told apart with any colour
vision; each also has its own dashes."""
_DARK_SERIES = [
    "#c4c9d0",
    "#56b4e9",
    "#f0883e",
    "#2fc795",
    "#e08fc0",
    "#d9b94a",
    "#9bd3f5",
    "#b497f0",
]
DASHES: list[str | tuple[int, tuple[float, ...]]] = [
    "solid",
    (0, (5, 1.5)),
    (0, (1.5, 1)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1)),
    (0, (8, 2)),
    (0, (1, 0.6)),
    (0, (4, 1, 1, 1, 1, 1)),
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]

VARIABLES = {
    INK: "ink",
    GRID: "grid",
    PAPER: "paper",
    **{colour: f"s{i}" for i, colour in enumerate(SERIES)},
}


def _variables(
    ink: str, soft: str, grid: str, paper: str, box: str, warn: str, series: list[str]
) -> str:
    named = {"ink": ink, "soft": soft, "grid": grid, "paper": paper, "box": box, "warn": warn}
    named |= {f"s{i}": colour for i, colour in enumerate(series)}
    return "".join(f"--{name}:{value};" for name, value in named.items())


_LIGHT = _variables(INK, "#59616b", GRID, PAPER, "#f4f5f7", "#fff4d6", SERIES)
_DARK = _variables("#e4e7eb", "#9aa3ad", "#3a4048", "#15181c", "#1f242a", "#40350f", _DARK_SERIES)

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:70rem;padding:1.5rem 1rem 4rem;
background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}}
h2{{font-size:1.2rem;margin:2.4rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--grid)}}
h1,h2,h3,p,li,summary{{overflow-wrap:anywhere}}
p{{max-width:50rem;margin:.5rem 0}}
.soft,figcaption,.note{{color:var(--soft);font-size:.9rem}}
.answer{{list-style:none;margin:1.2rem 0;padding:.8rem 1rem;background:var(--box);
border-radius:6px;font-size:1.05rem}}
.answer li{{margin:.4rem 0}}
.warn{{background:var(--warn);border-radius:6px;padding:.6rem 1rem;margin:.6rem 0}}
.key{{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0;padding:0;
list-style:none;font-size:.9rem}}
.line{{display:inline-block;vertical-align:middle;margin-right:.4rem}}
.figures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1.2rem}}
figure{{margin:0;min-width:0;max-width:36rem}}
figure.wide{{max-width:none}}figure.wide img{{min-width:36rem}}
figure svg,figure img{{width:100%;height:auto;display:block}}
figcaption b{{color:var(--ink);font-size:.95rem}}
.scroll{{overflow-x:auto;max-width:100%;margin-top:.6rem}}
table{{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:50%}}
th,td{{padding:.3rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}}
thead th{{border-bottom:2px solid var(--soft);vertical-align:bottom}}
.n{{text-align:right;white-space:nowrap}}
.w{{min-width:5rem;max-width:22rem;overflow-wrap:break-word}}
tr.primary td,tr.primary th{{font-weight:600}}
.samples td{{min-width:15rem;overflow-wrap:anywhere;white-space:pre-wrap;font-size:.85rem}}
.samples th{{min-width:7rem}}
pre{{background:var(--box);padding:.8rem;border-radius:6px;overflow-x:auto;
font-size:.8rem;line-height:1.35;max-height:32rem}}
details{{margin:.6rem 0}}summary{{cursor:pointer}}
@media (max-width:30rem){{body{{padding:1rem .7rem 3rem}}th,td{{padding:.25rem .45rem}}}}
@media print{{html{{font-size:11px}}body{{max-width:none}}
pre{{max-height:none;white-space:pre-wrap}}.scroll{{overflow:visible}}
figure,tr,.answer{{break-inside:avoid}}
h2{{break-after:avoid}}.figures{{grid-template-columns:1fr 1fr}}}}
"""


@contextmanager
def drawing(**settings: Any) -> Iterator[None]:
    """Draw with the reports' fonts and colours; `settings` of matplotlib override them."""
    import matplotlib

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plain: dict[str, Any] = {"font.size": 9, "font.family": "sans-serif", "axes.linewidth": 0.8}
    style: Any = {**dict.fromkeys(inked, INK), **plain, **settings}  # keys are a huge Literal
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # a letter that the font lacks is drawn as a box
        warnings.simplefilter("ignore", UserWarning)
        yield


def dress(axes: Any) -> None:
    """Draw a grid behind the axes, and no line at their top and right."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
