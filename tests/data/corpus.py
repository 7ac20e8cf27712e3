"""Small corpora and readers for the pipeline's tests: real sources on disk, and ranks that are
threads of this process."""

import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.data.encoding import encode
from core.data.loader import Layout, Loader, StepRows
from core.data.mixing import MixSettings
from core.data.objectives import build_objective
from core.data.packing import Row
from core.data.pipeline import Dealer, PipelineSettings
from core.data.pipeline_factory import PipelineFactory
from core.data.position import DataFacts, Position, resumed_position
from core.data.sources import build_source
from core.data.sources.text import TextSettings
from core.data.tokenizer import MASK, Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.data.validation import HoldOut
from core.parallel.single import Single
from core.preset.settings import TokenizerSettings
from tests.data.ranks import Ranks

SEQ_LENGTH = 32
LANES = 6
FINGERPRINT = "unchanged"
NEXT_TOKEN = build_objective(
    "next_token", build_tokenizer(TokenizerSettings(type="byte"), []), 0.2, 0
)


@functools.cache
def byte_tokenizer(masks: bool = False) -> Tokenizer:
    """`masks`: with a token to hide others behind."""
    return build_tokenizer(TokenizerSettings(type="byte"), [], (MASK,) if masks else ())


def write_corpus(
    folder: Path, sizes: dict[str, int], low: int = 20, high: int = 200
) -> list[TextSettings]:
    """One file of JSON lines for each name, with so many documents; every document's text is unlike
    any other's."""
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
    mix: MixSettings | None = None,
    shuffle: str = "shards",
    cache_gigabytes: float = 0.0,
    mask_fraction: float | None = None,
) -> PipelineFactory:
    """A factory over opened sources. `wrap` may put something around each source; `mix` stands for
    strategy and max_epochs; with a `mask_fraction` it makes rows of masked tokens."""
    sources = [wrap(build_source(section, folder, 1)) for section in sections]
    for source in sources:
        source.open()
    tokenizer = byte_tokenizer(masks=mask_fraction is not None)
    weights = tuple(float(1 + i) for i in range(len(sections)))
    settings = PipelineSettings(
        mix or MixSettings(strategy, weights, 1, max_epochs), lanes, SEQ_LENGTH, packing, 1
    )
    if mask_fraction is not None:
        settings = replace(settings, objective="masked_tokens", mask_fraction=mask_fraction)
    hold_out = hold_out or HoldOut(0.05)
    return PipelineFactory(
        sections,
        folder,
        1,
        tokenizer.state(),
        hold_out,
        settings,
        shuffle,
        cache_gigabytes,
        sources=sources,
        tokenizer=tokenizer,
    )


def start() -> Position:
    return Position()


def resumed(state: dict, factory: PipelineFactory) -> Position:
    """The position of a saved state, by way of JSON as a checkpoint keeps it."""
    contents = {source.name: "" for source in factory.sources or []}
    position, notes = resumed_position(json.loads(json.dumps(state)), FINGERPRINT, contents)
    assert notes == []
    return position


def make_loader(
    factory: PipelineFactory,
    position: Position,
    rows: int = LANES,
    parallel: Any = None,
    workers: int = 0,
    kind: type[Loader] = Loader,
    fill: bool = True,
) -> Any:
    layout = Layout(
        rows_per_step=rows,
        num_lanes=factory.settings.lanes,
        source_names=[section.name for section in factory.sections],
        packed=factory.settings.packing != "padding",
        fill=fill,
    )
    facts = DataFacts(fingerprint=FINGERPRINT)
    return kind(factory, position, parallel or Single(), layout, workers=workers, facts=facts)


def steps(loader: Loader, count: int | None = None) -> list[np.ndarray]:
    """The next steps of one rank, each as (rows, 5, T): all there is in a batch; None reads to the
    end of the data.

    They are put back into the groups that were read for them, so that a row's place tells its lane;
    rows of nothing but padding are -1 all over, those that a step left out as well.
    """
    found: list[np.ndarray] = []
    at = loader.position.rows
    while (count is None or len(found) < count) and (step := loader.next_step()) is not None:
        b = step.batch
        fields = np.stack(
            [b.input_ids, b.labels, b.position_ids, b.document_ids, b.source_ids], axis=1
        )
        before = loader._before[0].rows  # type: ignore[index]
        rows = {before + n: row for n, row in zip(step.numbers, fields) if (row[4] >= 0).any()}
        while at < loader.position.rows:
            own = [
                n
                for n in range(at, at + loader._rows_per_step)
                if n % loader._num_lanes in loader._lanes
            ]
            found.append(np.stack([rows.get(n, np.full_like(fields[0], -1)) for n in own]))
            at += loader._rows_per_step
    return found


def as_array(row: Row) -> np.ndarray:
    return np.stack([row.input_ids, row.labels, row.position_ids, row.document_ids, row.source_ids])


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def merged(ranks: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The steps of all ranks as one rank would have had them: rows in global order."""
    return [np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]) for parts in zip(*ranks)]


def texts_of(found: list[np.ndarray], lanes: int = LANES) -> list[str]:
    """The whole documents in steps that begin at row 0. One that goes on beyond the last step is
    left out."""
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


class Stretch(NamedTuple):
    """A stretch of a run without an interruption."""

    steps: int | None  # None: to the end of the data
    ranks: int = 1
    workers: int = 0
    rows: int = LANES  # global rows of a step


@dataclass
class History:
    """What a run consumed, over all its segments and ranks."""

    rows: dict[int, Row]  # by global number; rows of nothing but padding are left out
    # the ledger: documents and epochs of each source that the steps say begin in them
    documents: list[int]
    epochs: list[int]
    states: list[dict]  # saved after each segment
    dropped: set[tuple[str, str]]
    # draws from which on weights had other factors
    factors: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def state(self) -> dict:
        return self.states[-1]

    def __eq__(self, other: object) -> bool:
        """Whether the same was consumed in the same order: the receipt, and, which it stands for,
        everything in every row."""
        assert isinstance(other, History)
        equal = (
            self.rows.keys() == other.rows.keys()
            and all(
                np.array_equal(as_array(row), as_array(other.rows[n]))
                for n, row in self.rows.items()
            )
            and all(
                (row.segments, row.after) == (other.rows[n].segments, other.rows[n].after)
                for n, row in self.rows.items()
            )
        )
        receipts = [
            (history.state["receipt"], history.state["receipts"]) for history in (self, other)
        ]
        assert equal == (receipts[0] == receipts[1]), (
            f"the receipt does not tell: rows equal {equal}, {receipts}"
        )
        return equal and (self.documents, self.epochs) == (other.documents, other.epochs)

    @property
    def digests(self) -> set[int]:
        """Of every document of which anything was consumed."""
        return {segment.digest for row in self.rows.values() for segment in row.segments}


class Recorder(Loader):
    """A loader that keeps the rows it counts as consumed, under their global numbers."""

    consumed: dict[int, Row]
    factors: dict[int, dict[str, float]]

    def _advance(self, rows: list[Row]) -> None:
        first = self.position.rows
        numbers = [
            n
            for n in range(first, first + self._rows_per_step)
            if n % self._num_lanes in self._lanes
        ]
        assert [n % self._num_lanes for n in numbers] == [row.lane for row in rows], (
            "rows of other lanes than their turn's"
        )
        self.consumed |= zip(numbers, rows)
        self.factors |= self.position.factors
        super()._advance(rows)


class Reweighting(Recorder):
    """One that changes the factors of the sources every three rounds of lanes, with steps of a
    round, as a trainer may do it."""

    def next_step(self, *how: Any) -> StepRows | None:
        step, done = super().next_step(*how), self.position.rows // LANES
        if step is not None and done % 3 == 0:
            self.reweight(
                {
                    name: (0.3, 1.0, 2.5)[(done // 3 + i * i) % 3]
                    for i, name in enumerate(self.source_names)
                }
            )
        return step


def history(
    make: Callable[[int], PipelineFactory],
    plan: Sequence[Stretch],
    state: dict | None = None,
    recorder: type[Recorder] = Recorder,
) -> History:
    """Runs a plan from a saved state on. Between stretches everything but the state, as JSON, is
    forgotten.

    make  number of the stretch -> a factory with sources of its own
    """
    found = History({}, [], [], [], set())
    for number, stretch in enumerate(plan):
        read = partial(read_stretch, make, number, stretch, state, recorder)
        ranks = Ranks(stretch.ranks).run(read)
        consumed = {n: row for rank in ranks for n, row in rank[0].items()}
        assert len(consumed) == sum(len(rank[0]) for rank in ranks)
        assert not consumed.keys() & found.rows.keys()
        assert all(rank[1:3] == ranks[0][1:3] for rank in ranks), (
            "every rank must see the same ledger and the same merged state"
        )
        found.rows |= {n: row for n, row in sorted(consumed.items()) if row.segments}
        ledger, state, _, _ = ranks[0][1:]
        for column, counts in enumerate((found.documents, found.epochs)):
            steps = [step[column] for step in ledger] + ([list(counts)] if counts else [])
            counts[:] = [sum(numbers) for numbers in zip(*steps)]
        found.states.append(json.loads(json.dumps(state)))
        found.dropped |= {name for rank in ranks for name in rank[3]}
        found.factors |= {draw: factors for rank in ranks for draw, factors in rank[4].items()}
    return found


def read_stretch(
    make: Callable[[int], PipelineFactory],
    number: int,
    stretch: Stretch,
    state: dict | None,
    recorder: type[Recorder],
    parallel: Any,
) -> tuple:
    """What one rank reads of a stretch: rows, ledger, state, dropped sources, factors."""
    factory = make(number)
    position = start() if state is None else resumed(state, factory)
    loader = make_loader(factory, position, stretch.rows, parallel, stretch.workers, recorder)
    loader.consumed, loader.factors, ledger, done = {}, {}, [], 0
    try:
        while stretch.steps is None or done < stretch.steps:
            if (step := loader.next_step()) is None:
                break
            ledger.append((step.documents, step.epochs))
            done += 1
        return loader.consumed, ledger, loader.state(), loader.dropped, loader.factors
    finally:
        loader.close()


def check_accounts(
    found: History,
    factory: PipelineFactory,
    lost: Collection[int] = (),
    renewals: Sequence[int] = (),
) -> None:
    """A history since the beginning is what one reader of the whole mix, reading on its own, says
    it must be.

    Each draw is the document that it has to be, on the lane that it has to be on; each is used from
    its start on without a gap, wholly, but for those that the state says are waiting; and the
    ledger counts them.

    lost      draws that may be missing, or break off
    renewals  draws at which a new horizon began
    """
    settings = factory.settings
    # positions of a document that are none of its tokens
    ends = 2 if settings.objective == "masked_tokens" else 1
    drops = found.state["drops"]
    mixed = factory(
        Position(drops=drops, renewals=list(renewals), factors=found.factors), []
    )._mixer
    dealer = Dealer(settings.lanes, settings.mix.seed)
    used: Counter[int] = Counter()
    who: dict[int, tuple[int, int, int]] = {}
    for row in found.rows.values():
        for segment in row.segments:
            assert segment.start == used[segment.draw], (
                f"draw {segment.draw} goes on at {segment.start}, {used[segment.draw]} were used"
            )
            used[segment.draw] += segment.length
            told = (segment.source, segment.digest, row.lane)
            assert who.setdefault(segment.draw, told) == told, (
                f"draw {segment.draw} is two documents"
            )
    places = {
        int(lane): (place[0], {i: at for i, at in place[1]})
        for lane, place in found.state["lanes"].items()
    }
    documents, epochs = [0] * len(factory.sections), [0] * len(factory.sections)
    for index in range(max(used) + 1 if used else 0):
        draw = next(mixed)
        assert draw.index == index and draw.document is not None
        next_index, waiting = places.get(dealer.lane(index), (0, {}))
        total = len(encode(factory.tokenizer, [draw.document])[0].ids) + ends
        expected = waiting.get(index, total) if index < next_index else 0
        assert used[index] == expected or (index in lost and used[index] < expected), (
            f"{used[index]} of draw {index} were used, {expected} must have been"
        )
        if used[index]:
            assert who[index] == (draw.source, draw.document.digest, dealer.lane(index)), (
                f"draw {index} is another document"
            )
            documents[draw.source] += 1
            epochs[draw.source] += draw.opens_epoch
    assert (documents, epochs) == (found.documents, found.epochs), (
        "the ledger does not tell what was consumed"
    )
