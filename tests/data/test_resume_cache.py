"""Resume ≡ no resume with the token cache in between, whatever becomes of its files."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from core.data import token_cache as cache
from core.data.documents import Document, Encoded
from core.data.pipeline_factory import PipelineFactory
from core.data.sources.text import TextSettings
from tests.data.corpus import LANES, Stretch, history, make_factory
from tests.data.resume_setup import (
    CACHED,
    PACKINGS,
    STRATEGIES,
    damage,
    joined,
    mix_of,
    random_plan,
)
from tests.data.test_resume import both

# the cache ----------------------------------------------------------------------------------------


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

    straight = history(lambda number: make(number, on=False), [Stretch(40)])
    state, parts = None, []
    for number, segment in enumerate(random_plan(draw, 40 * LANES, 6)):
        parts.append(history(lambda _, number=number: make(number), [segment], state))
        state = parts[-1].state
        if draw.random() < 0.2:
            shutil.rmtree(root / cache.CACHE, ignore_errors=True)
        else:
            found.append(damage(root, draw))
    assert joined(parts) == straight and max(found) > 0, f"{strategy} {packing} {shuffle}"


def test_no_damage_to_a_cached_block_goes_unseen() -> None:
    """Any flipped bit, any shorter file: refused."""
    draw = np.random.default_rng(0)
    block = []
    for i in range(60):
        ids = draw.integers(0, 250, draw.integers(50, 400)).astype(np.int32)
        encoded = Encoded(ids, ids % 2 == 0, int(draw.integers(0, 2**63)), 30 + i)
        block.append((i + 1, Document("", f"a\n\udce9 {i}", encoded=encoded)))
    data = cache.packed(block, True)
    found, last = cache.unpacked(data)
    assert last and [described(item) for item in found] == [described(item) for item in block]
    places = [
        *range(cache.CHECKSUM_BYTES + 700),  # the header, and more
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
        history(lambda _, factory=factory: factory, [Stretch(10), Stretch(10)]) for factory in made
    ]
    assert (
        runs[0] == runs[1] == runs[2] and made[0].sources[0].contents() and len(runs[0].digests) > 5
    )
