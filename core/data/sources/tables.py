"""Rows of tables: JSON Lines, JSON, CSV and Parquet.

In:    pieces of a file in UTF-8 (decode.py), or an open Parquet file; the requested columns. CSV:
       see delimited.py
Out:   (index, values in the order of the columns), or (index, SkipRow) for a row that cannot be
       read
State: none; an index is a line, or a row
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from itertools import chain, zip_longest
from typing import Any, BinaryIO

from core.data.documents import SkipRow
from core.data.sources import decode
from core.data.sources.decode import Decoded, compression, lines
from core.data.sources.delimited import check_columns, csv_rows, too_long, with_newlines
from core.data.sources.skips import CutShort, Damaged, NoColumn, RowValues
from core.optional_packages import need

JSON_LINES = (".jsonl", ".ndjson")
CSV = {".csv": ",;\t|", ".tsv": "\t"}
KINDS = (*JSON_LINES, ".json", *CSV)
PARQUET = ".parquet"
TABLES = (*KINDS, PARQUET)

HEAD = 1000
"""First rows in which each column must occur once: JSON leaves out what a row does not have."""
LONGEST = 2 * decode.RECORD_BYTES
"""Characters of JSON that are read to find the end of a value, outside of JSON Lines."""
BATCH_ROWS, BATCH_BYTES = 256, 16 << 20
"""Rows of Parquet that are read at once, fewer where they are long."""

Rows = Iterator[tuple[int, RowValues]]


def kind_of(name: str) -> str:
    """Return the suffix that says how a table is read, in small letters; "" for other files."""
    name = name.lower()
    plain = name.removesuffix(compression(name))
    return next(
        (kind for kind in KINDS if plain.endswith(kind)), PARQUET if name.endswith(PARQUET) else ""
    )


def read_rows(
    kind: str,
    pieces: Iterator[bytes],
    columns: list[str],
    start: int,
    whole: bool = True,
    on_line: Callable[[Decoded], None] = lambda line: None,
) -> Rows:
    """Yield the rows from `start` on of any kind but Parquet. Raises Damaged, NoColumn among them.

    whole    whether the pieces begin where the file does
    on_line  is called with each decoded line of CSV
    """
    if kind in CSV:
        return csv_rows(lines(with_newlines(pieces)), columns, start, CSV[kind], on_line)
    rows = _json(pieces, columns) if kind == ".json" else _json_lines(pieces, start)
    return _columns_of(((i, row) for i, row in rows if i >= start), columns, whole and start == 0)


# JSON ---------------------------------------------------------------------------------------------


def _columns_of(rows: Iterator[tuple[int, Any]], columns: list[str], begins: bool) -> Rows:
    """Yield the requested values of objects. Raises NoColumn where a column is in none of the first
    rows of a table."""
    missing = set(columns) if begins else set()
    seen: dict[str, None] = {}  # the columns that are there, in order
    held: list[tuple[int, RowValues]] = []
    for index, row in rows:
        if isinstance(row, dict):
            missing -= row.keys()
            if missing:
                seen |= dict.fromkeys(row)
            held.append((index, tuple(row.get(column) for column in columns)))
        else:
            held.append((index, row if isinstance(row, SkipRow) else SkipRow("no object of JSON")))
        if not missing or len(held) >= HEAD:
            if missing and seen:
                break
            yield from held
            missing, held = set(), []
    if missing and seen:
        raise NoColumn(next(column for column in columns if column in missing), list(seen))
    yield from held


def _integer(digits: str) -> int | Decimal:
    """Read a whole number of any length, so that a long one does not cost its row."""
    try:
        return int(digits)
    except ValueError:  # longer than Python reads at once
        return Decimal(digits)


DECODER = json.JSONDecoder(parse_int=_integer)


def _json_lines(pieces: Iterator[bytes], start: int) -> Iterator[tuple[int, Any]]:
    for index, line in enumerate(lines(pieces)):
        if index < start or (line is not None and not line.strip()):
            continue
        if line is None:
            yield index, too_long()
            continue
        try:
            yield index, DECODER.decode(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield index, SkipRow("not UTF-8")
        except (ValueError, RecursionError):
            # no JSON, or a number or nesting beyond what Python reads
            yield index, SkipRow("no JSON")


class _TooLong(ValueError):
    """A value of more than LONGEST characters."""


class _Text:
    """JSON text that is read as it is needed. Bytes that are no UTF-8 become lone surrogates."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._buffer, self._at, self._over = "", 0, False
        # the error that ended the pieces; raised after what precedes it
        self._damage: Damaged | None = None

    def _read(self, characters: int) -> None:
        """Read at least so many characters more, if there are as many."""
        parts = [self._buffer[self._at :]]
        while characters > 0 and not self._over:
            try:
                piece = next(self._pieces, None)
            except Damaged as error:
                piece, self._damage = None, error
            self._over = piece is None
            parts.append(self._decode(piece or b"", self._over))
            characters -= len(parts[-1])
        self._buffer, self._at = "".join(parts), 0

    def peek(self) -> str:
        """Return the next character that is no space; "" at the end."""
        while True:
            rest = len(self._buffer)
            while self._at < rest and self._buffer[self._at].isspace():
                self._at += 1
            if self._at < rest:
                return self._buffer[self._at]
            if self._damage is not None:
                raise self._damage
            if self._over:
                return ""
            self._read(1)

    def skip(self) -> None:
        self._at += 1

    def value(self) -> Any:
        """Read the value that begins here; SkipRow where its bytes are no UTF-8. Raises ValueError,
        RecursionError or Damaged."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, self._at)
                if self._over or end < len(self._buffer):  # else a number may go on
                    break
            except json.JSONDecodeError as error:
                may_go_on = error.pos + len("\\ud83d\\ude42") >= len(
                    self._buffer
                ) or error.msg.startswith("Unterminated")
                if self._damage is not None and may_go_on:
                    raise self._damage from None
                if self._over or not may_go_on:
                    raise
            held = len(self._buffer) - self._at
            if held > LONGEST:
                raise _TooLong
            self._read(held + decode.PIECE)
        raw, self._at = self._buffer[self._at : end], end
        if len(raw) > decode.RECORD_BYTES:
            return too_long()
        try:
            raw.encode()
        except UnicodeEncodeError:
            return SkipRow("not UTF-8")
        return value

    def skip_line(self) -> None:
        while (end := self._buffer.find("\n", self._at)) < 0 and not self._over:
            self._at = len(self._buffer)
            self._read(1)
        self._at = end + 1 if end >= 0 else len(self._buffer)


def _json(pieces: Iterator[bytes], columns: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON file: an array of rows, rows one after another, one object that
    holds rows, or one object that is a row."""
    text, index = _Text(pieces), 0
    while (first := text.peek()) != "":
        if first == "[":
            for row in _array(text, index > 0):
                yield index, row
                index += 1
            continue
        try:
            row = text.value()
        except _TooLong:
            raise (
                CutShort(f"a row {too_long()}")
                if index
                else Damaged(f"too large ({too_long()} in one; split it)")
            ) from None
        except (ValueError, RecursionError):  # as a line of JSON Lines under another name
            row = SkipRow("no JSON")
            text.skip_line()
        if index == 0 and isinstance(row, dict) and text.peek() == "":
            yield from enumerate(_rows_inside(row, columns))
            return
        yield index, row
        index += 1


def _array(text: _Text, any_given: bool) -> Iterator[Any]:
    """Yield the elements of the array that begins here. Raises CutShort, or Damaged."""
    text.skip()
    try:
        while text.peek() != "]":
            yield text.value()
            any_given = True
            if text.peek() == ",":
                text.skip()
            elif text.peek() != "]":
                raise ValueError
        text.skip()
    except _TooLong:
        raise CutShort(f"a row {too_long()}") from None
    except (ValueError, RecursionError):
        raise (CutShort() if any_given else Damaged("damaged")) from None


def _rows_inside(whole: dict, columns: list[str]) -> Iterable[Any]:
    """Return the rows of one object: its columns, the lists of rows under its keys, or the object
    itself."""
    values = [whole.get(column) for column in columns]
    values = [list(value.values()) if isinstance(value, dict) else value for value in values]
    if all(
        isinstance(value, list) and value and not isinstance(value[0], dict) for value in values
    ):
        return (dict(zip(columns, row)) for row in zip_longest(*values))  # type: ignore[arg-type]
    lists = [
        value
        for value in whole.values()
        if isinstance(value, list) and any(isinstance(row, dict) for row in value)
    ]
    if lists and not any(column in whole for column in columns):
        return chain(*([each for each in lists if _has(each, columns)] or lists))
    return [whole]


def _has(rows: list, columns: list[str]) -> bool:
    """Return whether one of the rows has one of the columns."""
    return any(isinstance(row, dict) and not row.keys().isdisjoint(columns) for row in rows)


# Parquet ------------------------------------------------------------------------------------------


def parquet_rows(
    open_file: Callable[[], BinaryIO], columns: list[str], start: int, check_only: bool = False
) -> Rows:
    """Yield the rows of a Parquet file from `start` on, without reading the row groups before it.
    Raises Damaged, or what reading raises."""
    parquet = need("pyarrow.parquet", "pyarrow")
    index = 0
    with open_file() as handle:
        try:
            with parquet.ParquetFile(
                handle, pre_buffer=True, page_checksum_verification=True
            ) as file:
                check_columns(file.schema_arrow.names, columns)
                for group in range(0 if check_only else file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if index + count <= start:
                        index += count
                        continue
                    for row in _group(file, group, columns):
                        if index >= start:
                            yield index, row
                        index += 1
        except Exception as error:
            if not _is_damage(error):
                raise
            raise (CutShort() if index else Damaged("damaged")) from None


def _is_damage(error: Exception) -> bool:
    """Return whether an error is about the content of the file. Arrow raises many of these as
    OSError without a number."""
    arrow = need("pyarrow", "pyarrow").ArrowException
    return isinstance(error, arrow | UnicodeDecodeError) or (
        type(error) is OSError and error.errno is None
    )


def _group(file: Any, group: int, columns: list[str]) -> Iterator[RowValues]:
    facts = file.metadata.row_group(group)
    chunks = [facts.column(i) for i in range(facts.num_columns)]
    size = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] in columns
    )
    rows = max(1, min(BATCH_ROWS, facts.num_rows * BATCH_BYTES // max(size, 1)))
    for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
        for row in zip(*(_values(batch.column(column)) for column in columns)):
            yield next((value for value in row if isinstance(value, SkipRow)), row)


def _values(column: Any) -> list[Any]:
    """Return a column's values; SkipRow for those that are too long or no UTF-8."""
    plain = _plain(column.type)
    if plain == column.type and column.nbytes <= decode.RECORD_BYTES:
        try:
            return column.to_pylist()
        except (ValueError, ArithmeticError):  # text that is no UTF-8, a date beyond Python's
            pass
    return [_value(column.slice(i, 1), plain) for i in range(len(column))]


def _value(one: Any, plain: Any) -> Any:
    """Return the value of a column of one row."""
    try:
        one = one if one.type == plain else one.cast(plain)
        return too_long() if one.nbytes > decode.RECORD_BYTES else one[0].as_py()
    except UnicodeDecodeError:
        return SkipRow("not UTF-8")
    except (ValueError, ArithmeticError) as error:
        return SkipRow(f"not to be read ({type(error).__name__})")


def _plain(kind: Any) -> Any:
    """Return the type without dictionaries, of which every value counts as long as all of them."""
    arrow = need("pyarrow", "pyarrow")
    if arrow.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if arrow.types.is_list(kind):
        return arrow.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if arrow.types.is_struct(kind):
        return arrow.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind
