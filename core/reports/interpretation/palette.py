"""How activations and categories look: told apart by colour, by lightness alone, and by hatches,
dashes and marks.

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
"""What specification 001 calls the activations."""

COLOURS = ["#332288", "#c4560a", "#56b4e9", "#f5c518"]
"""Of the activations, from dark to light: after palettes of Tol, and of Okabe and Ito; in grey they
are as far apart."""
HATCHES = ["", "////", "....", "xxxx"]
HATCH_INKS = [PAPER, PAPER, INK, INK]
UNDECIDED = "#ffffff"
"""Of neurons without a preference: lighter than any activation."""

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
"""Of data sources, dark and light in turn; lines also differ in dashes and marks, as there may be
many."""


def title_of(activation: str) -> str:
    """ "SiLU (Dopamine)"."""
    return (
        f"{activation} ({NEUROTRANSMITTERS[activation]})"
        if activation in NEUROTRANSMITTERS
        else activation
    )


def short(name: str, length: int = 28) -> str:
    """A foreign name that fits into a figure; the full one stands in the tables."""
    name = clean(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"
