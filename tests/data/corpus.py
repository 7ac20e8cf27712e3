"""Small corpora and readers for the pipeline's tests: real sources on disk, and ranks that are threads of this process."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.assembly import PipelineFactory, data_position
from core.data.documents import Document
from core.data.loader import Loader
from core.data.mixing import MixSettings
from core.data.packing import Row
from core.data.pipeline import PipelineSettings, Position
from core.data.sources import build_source
from core.data.sources.text import TextSettings
from core.data.tokenizer import Tokenizer, build_tokenizer
from core.data.validation import HoldOut
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
    return Position(0, {}, None, {})


def resumed(state: dict, factory: PipelineFactory) -> Position:
    """The position of a saved state, by way of JSON as a checkpoint keeps it."""
    position, notes = data_position(json.loads(json.dumps(state)), FINGERPRINT, factory.sources or [])
    assert notes == []
    return position


def make_loader(factory: PipelineFactory, position: Position, rows: int = LANES, parallel: Any = None, workers: int = 0) -> Loader:
    names = [section.name for section in factory.sections]
    packed = factory.settings.packing == "documents"
    lanes = factory.settings.lanes
    return Loader(
        factory, position, parallel or Single(), rows, names, lanes, packed, workers=workers, fingerprint=FINGERPRINT
    )


def steps(loader: Loader, count: int | None = None) -> list[np.ndarray]:
    """The next steps of one rank, each as (rows, 5, T): all there is in a batch; None reads to the end of the data."""
    found: list[np.ndarray] = []
    while (count is None or len(found) < count) and (step := loader.next_step()) is not None:
        b = step.batch
        found.append(np.stack([b.input_ids, b.labels, b.position_ids, b.document_ids, b.source_ids], axis=1))
    return found


def as_array(row: Row) -> np.ndarray:
    return np.stack([row.input_ids, row.labels, row.position_ids, row.document_ids, row.source_ids])


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def texts_of(arrays: list[np.ndarray], tokenizer: Tokenizer) -> list[str]:
    """The documents in steps of one reader, in order of their rows; those that end beyond the steps are left out."""
    pieces: dict[str, str] = {}
    rows = [row for step in arrays for row in step]
    labels = np.concatenate([row[1][row[4] >= 0] for row in rows]) if rows else np.zeros(0)
    out, current = [], []
    for token in labels:
        if token == tokenizer.eos_id:
            out.append(tokenizer.decode(current))
            current = []
        else:
            current.append(int(token))
    assert not pieces
    return out


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
    """A source that can be read only so far: after `documents` of them in this process it fails for good."""

    def __init__(self, source: Any, documents: int):
        self._source, self._left = source, documents
        self.name, self.finite, self.notes = source.name, source.finite, source.notes

    def open(self) -> None:
        self._source.open()

    def stream(self, cursor: dict) -> "Fails":
        self._stream = self._source.stream(cursor)
        return self

    def __iter__(self) -> "Fails":
        return self

    def __next__(self) -> Document:
        from core.errors import SourceUnavailable

        if self._left == 0:
            raise SourceUnavailable("the disk is gone")
        self._left -= 1
        return next(self._stream)

    def cursor(self) -> dict:
        return self._stream.cursor()
