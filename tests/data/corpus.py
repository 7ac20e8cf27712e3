"""Small corpora and readers for the pipeline's tests: real sources on disk, and ranks that are threads of this process."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.data.corpus import PipelineFactory, data_position
from core.data.documents import Document
from core.data.loader import Loader
from core.data.mixing import MixSettings
from core.data.packing import Row
from core.data.pipeline import PipelineSettings, Position
from core.data.sources import build_source
from core.data.sources.text import TextSettings
from core.data.tokenizer import Tokenizer, build_tokenizer
from core.data.validation import HoldOut
from core.errors import SourceUnavailable
from core.parallel import Single
from core.preset import TokenizerSettings

SEQ_LENGTH = 32
LANES = 6
FINGERPRINT = "unchanged"


def byte_tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerSettings(type="byte"), [])


def write_corpus(folder: Path, sizes: dict[str, int], low: int = 20, high: int = 200) -> list[TextSettings]:
    """One file of JSON lines for each name, with so many documents; every document's text is unlike any other's."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, count in sizes.items():
        lengths = random.Random(f"{name} {count}")
        lines = [f"{name} {i}: " + "x" * lengths.randint(low, high) + "." for i in range(count)]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
        sections.append(TextSettings(path=f"{name}.jsonl", name=name))
    return sections


def make_factory(
    folder: Path,
    sections: list[TextSettings],
    strategy: str = "round_robin",
    packing: str = "documents",
    max_epochs: int | None = None,
    hold_out: HoldOut | None = None,
    lanes: int = LANES,
    wrap: Callable[[Any], Any] = lambda source: source,
) -> PipelineFactory:
    """A factory over opened sources. `wrap` may put something around each source."""
    sources = [wrap(build_source(section, folder, 1)) for section in sections]
    for source in sources:
        source.open()
    tokenizer = byte_tokenizer()
    weights = tuple(float(1 + i) for i in range(len(sections)))
    settings = PipelineSettings(MixSettings(strategy, weights, 1, max_epochs), lanes, SEQ_LENGTH, packing, 1)
    hold_out = hold_out or HoldOut(0.05)
    return PipelineFactory(sections, folder, 1, tokenizer.state(), hold_out, settings, sources=sources, tokenizer=tokenizer)


def start() -> Position:
    return Position()


def resumed(state: dict, factory: PipelineFactory) -> Position:
    """The position of a saved state, by way of JSON as a checkpoint keeps it."""
    contents = {source.name: "" for source in factory.sources or []}
    position, notes = data_position(json.loads(json.dumps(state)), FINGERPRINT, contents)
    assert notes == []
    return position


def make_loader(
    factory: PipelineFactory, position: Position, rows: int = LANES, parallel: Any = None, workers: int = 0
) -> Loader:
    names = [section.name for section in factory.sections]
    packed = factory.settings.packing != "padding"
    lanes = factory.settings.lanes
    ranks = parallel or Single()
    return Loader(factory, position, ranks, rows, names, lanes, packed, workers=workers, facts={"fingerprint": FINGERPRINT})


def steps(loader: Loader, count: int | None = None) -> list[np.ndarray]:
    """The next steps of one rank, each as (rows, 5, T): all there is in a batch; None reads to the end of the data.

    Steps of nothing but padding, which the loader passes over, are put back, so that a row's place tells its lane.
    """
    found: list[np.ndarray] = []
    at = loader.position.rows
    while (count is None or len(found) < count) and (step := loader.next_step()) is not None:
        b = step.batch
        fields = np.stack([b.input_ids, b.labels, b.position_ids, b.document_ids, b.source_ids], axis=1)
        at += loader._rows_per_step
        while at < loader.position.rows:
            found.append(np.full_like(fields, -1))
            at += loader._rows_per_step
        found.append(fields)
    return found


def as_array(row: Row) -> np.ndarray:
    return np.stack([row.input_ids, row.labels, row.position_ids, row.document_ids, row.source_ids])


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def merged(ranks: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The steps of all ranks as one rank would have had them: rows in global order."""
    return [np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]) for parts in zip(*ranks)]


def texts_of(found: list[np.ndarray], lanes: int = LANES) -> list[str]:
    """The whole documents in steps that begin at row 0. One that goes on beyond the last step is left out."""
    tokenizer = byte_tokenizer()
    rows = np.concatenate(found)
    texts = []
    for lane in range(lanes):
        current: list[int] = []
        for row in rows[lane::lanes]:
            for token in row[1][row[4] >= 0].tolist():
                if token == tokenizer.eos_id:
                    texts.append(tokenizer.decode(current))
                    current = []
                else:
                    current.append(token)
    return texts


class Ranks:
    """Data-parallel ranks as threads of this process: the interface of core/parallel with a barrier for a network."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._box: list[Any] = [None] * world_size

    def run(self, job: Callable[[Any], Any]) -> list[Any]:
        """`job(parallel)` on every rank; the results by rank. The first error of any rank is raised."""
        results: list[Any] = [None] * self.world_size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = job(_Rank(self, rank))
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return results

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._box[rank] = value
        self._barrier.wait()
        values = list(self._box)
        self._barrier.wait()
        return values


class _Rank:
    def __init__(self, ranks: Ranks, rank: int):
        self._ranks, self.rank, self.world_size = ranks, rank, ranks.world_size

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.exchange(self.rank, value)

    def sum(self, numbers: list[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self.gather(list(numbers)))]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


class Fails:
    """A source of one file that is broken at one place: document `at` of it can never be read, nor a second epoch."""

    def __init__(self, source: Any, at: int):
        self._source, self._at = source, at
        self.name, self.finite, self.notes = source.name, source.finite, source.notes

    def open(self) -> None:
        self._source.open()

    def stream(self, cursor: dict) -> "_FailingStream":
        return _FailingStream(self._source.stream(cursor), self._at)


class _FailingStream:
    def __init__(self, stream: Any, at: int):
        self._stream, self._at = stream, at

    def __iter__(self) -> "_FailingStream":
        return self

    def __next__(self) -> Document:
        document = next(self._stream)
        cursor = self._stream.cursor()
        if cursor["epoch"] > 0 or cursor["piece"] > self._at:
            raise SourceUnavailable("the disk is broken here")
        return document

    def cursor(self) -> dict:
        return self._stream.cursor()
