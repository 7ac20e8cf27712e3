"""Local text: plain files and rows of JSON or Parquet, and the standard library of the running Python.

In:    files, folders or globs
Out:   plain files cut at paragraph, sentence or line ends; a row of .jsonl(.gz, .zst) or .parquet is one document
State: none of its own (files.py)
"""

import glob
import gzip
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from core.data.documents import Document, SkipRow, split_text
from core.data.sources.files import Damaged, FileSource, Unit, split_into_units
from core.errors import SourceUnavailable
from core.packages import need
from core.settings import Settings

PLAIN = (".txt", ".md", ".py")
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
SEEKABLE = (*PLAIN, ".jsonl")  # can be read from any line on
COMPRESSED = (".jsonl.gz", ".jsonl.zst")  # to get to a line, all before it have to be read
READABLE = (*PLAIN, *JSON_LINES, *PARQUET)

LOW, HIGH = 8000, 16000
"""Characters of a document cut from a plain file: a few rows of a long context."""

CHECKED_AT_OPEN = 500
"""Files whose columns are looked at before training starts; the others are when their turn comes."""


class TextSettings(Settings):
    type: Literal["text"] = "text"
    """Local text files."""
    path: str | Annotated[list[str], Field(min_length=1)]
    """Files, folders or globs, relative to the project: .txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet."""
    text_field: str = "text"
    """The column that holds the text (.jsonl, .parquet)."""
    name: str = ""
    """Name in logs and weights; left out, the file's or the folder's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return named_by(data, lambda d: path_name(d.get("path")))

    @property
    def columns(self) -> list[str]:
        return [self.text_field]


class PythonStdlibSettings(Settings):
    type: Literal["python_stdlib"] = "python_stdlib"
    """The source text of the running Python's standard library: on every machine, without a network."""
    name: str = "python_stdlib"
    """Name in logs and weights."""


class PlainSource(FileSource):
    """Plain files, cut into documents."""

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        text = unit.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        for index, piece in enumerate(split_text(text, LOW, HIGH)):
            if index >= start and piece.strip():
                yield index + 1, Document(piece, f"{unit.key}#{index}")


class TextSource(PlainSource):
    """Files of any readable kind. A position is a piece, a line or a row."""

    readable: tuple[str, ...] = READABLE
    column_hint = 'set "text_field" to one of them'

    def __init__(self, settings: Any, root: Path, seed: int):
        super().__init__(settings.name, seed)
        self._patterns = [settings.path] if isinstance(settings.path, str) else settings.path
        self.columns, self._root = settings.columns, root

    def list_units(self) -> list[Unit]:
        found: dict[Path, str] = {}
        for pattern in self._patterns:
            found |= dict.fromkeys(self._matches(pattern), "")
        labels = {_label(path, self._root): path for path in found}
        units: list[Unit] = []
        for label in sorted(labels):
            path = labels[label]
            try:
                units += split_into_units(path, label) if _suffix(path) in SEEKABLE else [Unit(path, label)]
            except OSError:
                units.append(Unit(path, label))  # reading it will fail too, and be noted there
        return units

    def open(self) -> None:
        super().open()
        firsts = [unit for unit in self._units or [] if unit.begin == 0 and _suffix(unit.path) not in PLAIN]
        for unit in firsts[:CHECKED_AT_OPEN]:
            try:
                if _suffix(unit.path) in PARQUET:
                    self._parquet(unit).close()
                else:
                    self._row(unit, 0, next(_lines(unit), b""))
            except OSError:
                self.skip(unit, "unreadable")
            except Damaged as error:
                self.skip(unit, error.kind)

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        suffix = _suffix(unit.path)
        if suffix in PLAIN:
            return super().read(unit, start)
        return self._read_parquet(unit, start) if suffix in PARQUET else self._read_lines(unit, start)

    def document(self, values: tuple, key: str) -> Document | None:
        """One row, its values in the order of `columns`; None when it is not readable."""
        return Document(values[0], key) if isinstance(values[0], str) else None

    def _made(self, values: tuple, key: str) -> Document | None:
        try:
            return self.document(values, key)
        except SkipRow:
            return None

    def address(self, unit: Unit) -> str | None:
        if _suffix(unit.path) not in COMPRESSED:
            return None
        try:
            stat = unit.path.stat()
        except OSError:
            return None
        return "\n".join([type(self).__name__, *self.columns, str(unit.path), str(stat.st_size), str(stat.st_mtime_ns)])

    def _matches(self, pattern: str) -> list[Path]:
        """The files a path, folder or glob stands for. Raises SourceUnavailable."""
        path = self._root / Path(pattern).expanduser()
        known = " ".join(self.readable)

        def fits(path: Path) -> bool:
            return _suffix(path) in self.readable and path.is_file()

        if path.is_dir():
            files = [p for p in path.rglob("*") if fits(p) and not _hidden(p.relative_to(path))]
            problem = f"the folder {path} holds no readable file ({known})"
        elif path.is_file():
            files, problem = [path] if fits(path) else [], f"{path} is of no readable kind ({known})"
        elif glob.has_magic(pattern):
            files = [p for p in map(Path, glob.glob(str(path), recursive=True)) if fits(p)]
            problem = f"no readable file matches {path} ({known})"
        else:
            files, problem = [], f"{path} does not exist"
        if not files:
            raise SourceUnavailable(f'{problem}; correct the "path" of this source')
        return files

    def _read_lines(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        bad = 0
        for index, line in enumerate(_lines(unit)):
            if index < start or not line.strip():
                continue
            values = self._row(unit, index, line)
            document = None if values is None else self._made(values, f"{unit.key}#{index}")
            bad += document is None
            if document is not None and document.text.strip():
                yield index + 1, document
        self.skip_rows(unit, bad)

    def _row(self, unit: Unit, index: int, line: bytes) -> tuple | None:
        """The columns of a line of JSON; None where it has none. A first line that lacks one is the preset's mistake."""
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):  # no UTF-8, no JSON, a number or a nesting beyond what Python reads
            return None
        if not isinstance(row, dict):
            return None
        if index == 0 and unit.begin == 0:
            self._check_columns(unit, list(row))
        return tuple(row.get(column) for column in self.columns)

    def _parquet(self, unit: Unit) -> Any:
        """The open Parquet file, its columns checked."""
        pyarrow, parquet = need("pyarrow", "pyarrow"), need("pyarrow.parquet", "pyarrow")
        try:
            file = parquet.ParquetFile(unit.path)
        except pyarrow.ArrowInvalid:
            raise Damaged("damaged") from None
        try:
            self._check_columns(unit, file.schema_arrow.names)
        except SourceUnavailable:
            file.close()
            raise
        return file

    def _read_parquet(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        index, bad = 0, 0
        with self._parquet(unit) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if index + rows <= start:  # a resume reads no row group that it has behind it
                    index += rows
                    continue
                for values in self._rows(file, group):
                    index += 1
                    if index > start:
                        document = self._made(values, f"{unit.key}#{index - 1}")
                        bad += document is None
                        if document is not None and document.text.strip():
                            yield index, document
        self.skip_rows(unit, bad)

    def _rows(self, file: Any, group: int) -> Iterator[tuple]:
        pyarrow = need("pyarrow", "pyarrow")
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=self.columns):
                yield from zip(*(batch.column(column).to_pylist() for column in self.columns))
        except pyarrow.ArrowInvalid:
            raise Damaged("damaged") from None

    def _check_columns(self, unit: Unit, there: list[str]) -> None:
        if missing := [column for column in self.columns if column not in there]:
            known = ", ".join(there) or "none"
            raise SourceUnavailable(f'{unit.label} has no column "{missing[0]}"; its columns are {known}: {self.column_hint}')


class PythonStdlibSource(PlainSource):
    """The .py files of the standard library."""

    OUT = frozenset(
        ("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3")
    )  # other people's code, fixtures that are broken on purpose, an application, and a grammar nobody needs

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
    """`data` with the name filled in where the preset leaves it out; wrong types are left for pydantic to report."""
    if isinstance(data, dict) and not data.get("name"):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name(data)).strip("_")
        return {**data, "name": plain or re.sub(r"[^\w.-]+", "_", name(data)).strip("_") or data.get("type", "source")}
    return data


def path_name(path: Any) -> str:
    first = path[0] if isinstance(path, list) and path else path
    if not isinstance(first, str):
        return "text"
    plain = [part for part in Path(first).parts if not glob.has_magic(part) and part not in ("/", ".", "..")]
    name = plain[-1] if plain else "text"
    return name.removesuffix(_suffix(Path(name)))


def _suffix(path: Path) -> str:
    return next((s for s in sorted(READABLE, key=len, reverse=True) if path.name.lower().endswith(s)), "")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _label(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _lines(unit: Unit) -> Iterator[bytes]:
    """The lines of a JSON file, compressed or not. Raises Damaged where a compressed file breaks off."""
    suffix = _suffix(unit.path)
    if suffix == ".jsonl":
        yield from io.BytesIO(unit.read_bytes())
    elif suffix == ".jsonl.gz":
        try:
            with gzip.open(unit.path, "rb") as lines:
                yield from lines
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise Damaged("damaged") from None
    else:
        zstandard = need("zstandard", "zstandard")
        try:
            with unit.path.open("rb") as raw:
                yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        except zstandard.ZstdError:
            raise Damaged("damaged") from None
