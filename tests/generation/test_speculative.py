"""Drafts: what is said is what is said without them, token for token, whatever was guessed; good
guesses save passes."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.contracts import plain_batch
from core.generation.engine import GenerationRow, TextGenerator, advance, document_start
from core.generation.sampling import SamplingParams
from core.generation.speculative import Drafter, can_draft
from core.heads import AuxiliarySettings
from core.heads.draft import Draft
from core.heads.inputs import HeadInputs
from core.models.initial import draw_weights
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from tests.evaluation.harness.tiny import CONTEXT, OF_TEXT, build, byte_tokenizer, logs_of
from tests.models import test_huggingface

RAGGED = ["In year 31", "a", "", "The stone met", "x" * 60]
PARAMS = [
    SamplingParams(max_tokens=20),
    SamplingParams(max_tokens=20, temperature=1.5, top_p=0.9, no_repeat_ngram=2),
    SamplingParams(max_tokens=9, temperature=2.0, until=("e", "qq", "\x00")),
]


class Foretold(Drafter):
    """Guesses what the rows are known to say, but that every so many tokens of it are wrong."""

    def __init__(self, texts: dict[int, list[int]], wrong_every: int, tokens: int = 3):
        self._texts, self._wrong = texts, wrong_every
        self.tokens, self.passes, self.emitted, self.proposed, self.accepted = tokens, 0, 0, 0, 0

    def propose(self, states: Tensor, rows: list[Any], readout: Any, count: int) -> list[list[int]]:
        assert states.shape[0] == len(rows) and torch.isfinite(states).all()
        return [[self._guess(row, len(row.ids) + i) for i in range(count)] for row in rows]

    def _guess(self, row: Any, place: int) -> int:
        text = self._texts[row.number]
        right = text[place] if place < len(text) else row.eos
        return (right + 1) % 256 if (place + row.number) % self._wrong == 0 else right


def head_for(hidden_size: int, tokens: int = 3) -> Draft:
    torch.manual_seed(3)
    return (
        Draft(AuxiliarySettings(draft_tokens=tokens), hidden_size, 1).double().apply(draw_weights)
    )


def rows_of(
    tokenizer: Any, prompts: list[list[int]], params: SamplingParams, ends: tuple[int, ...] = ()
) -> list[Any]:
    rows = [
        GenerationRow(tokenizer, prompt, params, seed, ends) for seed, prompt in enumerate(prompts)
    ]
    for number, row in enumerate(rows):
        row.number, row.eos = number, tokenizer.eos_id  # type: ignore[attr-defined]
    return rows


def written(
    model: nn.Module, rows: list[Any], drafter: Drafter | None = None, tokenizer: Any = None
) -> tuple[list[Any], int]:
    """What the rows said, and in how many passes."""
    generator = TextGenerator(model, tokenizer or byte_tokenizer(), CONTEXT, drafter=drafter)  # type: ignore[arg-type]
    passes = sum(1 for _ in advance(generator, rows))
    return [(row.ids, row.text) for row in rows], passes


@pytest.mark.parametrize(
    "kind", [kind for kind in OF_TEXT if kind not in ("post-norm", "not causal")]
)
@pytest.mark.parametrize("params", PARAMS)
def test_drafts_change_no_text(kind: str, params: SamplingParams) -> None:
    """Of prompts of any length, up to the context's end and beyond it; with a block, stop strings
    and ends amid a draft. Right guesses, mistakes here and there, and nothing but mistakes; alone
    and together."""
    tokenizer = byte_tokenizer()
    model = build(kind, tokenizer.vocab_size)
    ends = tuple(range(97, 123, 4)) if params.until else ()
    prompts = [document_start(tokenizer, text) for text in RAGGED]
    plain, passes = written(model, rows_of(tokenizer, prompts, params, ends))
    known = {number: ids for number, (ids, _) in enumerate(plain)}
    for wrong_every in (10**9, 3, 1):
        drafter = Foretold(known, wrong_every)
        found, needed = written(model, rows_of(tokenizer, prompts, params, ends), drafter)
        assert (
            found == plain
            and drafter.proposed > 0
            and (drafter.accepted == 0) == (wrong_every == 1)
        )
        assert needed < passes or wrong_every < 10**9
    assert [
        written(model, [row], Foretold(known, 3))[0][0]
        for row in rows_of(tokenizer, prompts, params, ends)
    ] == plain


def test_a_model_without_a_cache_is_read_as_ever() -> None:
    """None is drafted where every pass reads everything."""
    tokenizer, params = byte_tokenizer(), PARAMS[1]
    model, prompts = build("not causal", tokenizer.vocab_size), [document_start(tokenizer, "ab")]
    plain, passes = written(model, rows_of(tokenizer, prompts, params))
    drafter = Foretold({0: plain[0][0]}, 10**9)
    assert not can_draft(model) and written(
        model, rows_of(tokenizer, prompts, params), drafter
    ) == (
        plain,
        passes,
    )
    assert drafter.passes == 0


def test_right_guesses_save_passes() -> None:
    """k right guesses give k + 1 tokens a pass. The first pass has nothing to guess from; the last
    token needs no guess."""
    tokenizer, params = byte_tokenizer(), SamplingParams(max_tokens=17)
    model = build("simple_lm", tokenizer.vocab_size)
    prompt = [document_start(tokenizer, "abc")]
    plain, passes = written(model, rows_of(tokenizer, prompt, params))
    assert passes == 17
    drafter = Foretold({0: plain[0][0]}, 10**9)
    assert written(model, rows_of(tokenizer, prompt, params), drafter) == (plain, 1 + 4)
    assert (drafter.emitted, drafter.proposed, drafter.accepted, drafter.passes) == (17, 12, 12, 5)


@pytest.mark.parametrize(
    ("name", "drafts"), [("llama", True), ("pythia", True), ("mistral", False)]
)
def test_models_of_the_library_draft_where_their_cache_keeps_every_position(
    name: str, drafts: bool
) -> None:
    """A window of 3 tokens has forgotten what a cut would need."""
    model = test_huggingface.build(name).double()
    assert can_draft(model) == drafts

    class Numbers:
        eos_id, vocab_size = test_huggingface.V - 1, test_huggingface.V

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(65 + i) for i in ids)

    numbers, prompts, params = (
        Numbers(),
        [[1, 2], [3], list(range(5, 20))],
        SamplingParams(max_tokens=12, temperature=1.0),
    )
    plain, passes = written(model, rows_of(numbers, prompts, params), tokenizer=numbers)
    drafter = Foretold({number: ids for number, (ids, _) in enumerate(plain)}, 4)
    found, needed = written(model, rows_of(numbers, prompts, params), drafter, numbers)
    assert found == plain and (
        needed < passes and drafter.accepted > 0
        if drafts
        else needed == passes and drafter.proposed == 0
    )


def test_drafting_is_choosing_and_leaves_the_row_as_it_was() -> None:
    """With the row's own random numbers and its block, of the guesses among themselves, too."""
    params = SamplingParams(temperature=1.0, top_p=0.9, no_repeat_ngram=2)
    one, other = (GenerationRow(byte_tokenizer(), [1, 2, 3], params, 7) for _ in range(2))
    scores = torch.randn(30, 260, generator=torch.Generator().manual_seed(1))
    scores[:, 50:55] += 6.0
    scores[:, byte_tokenizer().eos_id] = -9.0
    drafted = []
    for _ in range(2):
        choose = one.draft_sampler()
        drafted.append([choose(own.clone()) for own in scores])
    said = []
    for own in scores:
        said.append(other.choose(own.clone()))
        other.append(said[-1])
    assert drafted[0] == drafted[1] == said and one.ids == [1, 2, 3] and max(said) < 257
    pairs = list(itertools.pairwise([1, 2, 3, *said]))
    assert len(pairs) == len(set(pairs))


# in distribution ----------------------------------------------------------------------------------

V, TOKENS, TEXTS, PER_BATCH = 7, 4, 1600, 200


class Letters:
    """The tokenizer of a model of seven tokens, the last of which ends a text."""

    eos_id, vocab_size = V - 1, V

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdef"[i] for i in ids)


@pytest.fixture(scope="module")
def small() -> Any:
    """Its next token depends on the last ones most, and somewhat on those before."""
    torch.manual_seed(1)
    shape = SimpleLMSettings(
        hidden_size=32, num_layers=1, num_heads=2, seq_length=CONTEXT, tie_embeddings=False
    )
    model = SimpleLM(shape, V).double().eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def trained_head(model: nn.Module) -> Draft:
    """A head that has seen the model's hidden states of random tokens for a while."""
    head = head_for(32)
    optimizer, random = (
        torch.optim.AdamW(head.parameters(), lr=1e-2),
        torch.Generator().manual_seed(1),
    )
    for _ in range(120):
        batch = plain_batch(torch.randint(0, V, (32, 8), generator=random))
        with torch.no_grad():
            output = model(batch)
        seen = HeadInputs(output.hidden, output.readout, batch, lambda at: at, torch.float64)
        optimizer.zero_grad()
        head(
            seen, torch.arange(4).expand(32, -1), torch.ones(32, dtype=torch.bool)
        ).mean().backward()
        optimizer.step()
    return head


def ignorant_head() -> Draft:
    head = head_for(32)
    torch.nn.init.normal_(head.outer.weight, std=3.0)
    return head


def probabilities(model: nn.Module, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Of every text that can be said after token 0, from the model's scores alone: one plain pass
    for each beginning."""
    found, open_ = {}, {(): 1.0}
    for _ in range(TOKENS):
        longer = {}
        for said, so_far in open_.items():
            p = (logs_of(model, [0, *said])[-1] / params.temperature).softmax(-1)
            best, ids = p.sort(descending=True)
            kept = best * (best.cumsum(-1) - best < params.top_p)
            for token, share in zip(ids.tolist(), (kept / kept.sum()).tolist()):
                if share > 0:
                    (found if token == Letters.eos_id else longer)[*said, token] = so_far * share
        open_ = longer
    return found | open_


def test_texts_come_as_often_as_the_model_has_it(small: nn.Module) -> None:
    """Chi-squared of thousands of texts against their exact probabilities: with a head that knows
    nothing, and a good one."""
    params, tokenizer = SamplingParams(max_tokens=TOKENS, temperature=0.9, top_p=0.95), Letters()
    exact = probabilities(small, params)
    assert abs(sum(exact.values()) - 1) < 1e-9
    rates = []
    for head in (ignorant_head(), trained_head(small)):
        drafter, counted = Drafter(head), Counter()
        for first in range(0, TEXTS, PER_BATCH):
            rows = [
                GenerationRow(tokenizer, [0], params, seed)
                for seed in range(first, first + PER_BATCH)
            ]  # type: ignore[arg-type]
            for _ in advance(TextGenerator(small, tokenizer, CONTEXT, drafter=drafter), rows):  # type: ignore[arg-type]
                pass
            ended = [(*row.ids[1:], *[Letters.eos_id] * (len(row.ids) <= TOKENS)) for row in rows]
            counted.update(ended)
        assert set(counted) <= set(exact)
        often = {text: p for text, p in exact.items() if p * TEXTS >= 5}
        cells = [(counted[text], p * TEXTS) for text, p in often.items()]
        cells.append((TEXTS - sum(n for n, _ in cells), TEXTS * (1 - sum(often.values()))))
        chi2, freedom = sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1
        assert freedom > 25 and chi2 < freedom + 4 * (2 * freedom) ** 0.5, (
            "chance passes this about once in ten thousand"
        )
        rates.append(drafter.accepted / drafter.proposed)
    assert rates[1] > 1.5 * rates[0] > 0, f"the good head guesses better: {rates}"
