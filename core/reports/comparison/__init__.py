"""The report of a comparison: what to read first, and everything behind it.

In:    a Comparison, finished or not
Out:   report.html (one file, needs nothing else), report.md, metrics.json
State: none
"""

from pathlib import Path

from core.comparison.results import Comparison
from core.files import write_file


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write the three files into `folder`, each replaced whole. Can be called after every trial."""
    from core.reports.comparison.html import html_report
    from core.reports.comparison.markdown import markdown_report
    from core.reports.comparison.numbers import json_report

    write_file(folder / "metrics.json", json_report(comparison))
    write_file(folder / "report.md", markdown_report(comparison))
    write_file(folder / "report.html", html_report(comparison))
