"""Log-probabilities of continuations: as by hand, for every model, whatever the batch; and what is
computed for them."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from core.evaluation.harness import scoring
from core.evaluation.harness.scoring import Pair, Scorer
from tests.evaluation.harness.tiny import CONTEXT, EXACT, KINDS, build, by_hand, logs_of

V = 40


def some_pairs(seed: int = 3) -> list[Pair]:
    """Contexts and continuations of all lengths that fit, with answers of one token to one question
    among them."""
    draw = random.Random(seed)
    ids = lambda count: [draw.randrange(V) for _ in range(count)]  # noqa: E731
    question = ids(9)
    pairs = [(question, [answer]) for answer in (3, 17, 5)]
    pairs += [(ids(draw.randint(1, CONTEXT - 8)), ids(draw.randint(1, 8))) for _ in range(12)]
    return [
        *pairs,
        (ids(1), ids(CONTEXT - 1)),
        (ids(60), ids(5)),
        (ids(60), ids(1)),
        (question, question[:2]),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_one_text_at_a_time_gives(kind: str) -> None:
    """Contexts longer than the model's are cut at their beginning. The size of a batch changes
    nothing."""
    model, pairs = build(kind), some_pairs()
    expected = [by_hand(model, *pair) for pair in pairs]
    for batch_size in (1, 3, 64):
        found = Scorer(model, CONTEXT, batch_size).loglikelihoods(pairs)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        for (value, _), (wanted, _) in zip(found, expected):
            assert value == pytest.approx(wanted, abs=EXACT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not causal"])
def test_greedy_is_what_the_model_would_say(kind: str) -> None:
    """All of it: one other token anywhere, and it is not."""
    model, context = build(kind), [1, 2, 3]
    said: list[int] = []
    for _ in range(5):
        said.append(int(logs_of(model, [*context, *said])[-1].argmax()))
    others = [[*said[:i], (said[i] + 1) % V, *said[i + 1 :]] for i in range(5)]
    found = Scorer(model, CONTEXT, 4).loglikelihoods(
        [(context, said), *((context, other) for other in others)]
    )
    assert [greedy for _, greedy in found] == [True] + [False] * 5


@pytest.mark.parametrize("kind", ["simple_lm", "not causal"])
def test_a_continuation_longer_than_the_context_is_scored_in_stretches(kind: str) -> None:
    """No token is left out, and none is scored twice."""
    model = build(kind)
    scorer = Scorer(model, CONTEXT, 2)
    draw = random.Random(1)
    context, long = [7, 8], [draw.randrange(V) for _ in range(2 * CONTEXT + 5)]
    expected, seen = 0.0, list(context)
    for begin in range(0, len(long), scorer.longest):
        stretch = long[begin : begin + scorer.longest]
        expected += by_hand(model, seen, stretch)[0]
        seen += stretch
    assert scorer.loglikelihoods([(context, long)])[0][0] == pytest.approx(expected, abs=EXACT)
    assert scorer.loglikelihoods([(context, [])]) == [(0.0, True)]


def test_scores_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build("simple_lm"), some_pairs()
    whole = Scorer(model, CONTEXT, 8).loglikelihoods(pairs)
    monkeypatch.setattr(scoring, "SCORES_AT_ONCE", 3 * V)
    for (one, hit), (other, same) in zip(Scorer(model, CONTEXT, 8).loglikelihoods(pairs), whole):
        assert one == pytest.approx(other, abs=EXACT) and hit == same


class Watched:
    """A model that remembers what it was asked: rows as they are read, and how many positions were
    scored."""

    def __init__(self, model: Any):
        self.model, self.is_causal, self.rows, self.scored = model, model.is_causal, [], 0

    def parameters(self) -> Any:
        return self.model.parameters()

    def __call__(self, batch: Any) -> Any:
        self.rows.append(batch.input_ids)
        output = self.model(batch)
        readout = output.readout

        class Counted:
            table = readout.table

            def __call__(_, hidden: Tensor) -> Tensor:
                self.scored += len(hidden)
                return readout(hidden)

        output.readout = Counted()
        return output


def test_answers_of_one_token_cost_one_row_and_contexts_no_scores() -> None:
    model = Watched(build("simple_lm"))
    told: list[tuple[int, int]] = []
    Scorer(model, CONTEXT, 2).loglikelihoods(
        [
            ([1, 2, 3], [4]),
            ([1, 2, 3], [5]),
            ([1, 2, 3], [6]),
            ([1, 2, 3, 4, 5], [6, 7]),
            ([9], [1]),
        ],
        lambda done, total: told.append((done, total)),
    )
    assert [tuple(rows.shape) for rows in model.rows] == [
        (2, 6),
        (1, 1),
    ] and model.scored == 3 + 2 + 1
    assert told == [(2, 3), (3, 3)]


def test_what_is_not_causal_reads_rows_of_one_length_and_all_of_them() -> None:
    """Padding would change its scores, and so does the last token, though nothing follows it."""
    model = Watched(build("not causal"))
    pairs = some_pairs()
    Scorer(model, CONTEXT, 4).loglikelihoods(pairs)
    read = sorted(tuple(row) for rows in model.rows for row in rows.tolist())
    assert read == sorted(
        {tuple([*context, *continuation][-CONTEXT:]) for context, continuation in pairs}
    )
    assert max(len(rows) for rows in model.rows) > 1


def test_bf16_touches_the_model_and_not_the_scores() -> None:
    """A readout in bf16 would be off by hundredths: two digits after the point are all it has."""
    model, pairs = build("simple_lm").float(), some_pairs()
    exact = Scorer(model, CONTEXT, 8).loglikelihoods(pairs)
    kinds: list[torch.dtype] = []
    forward = model.forward

    def watch(batch: Any) -> Any:
        output = forward(batch)
        readout = output.readout
        output.readout = type(
            "Seen",
            (),
            {"table": readout.table, "__call__": lambda _, h: kinds.append(h.dtype) or readout(h)},
        )()
        return output

    model.forward = watch
    half = Scorer(model, CONTEXT, 8, torch.bfloat16).loglikelihoods(pairs)
    assert set(kinds) == {torch.float32}
    off = [abs(a - b) for (a, _), (b, _) in zip(exact, half)]
    assert 0 < max(off) < 2.0
