"""The report of an interpretation: figures, and one page with them and what they show.

In:    an Interpretation
Out:   the figures, index.html (one file, needs nothing else), entropy_stats.json,
       interpret.json
State: none
"""

import json
from pathlib import Path

from core.files import write_file
from core.interpretation.results import Interpretation, numbers


def write_interpretation(results: Interpretation, folder: Path) -> None:
    """Write everything into `folder`, each file replaced whole, the page last. Raises OSError."""
    from core.reports.interpretation.figures import figures
    from core.reports.interpretation.html import interpretation_page

    pngs = figures(results)
    for name, png in pngs.items():
        write_file(folder / name, png)
    tables = {"entropy_stats.json": results.static.stats(), "interpret.json": numbers(results)}
    for name, values in tables.items():
        write_file(folder / name, json.dumps(values, indent=1, allow_nan=False) + "\n")
    write_file(folder / "index.html", interpretation_page(results, pngs))
