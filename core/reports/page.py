"""HTML pages of reports. Each is one file that needs nothing else: no network, no script, no other
file.

In:    text that may hold anything, tables, the body of a page
Out:   HTML
State: none
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from core.reports.style import STYLE
from core.ui.text import clean


@dataclass(frozen=True)
class ReportTable:
    """A table of strings. `words`: number of columns at the left that hold words, not numbers."""

    head: list[str]
    rows: list[list[str]]
    words: int = 1


def html_page(title: str, body: Iterable[str]) -> str:
    """Return a whole document; `body` is HTML, `title` is not."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html_text(title)}</title>\n<style>{STYLE}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def html_table(table: ReportTable, strong: bool = False) -> str:
    """Return a table as HTML; `strong`: the first row stands out."""

    def cell(tag: str, i: int, words: str) -> str:
        return f'<{tag} class="{"w" if i < table.words else "n"}">{html_text(words)}</{tag}>'

    head = "".join(cell("th", i, words) for i, words in enumerate(table.head))
    rows = ["".join(cell("td", i, words) for i, words in enumerate(row)) for row in table.rows]
    first = '<tr class="primary">' if strong else "<tr>"
    body = "".join(f"{'<tr>' if n else first}{row}</tr>" for n, row in enumerate(rows))
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def html_text(words: str) -> str:
    """Escape any text as one line of HTML, also for use inside quotes."""
    return escape(clean(words))


def html_lines(words: str) -> str:
    """Escape any text of several lines."""
    return "\n".join(html_text(line) for line in words.split("\n"))
