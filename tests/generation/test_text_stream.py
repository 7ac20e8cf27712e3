"""The text of tokens that come one by one: whole characters, stop strings wherever tokens cut them,
pieces that join."""

import random

import pytest

from core.data.tokenizer import Tokenizer
from core.generation.text_stream import TextStream, first_stop
from tests.evaluation.harness.tiny import bpe_tokenizer, byte_tokenizer

TOKENIZERS = [byte_tokenizer, bpe_tokenizer]


def told(
    tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()
) -> tuple[list[str], str]:
    """(what `take` gives after each token and at the end, the text)."""
    continuation, pieces = TextStream(tokenizer, stops), []
    for token in ids:
        continuation.add(token)
        pieces.append(continuation.take())
        if continuation.finished:
            break
    continuation.finish()
    return [*pieces, continuation.take()], continuation.text


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_join_to_what_the_tokens_decode_to(make) -> None:
    """Of any tokens whatever, which are seldom UTF-8."""
    tokenizer, draw = make(), random.Random(3)
    for _ in range(60):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 50))]
        pieces, text = told(tokenizer, ids)
        assert "".join(pieces) == text == tokenizer.decode(ids)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_no_half_character_is_ever_shown(make) -> None:
    tokenizer, text = make(), "naïve 日本語 👩🏽 ok \ufffd!"
    pieces, whole = told(tokenizer, ids_of(tokenizer, text))
    assert whole == text and all(
        text.startswith("".join(pieces[: i + 1])) for i in range(len(pieces))
    )
    half = tokenizer.encode_batch(["日"])[0].tolist()[:-1]
    pieces, whole = told(byte_tokenizer(), ids_of(byte_tokenizer(), "a日")[:-1])
    assert pieces == ["a", "", "", "\ufffd"] and whole == "a\ufffd", (
        "what stays half is shown at the end"
    )
    assert told(tokenizer, half)[1] == tokenizer.decode(half)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_stop_string_cuts_wherever_tokens_do(make) -> None:
    """Exactly where the whole text would be cut; what belongs to it is never shown, what only looks
    like its beginning is."""
    tokenizer, draw = make(), random.Random(4)
    text = "the river of stone ## met a ### winter\n\nUser: é日 the garden"
    for _ in range(300):
        stops = tuple(
            text[(i := draw.randrange(len(text))) : i + draw.randrange(1, 9)]
            for _ in range(draw.randrange(1, 3))
        )
        pieces, said = told(tokenizer, ids_of(tokenizer, text), (*stops, "never there", ""))
        # several stops: the first that is complete counts, and in one token the leftmost
        cuts = [first_stop(text, (stop,)) for stop in stops]
        assert said == text[: len(said)] and len(said) in cuts
        assert "".join(pieces) == said and not any(stop in said for stop in stops)
        if len(stops) == 1:
            assert len(said) == cuts[0]


def test_the_beginning_of_a_stop_string_waits() -> None:
    tokenizer = byte_tokenizer()
    assert told(tokenizer, ids_of(tokenizer, "a##b###c"), ("###",))[0] == [
        "a",
        "",
        "",
        "##b",
        "",
        "",
        "",
        "",
    ]
    assert told(tokenizer, ids_of(tokenizer, "a##"), ("###",))[0] == ["a", "", "", "##"]
    assert told(tokenizer, ids_of(tokenizer, "aab"), ("aab",)) == (["", "", "", ""], "")


def test_long_texts_are_decoded_a_few_tokens_at_a_time() -> None:
    class Counting:
        decoded = 0

        def decode(self, ids: list[int]) -> str:
            self.decoded += len(ids)
            return byte_tokenizer().decode(ids)

    tokenizer = Counting()
    told(tokenizer, [65] * 2000)  # type: ignore[arg-type]
    assert tokenizer.decoded < 2000 * 6
