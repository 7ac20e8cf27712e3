"""Datasets of the Hugging Face Hub, streamed: only what is read is downloaded. Local dataset
folders too.

In:    a repository (data files only: `datasets` runs no scripts), its config and split, and the
       columns that make the text
Out:   one document per row: shards in an order permuted by seed and epoch, rows in order inside a
       shard
State: its cursor (shards.py); a position in a shard is the number of rows that are behind

`datasets` finds the files. Tables are read here (tables.py): a row or a shard that cannot be read
costs only itself, the memory has a bound, and of Parquet only the requested columns are fetched,
from any row group on. `datasets` reads the other kinds."""

import glob
import hashlib
import os
import re
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from core import hf_hub as hub
from core.data.documents import Document, SkipRow
from core.data.sources import tables
from core.data.sources.decode import as_utf8, compression, unpacked
from core.data.sources.files import file_size
from core.data.sources.find_files import FoundFiles, walk
from core.data.sources.shards import ShardSource
from core.data.sources.skips import Damaged, NoColumn
from core.data.sources.text import READER, TextSettings, TextSource, named_by, text_of
from core.errors import SourceUnavailable
from core.files import own_path
from core.optional_packages import need
from core.preset.settings import SourceSettings

SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
CHECKED_AT_OPEN = 3
"""Most files that are looked into until one is whole and has the columns."""
TRIES_AT_DAMAGE = 2
"""Reads of a shard that end in damage before it is left out: a broken connection may look like
damage."""
LOCAL_BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
START_SECONDS = 8.0
"""Seconds in which a Hub that answers with an error is asked again at the start of a run."""


class HfSettings(SourceSettings):
    type: Literal["hf"] = "hf"
    """A dataset on the Hugging Face Hub, streamed; or a local folder or file in one of its
    formats."""
    dataset: str = Field(min_length=1)
    """Repository, such as "wikimedia/wikipedia", or a path relative to the project, such as
    "./data/qa"."""
    config: str | None = None
    """Configuration (subset) of the dataset, where it has several."""
    split: str = "train"
    """Split of the dataset."""
    text_field: str | None = None
    """Column that holds the text; left out, "text"."""
    fields: list[str] | None = Field(None, min_length=1)
    """Columns put together by `format`, instead of one text column."""
    format: str | None = None
    """How `fields` become a document: "Q: {question}\\nA: {answer}"."""
    local: str | None = Field(None, min_length=1)
    """Text on this machine, as of a source of type `text`, that is read instead where it exists:
    "./data/book.txt"."""
    name: str = ""
    """Name in logs and weights; left out, the dataset's and its config's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return named_by(
            data,
            lambda d: "-".join(str(d[key]) for key in ("dataset", "config") if d.get(key)).lstrip(
                "./"
            ),
        )

    @model_validator(mode="after")
    def _columns_fit(self) -> "HfSettings":
        if (self.fields is None) != (self.format is None):
            raise ValueError(
                '"fields" and "format" go together: {"fields": ["a", "b"], "format": "{a} {b}"}'
            )
        if self.fields is not None and self.text_field is not None:
            raise ValueError('"text_field" and "fields" exclude each other; keep one')
        if self.fields is not None and self.format is not None:
            try:
                fields = [
                    field for field in string.Formatter().parse(self.format) if field[1] is not None
                ]
            except ValueError as error:
                raise ValueError(
                    f'"format" {self.format!r}: {error}; write a brace that is text twice'
                ) from None
            if wrong := [name for _, name, _, _ in fields if name not in self.fields]:
                raise ValueError(
                    f'"format" uses {{{wrong[0]}}}, which is not among its "fields" '
                    f"({', '.join(self.fields)})"
                )
            if how := [name for _, name, spec, conversion in fields if spec or conversion]:
                raise ValueError(
                    f'"format" holds the names of fields only; write {{{how[0]}}}, with nothing '
                    "behind : or !"
                )
            if not fields:
                raise ValueError('"format" uses none of its "fields"; put them in braces')
        return self

    @property
    def columns(self) -> list[str]:
        return self.fields or [self.text_field or "text"]


def _formatted(form: str, row: dict[str, Any]) -> str:
    """Replace each {name} of the form by the row's text. This is not `str.format`, to which {a.b}
    and {0} mean something else."""
    return "".join(
        text + ("" if name is None else str(row[name]))
        for text, name, _, _ in string.Formatter().parse(form)
    )


def hf_source(settings: HfSettings, root: Path, seed: int) -> ShardSource:
    """Build the source of the dataset; or, where it exists, of the local text that replaces it."""
    if settings.local is not None and own_path(settings.local, root).exists():
        return TextSource(TextSettings(path=settings.local, name=settings.name), root, seed)
    return HfSource(settings, root, seed)


class HfSource(ShardSource):
    """One split of a dataset. Opening asks the Hub for the files; rows are fetched as they are
    read."""

    column_hint = 'set "text_field" to one of them, or "fields" and "format"'
    tries = 5  # in a row without a document between them
    first_wait_seconds = 1.0  # doubles with each try

    def __init__(self, settings: Any, root: Path, seed: int):
        super().__init__(settings.name, seed)
        self.dataset, self.columns = settings.dataset, settings.columns
        self._settings = settings
        path = own_path(settings.dataset, root)
        local = path.exists() or settings.dataset.startswith(("./", "../", "/", "~"))
        self._path = path if local else None
        self.finite = local
        # the streaming dataset; for tables, () once they are found
        self._rows: Any = None
        self._files: list[str] = []  # the data files; hf://... names the commit too
        self._tables = False  # whether all files are tables, one per shard

    def open(self) -> None:
        """Find the files, check the columns, and fetch a few bytes of data; from a local dataset, a
        document. Raises SourceUnavailable."""
        self._rows = None
        self._load()
        if self.finite:
            next(self.stream({}))

    def shards(self) -> list[int]:
        self._load()
        return list(range(self._num_shards))

    def read(self, shard: int, start: int) -> Iterator[tuple[int, Document]]:
        """Yield (position after it, document). Rows without text are passed over, and counted."""
        if self._tables:
            rows = self._read_table(self._files[shard], start)
        else:
            rows = self._read_any(shard, start)
        return self.skips.documents(f"{shard}", rows, self.document, self._label(shard))

    def document(self, values: tuple, key: str) -> Document:
        """Make the document of a row; values are in the order of `columns`. Raises SkipRow when
        the row holds no text."""
        form = self._settings.format
        if form is None:
            value = values[0]
            text = str(value) if _is_number(value) else text_of(value, self.columns[0])
            return Document(text, key)
        row = {column: _blank_or(value, column) for column, value in zip(self.columns, values)}
        if not any(str(value).strip() for value in row.values()):
            raise SkipRow(f"no text in any of {', '.join(self.columns)}")
        return Document(text_of(_formatted(form, row), "format"), key)

    def _label(self, shard: int) -> str:
        return self._files[shard].rsplit("/", 1)[-1] if self._tables else f"shard{shard}"

    def recover(self, shard: int, error: Exception, failures: int) -> bool:
        """Wait, longer each time, and try again: HTTP, gzip and Arrow have different errors for a
        broken connection. An error that stays and has another cause costs its shard.
        """
        if self.finite or isinstance(error, NoColumn):
            tries = 1
        elif isinstance(error, Damaged):
            tries = TRIES_AT_DAMAGE
        else:
            tries = self.tries
        if failures >= tries and not hub.is_of_the_line(error):
            self.skips.file(self._label(shard), error)
            return False
        reason = hub.explain(error, self.dataset)
        if hub.is_permanent(error):
            raise SourceUnavailable(reason) from None
        if failures >= self.tries:
            raise SourceUnavailable(f"reading failed {failures} times in a row; {reason}") from None
        time.sleep(max(hub.asked_to_wait(error), self._usual_wait(failures)))
        return True

    def _usual_wait(self, failures: int) -> float:
        return self.first_wait_seconds * 2 ** (failures - 1)

    def contents(self) -> str:
        self._load()
        if self._path is not None:
            facts = [
                (os.path.relpath(file, self._path), file_size(Path(file))) for file in self._files
            ]
            return hashlib.blake2b(
                repr(facts).encode("utf-8", "backslashreplace"), digest_size=8
            ).hexdigest()
        return f"{len(self._files)} files, {self._num_shards} shards"

    def address(self, shard: int) -> str | None:
        """Identify the content by the names of the data files, which include the commit."""
        if self._path is not None:
            return None
        files = [self._files[shard]] if self._tables else [*self._files, str(shard)]
        settings = self._settings.model_dump_json(exclude={"name"})
        return "\n".join([type(self).__name__, str(READER), settings, *files])

    def seeks(self, shard: int) -> bool:
        return self._tables and tables.kind_of(self._files[shard]) == tables.PARQUET

    size_is_positions = True

    def size(self, shard: int) -> int | None:
        """Return the rows of a shard, where the file says how many."""
        if not self.seeks(shard):
            return None
        try:
            with hub.open_file(self._files[shard]) as data:
                return need("pyarrow.parquet", "pyarrow").ParquetFile(data).metadata.num_rows
        except Exception:  # reading the file will meet the same error, and explain it
            return None

    def nothing(self, order: list[int]) -> str:
        return f"no row of it holds text in {', '.join(self.columns)}" + "".join(
            f"; {note}" for note in self.notes
        )

    @property
    def _num_shards(self) -> int:
        return len(self._files) if self._tables else self._rows.num_shards

    def _load(self) -> None:
        """Find the dataset, once. Raises SourceUnavailable."""
        failures, begun = 0, time.monotonic()
        while self._rows is None:
            try:
                self._find()
            except hub.HubTrouble as trouble:
                failures += 1
                wait = max(trouble.wait_seconds, self._usual_wait(failures))
                soon = trouble.reachable and time.monotonic() - begun + wait < START_SECONDS
                if failures >= self.tries or not (self.patient or soon):
                    raise
                time.sleep(wait)

    def _find(self) -> None:
        """Ask for the files, check the columns, fetch a few bytes."""
        if self._path is None:
            hub.check_reachable()
        if self._path is not None and self._path.is_file() and tables.kind_of(self._path.name):
            files = [str(self._path)]
        elif self._path is not None and self._path.is_dir() and glob.has_magic(str(self._path)):
            files = self._listed(self._path)
        else:
            datasets = hub.quiet_datasets()
            try:
                builder = datasets.load_dataset_builder(**self._where())
                split = self._settings.split
                files = list((builder.config.data_files or {}).get(split, []))
                if not files or not all(tables.kind_of(file) for file in files):
                    return self._find_others(builder.as_streaming_dataset(split=split), files)
            except SourceUnavailable:
                raise
            except Exception as error:
                # the library lets through whatever its HTTP, YAML and Arrow layers raise
                raise hub.trouble(error, self.dataset) from None
        self._look_into(files)
        self._files, self._tables, self._rows = files, True, ()

    def _find_others(self, dataset: Any, files: list[str]) -> None:
        columns = dataset.column_names or list(next(dataset.iter(batch_size=1), {}))
        if missing := [column for column in self.columns if column not in columns]:
            raise SourceUnavailable(
                f"{self.dataset} has {NoColumn(missing[0], columns).text}: {self.column_hint}"
            )
        self._files, self._tables, self._rows = files, False, dataset.select_columns(self.columns)

    def _listed(self, folder: Path) -> list[str]:
        """Return the tables of a folder whose path `datasets` would take for a pattern; where files
        are named for splits, only those of this split."""
        found = FoundFiles()
        names = {
            path.relative_to(folder).as_posix().lower(): str(path) for path in walk(folder, found)
        }
        tables_there = {name: path for name, path in names.items() if tables.kind_of(name)}
        of_split = {
            split: [p for name, p in tables_there.items() if split in re.split("[^a-z]+", name)]
            for split in SPLITS
        }
        if any(of_split.values()):
            files = of_split.get(self._settings.split, [])
        else:
            files = list(tables_there.values())
        if not files:
            raise SourceUnavailable(
                f'{folder} holds no table of the "split" {self._settings.split}; correct this '
                "source"
            )
        return sorted(files)

    def _look_into(self, files: list[str]) -> None:
        """Raise SourceUnavailable unless one of the first files has the columns.

        This fetches a part of the file: a Hub that answers for a repository may still have trouble
        with its storage."""
        problem = ""
        for file in files[:CHECKED_AT_OPEN]:
            try:
                next(self._read_table(file, 0, check_only=True), None)
                return
            except NoColumn as error:
                problem = f"{self.dataset} has {error.text}: {self.column_hint}"
            except Damaged as error:
                problem = (
                    problem or f"{self.dataset} holds {error.kind} files: {file.rsplit('/', 1)[-1]}"
                )
            except Exception as error:
                raise hub.trouble(error, self.dataset) from None
        raise SourceUnavailable(problem)

    def _where(self) -> dict[str, Any]:
        """Return the arguments for `datasets`. Raises SourceUnavailable for a local path that does
        not exist."""
        path = self._path
        if path is None:
            return {"path": self.dataset, "name": self._settings.config}
        if path.is_dir():
            return {"path": str(path), "name": self._settings.config}
        if not path.is_file():
            raise SourceUnavailable(f'{path} does not exist; correct the "dataset" of this source')
        kind = next(
            (kind for suffix, kind in LOCAL_BUILDERS.items() if suffix in path.suffixes), None
        )
        if kind is None:
            known = " ".join(LOCAL_BUILDERS)
            raise SourceUnavailable(f"{path} is of no readable kind ({known})")
        return {"path": kind, "data_files": {self._settings.split: str(path)}}

    def _read_table(self, file: str, row: int, check_only: bool = False) -> tables.Rows:
        kind = tables.kind_of(file)
        if kind == tables.PARQUET:
            yield from tables.parquet_rows(
                lambda: hub.open_file(file), self.columns, row, check_only
            )
            return
        with hub.open_file(file) as data:
            yield from tables.read_rows(
                kind, as_utf8(unpacked(data, compression(file))), self.columns, row
            )

    def _read_any(self, shard: int, row: int) -> tables.Rows:
        begin = row
        dataset = self._rows.shard(num_shards=self._rows.num_shards, index=shard)
        # unlike iter(dataset), never divided among torch's workers
        for batch in dataset.iter(batch_size=256):
            columns = [batch[column] for column in self.columns]
            skipped, row = min(row, len(columns[0])), max(0, row - len(columns[0]))
            for values in zip(*(column[skipped:] for column in columns)):
                yield begin, values
                begin += 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _blank_or(value: Any, column: str) -> Any:
    """Return a value for a format: null as blank. Raises SkipRow for a value that is neither text
    nor a number."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return ""
    return value if _is_number(value) else text_of(value, column)
