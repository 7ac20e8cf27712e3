"""The report of a comparison: what to read first, and everything behind it.

In:    a Comparison, finished or not
Out:   report.html (one file, needs nothing else), report.md, metrics.json
State: none
"""

import os
from pathlib import Path

from core.comparison.results import Comparison


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write the three files into `folder`, each replaced whole. Can be called after every trial."""
    from core.ui.comparison.html import html_report
    from core.ui.comparison.markdown import markdown_report
    from core.ui.comparison.numbers import json_report

    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "metrics.json", json_report(comparison))
    _replace(folder / "report.md", markdown_report(comparison))
    _replace(folder / "report.html", html_report(comparison))


def _replace(path: Path, text: str) -> None:
    """Written aside and renamed: nobody ever reads half a report."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(text.encode("utf-8", "replace"))  # a lone surrogate is legal in a name, not in UTF-8
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
