"""Where each head looks: at every place of a row that is valid and at no other, by seed, step and
row alone."""

import math

import pytest
import torch

from core.contracts import IGNORE_INDEX, Batch
from core.heads import HEADS
from core.heads.inputs import NOWHERE
from tests.heads.setup import LENGTHS, SHIPPED, D, heads_for, placed, rows
from tests.models.test_models import T, V


def valid_places(
    name: str, batch: Batch, span_tokens: int, fraction: float
) -> list[set[tuple[int, ...]]]:
    """Every place of each row, by plain reading of what the head's file says."""
    found: list[set[tuple[int, ...]]] = []
    for row in range(len(batch.labels)):
        documents, known = (
            batch.document_ids[row].tolist(),
            (batch.labels[row] != IGNORE_INDEX).tolist(),
        )
        own: set[tuple[int, ...]] = set()
        for p in range(T):
            if batch.source_ids[row, p] < 0:
                continue
            begin, stop = documents.index(documents[p]), T - documents[::-1].index(documents[p])
            length = max(1, int(fraction * (stop - begin)))
            if name == "span_contrastive":
                own |= {(begin, p, p + length)} if begin < p and p + length <= stop else set()
            elif name == "memory":
                own |= (
                    {(begin, p, p + 6)}
                    if begin < p and p + 6 <= stop and any(known[p : p + 6])
                    else set()
                )
            else:
                ahead = range(p, min(p + span_tokens, stop))
                is_valid = {
                    "policy": known[p],
                    "value": any(known[t] for t in ahead),
                    "dynamics": p + 3 < stop,
                    "rollouts": p + 2 < stop and all(known[p : p + 3]),
                    "planner": False,
                    "draft": known[p] and p + 2 < stop,
                }
                own |= {(p,)} if is_valid[name] else set()
        if name == "planner":  # evenly spread, from any that has a target
            there = [p for p in range(T) if batch.labels[row, p] != IGNORE_INDEX]
            own = {
                tuple(there[(first + i * len(there) // 4) % len(there)] for i in range(4))
                for first in range(len(there))
            }
        found.append(own)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_every_valid_place_is_looked_at_and_no_other(name: str) -> None:
    """Also where only some tokens are learned, as in chats: windows, roots and spans stay inside
    their document, off padding."""
    batch = rows()
    batch.labels[0, :9] = batch.labels[1, 4:] = IGNORE_INDEX
    sizes = {"rollout_steps": 2, "draft_tokens": 2, "draft_positions": 1}
    heads = heads_for(D, V, value_span_tokens=3, span_mask_fraction=0.3, **sizes)
    expected = valid_places(name, batch, 3, 0.3)
    seen: list[list[tuple[int, ...]]] = [[] for _ in LENGTHS]
    for step in range(400):
        chosen, counts = placed(heads, batch, step)
        for row, place in enumerate(chosen.head_positions[name].tolist()):
            seen[row].append(tuple(place))
        assert counts[name] == sum(bool(own) for own in expected)
    for own, there in zip(expected, seen):
        if not own:
            assert set(there) == {(NOWHERE,) * len(there[0])}
            continue
        assert set(there) == own
        assert max(there.count(place) for place in own) < 400 / len(own) + 6 * math.sqrt(
            400 / len(own)
        ), "equally likely"


def test_a_draft_head_has_several_places_evenly_spread() -> None:
    """All of them where there are as many; the others are as likely as each other."""
    heads, batch = (
        heads_for(D, V, enable_draft=True, draft_tokens=2, draft_positions=4),
        rows([[16], [6], [2, 2], [8, 8]]),
    )
    counts = torch.zeros(4, T)
    for step in range(200):
        positions = placed(heads, batch, step)[0].head_positions["draft"]
        assert set(positions[1].tolist()) == {0, 1, 2, 3} and set(positions[2].tolist()) == {
            NOWHERE
        }
        assert all(
            3 <= (b - a) % 14 <= 4
            for a, b in zip(positions[0].tolist(), positions[0].roll(-1).tolist())
        )
        for row in (0, 3):
            counts[row].index_add_(0, positions[row], torch.ones(4))
    assert (
        counts[0, :14].min() > 30
        and counts[3, [*range(6), *range(8, 14)]].min() > 40
        and counts.sum() == 1600
    )


def test_places_follow_from_seed_step_and_row_alone() -> None:
    """Not from the rows beside it, or how many there are; heads, steps and rows draw
    independently."""
    heads, batch = heads_for(D, V), rows()
    whole, _ = placed(heads, batch, step=3)
    for row in range(len(LENGTHS)):
        alone, _ = placed(heads, batch.rows(row, row + 1), step=3, first=row)
        for name in HEADS:
            assert torch.equal(
                alone.head_positions[name], whole.head_positions[name][row : row + 1]
            )
    same = rows([[16]] * 64)
    one, other = placed(heads, same, 0)[0].head_positions, placed(heads, same, 1)[0].head_positions
    assert not torch.equal(one["policy"], other["policy"]) and len(one["policy"].unique()) > 10
    fewer, _ = placed(heads_for(D, V, enable_value=True), same, 0)
    assert torch.equal(fewer.head_positions["value"], one["value"]), (
        "another head switched off changes nothing"
    )


def test_places_travel_with_their_rows() -> None:
    heads = heads_for(D, V)
    whole, _ = placed(heads, rows())
    part = whole.rows(2, 4).to(torch.device("cpu"))
    assert all(
        torch.equal(part.head_positions[name], whole.head_positions[name][2:4]) for name in HEADS
    )
