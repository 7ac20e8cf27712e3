"""Parts of what is drawn on a terminal: rules, bars, grids, folded lines.

In:    strings, sizes in cells
Out:   rich Texts
State: none
"""

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

NAME_CELLS, VALUE_CELLS, SHORT_VALUE_CELLS = 14, 16, 12
"""Widths in a grid: of a name, of a number with its change in brackets, of a number alone."""


def rule(title: str, width: int, right: str = "", left: str = "") -> Text:
    """Return a horizontal line with a title; `left` stands behind the title, `right` at the end."""
    line = Text.assemble(("── ", "dim"), (title, "cyan"), " ", f"{left} " if left else "")
    dashes = max(0, width - line.cell_len - len(right) - (1 if right else 0))
    return line.append("─" * dashes + (" " if right else ""), "dim").append(right, "dim")


def apart(left: Text, right: Text, width: int) -> Text:
    """Put one text at each side, or the left one alone where both do not fit."""
    gap = width - left.cell_len - right.cell_len
    return left + Text(" " * gap) + right if gap >= 2 else left


def bar(fraction: float, width: int) -> Text:
    """Return a progress bar."""
    done = int(fraction * width)
    return Text.assemble(("━" * done, "cyan"), ("━" * (width - done), "grey35"))


def grid(
    cells: list[tuple[str, str]], width: int, columns: int = 3, name_cells: int = NAME_CELLS
) -> list[Text]:
    """Lay out names and values in at most `columns` columns."""
    columns = max(1, min(columns, width // (name_cells + SHORT_VALUE_CELLS)))
    column_width = width // columns
    lines = []
    for i in range(0, len(cells), columns):
        line = Text()
        for name, value in cells[i : i + columns]:
            cell = Text.assemble((f"{name:<{name_cells}} ", "dim"), value)
            cell.truncate(column_width - 1, overflow="ellipsis", pad=True)
            line.append_text(cell).append(" ")
        lines.append(line)
    return lines


def folded(line: Text, width: int) -> list[Text]:
    """Break a line at spaces, where there are any; cells are counted, not characters."""
    if cell_len(line.plain) <= width:
        return [line]
    return list(line.wrap(Console(width=width), width))
