"""The view of the evaluate job: its progress, and its results as tables.

In:    rows that are done; tables
Out:   a ProgressLine's lines and bar; tables
State: none
"""

from core.ui import text
from core.ui.progress_line import ProgressLine


class EvaluateView(ProgressLine):
    """Shows measurements as they go on."""

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` rows are done."""
        if not self.due:
            return
        parts = [f"{done:,} of {total:,}"]
        if 0 < done < total:
            parts.append(f"{text.duration(self.seconds / done * (total - done))} left")
        self.show(parts, done / total if total else None)

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """Show aligned columns: the first two to the left, numbers to the right; framed on a
        terminal."""
        if self._bar is not None:
            from rich.table import Table
            from rich.text import Text

            table = Table(title=Text(text.clean(title)), title_justify="left")
            for i, name in enumerate(header):
                table.add_column(
                    Text(text.clean(name)), justify="left" if i < 2 else "right", no_wrap=i == 0
                )
            for row in rows:
                table.add_row(*(Text(text.clean(cell)) for cell in row))
            self._bar.console.print(table)
            return
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        self.tell(title)
        for row in [header, *rows]:
            cells = [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ]
            self.tell("  " + "  ".join(cells).rstrip())
