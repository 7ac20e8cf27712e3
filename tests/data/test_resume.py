"""Resume ≡ no resume, and held-out documents stay out: every kind of source, mixing strategy and
packing, at random points.

A plan is a list of segments, each with its own number of ranks (threads here), workers (processes)
and rows a step; between segments everything but the saved state is forgotten. Whatever the plan,
what is consumed is the same, row by row, and it is what one reader of the whole mix says it must be
(corpus.check_accounts).

The constants of the pipeline are made small here, so that a few hundred short documents cross the
borders of snapshots, windows, cached blocks, pieces of files and epochs many times.
"""

import gzip
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice, product, repeat
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from core.data import pipeline
from core.data import token_cache as cache
from core.data.documents import Document, Encoded
from core.data.mixing import MixSettings
from core.data.pipeline_factory import PipelineFactory
from core.data.position import Position
from core.data.shuffle import ShuffledSource
from core.data.sources import SOURCES, build_source, text
from core.data.sources.chat import ChatSettings
from core.data.sources.hf import HfSettings
from core.data.sources.shards import ShardSource
from core.data.sources.text import PythonStdlibSettings, TextSettings
from core.data.sources.tokens import TokensSettings, TokensSource
from core.data.token_files import ChunkWriter, Manifest
from core.data.validation import HoldOut, plan_hold_out, validation_rows
from core.errors import SourceUnavailable
from core.schedules import Piece
from tests.data.corpus import (
    FINGERPRINT,
    LANES,
    NEXT_TOKEN,
    SEQ_LENGTH,
    Fails,
    History,
    Recorder,
    Reweighting,
    Segment,
    byte_tokenizer,
    check_accounts,
    history,
    make_factory,
    write_corpus,
)
from tests.hub import Hub, lines, parquet

HORIZON = 4000  # tokens: most of a reference run
FALLING = [
    Piece(start=0.9, shape="constant", end=0.4),
    Piece(start=0.9, to=0.1, begin=0.4, end=0.6),
]
RISING = [Piece(start=0.1, shape="constant", end=0.4), Piece(start=0.1, to=0.9, begin=0.4, end=0.6)]

STRATEGIES = ["round_robin", "sequential", "weighted", "annealed"]
PACKINGS = ["documents", "best_fit", "padding"]

KINDS: dict[str, Any] = {
    "txt": TextSettings(path="texts", name="it"),
    "jsonl": TextSettings(path="rows/*.jsonl", name="it"),
    "jsonl.gz": TextSettings(path="rows/*.gz", name="it"),
    "jsonl.zst": TextSettings(path="rows/*.zst", name="it"),
    "parquet": TextSettings(path="rows/*.parquet", name="it"),
    "python_stdlib": PythonStdlibSettings(name="it"),
    "pdf": SOURCES["pdf"][0](name="it"),
    "chat": ChatSettings(path="chat/*.jsonl.gz", name="it"),
    "chat dataset": ChatSettings(dataset="./chat_dataset", name="it"),
    "tokens": TokensSettings(path="tokens", name="it"),
    "hf": HfSettings(dataset="./dataset", name="it"),
}
CACHED = ["jsonl.gz", "jsonl.zst", "chat"]


def mix_of(strategy: str, sources: int = 2, max_epochs: int | None = None) -> MixSettings:
    """annealed: shares of tokens that a schedule turns around within the run."""
    if strategy == "annealed":
        weights = tuple(RISING if i % 2 else FALLING for i in range(sources))
        return MixSettings("weighted", weights, 1, max_epochs, "tokens", HORIZON, (0.9,) * sources)
    return MixSettings(strategy, tuple(1.0 + i for i in range(sources)), 1, max_epochs)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Every stretch that something is read, cut, cached or shuffled in is a few documents long."""
    monkeypatch.setattr(pipeline, "SNAPSHOT_EVERY", 5)
    monkeypatch.setattr(pipeline, "READ_AHEAD", 4)
    monkeypatch.setattr(cache, "BLOCK", 7)
    monkeypatch.setattr(cache, "FREE_BYTES", 0)
    monkeypatch.setattr(cache, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(text, "LOW", 40)
    monkeypatch.setattr(text, "HIGH", 80)
    monkeypatch.setattr(f"{SOURCES['pdf'][1].__module__}.LOW", 60)
    monkeypatch.setattr(f"{SOURCES['pdf'][1].__module__}.HIGH", 120)
    monkeypatch.setattr(ShardSource, "window", 6)
    monkeypatch.setattr(TokensSource, "window", 200)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(root / "library"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_data(root)
    return root


def write_data(root: Path, count: int = 9) -> None:
    """A few files of every kind, `count` documents in the smallest; no two documents are alike."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    draw = random.Random(3)

    def said(name: str, most: int = 90) -> str:
        return (
            f"{name}: "
            + " ".join(
                "abcdefghij"[: draw.randint(1, 10)] for _ in range(draw.randint(1, most // 5))
            )
            + "."
        )

    def rows(name: str, size: int) -> list[dict]:
        return [{"text": said(f"{name} {i}"), "id": i} for i in range(size)]

    def chat(name: str, size: int) -> list[dict]:
        def told(i: int) -> list[tuple[str, str]]:
            return [
                ("assistant", said(f"{name} {i}", 60)),
                ("user", "so?"),
                ("assistant", said("so", 20)),
            ]

        return [
            {"messages": [{"role": role, "content": content} for role, content in told(i)]}
            for i in range(size)
        ]

    def lines(found: list[dict]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in found).encode()

    for folder in ("texts", "rows", "library/deep", "pdfs", "chat", "dataset", "chat_dataset"):
        (root / folder).mkdir(parents=True)
    for i in range(3):
        size = count + 4 * i
        (root / f"texts/{i}.{('txt', 'md', 'py')[i]}").write_text(
            "\n\n".join(said(f"text {i} {k}") for k in range(size))
        )
        (root / f"library/{'deep/' * (i == 1)}{i}.py").write_text(
            "\n".join(f"# {said(f'code {i} {k}')}" for k in range(size))
        )
        (root / f"rows/{i}.jsonl").write_bytes(lines(rows(f"jsonl {i}", size)))
        (root / f"rows/{i}.jsonl.gz").write_bytes(gzip.compress(lines(rows(f"gz {i}", size))))
        (root / f"rows/{i}.jsonl.zst").write_bytes(
            zstandard.compress(lines(rows(f"zst {i}", size)))
        )
        (root / f"chat/{i}.jsonl.gz").write_bytes(gzip.compress(lines(chat(f"chat {i}", size))))
        for folder, found in (
            ("rows", rows(f"parquet {i}", size)),
            ("dataset", rows(f"hf {i}", size)),
            ("chat_dataset", chat(f"hf {i}", size)),
        ):
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(found),
                root / folder / f"train-{i}.parquet",
                row_group_size=5,
            )
    write_pdfs(root / "pdfs", [[said(f"pdf {i} {k}") for k in range(6)] for i in range(3)])
    write_tokens(root / "tokens", [said(f"tokens {i}") for i in range(3 * count)])
    write_corpus(root, {"other": 17}, low=5, high=90)


def write_pdfs(folder: Path, files: list[list[str]]) -> None:
    pymupdf = pytest.importorskip("pymupdf")
    for i, paragraphs in enumerate(files):
        with pymupdf.open() as document:
            document.new_page().insert_textbox(
                (50, 50, 550, 780), "\n\n".join(paragraphs), fontsize=9
            )
            document.save(folder / f"{i}.pdf")


def write_tokens(folder: Path, texts: list[str], chunk_size: int = 300) -> None:
    tokenizer = byte_tokenizer()
    manifest = Manifest(
        "test", None, 0, 0, chunk_size, tokenizer.eos_id, complete=False, documents=0
    )
    writer = ChunkWriter(folder, manifest)
    for ids in tokenizer.encode_batch(texts):
        writer.add(np.append(ids, tokenizer.eos_id))
    writer.save(complete=True)
    writer.close()


def random_plan(
    draw: random.Random,
    rows: int,
    segments: int,
    workers: tuple[int, ...] = (0,),
    sizes: Sequence[int] = (LANES, LANES, 2 * LANES, 6, 12, 18),
) -> list[Segment]:
    """Segments that come to `rows` rows; ranks, workers and rows a step by chance."""
    plan: list[Segment] = []
    while rows:
        ranks = draw.choice([1, 2, 2, 3])
        step = draw.choice(sizes)
        steps = draw.randint(0, max(1, 2 * rows // (step * segments)))
        if len(plan) >= segments or steps * step > rows:
            step, steps = LANES, rows // LANES
        plan.append(Segment(steps, ranks, draw.choice(workers), step))
        rows -= step * steps
    return plan


MOSTLY_SLOW = [
    pytest.param(packing, marks=[pytest.mark.slow] * (packing != "best_fit"))
    for packing in PACKINGS
]
"""The packing that can go wrong in most ways, and, when there is time, all of them."""

EVERY_COMBINATION = [
    pytest.param(
        kind,
        strategy,
        packing,
        marks=[pytest.mark.slow] * (packing != "best_fit" or (i + j) % 2 == 1),
    )
    for (i, kind), (j, strategy), packing in product(
        enumerate(KINDS), enumerate(STRATEGIES), PACKINGS
    )
]
"""Two of the strategies for every kind, and, when there is time, all of them."""

# every kind, strategy and packing -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy", "packing"), EVERY_COMBINATION)
def test_resume_is_no_resume(
    kind: str, strategy: str, packing: str, root: Path, small: None
) -> None:
    """At random points, with another number of ranks and of rows a step each time: the same is
    consumed, and it is all there."""
    draw = random.Random(f"{kind} {strategy} {packing}")
    sections = [KINDS[kind], TextSettings(path="other.jsonl", name="other")]
    shuffle = draw.choice(["documents", "shards"])
    total = 26 * LANES

    def make(number: int) -> PipelineFactory:
        return make_factory(root, sections, packing=packing, mix=mix_of(strategy), shuffle=shuffle)

    straight = history(make, [Segment(total // LANES)])
    check_accounts(straight, make(0))
    plan = random_plan(draw, total, 3)
    assert history(make, plan) == straight, f"{shuffle}, {plan}"


# where a run may be cut ---------------------------------------------------------------------------


def both(kind: str = "jsonl") -> list:
    return [KINDS[kind], TextSettings(path="other.jsonl", name="other")]


@pytest.mark.parametrize("recorder", [Recorder, Reweighting])
@pytest.mark.parametrize("packing", MOSTLY_SLOW)
def test_a_run_may_be_cut_after_every_step(
    packing: str, recorder: type[Recorder], root: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty segments of one step each, and from each of their states the rest in one: nothing else
    is consumed.

    Also where the weights of sources are adapted meanwhile, which begins to read anew each time,
    and not where one is cut."""
    if recorder is Reweighting:
        # what was read too far, and the snapshots taken there, must be forgotten
        monkeypatch.setattr(pipeline, "READ_AHEAD", 40)

    def make(number: int) -> PipelineFactory:
        return make_factory(
            root, both(), packing=packing, mix=mix_of("annealed"), shuffle="documents"
        )

    straight = history(make, [Segment(50)], recorder=recorder)
    check_accounts(straight, make(0))
    assert len(straight.factors) == (16 if recorder is Reweighting else 0)
    stepwise = history(
        make, [Segment(1, ranks=1 + number % 3) for number in range(50)], recorder=recorder
    )
    assert (
        stepwise == straight
        and stepwise.state == straight.state
        and stepwise.factors == straight.factors
    )
    for done in range(1, 50, 7):
        rest = history(
            make, [Segment(50 - done, ranks=1 + done % 2)], stepwise.states[done - 1], recorder
        )
        assert rest.state["receipt"] == straight.state["receipt"], f"after {done} steps"


def test_rows_of_a_step_may_change_at_every_resume(root: Path, small: None) -> None:
    """Steps of 1, 4, 7, 16, 2 and 6 rows, in the middle of rounds of lanes."""

    def make(number: int) -> PipelineFactory:
        return make_factory(root, both("parquet"), packing="best_fit", mix=mix_of("weighted"))

    plan = [
        Segment(11, rows=1),
        Segment(7, 2, rows=4),
        Segment(5, rows=7),
        Segment(3, 2, rows=16),
        Segment(7, 2, rows=2),
        Segment(16, 3),
    ]
    total = sum(segment.steps * segment.rows for segment in plan if segment.steps)
    assert history(make, plan) == history(make, [Segment(total, rows=1)])


class Watched(Recorder):
    """Remembers how far behind each rank's own snapshot is."""

    seen: ClassVar[list[tuple[int, int]]] = []

    def state(self) -> dict:
        self.seen.append((self._parallel.rank, (self.position.snapshot or {}).get("index", 0)))
        return super().state()


def test_ranks_may_stand_at_unlike_snapshots(root: Path, small: None) -> None:
    """The merged state goes back to the oldest of them, and a new horizon that only some ranks have
    behind them stays in it."""
    renewals = list(range(20, 400, 13))

    def make(number: int) -> PipelineFactory:
        return make_factory(root, both(), packing="best_fit", mix=mix_of("annealed"))

    begin = {
        **{
            "rows": 0,
            "lanes": {},
            "snapshot": None,
            "drops": {},
            "receipts": {},
            "fingerprint": FINGERPRINT,
        },
        "renewals": renewals,
    }
    straight = history(make, [Segment(60)], begin)
    check_accounts(straight, make(0), renewals=renewals)
    Watched.seen.clear()
    for ranks in (2, 3):
        assert history(make, [Segment(2, ranks)] * 30, begin, Watched) == straight
    places = [index for _, index in Watched.seen]
    unlike = [pair for pair in zip(places[::2], places[1::2]) if pair[0] != pair[1]]
    assert len(unlike) > 10, "this corpus no longer makes ranks stand apart: the test shows nothing"


@pytest.mark.parametrize("window", [1, 7, 64, 299, 300, 301, 1000])
def test_shuffled_tokens_go_on_from_every_place(
    window: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of tokens may begin inside a document, and a document may run into the next chunk:
    each comes whole, and once."""
    monkeypatch.setattr(TokensSource, "window", window)
    source = build_source(KINDS["tokens"], root, 1)
    stream, found = ShuffledSource(source, 1).stream({}), []
    while True:
        cursor = stream.cursor()
        try:
            found.append((cursor, next(stream).digest))
        except StopIteration:
            break
    digests = [digest for _, digest in found]
    assert sorted(digests) == sorted(document.digest for document in source.stream({}))
    for done, (cursor, _) in enumerate(found):
        assert [
            document.digest for document in ShuffledSource(source, 1).stream(cursor)
        ] == digests[done:]


# the cache ----------------------------------------------------------------------------------------


def damage(folder: Path, draw: random.Random) -> int:
    """Flip bits in, shorten, empty, fill with noise and delete the files of the token cache; how
    many there were."""
    files = sorted((folder / cache.CACHE).glob("*/*.npz"))
    for path in files:
        try:
            data = bytearray(path.read_bytes() or b"?")
        except FileNotFoundError:  # another rank's thread is at it, too
            continue
        match draw.randrange(6):
            case 0:
                path.unlink(missing_ok=True)
            case 1:
                path.write_bytes(b"")
            case 2:
                path.write_bytes(data[: draw.randrange(len(data))])
            case 3:
                for _ in range(draw.choice([1, 1, 100])):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
            case 4:
                path.write_bytes(draw.randbytes(len(data)))
    return len(files)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", CACHED)
def test_the_cache_changes_nothing_whatever_becomes_of_it(
    kind: str, seed: int, root: Path, small: None
) -> None:
    """On, off, deleted or damaged between segments, and shared by ranks: the order is that of a run
    without it."""
    draw = random.Random(f"{kind} {seed}")
    strategy, packing, shuffle = (
        draw.choice(STRATEGIES),
        draw.choice(PACKINGS),
        draw.choice(["documents", "shards"]),
    )
    found = []

    def make(number: int, on: bool = True) -> PipelineFactory:
        return make_factory(
            root,
            both(kind),
            packing=packing,
            mix=mix_of(strategy),
            shuffle=shuffle,
            cache_gigabytes=0.01 * (on and number % 4 != 3),
        )

    straight = history(lambda number: make(number, on=False), [Segment(40)])
    state, parts = None, []
    for number, segment in enumerate(random_plan(draw, 40 * LANES, 6)):
        parts.append(history(lambda _, number=number: make(number), [segment], state))
        state = parts[-1].state
        if draw.random() < 0.2:
            shutil.rmtree(root / cache.CACHE, ignore_errors=True)
        else:
            found.append(damage(root, draw))
    assert joined(parts) == straight and max(found) > 0, f"{strategy} {packing} {shuffle}"


def joined(parts: list[History]) -> History:
    rows = {n: row for part in parts for n, row in part.rows.items()}
    documents, epochs = (
        [sum(column) for column in zip(*counts)]
        for counts in zip(*((p.documents, p.epochs) for p in parts if p.documents))
    )
    return History(
        rows, documents, epochs, parts[-1].states, set().union(*(part.dropped for part in parts))
    )


def test_no_damage_to_a_cached_block_goes_unseen() -> None:
    """Any flipped bit, any shorter file: refused. numpy's own checks let some through, and answer
    others with any error."""
    draw = np.random.default_rng(0)
    block = []
    for i in range(60):
        ids = draw.integers(0, 250, draw.integers(50, 400)).astype(np.int32)
        encoded = Encoded(ids, ids % 2 == 0, int(draw.integers(0, 2**63)), 30 + i)
        block.append((i + 1, Document("", f"a\n\udce9 {i}", encoded=encoded)))
    data = cache.packed(block, True)
    found, last = cache.unpacked(data)
    assert last and [described(item) for item in found] == [described(item) for item in block]
    heads = [
        at + i for at in range(len(data)) if data.startswith(b"\x93NUMPY", at) for i in range(128)
    ]
    places = [
        *heads,
        *range(len(data) - 300, len(data)),
        *draw.integers(0, len(data), 100).tolist(),
    ]
    damaged = [data[:n] for n in (0, 1, 7, 1000, len(data) - 1)]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(draw.integers(8))
        damaged.append(bytes(flipped))
    for content in damaged:
        with pytest.raises(ValueError):
            cache.unpacked(content)


def described(item: tuple[int, Document]) -> tuple:
    at, document = item
    tokens = document.encoded
    assert tokens is not None and tokens.learned is not None
    return (
        at,
        document.key,
        tokens.ids.tolist(),
        tokens.learned.tolist(),
        tokens.digest,
        tokens.size,
    )


def test_a_file_may_have_any_name(root: Path, tmp_path: Path, small: None) -> None:
    """Bytes that are no UTF-8, line ends: it is read, held out by its keys and cached like any
    other."""
    shutil.copy(
        root / "rows/0.jsonl.gz",
        tmp_path / b"caf\xe9 au\nlait.jsonl.gz".decode("utf-8", "surrogateescape"),
    )
    section = TextSettings(path=".", name="it")
    made = [
        make_factory(tmp_path, [section], shuffle="documents", cache_gigabytes=0.01 * on)
        for on in (0, 1, 1)
    ]
    runs = [
        history(lambda _, factory=factory: factory, [Segment(10), Segment(10)]) for factory in made
    ]
    assert (
        runs[0] == runs[1] == runs[2] and made[0].sources[0].contents() and len(runs[0].digests) > 5
    )


# the end of the data ------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", MOSTLY_SLOW)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_epochs_hold_everything_twice(
    strategy: str, packing: str, root: Path, small: None
) -> None:
    """Whatever interrupts them: each position of each document once an epoch, and the ledger says
    so."""
    draw = random.Random(f"{strategy} {packing}")
    sections = [
        KINDS["jsonl.zst"],
        TextSettings(path="other.jsonl", name="other"),
        TextSettings(path="texts", name="texts"),
    ]

    def make(number: int) -> PipelineFactory:
        mix = mix_of(strategy, 3, max_epochs=2)
        return make_factory(
            root, sections, packing=packing, mix=mix, hold_out=HoldOut(0.0), shuffle="documents"
        )

    straight = history(make, [Segment(None)])
    plan = [
        *random_plan(draw, max(straight.rows) // 2 // LANES * LANES, 4),
        Segment(None, draw.choice([1, 2, 3])),
    ]
    found = history(make, plan)
    assert found == straight, plan
    check_accounts(found, make(0))
    everything = Counter(
        d.digest
        for source in make(0).sources
        for epoch in (0, 1)
        for d in source.stream({"epoch": epoch})
    )
    begun = Counter(
        segment.digest
        for row in found.rows.values()
        for segment in row.segments
        if segment.start == 0
    )
    assert begun == everything and set(everything.values()) == {2}
    assert not any(waiting for _, waiting in found.state["lanes"].values())
    assert found.epochs == [2, 2, 2] and sum(found.documents) == everything.total()
    again = history(make, [Segment(None, 2)], found.state)
    assert not again.rows and again.state["receipt"] == found.state["receipt"]


# shares -------------------------------------------------------------------------------------------


def tokens_of(found: History, first: int, last: int) -> list[int]:
    """Tokens of each of two sources in rows of these numbers."""
    rows = [row for n, row in found.rows.items() if first <= n < last]
    return [sum(int((row.source_ids == source).sum()) for row in rows) for source in (0, 1)]


@pytest.mark.parametrize("packing", MOSTLY_SLOW)
def test_shares_turn_with_their_schedule_whatever_interrupts(
    packing: str, tmp_path: Path, small: None
) -> None:
    """Of tokens: nine to one before the turn, one to nine after it, though one source's documents
    are five times as long."""
    sections = write_corpus(tmp_path, {"long": 60}, low=150, high=250) + write_corpus(
        tmp_path, {"short": 60}, low=20, high=40
    )
    horizon = 120_000

    def make(number: int) -> PipelineFactory:
        mix = MixSettings("weighted", (FALLING, RISING), 5, None, "tokens", horizon, (1.0, 1.0))
        return make_factory(tmp_path, sections, packing=packing, mix=mix, shuffle="documents")

    steps = horizon // (LANES * SEQ_LENGTH)
    straight = history(make, [Segment(steps)])
    draw = random.Random(packing)
    assert history(make, random_plan(draw, steps * LANES, 5)) == straight
    check_accounts(straight, make(0))
    # a share p of tokens in documents of about equal length within a source: n draws leave sqrt(p
    # (1 - p) / n) of chance
    # of the rows; the rest is padding
    filled = sum(tokens_of(straight, 0, 10**9)) / (steps * LANES * SEQ_LENGTH)
    turn = int(0.38 * steps * LANES / filled), int(0.64 * steps * LANES / filled)
    for (first, last), share in (((0, turn[0]), 0.9), ((turn[1], 10**9), 0.1)):
        counts = tokens_of(straight, first, last)
        if sum(counts) > 10_000:
            assert counts[0] / sum(counts) == pytest.approx(share, abs=0.06), f"{first} to {last}"


# sources that fail --------------------------------------------------------------------------------


def broken_run(
    tmp_path: Path,
    strategy: str,
    packing: str,
    wraps: Callable[[], Callable[[Any], Any]],
    seed: int = 1,
) -> tuple[History, PipelineFactory, set[int]]:
    """Two ranks of one lane each, which soon stand far apart, until b fails; "annealed" ones are
    adapted meanwhile, too.

    What they consumed, a factory of what they would have read, and the draws of b before its drop.
    """
    sections = write_corpus(tmp_path, {"b": 100, "a": 60, "c": 60}, low=5, high=900)

    def make(number: int, wrap: Callable[[Any], Any] = lambda source: source) -> PipelineFactory:
        mix = replace(mix_of(strategy, 3), seed=seed, horizon_tokens=40_000)
        if strategy == "weighted":
            mix = replace(mix, weights=(3.0, 1.0, 1.0))
        return make_factory(tmp_path, sections, packing=packing, mix=mix, lanes=2, wrap=wrap)

    plan = [Segment(60, 2, rows=12), Segment(20, 1, rows=12), Segment(30, 2, rows=12)]
    recorder = Reweighting if strategy == "annealed" else Recorder
    found = history(lambda number: make(number, wraps()), plan, recorder=recorder)
    assert {name for name, _ in found.dropped} == {"b"} == set(found.state["drops"])
    drop, mixed = (
        found.state["drops"]["b"],
        make(0)(Position(drops=found.state["drops"], factors=found.factors), [])._mixer,
    )
    return found, make(0), {draw.index for draw in islice(mixed, drop) if draw.source == 0}


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failure_leaves_all_ranks_one_order(
    strategy: str, packing: str, tmp_path: Path, small: None
) -> None:
    """A document that no rank can read: all that could be is consumed, and the ranks go on in one
    order."""
    found, whole, _ = broken_run(
        tmp_path, strategy, packing, lambda: lambda s: Fails(s, 8) if s.name == "b" else s
    )
    check_accounts(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize("packing", MOSTLY_SLOW)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failure_on_one_rank_leaves_all_one_order(
    strategy: str, packing: str, tmp_path: Path, small: None
) -> None:
    """What the others have read and used of it meanwhile is lost to that rank, and nothing else is
    lost or read twice."""
    for rank in (0, 1):
        broken = chain([rank == 0, rank == 1], repeat(False))

        def wraps(broken: Iterator[bool] = broken) -> Callable[[Any], Any]:
            fails = next(broken)
            return lambda s: Fails(s, 8) if s.name == "b" and fails else s

        found, whole, before = broken_run(tmp_path / str(rank), strategy, packing, wraps)
        check_accounts(found, whole, before)


class Vanishes:
    """A source that is gone for every reader once one of them has come to document `at`: not even
    read again."""

    def __init__(self, source: Any, at: int, gone: threading.Event):
        self._source, self._at, self._gone = source, at, gone
        self.name, self.finite, self.notes = source.name, source.finite, source.notes

    def stream(self, cursor: dict) -> Any:
        return _Vanishing(self._source.stream(cursor), self._at, self._gone)

    def open(self) -> None:
        self._source.open()


class _Vanishing:
    def __init__(self, stream: Any, at: int, gone: threading.Event):
        self._stream, self._at, self._gone = stream, at, gone

    def __iter__(self) -> "_Vanishing":
        return self

    def __next__(self) -> Document:
        if self._stream.cursor()["piece"] >= self._at:
            self._gone.set()
        if self._gone.is_set():
            raise SourceUnavailable("it is gone")
        return next(self._stream)

    def cursor(self) -> dict:
        return self._stream.cursor()


@pytest.mark.slow
@pytest.mark.parametrize("packing", MOSTLY_SLOW)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_source_that_vanishes_leaves_all_ranks_one_order(
    strategy: str, packing: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it can be read again, not even what a rank needs to find its place: the others
    lose nothing all the same."""
    monkeypatch.setattr(pipeline, "SNAPSHOT_EVERY", 60)
    for seed in range(2):
        gone = threading.Event()
        wrap = partial(Vanishes, at=(10, 6)[seed], gone=gone)
        found, whole, before = broken_run(
            tmp_path,
            strategy,
            packing,
            lambda wrap=wrap: lambda s: wrap(s) if s.name == "b" else s,
            seed,
        )
        check_accounts(found, whole, before)


# held-out documents -------------------------------------------------------------------------------

TWICE = "the same text in three places, of which one is held out"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large sources, held out by hash, and small ones that hold out their last documents; some
    texts are in several."""
    root = tmp_path_factory.mktemp("many")
    write_corpus(root, {"large": 420, "small": 40}, low=5, high=30)
    large = [json.loads(line)["text"] for line in (root / "large.jsonl").read_text().splitlines()]
    small = [json.loads(line)["text"] for line in (root / "small.jsonl").read_text().splitlines()]
    with gzip.open(root / "mixed.jsonl.gz", "wt") as file:
        for line in [
            TWICE,
            *large[100:160],
            small[-1],
            *small[:5],
            *(f"mixed {i}" for i in range(60)),
            TWICE,
        ]:
            file.write(json.dumps({"text": line}) + "\n")
    for name, count in (("chat", 350), ("few", 30)):
        with gzip.open(root / f"{name}.jsonl.gz", "wt") as file:
            for i in range(count):
                file.write(
                    json.dumps({"messages": [{"role": "assistant", "content": f"{name} {i} says"}]})
                    + "\n"
                )
    write_tokens(root / "tokens", [f"tokens {i}" for i in range(350)], 1000)
    write_tokens(root / "little", [f"little {i}" for i in range(25)], 100)
    return root


HELD = {
    "texts": [
        TextSettings(path="large.jsonl", name="large"),
        TextSettings(path="small.jsonl", name="small"),
        TextSettings(path="mixed.jsonl.gz", name="mixed"),
    ],
    "chat": [
        ChatSettings(path="chat.jsonl.gz", name="chat"),
        ChatSettings(path="few.jsonl.gz", name="few"),
    ],
    "tokens": [
        TokensSettings(path="tokens", name="tokens"),
        TokensSettings(path="little", name="little"),
    ],
}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
@pytest.mark.parametrize("kinds", HELD)
def test_validation_documents_never_occur_in_training(
    kinds: str, seed: int, many: Path, small: None
) -> None:
    """Over the log of what was consumed, for any ranks and resumes; and nothing else is kept from
    training."""
    draw = random.Random(f"{kinds} {seed}")
    sections, packing, strategy = HELD[kinds], draw.choice(PACKINGS), STRATEGIES[seed]
    cached, fraction, plans = 0.01 * draw.choice([0, 1]), 0.08, []

    def make(number: int) -> PipelineFactory:
        sources = [build_source(section, many, 1) for section in sections]
        plans.append(
            plan_hold_out(sources, fraction, 1, plans[-1].state() if plans and number else None)
        )
        mix = mix_of(strategy, len(sections), max_epochs=2)
        how = {"packing": packing, "mix": mix, "shuffle": "documents", "cache_gigabytes": cached}
        return make_factory(many, sections, hold_out=plans[-1], **how)

    found = history(make, [*random_plan(draw, 30 * LANES, 3), Segment(None, 2)])
    check_accounts(found, make(0))
    assert all(plan.state() == plans[0].state() for plan in plans)
    factory = make(0)
    documents = [
        (source.name, document) for source in factory.sources for document in source.stream({})
    ]
    held = {document.digest for _, document in documents if plans[0].holds(document)}
    rows = validation_rows(
        factory.sources, plans[0], byte_tokenizer(), NEXT_TOKEN, SEQ_LENGTH, 10**9, 1
    )
    read = {segment.digest for row in rows for segment in row.segments}
    assert read == held and not held & found.digests, (
        f"{len(held & found.digests)} of {len(held)} were trained on"
    )
    assert held | found.digests == {document.digest for _, document in documents}
    assert all(
        any(d.digest in held for name, d in documents if name == section.name)
        for section in sections
    )
    for section in sections:
        texts = {document.digest for name, document in documents if name == section.name}
        assert len(texts & held) == round(fraction * len(texts)) > 0


# processes and the network ------------------------------------------------------------------------

MIXES = [
    ["txt", "jsonl", "jsonl.gz"],
    ["jsonl.zst", "parquet", "python_stdlib"],
    ["chat", "tokens"],
    ["pdf", "jsonl.gz"],
    ["hf", "chat dataset"],
]
PLANS = [(seed, MIXES[seed % 3], Recorder) for seed in range(12)]
PLANS += [(seed, MIXES[0], Reweighting) for seed in (7,)] + [
    (18, MIXES[3], Recorder),
    (19, MIXES[4], Recorder),
]
"""Every strategy with every packing, also with weights that are adapted meanwhile. The last two
start slowly in every process: with one plan each."""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kinds of data, enough of them for constants as they are: workers know of no
    others."""
    root = tmp_path_factory.mktemp("larger")
    write_data(root, count=60)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kinds", "recorder"), PLANS)
def test_workers_and_ranks_change_nothing(
    seed: int, kinds: list[str], recorder: type[Recorder], larger: Path
) -> None:
    """Random plans of 1, 2 and 3 ranks with 0, 1 and 3 worker processes each, with the token cache
    on and off."""
    draw = random.Random(seed)
    strategy, packing, shuffle = (
        STRATEGIES[seed % 4],
        PACKINGS[seed // 4 % 3],
        draw.choice(["documents", "shards"]),
    )
    sections = [KINDS[kind].model_copy(update={"name": kind.replace(" ", "_")}) for kind in kinds]
    total = 120 * LANES
    cached = [draw.choice([0.0, 0.01]) for _ in range(9)]

    def make(number: int) -> PipelineFactory:
        mix = mix_of(strategy, len(sections))
        return make_factory(
            larger,
            sections,
            packing=packing,
            mix=mix,
            shuffle=shuffle,
            cache_gigabytes=cached[number % 9],
        )

    straight = history(make, [Segment(total // LANES)], recorder=recorder)
    check_accounts(straight, make(0))
    how: dict[str, Any] = {"sizes": [LANES]} if recorder is Reweighting else {}
    plan = [Segment(40), Segment(30, 2, 1), Segment(50, 1, 1)]
    if seed < 18:
        plan = random_plan(draw, total, 3, workers=(0, 1, 3), **how)
    if not any(segment.workers for segment in plan):
        plan = [segment._replace(workers=3) for segment in plan]
    assert history(make, plan, recorder=recorder) == straight, (
        f"{strategy}, {packing}, {shuffle}, {plan}"
    )


@pytest.mark.slow
def test_one_rank_then_two_then_one(larger: Path) -> None:
    """The case that the README promises, with as many workers as may be: the hash chain is the
    same."""

    def make(number: int) -> PipelineFactory:
        return make_factory(
            larger,
            [KINDS["jsonl"], KINDS["jsonl.gz"].model_copy(update={"name": "gz"})],
            packing="best_fit",
            mix=mix_of("annealed"),
        )

    straight = history(make, [Segment(150)])
    for workers in (0, 1, 3):
        found = history(
            make, [Segment(40, 1, workers), Segment(60, 2, workers), Segment(50, 1, workers)]
        )
        assert found.state["receipt"] == straight.state["receipt"] and found == straight


ON_THE_HUB = """
import json, random, shutil, sys
from pathlib import Path
from core.data import token_cache as cache
from core.data import pipeline
from core.data.sources.chat import ChatSettings
from core.data.sources.hf import HfSettings
from core.data.sources.shards import ShardSource
from tests.data.corpus import LANES, Segment, check_accounts, history, make_factory
from tests.data.test_resume import PACKINGS, STRATEGIES, damage, joined, mix_of, random_plan

root = Path(sys.argv[1])
sections = [
    HfSettings(dataset="me/parquet", name="parquet"),
    HfSettings(dataset="me/gzip", name="gzip"),
    ChatSettings(dataset="me/chat", name="chat"),
]

def run(plan, strategy, packing, cached):
    def make(number):
        how = {"mix": mix_of(strategy, 3), "packing": packing, "shuffle": "documents"}
        return make_factory(root, sections, cache_gigabytes=0.01 * cached(number), **how)
    found = history(make, plan)
    if len(plan) == 1:
        check_accounts(found, make(0))
    return found

worker = run([Segment(15), Segment(15, 1, 1)], "annealed", "best_fit", lambda number: True)  # its constants are as they are
assert worker == run([Segment(30)], "annealed", "best_fit", lambda number: False)
shutil.rmtree(root / cache.CACHE)

pipeline.SNAPSHOT_EVERY, cache.BLOCK, cache.FREE_BYTES, ShardSource.window = 5, 7, 0, 6
draw, harmed = random.Random(1), []

def cached(number):
    harmed.append(damage(root, draw))
    return number % 3 < 2

for strategy, packing in zip(STRATEGIES * 2, PACKINGS * 2):
    straight = run([Segment(30)], strategy, packing, lambda number: False)
    assert run(random_plan(draw, 30 * LANES, 3), strategy, packing, cached) == straight, (strategy, packing)
print(json.dumps(max(harmed)))
"""


@pytest.mark.slow
def test_a_hub_changes_nothing(tmp_path: Path) -> None:
    """Parquet and gzipped JSON streamed from a hub, every strategy and packing (their pairs are
    tested on files above), the cache on, off and damaged even while it is in use, and a worker
    process: as in one go without a cache."""
    draw = random.Random(8)
    texts = [
        [{"text": f"{shard} {i} " + "hub " * draw.randint(1, 20)} for i in range(n)]
        for shard, n in enumerate([11, 17, 5])
    ]
    others = [[{"text": row["text"] + "gz"} for row in rows] for rows in texts]
    talks = [
        {"messages": [{"role": "assistant", "content": f"{i} says " + "so " * draw.randint(1, 20)}]}
        for i in range(25)
    ]
    with Hub() as hub:
        hub.add_dataset(
            "me/parquet",
            {
                f"data/train-{k}.parquet": parquet(rows, row_group_size=4)
                for k, rows in enumerate(texts)
            },
        )
        hub.add_dataset(
            "me/gzip",
            {f"en/train.{k}.json.gz": gzip.compress(lines(rows)) for k, rows in enumerate(others)},
        )
        hub.add_dataset("me/chat", {"train.jsonl": lines(talks)})
        # a worker that is ended leaves the lock of the bars of `datasets` behind, and Python tells
        # of it
        assert hub.run(ON_THE_HUB, tmp_path, str(tmp_path), PYTHONWARNINGS="ignore") > 3
