"""Gradients of heads: where they enter, what they reach, and that nothing leaks from the future."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.contracts import IGNORE_INDEX, Batch, ModelOutput
from core.heads import HEADS
from core.heads.inputs import NOWHERE
from tests.heads.setup import (
    ALL,
    D,
    gradients,
    heads_for,
    inputs_of,
    objective_of,
    placed,
    rows,
    rows_of,
    run,
)
from tests.models.test_models import CAUSAL, T, V, build


@pytest.mark.parametrize("name", HEADS)
def test_gradients_enter_at_the_root_and_never_through_a_target(name: str) -> None:
    """The language model's side of the divergence, coming losses, coming states and spans get none;
    nor does anything of the model from rollouts and planner. Where rollouts lead, the policy and
    value heads learn, too."""
    heads = heads_for(D, V).double()
    batch, _ = placed(heads, rows())
    hidden = torch.randn(*batch.labels.shape, D, dtype=torch.float64, requires_grad=True)
    table = nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    run(name, heads, inputs_of(batch, heads, hidden, table)).nansum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads[name].parameters())
    others = {"rollouts": ["policy", "value"]}.get(name, [])
    taught = {
        other
        for other, head in heads.items()
        if any(p.grad is not None and p.grad.any() for p in head.parameters())
    }
    assert taught == {name, *others}
    if heads[name] in heads.apart():
        assert hidden.grad is None and table.grad is None, "of the model, nothing is reached"
        return
    roots = torch.zeros(batch.labels.shape, dtype=torch.bool)
    coming = set()
    for row, place in enumerate(batch.head_positions[name].tolist()):
        if place[0] != NOWHERE and name != "rollouts":
            roots[row, place[0] : place[1] if len(place) > 1 else place[0] + 1] = True
            coming |= set(batch.input_ids[row, place[0] + 1 : place[0] + 4].tolist())
    assert torch.equal(
        torch.zeros_like(roots) if hidden.grad is None else hidden.grad.abs().sum(-1) > 0, roots
    )
    used = (
        set()
        if table.grad is None
        else set((table.grad.abs().sum(-1) > 0).nonzero().flatten().tolist())
    )
    # memory's targets are scored
    assert used == {"dynamics": coming, "memory": set(range(V))}.get(name, set())


def test_rows_without_a_place_change_nothing() -> None:
    """Rows of padding beside others; and where there is none at all, the total is 0 and so is every
    gradient."""
    heads = heads_for(D, V).double()
    with_padding, counts = placed(heads, rows([[16], [5, 8], [], []]))
    without = with_padding.rows(0, 2)
    assert heads.count(without) == counts == dict.fromkeys(HEADS, 2.0)
    inputs = inputs_of(with_padding, heads)
    found = []
    for part in (without, with_padding):
        total, _ = heads(
            inputs_of(part, heads, inputs.hidden[: len(part.labels)], inputs.readout.table),
            counts,
            0.0,
        )
        total.backward()
        found.append((total.detach(), gradients(heads)))
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)
    nothing, none = placed(heads, rows([[], []]))
    assert set(none.values()) == {0.0}
    total, _ = heads(inputs_of(nothing, heads), none, 0.0)
    total.backward()
    assert total.item() == 0.0 and all(
        p.grad is not None and not p.grad.any() for p in heads.parameters()
    )


def test_micro_batches_add_up_to_the_step() -> None:
    """8 rows at once, 4 x 2 and 8 x 1: one gradient for model and heads; rows differ in targets,
    and some have no place.

    Spans are told from those of their forward pass, so the span contrastive head is the same only
    for the same forward passes."""
    lengths = [[16], [6, 10], [3, 1, 8], [2, 2, 2], [1, 1], [14], [], [4, 12]]
    model = build("simple_lm").double()
    row_by_row = heads_for(
        D, V, **{key: value for key, value in ALL.items() if key != "enable_span_contrastive"}
    ).double()
    every = heads_for(D, V).double()
    found: dict[Any, Any] = {}
    for heads in (row_by_row, every):
        objective = objective_of(model, heads)
        batch, counts = placed(heads, rows_of(lengths, T, V))
        targets = int((batch.labels != IGNORE_INDEX).sum())
        for size in (8, 2, 1):
            for start in range(0, 8, size):
                objective(batch.rows(start, start + size), targets, 0.0, counts)[0].backward()
            found[len(heads), size] = gradients(objective)
    for size in (2, 1):
        torch.testing.assert_close(
            found[len(row_by_row), size], found[len(row_by_row), 8], atol=1e-12, rtol=0
        )
    name, count = "heads.span_contrastive.0.weight", len(every)
    assert (
        not torch.allclose(found[count, 2][name], found[count, 8][name])
        and not found[count, 1][name].any()
    )
    # but its count is the step's: two forward passes of the same four rows are worth one of them,
    # twice counted
    objective = objective_of(model, every)
    batch, counts = placed(every, rows_of(lengths[:4], T, V))
    targets = int((batch.labels != IGNORE_INDEX).sum())
    objective(batch, targets, 0.0, counts)[0].backward()
    once = gradients(objective)
    for _ in range(2):
        objective(batch, 2 * targets, 0.0, {name: 2 * count for name, count in counts.items()})[
            0
        ].backward()
    torch.testing.assert_close(gradients(objective), once, atol=1e-12, rtol=0)


# on every causal model ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_leaks_on_any_causal_model(name: str) -> None:
    """In float64: scores at and before t do not change with tokens after t, heads or none, and
    heads change no score at all; no query, root or prediction changes with tokens after it was
    made."""
    model = build(name).double()
    heads = heads_for(D, V).double()
    objective = objective_of(model, heads)
    batch, counts = placed(heads, rows())
    scores: list[Tensor] = []

    def scored(changed: Batch) -> Tensor:
        inputs: list[ModelOutput] = []
        hook = model.register_forward_hook(lambda module, given, output: inputs.append(output))
        with torch.no_grad():
            objective(changed, 1.0, 0.0, counts)
        hook.remove()
        return inputs[0].readout(inputs[0].hidden)

    def queries(changed: Batch) -> Tensor:
        """What the projection's last layer is given for the queries, (B, D)."""
        taken: list[Tensor] = []
        hook = heads["span_contrastive"][2].register_forward_pre_hook(
            lambda module, inputs: taken.append(inputs[0])
        )
        scores.append(scored(changed))
        hook.remove()
        return taken[0]

    with torch.no_grad():
        output = model(batch)
    before = queries(batch)
    assert torch.equal(scores[-1], output.readout(output.hidden)), "heads change no score"
    start = batch.head_positions["span_contrastive"][:, 1]
    for t in range(T):
        ids = batch.input_ids.clone()
        ids[:, t] = (ids[:, t] + 1) % V
        after = queries(replace(batch, input_ids=ids))
        assert torch.equal(scores[-1][:, :t], scores[0][:, :t]), (
            f"position {t} is inputs by an earlier one"
        )
        blind = (start <= t) & (start != NOWHERE)
        assert torch.equal(after[blind], before[blind]), (
            f"a query before its span sees position {t}"
        )
    ids = batch.input_ids.clone()
    ids[:, 0] = (ids[:, 0] + 1) % V
    assert not torch.equal(queries(replace(batch, input_ids=ids))[0], before[0]), (
        "and it does see what is before"
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_all_work_on_every_causal_model(name: str) -> None:
    """Losses are finite, and every parameter of the heads gets a gradient, under bf16 autocast,
    too."""
    heads = heads_for(D, V)
    objective = objective_of(build(name).train(), heads)
    batch, counts = placed(heads, rows())
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            total, terms = objective(batch, 50, 0.0, counts)
        total.backward()
        assert list(terms.sums) == ["cross_entropy", *HEADS] and torch.isfinite(total)
        found = gradients(objective)
        assert all(found[f"heads.{name}"].abs().sum() > 0 for name, _ in heads.named_parameters())


# what drafts are measured by ----------------------------------------------------------------------


def test_how_many_guesses_a_draft_would_have_right() -> None:
    """Of each row: the share of first and of last guesses that are the model's likeliest token, and
    how many are before one is not. The head guesses what it was told, and the model's likeliest
    tokens are known: hidden states are rows of the identity."""
    table = nn.Parameter(torch.eye(V, dtype=torch.float64))
    heads = heads_for(V, V, enable_draft=True, draft_tokens=3, draft_positions=2).double()
    batch = rows([[16], [16], [1, 1]])
    likeliest = batch.input_ids.roll(-1, 1)  # at each position, the token that follows
    wrong = {(0, 7), (1, 4), (1, 9)}  # but not here
    for row, t in wrong:
        likeliest[row, t] = (likeliest[row, t] + 1) % V
    hidden = table[likeliest]
    batch = replace(
        batch, head_positions={"draft": torch.tensor([[2, 5], [3, 8], [NOWHERE, NOWHERE]])}
    )
    ahead = itertools.cycle((1, 2, 3))

    def follow(states: Tensor, tokens: Tensor) -> Tensor:  # guesses what the text says
        return table[
            batch.input_ids.gather(1, batch.head_positions["draft"].clamp(min=0) + next(ahead) + 1)
        ]

    heads["draft"].follow = follow  # type: ignore[method-assign]
    found = heads.measure(inputs_of(batch, heads, hidden, table))
    means = {name: (value[0] / value[1]).item() for name, value in found.items() if name != "draft"}
    # row 0: guesses at 3 4 5 right, of 6 7 8 the second wrong; row 1: of 4 5 6 the first wrong, and
    # so of 9 10 11
    assert means == pytest.approx(
        {"draft.first": 0.5, "draft.last": 1.0, "draft.accepted": (2.0 + 0.0) / 2}
    )
    assert found["draft.first"][1] == 2
