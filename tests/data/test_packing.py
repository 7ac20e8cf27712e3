"""Packing: no token is lost, every position has the right target, attention and positions stay inside each document."""

import random

import numpy as np
import pytest

from core.data.objectives import next_token
from core.data.packing import IGNORE_INDEX, Packer, Row

EOS, T = 99, 16


def random_documents(seed: int, count: int = 40) -> list[tuple[int, int, np.ndarray]]:
    """(index, source, ids): indices as one lane of six sees them, some missing; lengths from 0 to three rows."""
    draw = random.Random(seed)
    kept = [i for i in range(count) if draw.random() < 0.8]
    return [(6 * i + 2, draw.randrange(3), np.array([draw.randrange(90) for _ in range(draw.randint(0, 50))])) for i in kept]


def pack(documents: list[tuple[int, int, np.ndarray]], packing: str, after: tuple[int, int] = (0, 0)) -> list[Row]:
    """All rows of some documents, from a place on, the last one padded."""
    packer = Packer(2, T, EOS, packing, after)
    rows = []
    for index, source, ids in documents:
        if packer.wants(index):
            packer.add(index, source, *next_token(ids, EOS))
        while packer.ready:
            rows.append(packer.row())
    while (row := packer.row()).documents:
        rows.append(row)
    return rows


def fields(row: Row) -> list[np.ndarray]:
    return [row.input_ids, row.labels, row.position_ids, row.document_ids, row.source_ids]


def test_next_token_frames_a_document() -> None:
    """The first token is predicted from the end-of-document token, which also closes the document."""
    inputs, labels = next_token(np.array([5, 6, 7]), EOS)
    assert inputs.tolist() == [EOS, 5, 6, 7] and labels.tolist() == [5, 6, 7, EOS]
    inputs, labels = next_token(np.array([], dtype=np.int32), EOS)
    assert inputs.tolist() == [EOS] and labels.tolist() == [EOS]


@pytest.mark.parametrize("packing", ["documents", "padding"])
@pytest.mark.parametrize("seed", range(8))
def test_no_token_is_lost_and_every_target_is_right(packing: str, seed: int) -> None:
    """All rows read one after the other are all documents, framed, in order: each position with the token that follows."""
    documents = random_documents(seed)
    rows = pack(documents, packing)
    real = [row.source_ids >= 0 for row in rows]
    inputs = np.concatenate([row.input_ids[r] for row, r in zip(rows, real)])
    labels = np.concatenate([row.labels[r] for row, r in zip(rows, real)])
    sources = np.concatenate([row.source_ids[r] for row, r in zip(rows, real)])
    framed = [np.concatenate([[EOS], ids, [EOS]]) for _, _, ids in documents]
    assert inputs.tolist() == np.concatenate([f[:-1] for f in framed]).tolist()
    assert labels.tolist() == np.concatenate([f[1:] for f in framed]).tolist()
    assert sources.tolist() == [source for _, source, ids in documents for _ in range(len(ids) + 1)]
    assert [i for row in rows for i in row.documents if i not in {d[0] for d in documents}] == []
    if packing == "documents":
        assert all(r.all() for r in real[:-1]), "only the very last row may have padding"


@pytest.mark.parametrize("packing", ["documents", "padding"])
@pytest.mark.parametrize("seed", range(8))
def test_attention_and_positions_stay_inside_each_document(packing: str, seed: int) -> None:
    """document_ids change exactly where a document does, positions count from 0 there, padding is a document of its own."""
    for row in pack(random_documents(seed), packing):
        edges = [0, *(np.flatnonzero(np.diff(row.document_ids)) + 1).tolist(), T]
        stretches = list(zip(edges, edges[1:]))
        padded = bool((row.source_ids < 0).any())
        assert len(stretches) == len(row.documents) + padded
        assert row.document_ids[[a for a, _ in stretches]].tolist() == list(range(len(stretches)))
        for number, (a, b) in enumerate(stretches):
            assert row.position_ids[a:b].tolist() == list(range(b - a))
            is_padding = padded and number == len(stretches) - 1
            assert (row.source_ids[a:b] < 0).all() == is_padding
            assert (row.labels[a:b] == IGNORE_INDEX).all() == is_padding
            # inside a document the target of one position is the input of the next
            assert is_padding or row.labels[a : b - 1].tolist() == row.input_ids[a + 1 : b].tolist()
        if packing == "padding":
            assert len(row.documents) == 1


@pytest.mark.parametrize("packing", ["documents", "padding"])
@pytest.mark.parametrize("seed", range(4))
def test_a_lane_goes_on_from_any_row(packing: str, seed: int) -> None:
    """`after` is all that is needed: the documents read again from any earlier place give the same rows."""
    documents = random_documents(seed)
    rows = pack(documents, packing)
    for done, row in enumerate(rows):
        again = pack(documents, packing, row.after)
        assert len(again) == len(rows) - done - 1
        for one, other in zip(rows[done + 1 :], again):
            assert all(np.array_equal(a, b) for a, b in zip(fields(one), fields(other)))
            assert (one.after, one.documents) == (other.after, other.documents)


def test_a_document_that_cannot_be_read_again_costs_only_itself() -> None:
    """A lane in mid-document, whose source was then dropped, goes on with the next document from its beginning."""
    documents = [(2, 0, np.arange(40)), (8, 1, np.arange(10)), (14, 1, np.arange(30))]
    rows = pack(documents, "documents")
    assert rows[0].after == (2, 16)
    again = pack(documents[1:], "documents", rows[0].after)
    labels = np.concatenate([row.labels[row.source_ids >= 0] for row in again])
    assert labels.tolist() == [*range(10), EOS, *range(30), EOS]
