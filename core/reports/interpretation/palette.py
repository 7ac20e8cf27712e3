"""The look of activations and categories: they can be told apart by colour, by lightness alone, and
by hatches, dashes and marks.

In:    nothing
Out:   colours, hatches, names
State: none
"""

from core.reports.style import INK, PAPER
from core.ui.text import clean

NEUROTRANSMITTERS = {
    "ReLU": "Glutamate",
    "Tanh": "GABA",
    "SiLU": "Dopamine",
    "GELU": "Acetylcholine",
}
"""Names of the activations in specification 001."""

COLOURS = ["#332288", "#c4560a", "#56b4e9", "#f5c518"]
"""Colours of the activations, from dark to light, after palettes of Tol, and of Okabe and Ito. In
grey they are as far apart."""
HATCHES = ["", "////", "....", "xxxx"]
HATCH_INKS = [PAPER, PAPER, INK, INK]
UNDECIDED = "#ffffff"
"""Colour of neurons without a preference: lighter than any activation."""

CATEGORY_COLOURS = [
    "#1f2328",
    "#e08214",
    "#0072b2",
    "#66c2a5",
    "#6a3d9a",
    "#d9b310",
    "#3f9fd0",
    "#a8326b",
]
"""Colours of data sources, dark and light in turn. There may be many, so their lines also differ in
dashes and marks."""


def title_of(activation: str) -> str:
    """Return an activation's name with its neurotransmitter: "SiLU (Dopamine)"."""
    if activation not in NEUROTRANSMITTERS:
        return activation
    return f"{activation} ({NEUROTRANSMITTERS[activation]})"


def short(name: str, length: int = 28) -> str:
    """Shorten a name to fit into a figure; the tables have the full one."""
    name = clean(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"
