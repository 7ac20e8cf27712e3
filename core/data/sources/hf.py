"""Datasets of the Hugging Face Hub, streamed: nothing is downloaded but what is read. Local dataset folders too.

In:    a repository (data files only: `datasets` runs no scripts), its config and split, and the columns that make the text
Out:   one document per row: shards in an order permuted by seed and epoch, rows in order inside a shard
State: `{"epoch", "shard", "row"}`: shard counts along the permuted order, row is how many rows of it are behind

`datasets` finds the files and reads them, except Parquet: PyArrow reads that here, only the columns asked for and from any
row group on. `datasets` would resume in a shard by downloading it again up to the row.
"""

import os
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from core.data.documents import Cursor, Document
from core.data.sources import hub
from core.data.sources.files import need
from core.data.sources.text import named_by
from core.errors import SourceUnavailable
from core.preset import Settings
from core.randomness import derive_seed

LOCAL_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}


class HfSettings(Settings):
    type: Literal["hf"] = "hf"
    """A dataset on the Hugging Face Hub, streamed; or a local folder or file in one of its formats."""
    dataset: str = Field(min_length=1)
    """Repository, such as "wikimedia/wikipedia", or a path relative to the project, such as "./data/qa"."""
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
    name: str = ""
    """Name in logs and weights; left out, the dataset's and its config's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return named_by(data, lambda d: "-".join(str(d[key]) for key in ("dataset", "config") if d.get(key)).lstrip("./"))

    @model_validator(mode="after")
    def _columns_fit(self) -> "HfSettings":
        if (self.fields is None) != (self.format is None):
            raise ValueError('"fields" and "format" go together: {"fields": ["a", "b"], "format": "{a} {b}"}')
        if self.fields is not None and self.text_field is not None:
            raise ValueError('"text_field" and "fields" exclude each other; keep one')
        if self.fields is not None and self.format is not None:
            try:
                used = [name for _, name, _, _ in string.Formatter().parse(self.format) if name is not None]
            except ValueError as error:
                raise ValueError(f'"format" {self.format!r}: {error}; write a brace that is text twice') from None
            if wrong := [name for name in used if name not in self.fields]:
                raise ValueError(f'"format" uses {{{wrong[0]}}}, which is not among its "fields" ({", ".join(self.fields)})')
            if not used:
                raise ValueError('"format" uses none of its "fields"; put them in braces')
        return self

    @property
    def columns(self) -> list[str]:
        return self.fields or [self.text_field or "text"]


class HfSource:
    """One split of a dataset. Opening asks the Hub for its files; rows are fetched as they are read."""

    tries = 5  # in a row without a document between them
    first_wait_seconds = 1.0  # doubles from try to try

    def __init__(self, settings: HfSettings, root: Path, seed: int):
        self.name, self.seed, self.notes = settings.name, seed, []
        self.dataset, self.columns = settings.dataset, settings.columns
        self._config, self._split, self._format = settings.config, settings.split, settings.format
        path = root / Path(settings.dataset).expanduser()
        local = path.exists() or settings.dataset.startswith(("./", "../", "/", "~"))
        self._path = path if local else None
        self.finite = local
        self._rows: Any = None  # the streaming dataset
        self._files: list[str] | None = None  # of the shards, in their order, when all are Parquet

    def open(self) -> None:
        """Finds the files, checks the columns, and fetches a few bytes of data. Raises SourceUnavailable."""
        self._rows, self._files = None, None
        self._load()

    def stream(self, cursor: Cursor) -> "HfStream":
        self._load()
        return HfStream(self, cursor)

    def order(self, epoch: int) -> list[int]:
        """The shards in the order of one epoch."""
        shards = list(range(self._rows.num_shards))
        random.Random(derive_seed(self.seed, "order", self.name, epoch)).shuffle(shards)
        return shards

    def label(self, shard: int) -> str:
        return self._files[shard].rsplit("/", 1)[-1] if self._files else f"shard{shard}"

    def read(self, shard: int, row: int) -> Iterator[str | None]:
        """The texts of a shard's rows from `row` on; None for a row that has none."""
        rows = self._read_parquet(self._files[shard], row) if self._files else self._read_any(shard, row)
        for values in rows:
            if not all(isinstance(v, (str, int, float)) and str(v).strip() for v in values):
                yield None
            else:
                yield self._format.format(**dict(zip(self.columns, values))) if self._format else str(values[0])

    def _load(self) -> None:
        """The dataset, found once. Raises SourceUnavailable."""
        if self._rows is not None:
            return
        if self._path is None:
            hub.check_reachable()
        datasets = hub.quiet_datasets()
        try:
            builder = datasets.load_dataset_builder(**self._where())
            dataset = builder.as_streaming_dataset(split=self._split)
            columns = dataset.column_names or list(next(dataset.iter(batch_size=1), {}))
            files = list((builder.config.data_files or {}).get(self._split, []))
            self._check_columns(columns)
            if len(files) == dataset.num_shards and all(file.endswith(".parquet") for file in files):
                self._files = files
                self._touch(files[0])
        except SourceUnavailable:
            raise
        except Exception as error:  # the library lets through whatever its HTTP, YAML and Arrow layers raise
            raise SourceUnavailable(hub.explain(error, self.dataset)) from None
        self._rows = dataset.select_columns(self.columns)

    def _where(self) -> dict[str, Any]:
        """What `datasets` is asked for. Raises SourceUnavailable for a local path that is not there."""
        path = self._path
        if path is None:
            return {"path": self.dataset, "name": self._config}
        if path.is_dir():
            return {"path": str(path), "name": self._config}
        if not path.is_file():
            raise SourceUnavailable(f'{path} does not exist; correct the "dataset" of this source')
        kind = next((kind for suffix, kind in LOCAL_BUILDERS.items() if suffix in path.suffixes), None)
        if kind is None:
            known = " ".join(LOCAL_BUILDERS)
            raise SourceUnavailable(f"{path} is of no readable kind ({known})")
        return {"path": kind, "data_files": {self._split: str(path)}}

    def _check_columns(self, there: list[str]) -> None:
        if missing := [column for column in self.columns if column not in there]:
            raise SourceUnavailable(
                f'{self.dataset} has no column "{missing[0]}"; its columns are {", ".join(there)}: '
                'set "text_field" to one of them, or "fields" and "format"'
            )

    def _touch(self, file: str) -> None:
        """The last bytes of one file: the Hub answering for a repository does not yet mean that its storage does."""
        with hub.open_file(file) as data:
            data.seek(-4, os.SEEK_END)
            data.read(4)

    def _read_parquet(self, file: str, row: int) -> Iterator[tuple]:
        parquet = need("pyarrow.parquet", "pyarrow")
        with hub.open_file(file) as data:
            table = parquet.ParquetFile(data, pre_buffer=True)
            counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            first = 0
            while first < len(counts) and row >= counts[first]:
                row -= counts[first]
                first += 1
            for group in range(first, len(counts)):
                for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=self.columns):
                    skipped, row = min(row, batch.num_rows), max(0, row - batch.num_rows)
                    yield from zip(*(batch.column(c).to_pylist()[skipped:] for c in self.columns))

    def _read_any(self, shard: int, row: int) -> Iterator[tuple]:
        dataset = self._rows.shard(num_shards=self._rows.num_shards, index=shard)
        for batch in dataset.iter(batch_size=256):  # unlike iter(dataset), never divided among torch's workers
            columns = [batch[column] for column in self.columns]
            skipped, row = min(row, len(columns[0])), max(0, row - len(columns[0]))
            yield from zip(*(column[skipped:] for column in columns))


class HfStream:
    """One epoch from a cursor on. A failed read is tried again from the same row, with growing waits between."""

    def __init__(self, source: HfSource, cursor: Cursor):
        self._source = source
        self._epoch: int = cursor.get("epoch", 0)
        self._shard: int = cursor.get("shard", 0)
        self._row: int = cursor.get("row", 0)
        self._from_start = self._shard == 0 and self._row == 0
        self._order = source.order(self._epoch)
        self._texts: Iterator[str | None] | None = None
        self._failures = 0

    def __iter__(self) -> "HfStream":
        return self

    def __next__(self) -> Document:
        while self._shard < len(self._order):
            shard = self._order[self._shard]
            try:
                if self._texts is None:
                    self._texts = self._source.read(shard, self._row)
                for text in self._texts:
                    self._row += 1
                    self._failures = 0
                    if text is not None:
                        self._from_start = False
                        return Document(text, f"{self._source.label(shard)}#{self._row - 1}")
            except SourceUnavailable:
                raise
            except Exception as error:  # HTTP, gzip and Arrow all have their own ways to say that the line broke
                self._texts = None
                self._wait_after(error)
                continue
            self._shard, self._row, self._texts = self._shard + 1, 0, None
        if self._from_start:  # as in files.py: the next epoch would be as empty
            raise SourceUnavailable(f"no row of it holds text in {', '.join(self._source.columns)}")
        raise StopIteration

    def cursor(self) -> Cursor:
        return {"epoch": self._epoch, "shard": self._shard, "row": self._row}

    def _wait_after(self, error: Exception) -> None:
        """Waits before the next try. Raises SourceUnavailable when there is none."""
        self._failures += 1
        reason = hub.explain(error, self._source.dataset)
        if hub.is_permanent(error):
            raise SourceUnavailable(f"{reason}") from None
        if self._failures >= self._source.tries:
            raise SourceUnavailable(f"reading failed {self._failures} times in a row; {reason}") from None
        time.sleep(self._source.first_wait_seconds * 2 ** (self._failures - 1))
