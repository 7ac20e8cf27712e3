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
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest

from core.data import pipeline
from core.data.pipeline_factory import PipelineFactory
from core.data.shuffle import ShuffledSource
from core.data.sources import build_source
from core.data.sources.text import TextSettings
from core.data.sources.tokens import TokensSource
from tests.data.corpus import (
    FINGERPRINT,
    LANES,
    Recorder,
    Reweighting,
    Stretch,
    check_accounts,
    history,
    make_factory,
)
from tests.data.resume_setup import (
    EVERY_COMBINATION,
    KINDS,
    MOSTLY_SLOW,
    PACKINGS,
    STRATEGIES,
    mix_of,
    random_plan,
    write_data,
)
from tests.hub import Hub, lines, parquet

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

    straight = history(make, [Stretch(total // LANES)])
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

    straight = history(make, [Stretch(50)], recorder=recorder)
    check_accounts(straight, make(0))
    changes = 15 if packing == "padding" else 16  # of weights: its rows are less full
    assert len(straight.factors) == (changes if recorder is Reweighting else 0)
    stepwise = history(
        make, [Stretch(1, ranks=1 + number % 3) for number in range(50)], recorder=recorder
    )
    assert (
        stepwise == straight
        and stepwise.state == straight.state
        and stepwise.factors == straight.factors
    )
    for done in range(1, 50, 7):
        rest = history(
            make, [Stretch(50 - done, ranks=1 + done % 2)], stepwise.states[done - 1], recorder
        )
        assert rest.state["receipt"] == straight.state["receipt"], f"after {done} steps"


def test_rows_of_a_step_may_change_at_every_resume(root: Path, small: None) -> None:
    """Steps of 1, 4, 7, 16, 2 and 6 rows, in the middle of rounds of lanes."""

    def make(number: int) -> PipelineFactory:
        return make_factory(root, both("parquet"), packing="best_fit", mix=mix_of("weighted"))

    plan = [
        Stretch(11, rows=1),
        Stretch(7, 2, rows=4),
        Stretch(5, rows=7),
        Stretch(3, 2, rows=16),
        Stretch(7, 2, rows=2),
        Stretch(16, 3),
    ]
    total = sum(segment.steps * segment.rows for segment in plan if segment.steps)
    assert history(make, plan) == history(make, [Stretch(total, rows=1)])


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
    straight = history(make, [Stretch(60)], begin)
    check_accounts(straight, make(0), renewals=renewals)
    Watched.seen.clear()
    for ranks in (2, 3):
        assert history(make, [Stretch(2, ranks)] * 30, begin, Watched) == straight
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

    straight = history(make, [Stretch(total // LANES)], recorder=recorder)
    check_accounts(straight, make(0))
    how: dict[str, Any] = {"sizes": [LANES]} if recorder is Reweighting else {}
    plan = [Stretch(40), Stretch(30, 2, 1), Stretch(50, 1, 1)]
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

    straight = history(make, [Stretch(150)])
    for workers in (0, 1, 3):
        found = history(
            make, [Stretch(40, 1, workers), Stretch(60, 2, workers), Stretch(50, 1, workers)]
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
from tests.data.corpus import LANES, Stretch, check_accounts, history, make_factory
from tests.data.resume_setup import PACKINGS, STRATEGIES, damage, joined, mix_of, random_plan

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

# a worker's constants are as they are
worker = run([Stretch(15), Stretch(15, 1, 1)], "annealed", "best_fit", lambda number: True)
assert worker == run([Stretch(30)], "annealed", "best_fit", lambda number: False)
shutil.rmtree(root / cache.CACHE)

pipeline.SNAPSHOT_EVERY, cache.BLOCK, cache.FREE_BYTES, ShardSource.window = 5, 7, 0, 6
draw, harmed = random.Random(1), []

def cached(number):
    harmed.append(damage(root, draw))
    return number % 3 < 2

for strategy, packing in zip(STRATEGIES * 2, PACKINGS * 2):
    straight = run([Stretch(30)], strategy, packing, lambda number: False)
    plan = random_plan(draw, 30 * LANES, 3)
    assert run(plan, strategy, packing, cached) == straight, (strategy, packing)
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
