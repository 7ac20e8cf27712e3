"""Rows of CSV and other delimited text. An odd row costs only itself: reading goes on at the line
after its first.

In:    lines in UTF-8; None for a line that is too long
Out:   (index, values) or (index, SkipRow) for each row below the header
State: none
"""

from collections import deque
from collections.abc import Callable, Iterator

from core.data.documents import SkipRow
from core.data.sources import decode
from core.data.sources.decode import Decoded, decoded
from core.data.sources.skips import Damaged, NoColumn, RowValues

FURTHER_FIELDS = 100
"""A row with so many more fields than the header has quotation marks that are out of step."""
SWALLOWED, ALIKE = 20, 0.9
"""A stray quotation mark has swallowed the lines inside a row if more than SWALLOWED of them, and
this share, look like rows themselves."""

Line = tuple[str, SkipRow | None]  # the text, and what is wrong with it


class _Stray(Exception):
    """A quotation mark that is not closed, or that is followed by something other than a
    delimiter."""


def csv_rows(
    lines: Iterator[bytes | None],
    columns: list[str],
    start: int,
    delimiters: str,
    on_line: Callable[[Decoded], None],
) -> Iterator[tuple[int, RowValues]]:
    """Yield the rows from `start` on. Reads Windows-1252 too, which many programs write. Calls
    `on_line` with each decoded line. Raises Damaged, NoColumn among them."""
    texts = _texts(lines, on_line)
    header = next((text for text, _ in texts if text.strip()), "")
    try:
        tried = [_names(header, delimiter, columns) for delimiter in delimiters]
    except _Stray:
        raise Damaged("damaged") from None
    names = next(
        (names for names in tried if all(column in names for column in columns)),
        max(tried, key=len),
    )
    check_columns(names, columns)
    # with one column, a line is its field
    delimiter = delimiters[tried.index(names)] if len(names) > 1 else ""
    positions = [names.index(column) for column in columns]
    for index, row in enumerate(_rows(texts, delimiter, len(names))):
        if index < start or row == []:
            continue
        if not isinstance(row, SkipRow) and any(field.strip() for field in row[len(names) :]):
            row = SkipRow("more fields than columns")
        if isinstance(row, SkipRow):
            yield index, row
        else:
            yield index, tuple(row[at] if at < len(row) else None for at in positions)


def check_columns(there: list[str], columns: list[str]) -> None:
    """Raise NoColumn for a column that is missing, or Damaged for one that is there twice."""
    for column in columns:
        if there.count(column) > 1:
            raise Damaged(f'with the column "{column}" twice')
        if column not in there:
            raise NoColumn(column, there)


def too_long() -> SkipRow:
    return SkipRow(f"longer than {decode.RECORD_BYTES >> 20} MB")


def with_newlines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pass on the pieces; replace carriage returns by newlines where lines end with a carriage
    return alone, as on an old Mac."""
    first = next(pieces, b"")
    old = b"\n" not in first and b"\r" in first.rstrip(b"\r")
    yield first.replace(b"\r", b"\n") if old else first
    for piece in pieces:
        yield piece.replace(b"\r", b"\n") if old else piece


def _texts(lines: Iterator[bytes | None], on_line: Callable[[Decoded], None]) -> Iterator[Line]:
    for line in lines:
        result = decoded(line or b"")
        on_line(result)
        problem = too_long() if line is None else SkipRow("not UTF-8") if result.replaced else None
        yield result.text.removesuffix("\r"), problem


def _names(header: str, delimiter: str, columns: list[str]) -> list[str]:
    names = _fields(header, lambda: None, delimiter, len(header))
    return [name if name in columns else name.strip() for name in names]


def _rows(texts: Iterator[Line], delimiter: str, width: int) -> Iterator[list[str] | SkipRow]:
    """Yield the fields of each row, none for a blank line; SkipRow for an odd row."""
    ahead: deque[Line] = deque()  # lines that were read for a row to which they do not belong
    taken: list[Line] = []  # the lines of the row being read
    damage: list[Damaged] = []  # the error that ended the lines; raised after all that precedes it

    def take() -> str | None:
        try:
            line = ahead.popleft() if ahead else next(texts, None)
        except Damaged as error:
            damage.append(error)
            line = None
        if line is None:
            return None
        taken.append(line)
        return line[0]

    while (first := take()) is not None:
        try:
            row: list[str] | SkipRow = _fields(first, take, delimiter, width)
            inner = [text for text, _ in taken[1:-1]]
            if width > 1 and sum(text.count(delimiter) == width - 1 for text in inner) > max(
                SWALLOWED, ALIKE * len(inner)
            ):
                raise _Stray
            row = next((odd for _, odd in taken if odd is not None), row)
        except _Stray:
            row = taken[0][1] or SkipRow("a quotation mark out of place")
            ahead.extendleft(reversed(taken[1:]))
        taken.clear()
        yield row if first or isinstance(row, SkipRow) else []
    if damage:
        raise damage[0]


def _fields(line: str, take: Callable[[], str | None], delimiter: str, width: int) -> list[str]:
    """Return the fields of the row that begins with `line`. `take` gives the lines after it. Raises
    _Stray."""
    if '"' not in line:
        return line.split(delimiter) if delimiter else [line]
    fields, at = list[str](), 0
    while len(fields) <= width + FURTHER_FIELDS:
        if line.startswith('"', at):
            field, line, at = _quoted(line, at + 1, take)
        else:
            end = line.find(delimiter, at) if delimiter else -1
            end = len(line) if end < 0 else end
            field, at = line[at:end], end
        fields.append(field)
        if at == len(line):
            return fields
        if line[at] != delimiter:
            break
        at += 1
    raise _Stray


def _quoted(line: str, at: int, take: Callable[[], str | None]) -> tuple[str, str, int]:
    """Return the field whose text begins at `at`, the line in which it ends, and the position
    behind it. Raises _Stray."""
    parts, size = [], 0
    while True:
        end = line.find('"', at)
        if end >= 0:
            if line.startswith('"', end + 1):  # two stand for one
                parts.append(line[at : end + 1])
                at = end + 2
                continue
            parts.append(line[at:end])
            end += 1
            while line.startswith(" ", end):
                end += 1
            return "".join(parts), line, end
        parts += [line[at:], "\n"]
        size += len(line)
        following = take() if size <= decode.RECORD_BYTES else None
        if following is None:
            raise _Stray
        line, at = following, 0
