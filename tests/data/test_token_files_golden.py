"""Token files against the reference program of specification 001."""

import random
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import pytest

from core.data.token_files import ChunkReader
from core.schedules import Piece, value_at
from tests.data.test_token_files import EOS_001, EXPECTED, GOLDEN, SEEDS, source_of

# specification 001 --------------------------------------------------------------------------------


def stretches(tokens: Iterator[int], length: int) -> Iterator[list[int]]:
    """Consecutive stretches as the reference reads them: without overlap, the last filled up with
    ends."""
    while stretch := list(islice(tokens, length)):
        yield stretch + [EOS_001] * (length - len(stretch))


def raw(name: str, order: list[int], start: int = 0) -> Iterator[int]:
    return chain.from_iterable(
        block.tolist() for block in ChunkReader(GOLDEN / name).consecutive(order, start)
    )


@pytest.mark.parametrize("name", SEEDS)
def test_the_first_epochs_order_is_the_references(name: str) -> None:
    source = source_of(GOLDEN / name, SEEDS[name], run_seed=7)
    order = EXPECTED["loader_chunk_order"][name]
    assert [unit.label for unit in source.order(0)] == [f"chunk_{index:05d}.bin" for index in order]
    # its own seed, in every epoch
    assert source.order(1) == source_of(GOLDEN / name, SEEDS[name], run_seed=8).order(1)


def test_consecutive_tokens_are_the_references() -> None:
    assert list(stretches(raw("code", [0]), 9)) == EXPECTED["reader_code_len9_unshuffled"]
    assert (
        next(stretches(raw("math", [0, 1, 2], start=60), 5)) == EXPECTED["reader_math_seek60_len5"]
    )


def test_documents_with_their_ends_put_back_are_the_references_tokens() -> None:
    """In the order of names. Empty documents are left out, so their ends are too: two ends in a row
    become one."""
    for name in SEEDS:
        found = [
            unit for unit in sorted(source_of(GOLDEN / name).order(0), key=lambda unit: unit.label)
        ]
        source = source_of(GOLDEN / name)
        again = [
            t
            for unit in found
            for _, d in source.read(unit, 0)
            for t in [*d.encoded.ids.tolist(), EOS_001]
        ]
        tokens = [*raw(name, list(range(len(found)))), EOS_001]
        once = [
            t for t, before in zip(tokens, [EOS_001, *tokens]) if (t, before) != (EOS_001, EOS_001)
        ]
        assert again == once
        if name == "code":
            assert list(stretches(iter(again[:-1]), 9)) == EXPECTED["reader_code_len9_unshuffled"]


def test_the_references_batches_come_out_of_these_streams() -> None:
    """Its draws (one `choices` per sequence; the ratio is that of the micro-batch before) over our
    tokens in its chunk order."""
    names, seq_length = list(SEEDS), 8
    reading = {
        n: stretches(raw(n, EXPECTED["loader_chunk_order"][n]), seq_length + 1) for n in names
    }
    rng, ratio = random.Random(42), shares(0, 100)
    for number, expected in enumerate(EXPECTED["loader_batches"]):
        rows = [next(reading[rng.choices(names, weights=ratio)[0]]) for _ in range(2)]
        ratio = shares(number, 100)
        inputs, targets = [row[:-1] for row in rows], [row[1:] for row in rows]
        assert inputs == expected["input_ids"] and targets == expected["targets"]
        ends = [
            r * seq_length + c + 1
            for r, row in enumerate(inputs)
            for c, token in enumerate(row)
            if token == EOS_001
        ]
        bounds = sorted({0, *ends, *((r + 1) * seq_length for r in range(2))})
        assert bounds == expected["cu_seqlens"] and max(np.diff(bounds)) == expected["max_seqlen"]


def shares(step: int, total: int) -> list[float]:
    """Specification 001's mix as schedules of our own: the last fifth moves to more mathematics."""
    begin, progress = int(0.8 * total) / total, step / total
    pairs = ((0.70, 0.85), (0.25, 0.10), (0.05, 0.05))
    return [value_at([Piece(start=a, to=b, begin=begin, end=1.0)], progress) for a, b in pairs]


@pytest.mark.parametrize(
    ("table", "total"), [("mixing_total19531", 19531), ("mixing_total100", 100)]
)
def test_the_mix_over_the_run_is_the_references(table: str, total: int) -> None:
    for step, expected in EXPECTED[table]["ratios"].items():
        assert shares(int(step), total) == pytest.approx(expected, abs=1e-12)
