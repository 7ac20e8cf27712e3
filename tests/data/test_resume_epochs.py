"""Resume ≡ no resume over the ends of epochs, and while shares follow a schedule."""

import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from core.data.mixing import MixSettings
from core.data.pipeline_factory import PipelineFactory
from core.data.sources.text import TextSettings
from core.data.validation import HoldOut
from tests.data.corpus import (
    LANES,
    SEQ_LENGTH,
    History,
    Stretch,
    check_accounts,
    history,
    make_factory,
    write_corpus,
)
from tests.data.resume_setup import (
    FALLING,
    KINDS,
    MOSTLY_SLOW,
    PACKINGS,
    RISING,
    STRATEGIES,
    mix_of,
    random_plan,
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

    straight = history(make, [Stretch(None)])
    plan = [
        *random_plan(draw, max(straight.rows) // 2 // LANES * LANES, 4),
        Stretch(None, draw.choice([1, 2, 3])),
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
    again = history(make, [Stretch(None, 2)], found.state)
    assert not again.rows and again.state["receipt"] == found.state["receipt"]


# the places where documents are cut ---------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_epoch_cuts_long_documents_at_other_places(packing: str, tmp_path: Path) -> None:
    """A few long documents, five epochs: two of them share hardly more cuts than chance gives, and
    the first is cut as it always was. Interrupted, it is the same."""
    lengths = SEQ_LENGTH * 20, SEQ_LENGTH * 25
    sections = write_corpus(tmp_path, {"long": 5}, *lengths)

    def make(number: int) -> PipelineFactory:
        mix = MixSettings("round_robin", (1.0,), 1, max_epochs=5)
        hold_out = HoldOut(0.0)
        return make_factory(tmp_path, sections, packing=packing, mix=mix, hold_out=hold_out)

    straight = history(make, [Stretch(None)])
    assert history(make, [Stretch(30, 2), Stretch(41, 3, rows=12), Stretch(None)]) == straight
    check_accounts(straight, make(0))
    segments = [each for _, row in sorted(straight.rows.items()) for each in row.segments]
    draws = sorted({each.draw for each in segments})
    assert len(draws) == 25
    cuts = [{(s.digest, s.start) for s in segments if s.draw // 5 == epoch} for epoch in range(5)]
    cuts = [{cut for cut in epoch if cut[1]} for epoch in cuts]  # all documents begin at 0
    shares = [len(a & b) / len(a) for a, b in combinations(cuts, 2)]
    assert sum(shares) / len(shares) < 0.25, shares
    if packing == "padding":
        assert {start % SEQ_LENGTH for _, start in cuts[0]} == {0}


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
    straight = history(make, [Stretch(steps)])
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
