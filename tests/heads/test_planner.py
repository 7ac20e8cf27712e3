"""The planner: a proper distribution that begins as the model's, sees nothing to come, learns what
rollouts foretell and nothing else, and guides generation as it was trained."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from core.contracts import Batch, plain_batch
from core.data.tokenizer import Tokenizer
from core.generation.engine import GenerationRow, Guide, TextGenerator, advance, document_start
from core.generation.sampling import SamplingParams
from core.heads.inputs import HeadInputs
from core.heads.stack import HeadStack
from core.models.readout import LinearReadout
from tests.evaluation.harness.tiny import CONTEXT, KINDS, build, byte_tokenizer
from tests.heads.setup import heads_for

D, V = 16, 40


def guide_of(heads: HeadStack, table: Tensor) -> Guide:
    return partial(heads["planner"].plan, heads=heads, table=table.detach())  # type: ignore[operator]


def of_model(model: nn.Module, seed: int = 0) -> Guide:
    """A planner whose router is not 0, beside a model of `tiny`."""
    output = model(plain_batch(torch.zeros(1, 1, dtype=torch.int64)))
    width, scores = output.hidden.shape[-1], output.readout(output.hidden[0])
    heads = heads_for(width, scores.shape[-1], seed).double().requires_grad_(False)
    for p in heads.parameters():
        p *= 3
    return guide_of(heads, output.readout.table)


def test_it_begins_as_the_model_and_is_a_distribution() -> None:
    """At first the scores are the same bits; then those of the candidates alone change, and all
    probabilities sum to 1."""
    torch.manual_seed(0)
    heads, table = heads_for(D, V, planner_candidates=5), torch.randn(V, D)
    hidden, scores = torch.randn(7, D), 2 * torch.randn(7, V)
    changed = guide_of(heads, table)(hidden, scores)
    candidates = torch.zeros(7, V, dtype=torch.bool).scatter(1, scores.topk(5)[1], True)
    assert torch.equal(changed != scores, candidates)
    before, after = scores.softmax(-1), changed.softmax(-1)
    torch.testing.assert_close(after.sum(-1), torch.ones(7))
    others = (after / before)[~candidates].view(7, V - 5)
    torch.testing.assert_close(
        others, others[:, :1].expand_as(others), msg="all others lose or gain the same share"
    )
    heads["planner"].begin()
    assert torch.equal(guide_of(heads, table)(hidden, scores), scores)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not causal"])
def test_it_sees_nothing_to_come(kind: str) -> None:
    """In float64, on every causal model: at p, scores depend on tokens up to p only, and on
    that."""
    model = build(kind)
    guide = of_model(model)
    ids = torch.randint(0, 39, (1, 12), generator=torch.Generator().manual_seed(1))

    def planned(ids: Tensor) -> Tensor:
        with torch.no_grad():
            output = model(plain_batch(ids))
            return guide(output.hidden[0], output.readout(output.hidden[0]))

    before = planned(ids)
    for t in range(12):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % 39
        after = planned(other)
        assert torch.equal(after[:t], before[:t]) and not torch.equal(after[t], before[t])


def adding(heads: HeadStack) -> None:
    """Makes the transition s + E[token], exactly: gelu(x) - gelu(-x) = x."""
    inner, _, outer = heads["rollouts"]
    one, none = torch.eye(D), torch.zeros(D, D)
    inner.weight.data = torch.cat([torch.cat([none, one], 1), torch.cat([none, -one], 1)])
    outer.weight.data = torch.cat([one, -one], 1)
    inner.bias.data.zero_()
    outer.bias.data.zero_()


@pytest.mark.parametrize("planted", [True, False])
def test_it_learns_what_values_foretell_and_nothing_where_they_do_not(planted: bool) -> None:
    """Of the tokens a model likes, those come up that lead to lower values; or, in the control, as
    often as the model says."""
    torch.manual_seed(3)
    heads, table = heads_for(D, V, planner_positions=8, rollout_steps=2), torch.randn(V, D)
    adding(heads)
    heads["planner"].begin()
    # (V,)
    promised = -table @ heads["value"].weight.detach()[0] / heads["value"].weight.detach().norm()
    heads["value"].weight.data /= heads["value"].weight.detach().norm()

    def drawn(rows: int) -> HeadInputs:
        hidden = torch.randn(rows, 8, D)
        scores = hidden @ table.T / 2
        truth = scores + planted * promised
        labels = torch.multinomial(truth.flatten(0, 1).softmax(-1), 1).view(rows, 8)
        zeros = torch.zeros(rows, 8, dtype=torch.int64)
        batch = Batch(zeros, labels, zeros, zeros.int(), zeros.int(), packed=False)
        return HeadInputs(
            hidden,
            LinearReadout(table / 2, None, table),
            batch,
            lambda at: at,
            torch.float32,
            heads=heads,
        )

    def measured(head: nn.Module, inputs: HeadInputs) -> tuple[Tensor, dict[str, Tensor]]:
        positions = torch.arange(8).expand(len(inputs.hidden), 8)
        valid = torch.ones(len(positions), dtype=torch.bool)
        return head(inputs, positions, valid).mean(), head.measure(inputs, positions, valid)  # type: ignore[operator]

    router = heads["planner"]
    optimizer = torch.optim.AdamW(router.parameters(), lr=5e-3)
    for _ in range(100):
        loss, _ = measured(router, drawn(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, found = measured(router, drawn(500))
    gain, error = found["gain"].mean().item(), found["gain"].std().item() / 500**0.5
    assert gain > 0.1 and gain > 6 * error if planted else abs(gain) < 0.01, (gain, error)
    assert (found["kl"].mean().item() > 0.05) == planted and (
        found["changed"].mean().item() > 0.05
    ) == planted


def written(
    model: nn.Module, prompts: list[list[int]], tokenizer: Tokenizer, guide: Guide | None
) -> list[list[int]]:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, no_repeat_ngram=2)
    rows = [GenerationRow(tokenizer, ids, params, len(ids)) for ids in prompts]
    for _ in advance(TextGenerator(model, tokenizer, CONTEXT, guide), rows):  # type: ignore[arg-type]
        pass
    return [row.ids for row in rows]


@pytest.mark.parametrize("kind", ["simple_lm", "polychromatic"])
def test_a_guided_text_is_the_same_alone_or_in_a_batch_with_a_cache_or_without(kind: str) -> None:
    """And another than the model's own."""
    tokenizer = byte_tokenizer()
    model = build(kind, tokenizer.vocab_size)
    guide = of_model(model)
    prompts = [
        document_start(tokenizer, text) for text in ("In year 31", "a", "", "the river of the")
    ]
    together = written(model, prompts, tokenizer, guide)
    assert [written(model, [ids], tokenizer, guide)[0] for ids in prompts] == together
    assert written(model, prompts, tokenizer, None) != together
    model.new_cache = lambda: None
    assert written(model, prompts, tokenizer, guide) == together
