"""Packing: no token is lost, every position has the right target, attention and positions stay
inside each document."""

import json
import random

import numpy as np
import pytest

from core.data.documents import Encoded
from core.data.objectives import IGNORE_INDEX, next_token
from core.data.packing import PACKERS, LanePosition, Row, first_piece

EOS, T = 99, 16
BEGINNING = LanePosition()


def random_documents(seed: int, count: int = 40) -> list[tuple[int, int, np.ndarray]]:
    """(index, source, ids): indices as one lane of six sees them, some missing; lengths from 0 to
    three rows."""
    draw = random.Random(seed)
    kept = [i for i in range(count) if draw.random() < 0.8]
    return [
        (
            6 * i + 2,
            draw.randrange(3),
            np.array([draw.randrange(90) for _ in range(draw.randint(0, 50))]),
        )
        for i in kept
    ]


def framed(
    ids: list[int] | np.ndarray, learned: list[bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    mask = None if learned is None else np.array(learned)
    return next_token(Encoded(np.array(ids, dtype=np.int32), mask, 0, 1), EOS)


def pack(
    documents: list[tuple[int, int, np.ndarray]],
    packing: str,
    place: LanePosition = BEGINNING,
    ahead: int = 1,
) -> list[Row]:
    """All rows of some documents, from a place on, the last ones padded; some documents are of a
    later epoch. `ahead`: documents that arrive at once."""
    packer = PACKERS[packing](2, T, EOS, place)
    rows = []
    wanted = [document for document in documents if packer.wants(document[0])]
    for begin in range(0, len(wanted), ahead):
        for index, source, ids in wanted[begin : begin + ahead]:
            first = first_piece(1, index // 6 % 3, 1000 + index, T)
            packer.add(index, source, 1000 + index, index % 7 == 0, *framed(ids), first=first)
        while packer.ready:
            rows.append(packer.row())
    while (row := packer.row()).segments:
        rows.append(row)
    return rows


def inside(row: Row) -> list[tuple[int, int]]:
    """Where each document of a row begins and ends in it, padding last."""
    edges = [0, *(np.flatnonzero(np.diff(row.document_ids)) + 1).tolist(), T]
    return list(zip(edges, edges[1:]))


def fields(row: Row) -> list[np.ndarray]:
    return [row.input_ids, row.labels, row.position_ids, row.document_ids, row.source_ids]


def test_next_token_frames_a_document() -> None:
    """The first token is predicted from the end-of-document token, which also closes the
    document."""
    inputs, labels = framed([5, 6, 7])
    assert inputs.tolist() == [EOS, 5, 6, 7] and labels.tolist() == [5, 6, 7, EOS]
    inputs, labels = framed([])
    assert inputs.tolist() == [EOS] and labels.tolist() == [EOS]


def test_only_what_is_learned_is_a_target() -> None:
    """What a document says is not learned is read all the same; its end is no target either."""
    inputs, labels = framed([5, 6, 7], [False, True, False])
    assert inputs.tolist() == [EOS, 5, 6, 7] and labels.tolist() == [
        IGNORE_INDEX,
        6,
        IGNORE_INDEX,
        IGNORE_INDEX,
    ]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("seed", range(8))
def test_no_token_is_lost_and_every_target_is_right(packing: str, seed: int) -> None:
    """The pieces of a document put together are the document, framed: each position with the token
    that follows."""
    documents = random_documents(seed)
    rows = pack(documents, packing)
    found: dict[int, list[tuple[int, list, list, set]]] = {}
    for row in rows:
        for segment, (a, b) in zip(row.segments, inside(row)):
            assert segment.length == b - a and segment.digest == 1000 + segment.draw
            assert segment.opens_epoch == (segment.draw % 7 == 0 and segment.start == 0)
            sources = set(row.source_ids[a:b].tolist())
            found.setdefault(segment.draw, []).append(
                (segment.start, row.input_ids[a:b].tolist(), row.labels[a:b].tolist(), sources)
            )
    assert set(found) == {index for index, _, _ in documents}
    for index, source, ids in documents:
        pieces = sorted(found[index], key=lambda piece: piece[0])
        assert [piece[0] for piece in pieces] == [
            0,
            *np.cumsum([len(piece[1]) for piece in pieces])[:-1],
        ]
        assert [token for piece in pieces for token in piece[1]] == [EOS, *ids.tolist()]
        assert [token for piece in pieces for token in piece[2]] == [*ids.tolist(), EOS]
        assert all(piece[3] == {source} for piece in pieces)
    if packing == "documents":
        assert [segment.draw for row in rows for segment in row.segments] == sorted(
            segment.draw for row in rows for segment in row.segments
        )
        assert all((row.source_ids >= 0).all() for row in rows[:-1]), (
            "only the very last row may have padding"
        )


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("seed", range(8))
def test_attention_and_positions_stay_inside_each_document(packing: str, seed: int) -> None:
    """document_ids change exactly where a document does, positions count from 0 there, padding is a
    document of its own."""
    for row in pack(random_documents(seed), packing):
        stretches = inside(row)
        padded = bool((row.source_ids < 0).any())
        assert len(stretches) == len(row.segments) + padded
        assert row.document_ids[[a for a, _ in stretches]].tolist() == list(range(len(stretches)))
        for number, (a, b) in enumerate(stretches):
            assert row.position_ids[a:b].tolist() == list(range(b - a))
            is_padding = padded and number == len(stretches) - 1
            assert (row.source_ids[a:b] < 0).all() == is_padding
            assert (row.labels[a:b] == IGNORE_INDEX).all() == is_padding
            # inside a document the target of one position is the input of the next
            assert is_padding or row.labels[a : b - 1].tolist() == row.input_ids[a + 1 : b].tolist()
        if packing == "padding":
            assert len(row.segments) == 1


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_row_holds_one_piece_of_a_document(packing: str, seed: int) -> None:
    """Also where the first piece was shorter than the room it found."""
    for row in pack(random_documents(seed), packing):
        draws = [segment.draw for segment in row.segments]
        assert len(draws) == len(set(draws))


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_lane_goes_on_from_any_row(packing: str, seed: int) -> None:
    """`after` is all that is needed: the documents read again from any earlier place give the same
    rows."""
    documents = random_documents(seed)
    rows = pack(documents, packing)
    for done, row in enumerate(rows):
        again = pack(
            documents,
            packing,
            LanePosition.from_json(json.loads(json.dumps(row.after))),
            ahead=1 + done % 5,
        )
        assert len(again) == len(rows) - done - 1
        for one, other in zip(rows[done + 1 :], again):
            assert all(np.array_equal(a, b) for a, b in zip(fields(one), fields(other)))
            assert (one.after, one.segments) == (other.after, other.segments)


@pytest.mark.parametrize("packing", PACKERS)
def test_how_many_documents_arrive_at_once_changes_nothing(packing: str) -> None:
    documents = random_documents(3)
    one, other = pack(documents, packing), pack(documents, packing, ahead=11)
    assert [row.segments for row in one] == [row.segments for row in other] and [
        r.after for r in one
    ] == [r.after for r in other]


def test_best_fit_cuts_only_what_is_longer_than_a_row() -> None:
    """Every other document is in one row, whole."""
    documents = random_documents(5, 400)
    lengths = {index: len(ids) + 1 for index, _, ids in documents}
    rows = pack(documents, "best_fit")
    for segment in (segment for row in rows for segment in row.segments):
        assert lengths[segment.draw] > T or (segment.start, segment.length) == (
            0,
            lengths[segment.draw],
        )


@pytest.mark.parametrize("row_length", [256, 1024, 2048])
def test_best_fit_leaves_little_padding(row_length: int) -> None:
    """Mixed lengths, some much shorter and some longer than a row; the end of the data is not
    counted."""
    draw = random.Random(row_length)
    packer = PACKERS["best_fit"](0, row_length, EOS, LanePosition())
    real = []
    for index in range(3000):
        packer.add(
            index,
            0,
            0,
            False,
            *framed(np.full(int(min(40 * 512, draw.lognormvariate(5.5, 1.0))), 5)),
        )
        while packer.ready:
            real.append((packer.row().source_ids >= 0).mean())
    assert len(real) > 200 and np.mean(real) > 0.99


@pytest.mark.parametrize("packing", PACKERS)
def test_a_document_that_cannot_be_read_again_costs_only_itself(packing: str) -> None:
    """A lane in mid-document, whose source was then dropped, goes on with the next document from
    its beginning."""
    documents = [(2, 0, np.arange(40)), (8, 1, np.arange(10)), (14, 1, np.arange(30))]
    rows = pack(documents, packing)
    assert rows[0].after.oldest == 2 and rows[0].after.waiting[0] == (2, 16)
    packer = PACKERS[packing](2, T, EOS, rows[0].after)
    packer.lose(2)
    again = []
    for index, source, ids in documents[1:]:
        packer.add(index, source, 0, False, *framed(ids))
    while packer.ready or (again and again[-1].segments) or not again:
        again.append(packer.row())
    learned = sorted(token for row in again for token in row.labels[row.source_ids >= 0].tolist())
    assert learned == sorted([*range(10), EOS, *range(30), EOS])
