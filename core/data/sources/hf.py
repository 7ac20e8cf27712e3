"""Datasets of the Hugging Face Hub, streamed: nothing is downloaded but what is read. Local dataset folders too.

In:    a repository (data files only: `datasets` runs no scripts), its config and split, and the columns that make the text
Out:   one document per row: shards in an order permuted by seed and epoch, rows in order inside a shard
State: its cursor (shards.py); a position in a shard is how many rows of it are behind

`datasets` finds the files and reads them, except Parquet: PyArrow reads that here, only the columns asked for and from any
row group on. `datasets` would resume in a shard by downloading it again up to the row.
"""

import os
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from core import hub
from core.data.documents import Document, SkipRow
from core.data.sources.shards import ShardSource
from core.data.sources.text import TextSettings, TextSource, named_by
from core.errors import SourceUnavailable
from core.packages import need
from core.settings import Settings

LOCAL_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
START_SECONDS = 8.0
"""How long a Hub that answers, but with an error of its own, is asked again at the start of a run."""


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
    local: str | None = None
    """Text on this machine, as of a source of type `text`, that is read instead where it exists: "./data/book.txt"."""
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
                fields = [field for field in string.Formatter().parse(self.format) if field[1] is not None]
            except ValueError as error:
                raise ValueError(f'"format" {self.format!r}: {error}; write a brace that is text twice') from None
            if wrong := [name for _, name, _, _ in fields if name not in self.fields]:
                raise ValueError(f'"format" uses {{{wrong[0]}}}, which is not among its "fields" ({", ".join(self.fields)})')
            if how := [name for _, name, spec, conversion in fields if spec or conversion]:
                raise ValueError(f'"format" holds the names of fields only; write {{{how[0]}}}, with nothing behind : or !')
            if not fields:
                raise ValueError('"format" uses none of its "fields"; put them in braces')
        return self

    @property
    def columns(self) -> list[str]:
        return self.fields or [self.text_field or "text"]


def _formatted(form: str, row: dict[str, Any]) -> str:
    """Each {name} of the form as the row's text there. Not `str.format`, to which {a.b} and {0} mean something else."""
    return "".join(text + ("" if name is None else str(row[name])) for text, name, _, _ in string.Formatter().parse(form))


def hf_source(settings: HfSettings, root: Path, seed: int) -> ShardSource:
    """The dataset; or, where it is there, the local text that stands for it."""
    if settings.local is not None and (root / Path(settings.local).expanduser()).exists():
        return TextSource(TextSettings(path=settings.local, name=settings.name), root, seed)
    return HfSource(settings, root, seed)


class HfSource(ShardSource):
    """One split of a dataset. Opening asks the Hub for its files; rows are fetched as they are read."""

    column_hint = 'set "text_field" to one of them, or "fields" and "format"'
    tries = 5  # in a row without a document between them
    first_wait_seconds = 1.0  # doubles from try to try
    patient = False  # whether opening waits for a Hub that is away; at the start of a run, a person waits for it to begin

    def __init__(self, settings: Any, root: Path, seed: int):
        super().__init__(settings.name, seed)
        self.dataset, self.columns = settings.dataset, settings.columns
        self._settings = settings
        path = root / Path(settings.dataset).expanduser()
        local = path.exists() or settings.dataset.startswith(("./", "../", "/", "~"))
        self._path = path if local else None
        self.finite = local
        self._rows: Any = None  # the streaming dataset
        self._files: list[str] = []  # the data files; hf://... names the commit too
        self._parquet = False  # whether they are all Parquet, one a shard

    def open(self) -> None:
        """Finds the files, checks the columns, and fetches a few bytes of data. Raises SourceUnavailable."""
        self._rows = None
        self._load()

    def shards(self) -> list[int]:
        self._load()
        return list(range(self._rows.num_shards))

    def read(self, shard: int, start: int) -> Iterator[tuple[int, Document]]:
        """Rows without text are passed over."""
        rows = self._read_parquet(self._files[shard], start) if self._parquet else self._read_any(shard, start)
        label = self._files[shard].rsplit("/", 1)[-1] if self._parquet else f"shard{shard}"
        for row, values in enumerate(rows, start):
            try:
                document = self.document(values, f"{label}#{row}")
            except SkipRow:
                continue
            if document is not None:
                yield row + 1, document

    def document(self, values: tuple, key: str) -> Document | None:
        """One row, its values in the order of `columns`; None when it holds no text."""
        if not all(isinstance(v, (str, int, float)) and str(v).strip() for v in values):
            return None
        form = self._settings.format
        return Document(_formatted(form, dict(zip(self.columns, values))) if form else str(values[0]), key)

    def recover(self, shard: int, error: Exception, failures: int) -> bool:
        """Wait, longer each time, and try again. HTTP, gzip and Arrow all have their own ways to say that the line broke."""
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
        return f"{len(self._files)} files, {self._rows.num_shards} shards"

    def address(self, shard: int) -> str | None:
        """Data files are named with their commit: their names stand for their content."""
        if self._path is not None:
            return None
        files = [self._files[shard]] if self._parquet else [*self._files, str(shard)]
        return "\n".join([type(self).__name__, self._settings.model_dump_json(exclude={"name"}), *files])

    def seeks(self, shard: int) -> bool:
        return self._parquet

    def nothing(self, order: list[int]) -> str:
        return f"no row of it holds text in {', '.join(self.columns)}"

    def _load(self) -> None:
        """The dataset, found once. Raises SourceUnavailable."""
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
        datasets = hub.quiet_datasets()
        try:
            builder = datasets.load_dataset_builder(**self._where())
            split = self._settings.split
            dataset = builder.as_streaming_dataset(split=split)
            columns = dataset.column_names or list(next(dataset.iter(batch_size=1), {}))
            self._files = list((builder.config.data_files or {}).get(split, []))
            self._check_columns(columns)
            self._parquet = len(self._files) == dataset.num_shards and all(f.endswith(".parquet") for f in self._files)
            if self._parquet:
                self._touch(self._files[0])
        except SourceUnavailable:
            raise
        except Exception as error:  # the library lets through whatever its HTTP, YAML and Arrow layers raise
            raise hub.trouble(error, self.dataset) from None
        self._rows = dataset.select_columns(self.columns)

    def _where(self) -> dict[str, Any]:
        """What `datasets` is asked for. Raises SourceUnavailable for a local path that is not there."""
        path = self._path
        if path is None:
            return {"path": self.dataset, "name": self._settings.config}
        if path.is_dir():
            return {"path": str(path), "name": self._settings.config}
        if not path.is_file():
            raise SourceUnavailable(f'{path} does not exist; correct the "dataset" of this source')
        kind = next((kind for suffix, kind in LOCAL_BUILDERS.items() if suffix in path.suffixes), None)
        if kind is None:
            known = " ".join(LOCAL_BUILDERS)
            raise SourceUnavailable(f"{path} is of no readable kind ({known})")
        return {"path": kind, "data_files": {self._settings.split: str(path)}}

    def _check_columns(self, there: list[str]) -> None:
        if missing := [column for column in self.columns if column not in there]:
            raise SourceUnavailable(
                f'{self.dataset} has no column "{missing[0]}"; its columns are {", ".join(there)}: {self.column_hint}'
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
