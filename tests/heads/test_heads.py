"""What each head promises: what its loss is, what its gradient reaches, and that nothing leaks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import IGNORE_INDEX, ModelOutput
from core.heads import HEADS
from core.heads.inputs import NOWHERE, HeadInputs
from core.heads.stack import HeadStack
from core.losses.cosine import Cosine, CosineSettings
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.attention import DocumentMask
from core.models.readout import LinearReadout
from core.schedules import Piece
from tests.heads.setup import (
    LENGTHS,
    SHIPPED,
    D,
    heads_for,
    inputs_of,
    placed,
    rows,
    run,
)
from tests.models.test_models import T, V

# what their losses are ----------------------------------------------------------------------------


class PlainHeads:
    """One row's losses, by plain reading of the specification."""

    def __init__(self, name: str, heads: HeadStack, inputs: HeadInputs, row: int):
        self.batch, self.inputs, self.row = inputs.batch, inputs, row
        self.hidden, self.table = inputs.hidden[row], inputs.readout.table
        self.ids = self.batch.input_ids[row].tolist()
        self.all_positions = self.batch.head_positions[name].tolist()
        self.positions = self.all_positions[row]
        self.p = self.positions[0]
        self.head: Any = heads[name]
        self.policy_head, self.value_head = heads["policy"], heads["value"]
        self.rollouts_head = heads["rollouts"]

    def policy_log_probabilities(self, state: Tensor) -> Tensor:
        return (state @ self.policy_head.weight.T + self.policy_head.bias).log_softmax(-1)

    def policy_divergence(self, state: Tensor, t: int) -> Tensor:
        teacher = (self.hidden[t] @ self.table.T).softmax(-1)
        return (teacher * (teacher.log() - self.policy_log_probabilities(state))).sum()

    def predicted_nll(self, state: Tensor) -> Tensor:
        return state @ self.value_head.weight[0] + self.value_head.bias[0]

    def value_error(self, state: Tensor, t: int) -> Tensor:
        documents, labels = self.batch.document_ids[self.row], self.batch.labels[self.row]
        span = range(t, min(t + self.value_head.span_tokens, T))
        losses = [
            -(self.hidden[u] @ self.table.T).log_softmax(-1)[labels[u]]
            for u in span
            if documents[u] == documents[t] and labels[u] >= 0
        ]
        return (self.predicted_nll(state) - torch.stack(losses).mean()) ** 2

    def after(self, state: Tensor, token: int) -> Tensor:
        inner = self.rollouts_head[0](torch.cat([state, self.table[token]]))
        return state + self.rollouts_head[2](F.gelu(inner))

    def policy(self) -> Tensor:
        return self.policy_divergence(self.hidden[self.p], self.p)

    def value(self) -> Tensor:
        return self.value_error(self.hidden[self.p], self.p)

    def rollouts(self) -> Tensor:
        state, losses = self.hidden[self.p], []
        for t in range(self.p + 1, self.p + 1 + self.rollouts_head.steps):
            state = self.after(state, self.ids[t])
            error = ((state - self.hidden[t]) ** 2).sum() / (self.hidden[t] ** 2).sum()
            losses.append(error + self.value_error(state, t) + self.policy_divergence(state, t))
        return sum(losses) / len(losses)

    def planner_features(self, p: int, before: Tensor, token: int) -> Tensor:
        """One candidate's features: log-probabilities, values, and their discounted mean."""
        state, values = self.hidden[p], []
        log_p = [before.log_softmax(-1)[token], self.policy_log_probabilities(state)[token]]
        for k in range(self.rollouts_head.steps):
            if k > 0:
                token = int(self.policy_log_probabilities(state).argmax())
                log_p.append(self.policy_log_probabilities(state)[token])
            state = self.after(state, token)
            values.append(self.predicted_nll(state))
        discounted = sum(0.9**k * v for k, v in enumerate(values))
        return torch.stack([*log_p, *values, discounted / sum(0.9**k for k in range(len(values)))])

    def planner(self) -> Tensor:
        head, losses = self.head, []
        for p in self.positions:
            before = self.hidden[p] @ self.table.T
            candidates = before.argsort(descending=True)[: head.candidates].tolist()
            features = [self.planner_features(p, before, token) for token in candidates]
            mean = sum(features) / len(features)
            scores = before.clone()
            for token, own in zip(candidates, features):
                scores[token] += head[2](F.gelu(head[0](torch.cat([own, own - mean]))))[0]
            p_all, q_all = before.softmax(-1), scores.softmax(-1)
            divergence = (q_all * (q_all / p_all).log()).sum()
            nll = -q_all[self.batch.labels[self.row, p]].log()
            losses.append(nll + head.kl_weight * divergence)
        return sum(losses) / len(losses)

    def dynamics(self) -> Tensor:
        p, head = self.p, self.head
        tokens = self.table[self.ids[p + 1 : p + 4]].mean(0)
        predicted = head[2](F.gelu(head[0](torch.cat([self.hidden[p], tokens]))))
        return ((predicted - self.hidden[p + 1 : p + 4].mean(0)) ** 2).mean()

    def memory(self) -> Tensor:
        return plain_memory(self.head, self.inputs, self.row)

    def draft(self) -> Tensor:
        head, losses = self.head, []
        for root in self.positions:
            state = self.hidden[root]
            for k in (1, 2):
                token = self.table[self.ids[root + k]]
                read = torch.cat([head.norm_state(state), head.norm_token(token)])
                gate, up = (head.inner.weight @ read + head.inner.bias).view(2, -1)
                change = head.outer.weight @ (gate * torch.sigmoid(gate) * up)
                state = state + change + head.outer.bias
                of_model = (self.hidden[root + k] @ self.table.T).softmax(-1)
                guess = (state @ self.table.T).softmax(-1)
                losses.append((of_model * (of_model / guess).log()).sum())
        return torch.stack(losses).mean()

    def span_contrastive(self) -> Tensor:
        def project(states: Tensor) -> Tensor:
            inner = F.gelu(self.head[0](states))
            return F.normalize(self.head[2](inner).mean(0), dim=-1)

        begin, start, _ = self.positions
        query = project(self.hidden[begin:start])
        valid = [row for row, at in enumerate(self.all_positions) if at[0] != NOWHERE]
        spans = [(row, *self.all_positions[row][1:]) for row in valid]
        keys = [project(self.inputs.hidden[row, first:stop]) for row, first, stop in spans]
        scores = torch.stack([query @ key / 0.07 for key in keys])
        return -scores.log_softmax(-1)[valid.index(self.row)]


def plain_memory(head: Any, inputs: HeadInputs, row: int) -> Tensor:
    """Summaries written out, and put before the tokens' embeddings without a hook."""
    batch, table, model = inputs.batch, inputs.readout.table, inputs.model
    begin, middle, _ = batch.head_positions["memory"][row].tolist()
    states, ids, losses, bags = inputs.hidden[row, begin:middle], batch.input_ids[row], [], []
    for start in (middle, middle + 3):
        weights = torch.stack([(states @ look).softmax(0) for look in head.look.weight])  # (4, L)
        summary = (weights @ states).flatten() @ head.say.weight.T + head.say.bias
        bag = (table @ (head.tell.weight @ summary + head.tell.bias)).log_softmax(0)
        bags.append(-torch.stack([bag[ids[t]] for t in range(begin, start)]).mean())
        x = (
            torch.cat([summary[None], table[ids[start : start + 3]]])
            + model.pos_embedding.weight[:4]
        )
        x = x[None]
        for layer in model.layers:
            x = layer(x, DocumentMask("sdpa", x.dtype, causal=True))
        states = model.norm(x)[0]  # (4, D): what the next summary is made of
        losses += [
            -(states[1 + i] @ table.T).log_softmax(0)[batch.labels[row, start + i]]
            for i in range(3)
        ]
    return torch.stack(losses).mean() + 0.1 * torch.stack(bags).mean()


def test_every_head_has_a_reference() -> None:
    """Here, or in a test of its own."""
    for name in HEADS:
        own = Path(__file__).with_name(f"test_{name}.py")
        assert name in SHIPPED or own.is_file(), f"{name}: add {own.name}"


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("step", range(3))
def test_losses_are_what_the_specification_says(name: str, step: int) -> None:
    sizes = {
        "planner_candidates": 3,
        "planner_kl_weight": 0.7,
        "draft_tokens": 2,
        "draft_positions": 3,
    }
    heads = heads_for(D, V, value_span_tokens=5, span_mask_fraction=0.3, **sizes).double()
    batch, _ = placed(heads, rows(), step)
    inputs = inputs_of(batch, heads)
    found = run(name, heads, inputs)
    valid = batch.head_positions[name][:, 0] != NOWHERE
    assert valid.sum() > 3
    for row in valid.nonzero().flatten().tolist():
        expected = getattr(PlainHeads(name, heads, inputs, row), name)()
        torch.testing.assert_close(found[row], expected, atol=1e-10, rtol=0)


def test_rollouts_that_change_nothing_err_as_much_as_no_change() -> None:
    """Of every step, relative to the square of the hidden state that comes."""
    heads = heads_for(D, V).double()
    for p in heads["rollouts"][2].parameters():
        p.data.zero_()
    batch, _ = placed(heads, rows())
    inputs, positions = inputs_of(batch, heads), batch.head_positions["rollouts"]
    with torch.no_grad():
        found = heads["rollouts"].measure(
            inputs, positions.clamp(min=0), positions[:, 0] != NOWHERE
        )
    for row, (p,) in enumerate(positions.tolist()):
        for k in (1, 2, 3) if p != NOWHERE else ():
            here, there = inputs.hidden[row, p], inputs.hidden[row, p + k]
            expected = pytest.approx(float(((here - there) ** 2).sum() / (there**2).sum()))
            assert (
                float(found[f"error_{k}"][row]) == float(found[f"unchanged_{k}"][row]) == expected
            )


def test_span_keys_may_have_lengths() -> None:
    """span_l2_normalize and the temperature are settings."""
    batch, _ = placed(heads := heads_for(D, V).double(), rows())
    values = {}
    for changed in ({}, {"span_l2_normalize": False}, {"span_contrastive_temperature": 0.5}):
        other = heads_for(D, V, **changed).double()
        other.load_state_dict(heads.state_dict())
        values[str(changed)] = run("span_contrastive", other, inputs_of(batch)).nansum().item()
    assert len(set(values.values())) == 3


def test_the_total_is_weighted_and_divided_by_the_counts_it_is_given() -> None:
    schedule = Piece(**{"from": 0.0, "to": 0.4})
    heads = heads_for(D, V, policy_kl_weight=0.5, value_weight=schedule).double()
    batch, _ = placed(heads, rows())
    counts = dict.fromkeys(HEADS, 5.0) | {
        "policy": 10.0,
        "value": 3.0,
        "dynamics": 7.0,
        "memory": 2.0,
        "draft": 4.0,
    }
    total, sums = heads(inputs_of(batch, heads), counts, 0.5)
    weights = dict.fromkeys(HEADS, 0.05) | {
        "policy": 0.5,
        "value": 0.2,
        "memory": 0.2,
        "draft": 1.0,
    }
    assert heads.weights(0.5) == pytest.approx(weights) and heads.scheduled(0.5) == {
        "value.weight": pytest.approx(0.2)
    }
    assert total.item() == pytest.approx(
        sum(weights[name] * sums[name].item() / counts[name] for name in HEADS), rel=1e-12
    )
    for name in HEADS:
        assert sums[name].item() == pytest.approx(
            run(name, heads, inputs_of(batch, heads)).nansum().item(), rel=1e-12
        )


@pytest.mark.parametrize("smoothing", [None, 0.2])
def test_the_surprise_is_cross_entropy_whatever_the_losses_are(smoothing: float | None) -> None:
    """Read from the losses where they have it; else computed, at the asked positions only."""
    torch.manual_seed(0)
    batch = rows()
    hidden, readout = (
        torch.randn(*batch.labels.shape, D, dtype=torch.float64),
        LinearReadout(torch.randn(V, D).double()),
    )
    first = (
        Cosine(CosineSettings())
        if smoothing is None
        else CrossEntropy(CrossEntropySettings(label_smoothing=smoothing))
    )
    output, at = (
        ModelOutput(hidden, readout),
        torch.tensor([[0, 5, 5], [3, 9, 15], [1, 2, 12], [0, 1, 2], [4, 5, 6], [7, 8, 15]]),
    )
    expected = F.cross_entropy(
        readout(hidden).transpose(1, 2), batch.labels, ignore_index=IGNORE_INDEX, reduction="none"
    )
    for losses in ([first], [CrossEntropy(CrossEntropySettings())]):
        stack = LossStack(losses)
        _, terms = stack(output, batch, 1, 0.0, 1)
        torch.testing.assert_close(
            stack.nll_at(output, batch, terms, at), expected.gather(1, at), atol=1e-10, rtol=0
        )


def test_only_the_chosen_positions_are_scored() -> None:
    """Never (B * T, V): the readout is asked for one position a row, for one at each step of a
    rollout, for each of a planner's; for drafts, twice for each of theirs."""
    asked: list[int] = []

    class Counting(LinearReadout):
        def __call__(self, hidden: Tensor) -> Tensor:
            asked.append(len(hidden))
            return super().__call__(hidden)

        def detached(self) -> "Counting":
            return Counting(self.table.detach())

    heads = heads_for(D, V, draft_tokens=3, draft_positions=2).double()
    batch, counts = placed(heads, rows())
    inputs = inputs_of(batch, heads)
    heads(replace(inputs, readout=Counting(inputs.readout.table)), counts, 0.0)
    assert asked == [len(LENGTHS), 3 * len(LENGTHS), 4 * len(LENGTHS)] + 2 * 3 * [2 * len(LENGTHS)]


# what their gradients reach -----------------------------------------------------------------------
