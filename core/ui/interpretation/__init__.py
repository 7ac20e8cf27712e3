"""The report of an interpretation: figures, what they show in words, and one page that gathers them.

In:    an Interpretation
Out:   the pictures of FIGURES, index.html (one file, needs nothing else), entropy_stats.json, interpret.json
State: none
"""

import json
from pathlib import Path

from core.interpretation.results import Interpretation, numbers
from core.ui.page import replace_file


def write_interpretation(found: Interpretation, folder: Path) -> None:
    """Write everything into `folder`, each file replaced whole, the page last. Raises OSError."""
    from core.ui.interpretation.figures import pictures
    from core.ui.interpretation.html import html_page

    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures(found)
    for name, picture in drawn.items():
        replace_file(folder / name, picture)
    for name, values in (("entropy_stats.json", found.static.stats()), ("interpret.json", numbers(found))):
        replace_file(folder / name, json.dumps(values, indent=1, allow_nan=False) + "\n")
    replace_file(folder / "index.html", html_page(found, drawn))
