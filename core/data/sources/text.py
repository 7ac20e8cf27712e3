"""Local text: plain files, web pages and rows of tables, and the standard library of the running
Python.

In:    files, folders or patterns
Out:   plain files and web pages cut at paragraph, sentence or line ends; a row of a table is one
       document
State: none of its own (files.py)
"""

import glob
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from core.data.documents import Document, SkipRow, split_text
from core.data.sources import decode, tables
from core.data.sources.decode import Decoded, blocks, compression, decoded, is_mostly_damage
from core.data.sources.delimited import too_long
from core.data.sources.files import SEGMENT_BYTES, FileSource, Unit, label_of, split_into_units
from core.data.sources.find_files import FoundFiles, find_files
from core.data.sources.skips import CutShort, Damaged
from core.data.sources.tables import JSON_LINES, PARQUET, TABLES
from core.data.sources.webpage import page_text
from core.errors import SourceUnavailable
from core.files import own_path
from core.preset.settings import SourceSettings

PLAIN = (".txt", ".md", ".py")
PAGES = (".html", ".htm", ".xhtml")
READABLE = (*PLAIN, *PAGES, *TABLES)
SEEKABLE = (*PLAIN, *JSON_LINES)  # can be read from any line on, unless compressed

READER = 3
"""Raised when the same file would give other documents, so that cached tokens are made again."""

LOW, HIGH = 8000, 16000
"""Characters of a document cut from a plain file: a few rows of a long context."""

PROJECT = Path(__file__).resolve().parents[3]
"""The folder that the paths of a preset are relative to."""

CHECKED_AT_OPEN = 500
"""Files that are looked into before training starts; the others follow when their turn comes."""

T = TypeVar("T")


def _none_is_empty(paths: str | list[str]) -> str | list[str]:
    if "" in ([paths] if isinstance(paths, str) else paths):
        raise ValueError(
            "an empty path would be the whole project; name a file, a folder or a pattern"
        )
    return paths


Paths = Annotated[str | Annotated[list[str], Field(min_length=1)], AfterValidator(_none_is_empty)]
"""One path or several."""


class TextSettings(SourceSettings):
    type: Literal["text"] = "text"
    """Local text files."""
    path: Paths
    """Files, folders or patterns, relative to the project: .txt .md .py .html .jsonl .json .csv
    .tsv .parquet, and .gz .bz2 .xz .zst of any but the last."""
    text_field: str = "text"
    """The column that holds the text, in tables (.jsonl, .json, .csv, .tsv, .parquet)."""
    name: str = ""
    """Name in logs and weights; left out, the file's or the folder's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return named_by(data, lambda d: path_name(d.get("path")))

    @property
    def columns(self) -> list[str]:
        return [self.text_field]


class PythonStdlibSettings(SourceSettings):
    type: Literal["python_stdlib"] = "python_stdlib"
    """The source text of the running Python's standard library: on every machine, without a
    network."""
    name: str = "python_stdlib"
    """Name in logs and weights."""


class PlainSource(FileSource):
    """Plain files and web pages, cut into documents. A position is a piece."""

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        index = 0
        for text in self._texts(unit):
            for piece in split_text(text, LOW, HIGH):
                if index >= start and piece.strip():
                    yield index + 1, Document(piece, f"{unit.key}#{index}")
                index += 1

    def _texts(self, unit: Unit) -> Iterator[str]:
        """Yield the text of a unit, in blocks where it is long. Raises Damaged if it is no text."""
        page = _kind(unit.path) in PAGES
        for number, block in enumerate(blocks(unit.pieces(rows=False), 2 * SEGMENT_BYTES)):
            if page and number:
                raise CutShort(f"the first {2 * SEGMENT_BYTES >> 20} MB")
            result = page_text(block) if page else decoded(block)
            if is_mostly_damage(block, result):
                raise CutShort() if number else no_text()
            self.skips.text(unit.label, f"{unit.key}#{number}", result.replaced, result.other)
            yield result.text.replace("\r\n", "\n")


def no_text() -> Damaged:
    return Damaged("textless (binary, or of an unknown encoding)")


class TextSource(PlainSource):
    """Files of any readable kind. A position is a piece, a line or a row."""

    readable: tuple[str, ...] = READABLE
    column_hint = 'set "text_field" to one of them'

    def __init__(self, settings: Any, root: Path, seed: int):
        super().__init__(settings.name, seed)
        self._patterns = [settings.path] if isinstance(settings.path, str) else settings.path
        self.columns, self._root = settings.columns, root

    def list_units(self) -> list[Unit]:
        paths: dict[str, Path] = {}
        for pattern in self._patterns:
            paths = self._matches(pattern) | paths
        labels = {label_of(path, self._root): path for path in paths.values()}
        units: list[Unit] = []
        for label in sorted(labels):
            path = labels[label]
            try:
                seekable = _kind(path) in SEEKABLE and not compression(path.name)
                units += split_into_units(path, label) if seekable else [Unit(path, label)]
            except OSError:
                units.append(Unit(path, label))  # reading it will fail too, and be noted there
        return units

    def open(self) -> None:
        super().open()
        for unit in [unit for unit in self._units or [] if unit.begin == 0][:CHECKED_AT_OPEN]:
            try:
                self._look_into(unit)
            except Exception as error:  # reading it would raise the same
                self.skips.file(unit.label, error)

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        whole = start == 0 and unit.begin == 0 and unit.end is None
        if _kind(unit.path) not in TABLES:
            return some(super().read(unit, start)) if whole else super().read(unit, start)
        rows = self._rows(unit, start)
        return self.skips.documents(unit.key, some(rows) if whole else rows, self.document)

    def document(self, values: tuple, key: str) -> Document:
        """Make the document of a row; values are in the order of `columns`. Raises SkipRow when
        the row holds no text."""
        return Document(text_of(values[0], self.columns[0]), key)

    def address(self, unit: Unit) -> str | None:
        """Identify the content of a unit that cannot be read from any position on."""
        if not compression(unit.path.name) and (
            _kind(unit.path) not in TABLES or _kind(unit.path) in (*SEEKABLE, PARQUET)
        ):
            return None
        try:
            stat = unit.path.stat()
        except OSError:
            return None
        facts = [
            type(self).__name__,
            str(READER),
            *self.columns,
            str(unit.path),
            str(stat.st_size),
            str(stat.st_mtime_ns),
        ]
        return "\n".join(facts)

    def nothing(self, order: list[Unit]) -> str:
        if not self.skips.lacking:
            return super().nothing(order)
        others = (
            [note for note in self.notes if note != self.skips.lacking] if len(order) > 1 else []
        )
        return "; ".join([self.skips.lacking, *others])

    def _matches(self, pattern: str) -> dict[str, Path]:
        """Return the files that a path, folder or pattern stands for, by their real paths. Raises
        SourceUnavailable."""
        found = FoundFiles()

        def readable(path: Path) -> bool:
            return _kind(path) in self.readable

        path, what = find_files(pattern, self._root, readable, found)
        if what != "a file":
            advice = 'convert them to text; PDFs are read by a source of type "pdf"'
            self.note_unread(found, self._root, advice)
        if not found.paths:
            known = f"({' '.join(self.readable)}, and {' '.join(decode.COMPRESSIONS)} of them)"
            problem = {
                "a folder": f"the folder {path} holds no readable file {known}",
                "a file": f"{path} is of no readable kind {known}",
                "a pattern": f"no readable file matches {path} {known}",
            }.get(what, f"{path} does not exist")
            notes = "".join(f"; {note}" for note in self.notes)
            raise SourceUnavailable(f'{problem}; correct the "path" of this source{notes}')
        return found.paths

    def _rows(self, unit: Unit, start: int, check_only: bool = False) -> tables.Rows:
        kind = _kind(unit.path)
        if kind == PARQUET:
            return tables.parquet_rows(
                lambda: unit.path.open("rb"), self.columns, start, check_only
            )

        def note_encoding(line: Decoded) -> None:
            self.skips.text(unit.label, unit.key, 0, line.other)

        return tables.read_rows(
            kind, unit.pieces(rows=True), self.columns, start, unit.begin == 0, note_encoding
        )

    def _look_into(self, unit: Unit) -> None:
        """Raise what reading the file would raise, as far as its beginning shows it."""
        if _kind(unit.path) in TABLES:
            rows = self._rows(unit, 0, check_only=True)
            next(rows if _kind(unit.path) == PARQUET or unit.end is not None else some(rows), None)
        elif is_mostly_damage(data := next(unit.pieces(rows=False), b""), decoded(data)):
            # a longer block may be text, and a page may declare its encoding
            next(self._texts(unit), None)


def some(items: Iterator[T]) -> Iterator[T]:
    """Pass on all items. Raises Damaged where there is none."""
    any_given = False
    for each in items:
        any_given = True
        yield each
    if not any_given:
        raise Damaged("without text")


def text_of(value: Any, column: str) -> str:
    """Return the text in a cell of a table. Raises SkipRow where there is none."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise SkipRow("not UTF-8") from None
    if not isinstance(value, str):
        kind = {dict: "an object", list: "a list", bool: "true or false"}.get(
            type(value), "a number, a date or the like"
        )
        raise SkipRow(f'"{column}" is {"missing or null" if value is None else f"{kind}, no text"}')
    if not value.strip():
        raise SkipRow(f'"{column}" is blank')
    if len(value) > decode.RECORD_BYTES:
        raise too_long()
    return value


class PythonStdlibSource(PlainSource):
    """The .py files of the standard library."""

    # other people's code, fixtures that are broken on purpose, an application, an unused grammar
    OUT = frozenset(
        ("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3")
    )

    def __init__(self, settings: PythonStdlibSettings, root: Path, seed: int):
        super().__init__(settings.name, seed)

    def list_units(self) -> list[Unit]:
        library = Path(sysconfig.get_path("stdlib"))
        units = []
        for folder, folders, files in os.walk(library):
            folders[:] = [f for f in folders if f not in self.OUT]
            paths = [Path(folder, f) for f in files if f.endswith(".py")]
            units += [Unit(path, path.relative_to(library).as_posix()) for path in paths]
        if not units:
            raise SourceUnavailable(
                f"{library} holds no .py file: this Python was installed without its source text; "
                "use another Python, or take this source out of the preset"
            )
        return sorted(units, key=lambda unit: unit.label)


def named_by(data: Any, name: Callable[[dict], str]) -> Any:
    """Return `data` with the name filled in where the preset leaves it out; wrong types are left
    for pydantic to report."""
    if not isinstance(data, dict) or data.get("name"):
        return data
    ascii_name = re.sub(r"[^A-Za-z0-9._-]+", "_", name(data)).strip("_")
    any_name = re.sub(r"[^\w.-]+", "_", name(data)).strip("_")
    return {**data, "name": ascii_name or any_name or data.get("type", "source")}


def path_name(path: Any) -> str:
    """Return a path's last part that is no pattern, without its suffix. A part that exists is no
    pattern, whatever brackets stand in it."""
    first = path[0] if isinstance(path, list) and path else path
    if not isinstance(first, str):
        return "text"
    parts = Path(first).parts
    real = [own_path(str(Path(*parts[: i + 1])), PROJECT).exists() for i in range(len(parts))]
    named = [
        part
        for part, there in zip(parts, real)
        if (there or not glob.has_magic(part)) and part not in ("/", ".", "..")
    ]
    name = named[-1] if named else "text"
    plain = name.removesuffix(compression(name))
    return plain.removesuffix(_kind(Path(plain)))


def _kind(path: Path) -> str:
    """Return the suffix that says how a file is read, in small letters and without that of a
    compression; "" where it is not read."""
    name = path.name.lower()
    plain = name.removesuffix(compression(name))
    return tables.kind_of(name) or next(
        (kind for kind in (*PLAIN, *PAGES) if plain.endswith(kind)), ""
    )
