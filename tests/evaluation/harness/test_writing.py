"""Continuations: as by hand, for every model, in batches of prompts of any length; where they end,
and how they are drawn."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.contracts import Batch, ModelOutput, call_if_defined
from core.evaluation.harness.writing import Writer
from core.generation.engine import TextGenerator
from core.generation.sampling import SamplingParams
from core.generation.text_stream import first_stop
from core.models.readout import LinearReadout
from tests.evaluation.harness.tiny import CONTEXT, OF_TEXT, build, byte_tokenizer, continue_by_hand

EOS = byte_tokenizer().eos_id
PROMPTS = ["In year 31", "a", "", "the river of", "The stone met", "x" * 40, "a"]


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode_batch([text])[0].tolist()


@pytest.mark.parametrize("kind", OF_TEXT)
def test_greedy_is_the_likeliest_token_each_time(kind: str) -> None:
    """Whatever the batch. A prompt too long loses its beginning, so that everything written can be
    seen."""
    tokenizer, model = byte_tokenizer(), build(kind, byte_tokenizer().vocab_size)
    expected = []
    for prompt in PROMPTS:
        ids = (ids_of(prompt) or [EOS])[-(CONTEXT - 6) :]
        expected.append(tokenizer.decode(continue_by_hand(model, ids, 6, stop=EOS)))
    for batch_size in (1, 3, 16):
        writer = Writer(TextGenerator(model, tokenizer, CONTEXT), batch_size)
        assert (
            writer.write([(prompt, SamplingParams(max_tokens=6)) for prompt in PROMPTS]) == expected
        )
        assert writer.notes == []
    assert len(set(expected)) > 1


class Script(nn.Module):
    """Says what it is told to, after any prompt; remembers what it was shown."""

    is_causal = True

    def __init__(self, text: str, vocab_size: int = 257):
        super().__init__()
        self.table, self.seen = nn.Parameter(torch.eye(vocab_size)), []
        self.says = [*ids_of(text), EOS]
        self.starts: dict[str, int] = {}

    def forward(self, batch: Batch) -> ModelOutput:
        ids = batch.input_ids.tolist()
        self.seen.append(ids)
        hidden = torch.zeros(*batch.input_ids.shape, len(self.table))
        for row, tokens in enumerate(ids):
            marks = [i for i, token in enumerate(tokens) if token == ids_of("|")[0]]
            said = len(tokens) - 1 - marks[-1] if marks else 0  # still in its prompt
            hidden[row, -1, self.says[min(said, len(self.says) - 1)]] = 50.0
        return ModelOutput(hidden, LinearReadout(self.table))


def say(
    text: str, batch_size: int = 4, prompts: tuple[str, ...] = ("|",), **params: Any
) -> list[str]:
    writer = Writer(TextGenerator(Script(text), byte_tokenizer(), 64), batch_size)
    return writer.write([(prompt, SamplingParams(**params)) for prompt in prompts])


def test_a_text_ends_where_the_first_stop_string_begins() -> None:
    """In the text, not in its tokens: the beginning of a stop string ends nothing. The one that
    comes first counts."""
    assert say("one two\nthree", until=("\n",)) == ["one two"]
    assert say("a###b####c", until=("####",)) == ["a###b"]
    assert say("abcXYZdef", until=("f", "XYZ", "Zd")) == ["abc"]
    assert say("Q", until=("Q",)) == [""]
    assert say("Question: no", until=("Question: yes", "")) == ["Question: no"]
    assert first_stop("abc", ("d", "")) is None and first_stop("abcab", ("b", "ca")) == 1


def test_a_text_ends_with_the_document_or_the_limit() -> None:
    assert say("all of it") == ["all of it"]
    assert say("all of it", max_tokens=5) == ["all o"]
    assert say("é", max_tokens=2) == ["é"]


def test_every_row_has_its_own_wish() -> None:
    """In one batch, with prompts of different length: each ends by itself, and sees nothing but its
    own tokens."""
    model = Script("0123456789")
    asked = [
        ("||||", SamplingParams(until=("4",))),
        ("a|", SamplingParams(max_tokens=2)),
        ("abc|", SamplingParams()),
        ("ab|", SamplingParams(until=("89", "7"))),
    ]
    assert Writer(TextGenerator(model, byte_tokenizer(), 64), 4).write(asked) == [
        "0123",
        "01",
        "0123456789",
        "0123456",
    ]
    assert len(model.seen[0]) == 4 and len(model.seen[0][0]) == 2, (
        "the first pass reads as much as the shortest prompt has"
    )
    for (prompt, _), row in zip(sorted(asked, key=lambda each: -len(each[0])), zip(*model.seen)):
        assert list(row[-1])[: len(prompt)] == ids_of(prompt)


def test_prompt_and_text_fit_into_the_context() -> None:
    """The prompt's end is what stays. A task that wants more than half of a small context gets
    less, and it is told."""
    model = Script("x" * 200)
    writer = Writer(TextGenerator(model, byte_tokenizer(), 16), 4)
    prompt = "abcdefghijklmnopqrstuvw|"
    assert (
        writer.write([(prompt, SamplingParams(max_tokens=4))]) == ["x" * 4] and writer.notes == []
    )
    assert model.seen[0][0] == ids_of(prompt)[-12:] and max(len(ids[0]) for ids in model.seen) <= 16
    assert writer.write(
        [(prompt, SamplingParams(max_tokens=256)), ("ab|", SamplingParams(max_tokens=256))]
    ) == [
        "x" * 8,
        "x" * 13,
    ]
    assert writer.notes == ["the model sees 16 tokens: texts of up to 256 tokens end earlier here"]
    assert max(len(ids[0]) for ids in model.seen) <= 16


def test_draws_depend_on_the_prompt_and_not_on_its_batch() -> None:
    """The same prompt asked again is drawn anew; the nucleus keeps out what is unlikely."""
    model = build("simple_lm", byte_tokenizer().vocab_size)
    asked = [(prompt, SamplingParams(max_tokens=8, temperature=1.5)) for prompt in PROMPTS]
    texts = [
        Writer(TextGenerator(model, byte_tokenizer(), CONTEXT), size, seed=2).write(asked)
        for size in (1, 4, 16)
    ]
    assert texts[0] == texts[1] == texts[2] and texts[0][1] != texts[0][-1]
    assert (
        Writer(TextGenerator(model, byte_tokenizer(), CONTEXT), 4, seed=3).write(asked) != texts[0]
    )
    greedy = Writer(TextGenerator(model, byte_tokenizer(), CONTEXT), 4).write(
        [(prompt, SamplingParams(max_tokens=8)) for prompt in PROMPTS]
    )
    narrow = [
        (prompt, SamplingParams(max_tokens=8, temperature=1.5, top_p=1e-6)) for prompt in PROMPTS
    ]
    assert Writer(TextGenerator(model, byte_tokenizer(), CONTEXT), 4).write(narrow) == greedy


def test_rows_that_no_token_has_are_never_said() -> None:
    """A published table may have more rows than its tokenizer has tokens."""

    class Wide(Script):
        def forward(self, batch: Batch) -> ModelOutput:
            output = super().forward(batch)
            output.hidden[..., 257:] = 100.0
            return output

    model = Wide("fine", vocab_size=300)
    assert Writer(TextGenerator(model, byte_tokenizer(), 64), 1).write(
        [("|", SamplingParams())]
    ) == ["fine"]


def test_it_can_be_stopped_between_tokens() -> None:
    """Whoever is told may raise."""
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Writer(TextGenerator(Script("x" * 50), byte_tokenizer(), 64), 1).write(
            [("|", SamplingParams())] * 2, stop
        )
    assert told == [(0, 2)] * 3


def test_with_a_cache_each_token_is_read_once() -> None:
    """And a model that is not causal reads everything anew."""
    for kind, expected in (("simple_lm", [3, 1, 1, 1, 1]), ("not causal", [3, 4, 5, 6, 7])):
        model, widths = build(kind, byte_tokenizer().vocab_size), []
        assert (call_if_defined(model, "new_cache") is None) == (kind == "not causal")
        forward, extend = model.forward, getattr(model, "extend", None)

        def read(ids: Tensor, *more: Any, run: Any = None, widths: Any = widths) -> Any:
            widths.append((ids if isinstance(ids, Tensor) else ids.input_ids).shape[1])
            return run(ids, *more)

        model.forward = lambda batch, run=forward, read=read: read(batch, run=run)
        model.extend = lambda ids, cache, run=extend, read=read: read(ids, cache, run=run)
        Writer(TextGenerator(model, byte_tokenizer(), CONTEXT), 2).write(
            [("abc", SamplingParams(max_tokens=4)), ("abcd", SamplingParams(max_tokens=4))]
        )
        assert widths == expected
