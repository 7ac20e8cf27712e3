"""The memory head: summaries stand exactly where embeddings would, carry what they should and
nothing else, and serve texts that are longer than the context."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from core.contracts import IGNORE_INDEX, Batch, plain_batch
from core.generation.engine import (
    GenerationRow,
    ModelRunner,
    TextGenerator,
    advance,
    document_start,
)
from core.generation.sampling import SamplingParams
from core.generation.speculative import Drafter
from core.heads.memory import Memory, Summary, read
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from tests.evaluation.harness.tiny import CONTEXT, build, byte_tokenizer
from tests.heads.setup import heads_for, objective_of, placed, rows_of
from tests.models import test_models as models

D, n = 32, 3


def memory_for(vocab_size: int, hidden_size: int = D, **settings: Any) -> Memory:
    return heads_for(
        hidden_size, vocab_size, enable_memory=True, memory_tokens_after=n, **settings
    )["memory"].eval()


# how a model reads a summary ----------------------------------------------------------------------


@pytest.mark.parametrize("name", models.CAUSAL)
def test_a_summary_stands_exactly_where_embeddings_would(name: str) -> None:
    """Put for tokens whose own embeddings it holds it changes no bit: read at once, in pieces with
    a cache, with a gradient."""
    model = models.build(name)
    ids = torch.randint(0, models.V, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = model(plain_batch(ids))
    table = plain.readout.table
    own = Summary(table[ids[:, :2]], table)
    told = {key: value for key, value in vars(model).items() if isinstance(value, Tensor)}
    assert torch.equal(read(model, ids[:, 2:], own).hidden, plain.hidden)
    assert all(vars(model)[key] is value for key, value in told.items()), (
        "what the model reports is still of its own pass"
    )
    assert torch.equal(model(plain_batch(ids)).hidden, plain.hidden), (
        "and the next pass is its own again"
    )
    with torch.no_grad():
        whole, pieces = model.new_cache(), model.new_cache()
        assert torch.equal(
            read(model, ids[:, 2:], own, whole).hidden, model.extend(ids, model.new_cache()).hidden
        )
        first = read(model, ids[:, 2:5], own, pieces).hidden
        both = torch.cat([first, model.extend(ids[:, 5:], pieces).hidden], dim=1)
        torch.testing.assert_close(both, plain.hidden, atol=1e-5, rtol=0)
    other = Summary(own.vectors.detach().flip(0).requires_grad_(), table)
    hidden = read(model, ids[:, 2:], other).hidden
    assert not torch.allclose(hidden[:, 2:], plain.hidden[:, 2:])
    hidden[0].sum().backward()
    assert other.vectors.grad[0].any() and not other.vectors.grad[1].any(), "each row reads its own"


# what it carries ----------------------------------------------------------------------------------


def test_text_is_seen_through_summaries_only_and_they_see_no_later_token() -> None:
    """In float64: s1 changes with the document's tokens before A2 alone, s2 with them and A2's; the
    rest of row and batch changes nothing; and where summaries say nothing, no token before a
    segment changes what is made of it."""
    model, heads = (
        models.build("simple_lm").double(),
        heads_for(D, models.V, enable_memory=True, memory_tokens_after=n).double(),
    )
    batch, _ = placed(heads, rows_of([[4, 12], [16]], models.T, models.V))
    begin, middle, stop = batch.head_positions["memory"][0].tolist()
    assert begin == 4 < middle and stop == middle + 2 * n
    head: Any = heads["memory"]
    taken: list[Tensor] = []
    head.say.register_forward_hook(lambda module, inputs, output: taken.append(output.detach()))

    def look(changed: Batch, mute: bool = False) -> list[Tensor]:
        """s1, s2, and the losses at A2 and B of row 0."""
        taken.clear()
        states: list[Tensor] = []
        head._nats = lambda inputs, hidden, labels: (
            states.append(hidden) or (torch.zeros(2), torch.zeros(()))
        )
        weight = head.say.weight.detach().clone()
        with torch.no_grad():
            head.say.weight.mul_(0.0 if mute else 1.0)
            output = model(changed)
            inputs = heads.inputs(model, output, changed, lambda at: at.double(), None)
            head(inputs, changed.head_positions["memory"], torch.ones(2, dtype=torch.bool))
            head.say.weight.copy_(weight)
        return [taken[0][0], taken[1][0], states[0][0, :n], states[0][0, n:]]

    before, muted = look(batch), look(batch, mute=True)
    for row, t in [(0, t) for t in range(models.T)] + [(1, 5)]:
        ids = batch.input_ids.clone()
        ids[row, t] = (ids[row, t] + 1) % models.V
        after, silent = (look(replace(batch, input_ids=ids), mute) for mute in (False, True))
        parts = range(4, middle), range(middle, middle + n), range(middle + n, stop)
        of_a1, of_a2, of_b = (row == 0 and t in part for part in parts)
        same = [torch.equal(a, b) for a, b in zip(after, before)]
        assert same == [
            not of_a1,
            not (of_a1 or of_a2),
            not (of_a1 or of_a2),
            not (of_a1 or of_a2 or of_b),
        ], (row, t)
        same = [torch.equal(a, b) for a, b in zip(silent[2:], muted[2:])]
        assert same == [not of_a2, not of_b], (row, t)


def test_a_key_is_carried_over_two_summaries() -> None:
    """A document's first token is a key, which its last target repeats; all between is noise. So
    only s2, and only if s1 told it, can tell B's target. By reading alone, without reconstruction,
    the gain comes to nearly ln 8, all there is to know."""
    torch.manual_seed(0)
    keys, V, T = 8, 20, 9
    model = SimpleLM(SimpleLMSettings(hidden_size=D, num_layers=2, num_heads=2, seq_length=T), V)
    heads = heads_for(
        D,
        V,
        enable_memory=True,
        memory_tokens_after=n,
        memory_weight=1.0,
        memory_reconstruction_weight=0.0,
    )
    objective = objective_of(model, heads)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    for step in range(150):
        ids = torch.randint(keys, V, (32, T))
        ids[:, 0] = torch.randint(0, keys, (32,))
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, -1] = ids[:, 0]
        batch, counts = placed(heads, replace(plain_batch(ids), labels=labels), step)
        assert batch.head_positions["memory"][0].tolist() == [0, T - 2 * n, T], (
            "the one place with something to tell"
        )
        total, _ = objective(batch, 32, 0.0, counts)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    output = model(batch)
    measured = objective.stack.measure(output, batch, 0.0, 1).terms
    stack = objective.stack
    nll, cross_entropy = (
        partial(stack.nll_at, output, batch, measured),
        partial(stack.cross_entropy, output.readout),
    )
    inputs = heads.inputs(model, output, batch, nll, cross_entropy)
    found = {name: (total / rows).item() for name, (total, rows) in heads.measure(inputs).items()}
    assert found["memory.gain"] > 0.9 * math.log(keys) and abs(
        found["memory.gap"]
    ) < 0.1 * math.log(keys)


# texts longer than the context --------------------------------------------------------------------


PROMPTS = ["import os", "x" * (CONTEXT - 2), "def long(): " * 6]
"""Shorter than the context, just as long, and three times as long."""


def continued(
    generator: TextGenerator, prompts: list[str], max_tokens: int, temperature: float = 0.0
) -> list[list[int]]:
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, no_repeat_ngram=0)
    rows = [
        GenerationRow(generator.tokenizer, document_start(generator.tokenizer, text), params, seed)
        for seed, text in enumerate(prompts)
    ]
    for _ in advance(generator, rows):
        pass
    return [row.ids for row in rows]


def backwards(hidden: Tensor, scores: Tensor) -> Tensor:
    """A guide that likes other tokens at every position."""
    return (scores + hidden.sum(-1, keepdim=True)).flip(-1)


@torch.no_grad()
def likeliest(model: Any, memory: Memory, ids: list[int]) -> int:
    """The token after a text read from scratch: halves of the context into the summary until the
    rest fits beside it."""
    halves = (
        max(0, -(-(len(ids) + memory.slots - CONTEXT) // (CONTEXT // 2)))
        if len(ids) > CONTEXT
        else 0
    )
    row, summary = torch.tensor([ids]), None
    for half in range(halves):
        summary = memory.compress(
            model, row[:, half * CONTEXT // 2 : (half + 1) * CONTEXT // 2], summary
        )
    rest = row[:, halves * CONTEXT // 2 :]
    assert rest.shape[1] + (memory.slots if halves else 0) <= CONTEXT
    output = read(model, rest, summary)
    return int(output.readout(output.hidden[0, -1:])[0, : byte_tokenizer().vocab_size].argmax())


@pytest.mark.parametrize(("kind", "slots"), [("simple_lm", 1), ("gpt2", 2), ("polychromatic", 1)])
def test_beyond_the_context_a_text_goes_on_behind_its_summary(kind: str, slots: int) -> None:
    """Token for token as from scratch; the same in a batch and alone, with a cache and without,
    drawn or not. What is out of sight still counts: another first token gives other scores, but not
    without a memory."""
    model, tokenizer = build(kind, byte_tokenizer().vocab_size), byte_tokenizer()
    width = model(plain_batch(torch.zeros(1, 1, dtype=torch.int64))).hidden.shape[-1]
    memory = memory_for(tokenizer.vocab_size, width, memory_slots=slots).double()
    with torch.no_grad():
        memory.say.weight.mul_(4.0)  # loud enough to be heard in random weights
    generator = TextGenerator(model, tokenizer, CONTEXT, memory=memory)
    together, drawn = (
        continued(generator, PROMPTS, 30),
        continued(generator, PROMPTS, 30, temperature=1.0),
    )
    for prompt, ids in zip(PROMPTS, together):
        for length in range(len(document_start(tokenizer, prompt)), len(ids)):
            assert ids[length] == likeliest(model, memory, ids[:length])
    assert [continued(generator, [prompt], 30)[0] for prompt in PROMPTS] == together
    drafter = Drafter(
        heads_for(width, tokenizer.vocab_size, enable_draft=True, draft_tokens=3)["draft"].double()
    )
    for own, text in (
        (generator, together),
        (guided := replace(generator, guide=backwards), continued(guided, PROMPTS, 30)),
    ):
        assert continued(replace(own, drafter=drafter), PROMPTS, 30) == text, (
            "a memory, a guide and drafts go together"
        )
    assert drafter.proposed > 0 and text != together
    model.new_cache = lambda: None
    assert (
        continued(generator, PROMPTS, 30) == together
        and continued(generator, PROMPTS, 30, temperature=1.0) == drawn
    )
    for own, counts in ((generator, True), (replace(generator, memory=None), False)):
        found = [ModelRunner(own).read([[first, *range(100)]], 1)[1] for first in (1, 2)]
        assert torch.equal(*found) != counts


def test_within_the_context_a_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "compress", lambda *_: pytest.fail("nothing had to be compressed"))
    model, memory = build("simple_lm", 40), memory_for(40).double()
    generators = [
        TextGenerator(model, byte_tokenizer(), CONTEXT, memory=own) for own in (None, memory)
    ]
    for rows in ([[7] * CONTEXT, list(range(CONTEXT))], [[1, 2, 3]]):
        scores = [ModelRunner(generator).read(rows, 1)[1] for generator in generators]
        assert torch.equal(*scores)
