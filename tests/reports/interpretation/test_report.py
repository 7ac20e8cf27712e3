"""The report of an interpretation: every figure at any shape, told apart without colour, and
sentences that claim no more than there is."""

import json
import re
from base64 import b64decode
from itertools import combinations
from pathlib import Path

import pytest

from core.interpretation.results import Interpretation
from core.models.polyglu import NAMES
from core.reports.interpretation import write_interpretation
from core.reports.interpretation.content import CAPTIONS, findings, layer_table, warnings
from core.reports.interpretation.palette import COLOURS, HATCHES, NEUROTRANSMITTERS, UNDECIDED
from core.reports.style import DASHES, MARKERS
from tests.interpretation.routings import made_up
from tests.reports.comparison.test_report import Page

PNG = b"\x89PNG\r\n\x1a\n"
NASTY = "$x_1$ <b>&\u202e" + "a very long name " * 8


def luminance(colour: str) -> float:
    """Relative luminance (WCAG): 0 black, 1 white."""
    parts = [value / 255 for value in bytes.fromhex(colour[1:])]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def test_activations_differ_without_colour() -> None:
    """In lightness alone, and by hatches; what has no preference is lighter than all."""
    assert len(COLOURS) == len(HATCHES) == len(set(HATCHES)) == len(NAMES) == len(NEUROTRANSMITTERS)
    for one, other in combinations([*COLOURS, UNDECIDED], 2):
        assert abs(luminance(one) - luminance(other)) > 0.12, (one, other)
    assert len(set(MARKERS[:6])) == len({str(dash) for dash in DASHES[:6]}) == 6


def written(found: Interpretation, folder: Path) -> str:
    """The page, after a look at all files."""
    write_interpretation(found, folder)
    files = {path.name for path in folder.iterdir()}
    assert files == {*CAPTIONS, "entropy_stats.json", "interpret.json", "index.html"}
    page = (folder / "index.html").read_text()
    embedded = [
        b64decode(picture) for picture in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert embedded == [(folder / name).read_bytes() for name in CAPTIONS] and all(
        each.startswith(PNG) for each in embedded
    )
    assert json.loads((folder / "entropy_stats.json").read_text()) == found.static.stats()
    return page


def test_the_page_has_every_figure_and_sentence(tmp_path: Path) -> None:
    found = made_up(documents=(8, 8, 8), shift=1.0)
    page = Page(written(found, tmp_path))
    assert not [
        value
        for key, value in page.attributes
        if key in ("src", "href") and not value.startswith("data:")
    ]
    for caption in CAPTIONS.values():
        for sentence in (caption.title, caption.how.format(unit="documents"), caption.here(found)):
            assert sentence in page.text, sentence
    for sentence in findings(found):
        assert sentence in page.text
    for name in NAMES:
        assert f"{name} ({NEUROTRANSMITTERS[name]})" in page.text


LARGE = {
    "layers": 30,
    "neurons": 1100,
    "documents": (5,) * 6,
    "names": (NASTY, *"bcdef"),
    "causal": False,
    "spread": 1e-4,
}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"layers": 1, "neurons": 1, "documents": (1,)}, id="smallest"),
        pytest.param(LARGE, id="large", marks=pytest.mark.slow),
    ],
)
def test_any_shape_is_drawn(shape: dict, tmp_path: Path) -> None:
    found = made_up(**shape)
    page = Page(written(found, tmp_path))
    for warning in warnings(found):
        assert warning in page.text
    assert ("Not causal." in page.text) is not found.causal
    assert len(layer_table(found).rows) == shape["layers"]


def test_nothing_is_claimed_that_is_not_beyond_noise() -> None:
    alike, apart = made_up(), made_up(shift=3.0)
    assert "No shift between categories is beyond noise, at none of 12 pairs" in findings(alike)[-1]
    assert re.search(r"At \d+ of 12 pairs .* lie apart by more than noise", findings(apart)[-1])
    assert "nothing to compare" in findings(made_up(documents=(9,)))[-1]
    few = made_up(documents=(9, 3))
    assert "cannot be told" in findings(few)[-1] and any(
        "pdf has 3" in warning for warning in warnings(few)
    )
    assert not any("static map is noise" in warning for warning in warnings(alike))
    assert any("static map is noise" in warning for warning in warnings(made_up(spread=1e-3)))
    assert any(warning.startswith("Not causal") for warning in warnings(made_up(causal=False)))
