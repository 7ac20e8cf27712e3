"""The report of an interpretation: figures, what they show in words, and one page that gathers
them.

In:    an Interpretation
Out:   the pictures of FIGURES, index.html (one file, needs nothing else), entropy_stats.json,
       interpret.json
State: none
"""

import json
from pathlib import Path

from core.files import write_file
from core.interpretation.results import Interpretation, numbers


def write_interpretation(found: Interpretation, folder: Path) -> None:
    """Write everything into `folder`, each file replaced whole, the page last. Raises OSError."""
    from core.reports.interpretation.figures import pictures
    from core.reports.interpretation.html import interpretation_page

    drawn = pictures(found)
    for name, picture in drawn.items():
        write_file(folder / name, picture)
    for name, values in (
        ("entropy_stats.json", found.static.stats()),
        ("interpret.json", numbers(found)),
    ):
        write_file(folder / name, json.dumps(values, indent=1, allow_nan=False) + "\n")
    write_file(folder / "index.html", interpretation_page(found, drawn))
