"""Generation: exact nucleus, no repeated n-gram, the same seed the same text, never more context
than the model knows; batches and caches that change no token."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.contracts import Batch, ModelOutput
from core.data.chat import MARKERS, START, encode_chat, encode_turn, render_chat
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.errors import UserError
from core.generation.engine import (
    GenerationRow,
    TextGenerator,
    advance,
    document_start,
    generate_text,
    stream_text,
)
from core.generation.sampling import SamplingParams
from core.models.readout import LinearReadout
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from core.preset.settings import GenerateSettings, TokenizerSettings
from tests.evaluation.harness.tiny import (
    CONTEXT,
    KINDS,
    OF_TEXT,
    build,
    byte_tokenizer,
    continue_by_hand,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerSettings(type="byte"), [])


class Scripted(nn.Module):
    """A real model in all but its arithmetic: scores are a function of the tokens it is given."""

    def __init__(self, scores_of: Any, vocab_size: int = 257):
        super().__init__()
        self.table = nn.Parameter(torch.eye(vocab_size))
        self.scores_of, self.seen = scores_of, []

    def forward(self, batch: Batch) -> ModelOutput:
        ids = batch.input_ids[0].tolist()
        self.seen.append((ids, batch.position_ids[0].tolist()))
        hidden = torch.zeros(1, len(ids), len(self.table))
        hidden[0, -1] = self.scores_of(ids)  # the table is the identity: hidden states are scores
        return ModelOutput(hidden, LinearReadout(self.table))


def scores(**letters: float) -> Tensor:
    """Scores over the byte vocabulary, high for these letters, hopeless for all else."""
    ids = build_tokenizer(TokenizerSettings(type="byte"), []).encode_batch(list(letters))
    out = torch.full((257,), -1e4)
    for (token,), score in zip(ids, letters.values()):
        out[token] = score
    return out


@pytest.mark.slow
def test_temperature_divides_the_scores(tokenizer: Tokenizer) -> None:
    """Two tokens whose scores differ by 2: at temperature 2 they come in shares of e to 1."""
    model = Scripted(lambda ids: scores(a=2.0, b=0.0))
    settings = GenerateSettings(max_tokens=3000, temperature=2.0, top_p=1.0, no_repeat_ngram=0)
    text = generate_text(TextGenerator(model, tokenizer, 4), "", settings, seed=3)
    assert text.count("a") + text.count("b") == 3000
    assert text.count("a") / 3000 == pytest.approx(0.7311, abs=0.03)


def test_no_ngram_appears_twice(tokenizer: Tokenizer) -> None:
    """Not even against the prompt, and not even when the model would say nothing else."""
    for n in (1, 2, 3):
        model = Scripted(lambda ids: scores(a=5.0, b=4.0, c=3.0, d=2.0))
        settings = GenerateSettings(max_tokens=40, top_p=1.0, no_repeat_ngram=n)
        generate_text(TextGenerator(model, tokenizer, 64), "ab", settings, seed=1)
        tokens = model.seen[-1][0][1:]
        ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        assert len(tokens) == 41 and len(ngrams) == len(set(ngrams))


def test_without_the_block_it_repeats_itself(tokenizer: Tokenizer) -> None:
    model = Scripted(lambda ids: scores(a=100.0))
    settings = GenerateSettings(max_tokens=10, no_repeat_ngram=0)
    assert generate_text(TextGenerator(model, tokenizer, 64), "x", settings, seed=1) == "a" * 10


def test_the_end_of_the_document_ends_the_text(tokenizer: Tokenizer) -> None:
    """It is not part of the text; the prompt is not either; max_tokens is the limit otherwise."""

    def say(ids: list[int]) -> Tensor:
        out = scores(a=10.0)
        out[tokenizer.eos_id] = 20.0 if len(ids) >= 6 else -1e4
        return out

    settings = GenerateSettings(max_tokens=50, no_repeat_ngram=0)
    assert (
        generate_text(TextGenerator(Scripted(say), tokenizer, 64), "xyz", settings, seed=1) == "aa"
    )


@pytest.mark.parametrize("marked", [True, False])
def test_a_conversation_in_a_preset_is_answered(marked: bool) -> None:
    """Encoded as training encodes conversations, where the tokenizer has the markers and where they
    are spelled out; the answer ends with its marker."""
    messages = (("user", "abc"),)
    tokenizer = build_tokenizer(
        TokenizerSettings(vocab_size=300), ["abcabc say"] * 20, MARKERS if marked else ()
    )
    rest = list(encode_chat(tokenizer, [(*messages, ("assistant", "say"))])[0][0])
    began = [tokenizer.eos_id, *encode_turn(tokenizer, messages)]

    def say(ids: list[int]) -> Tensor:
        out = torch.full((tokenizer.vocab_size,), -1e4)
        out[rest[len(ids) - 1]] = 10.0
        return out

    model = Scripted(say, tokenizer.vocab_size)
    settings = GenerateSettings(max_tokens=50, no_repeat_ngram=0)
    assert (
        generate_text(
            TextGenerator(model, tokenizer, 200),
            f"{render_chat(messages)}{START}assistant\n",
            settings,
            seed=1,
        )
        == "say"
    )
    assert model.seen[0][0] == began


def test_the_context_is_cropped_to_what_the_model_knows(tokenizer: Tokenizer) -> None:
    """It starts from the end-of-document token; beyond the context the oldest tokens fall away and
    positions start at 0."""
    model = Scripted(lambda ids: scores(a=1.0, b=1.0, c=1.0))
    generate_text(
        TextGenerator(model, tokenizer, 8),
        "xy",
        GenerateSettings(max_tokens=20, no_repeat_ngram=0),
        seed=1,
    )
    assert model.seen[0][0] == [tokenizer.eos_id, *tokenizer.encode_batch(["xy"])[0].tolist()]
    assert [len(ids) for ids, _ in model.seen] == [min(3 + i, 8) for i in range(20)]
    assert all(positions == list(range(len(ids))) for ids, positions in model.seen)
    long = [ids for ids, _ in model.seen if len(ids) == 8]
    assert all(later[:-1] == earlier[1:] for earlier, later in zip(long, long[1:]))


def test_the_same_seed_gives_the_same_text(tokenizer: Tokenizer) -> None:
    """With a real model, longer than its context; whatever state the global generator is in."""
    torch.manual_seed(1)
    model = SimpleLM(
        SimpleLMSettings(hidden_size=16, num_layers=1, num_heads=1, seq_length=8), 257
    ).eval()
    settings = GenerateSettings(max_tokens=30, top_p=0.99)
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(texts))
        before = torch.get_rng_state()
        texts.append(generate_text(TextGenerator(model, tokenizer, 8), "an", settings, seed=seed))
        assert torch.equal(torch.get_rng_state(), before), (
            "the run's own randomness must not be touched"
        )
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("temperature", "winners"), [(1e-40, {7}), (1e40, set(range(200)))])
def test_a_temperature_that_no_float_can_divide_by(
    temperature: float, winners: set[int], tokenizer: Tokenizer
) -> None:
    """The likeliest token, as with 0; and any that is not blocked."""
    row = GenerationRow(tokenizer, [3], SamplingParams(temperature=temperature), 0)
    for number in range(50):
        found = torch.linspace(-1, 1, tokenizer.vocab_size)
        found[7], found[200:] = 5.0, float("-inf")
        assert (row.choose if number % 2 else row.draft_sampler())(found) in winners


def test_a_temperature_of_zero_takes_the_likeliest(tokenizer: Tokenizer) -> None:
    model = Scripted(lambda ids: scores(a=1.0, b=1.01))
    settings = GenerateSettings(max_tokens=20, temperature=0.0, no_repeat_ngram=0)
    assert {
        generate_text(TextGenerator(model, tokenizer, 64), "x", settings, seed=seed)
        for seed in range(3)
    } == {"b" * 20}


def test_stop_strings_of_the_settings_end_a_sample(tokenizer: Tokenizer) -> None:
    # "abcabc" after a prompt of one letter
    model = Scripted(lambda ids: scores(**{"abc"[(len(ids) - 2) % 3]: 50.0}))
    for stop, text in ((["ca"], "ab"), (["zz", "cab"], "ab"), ([], "abcabcab")):
        settings = GenerateSettings(max_tokens=8, no_repeat_ngram=0, stop=stop)
        assert generate_text(TextGenerator(model, tokenizer, 64), "x", settings, seed=1) == text


def test_what_ends_a_text_is_never_blocked(tokenizer: Tokenizer) -> None:
    """Though the same three tokens stand in the prompt: a conversation has many ends."""
    bar = int(tokenizer.encode_batch(["|"])[0][0])

    def say(ids: list[int]) -> Tensor:
        out = scores(a=5.0, b=1.0)
        out[bar] = 9.0 if len(ids) > 6 else -1e4
        return out

    row = GenerationRow(
        tokenizer,
        document_start(tokenizer, "aa|a|"),
        SamplingParams(max_tokens=10, no_repeat_ngram=1),
        1,
        ends=[bar],
    )
    for _ in advance(TextGenerator(Scripted(say), tokenizer, 64), [row]):
        pass
    assert row.text == "b"


def test_scores_that_are_no_numbers_are_told(tokenizer: Tokenizer) -> None:
    model = Scripted(lambda ids: scores(a=1.0) * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate_text(TextGenerator(model, tokenizer, 64), "x", GenerateSettings(), seed=1)


# batches and caches -------------------------------------------------------------------------------

RAGGED = ["In year 31", "a", "", "the river of", "The stone met", "x" * 60, "a"]


def written(model: nn.Module, rows: list[GenerationRow]) -> list[list[int]]:
    for _ in advance(TextGenerator(model, byte_tokenizer(), CONTEXT), rows):  # type: ignore[arg-type]
        pass
    return [row.ids for row in rows]


def rows_of(params: SamplingParams) -> list[GenerationRow]:
    return [
        GenerationRow(byte_tokenizer(), document_start(byte_tokenizer(), text), params, seed)
        for seed, text in enumerate(RAGGED)
    ]


@pytest.mark.parametrize("kind", OF_TEXT)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=20, temperature=1.5, top_p=0.9, no_repeat_ngram=2),
    ],
)
def test_a_batch_is_each_row_alone_with_a_cache_or_without(
    kind: str, params: SamplingParams
) -> None:
    """Token for token, for prompts of any length, beyond the context too."""
    model = build(kind, byte_tokenizer().vocab_size)
    together = written(model, rows_of(params))
    assert [written(model, [row])[0] for row in rows_of(params)] == together
    model.new_cache = lambda: None
    assert written(model, rows_of(params)) == together
    assert len({tuple(row) for row in together}) == len(RAGGED) - (params.temperature == 0.0), (
        "a prompt stands there twice"
    )


@pytest.mark.parametrize("kind", OF_TEXT)
def test_the_likeliest_tokens_are_those_found_by_hand(kind: str) -> None:
    """Within the context, where one plain pass over everything before gives each token."""
    model = build(kind, byte_tokenizer().vocab_size)
    row = GenerationRow(
        byte_tokenizer(), document_start(byte_tokenizer(), "The"), SamplingParams(max_tokens=15), 0
    )
    begin = list(row.ids)
    assert written(model, [row])[0][4:] == continue_by_hand(
        model, begin, 15, stop=byte_tokenizer().eos_id
    )


def test_a_model_of_the_hub_generates_the_same_in_batches() -> None:
    """Its vocabulary is smaller than any tokenizer's; tokens are enough."""

    class Numbers:
        eos_id, vocab_size = 39, 40

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(65 + i) for i in ids)

    model, prompts = build("hub"), [[39, 1, 2], [39], [39, *range(20)]]
    found = []
    for batches in ([prompts], [[prompt] for prompt in prompts]):
        for batch in batches:
            rows = [
                GenerationRow(
                    Numbers(), ids, SamplingParams(max_tokens=12, temperature=1.0), len(ids)
                )
                for ids in batch
            ]  # type: ignore[arg-type]
            for _ in advance(TextGenerator(model, Numbers(), CONTEXT), rows):  # type: ignore[arg-type]
                pass
            found += [row.ids for row in rows]
    assert found[:3] == found[3:] and "hub" in KINDS


def test_pieces_of_a_stream_join_to_the_text() -> None:
    """Of a model that says bytes which are no characters; one that is left amid its text has said
    what was shown."""
    tokenizer, model = byte_tokenizer(), build("simple_lm", byte_tokenizer().vocab_size)
    params = SamplingParams(max_tokens=60, temperature=2.0, until=("qq",))
    pieces = list(
        stream_text(
            TextGenerator(model, tokenizer, CONTEXT),
            row := GenerationRow(tokenizer, document_start(tokenizer, "a"), params, 5),
        )
    )
    assert "".join(pieces) == row.text and row.finished and len(pieces) > 10 and "" not in pieces
    begun = stream_text(
        TextGenerator(model, tokenizer, CONTEXT),
        again := GenerationRow(tokenizer, document_start(tokenizer, "a"), params, 5),
    )
    first = [next(begun) for _ in range(5)]
    begun.close()
    assert first == pieces[:5] and not again.finished and again.text.startswith("".join(first))
