"""Conversations as ChatML: their text, their tokens, and which of the tokens are learned.

In:    messages: (role, content) in order
Out:   ids, a mask and a number of bytes, without the end-of-document token, which objectives.py
       adds
State: none

    <|im_start|>user⏎What is 2+2?<|im_end|>⏎<|im_start|>assistant⏎It is 4.<|im_end|>⏎
                                                                  ~~~~~~~~~~~~~~~~~~~ learned

A message cannot imitate a marker: where the markers are special tokens, no text is ever encoded to
them.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np

from core.data.documents import ASSISTANT, ROLES, Messages, num_bytes_of
from core.data.tokenizer import MARKERS, Tokenizer

START, STOP = MARKERS

_WRITTEN_OUT = re.compile(rf"{re.escape(START)}(\w+)\n(.*?){re.escape(STOP)}\n", re.DOTALL)


def render_chat(messages: Messages) -> str:
    """Write a conversation as a person would see it; not for encoding, since a message may contain
    what looks like a marker."""
    return _rendered(_turns(messages))


def encode_chat(
    tokenizer: Tokenizer,
    conversations: Sequence[Messages],
    read_only: Sequence[tuple[int, ...]] = (),
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Tokenize conversations in one call; return (ids (n,) int32, learned (n,) bool, UTF-8 bytes
    that are learned) of each.

    Learned are the tokens that lie wholly inside what an assistant says and the marker and line end
    that close it; a marker that is a special token has no bytes.

    read_only   of each conversation, the numbers of the assistant's messages that are not learned
    """
    talks = [
        _turns(messages, numbers)
        for messages, numbers in zip_longest(conversations, read_only, fillvalue=())
    ]
    if chat_note(tokenizer) is not None:
        return _encode_spelled_out(tokenizer, talks)
    start, stop = (np.array([tokenizer.special_id(marker)], dtype=np.int32) for marker in MARKERS)
    # special tokens cut a text before anything else looks at it: its pieces give the tokens that
    # the whole would
    pieces = [f"{role}\n{content}" for turns in talks for role, content, _ in turns]
    (line_end, _), *rest = tokenizer.encode_with_spans(["\n", *pieces])
    encoded, out = iter(zip(pieces, rest)), []
    for turns in talks:
        ids, learned, total = [np.empty(0, np.int32)], [np.empty(0, np.bool_)], 0
        for role, _, is_learned in turns:
            text, (piece, spans) = next(encoded)
            inside, num_bytes = _inside(text, spans, len(role) + 1, len(text))
            closing = np.full(1 + len(line_end), is_learned)
            ids += [start, piece, stop, line_end]
            learned += [np.zeros(1, np.bool_), is_learned & inside, closing]
            total += is_learned * (num_bytes + 1)
        out.append((np.concatenate(ids), np.concatenate(learned), total))
    return out


def encode_turn(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation, up to where the assistant's next message begins."""
    if chat_note(tokenizer) is not None:
        return tokenizer.encode_batch([f"{render_chat(messages)}{START}{ASSISTANT}\n"])[0].tolist()
    ((ids, _, _),) = encode_chat(tokenizer, [messages])
    opening = tokenizer.encode_batch([f"{ASSISTANT}\n"])[0].tolist()
    return [*ids.tolist(), tokenizer.special_id(START), *opening]


def read_turn(text: str) -> Messages | None:
    """Read the conversation in a prompt like
    "<|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎"; None if it is no conversation. For
    prompts of presets: what a person types is never parsed."""
    body = text.removesuffix(f"{START}{ASSISTANT}\n")
    messages = tuple(_WRITTEN_OUT.findall(body))
    return messages if messages and body != text and render_chat(messages) == body else None


def chat_note(tokenizer: Tokenizer) -> str | None:
    """Return a note where this tokenizer has no special tokens for conversations."""
    if all(tokenizer.special_id(marker) is not None for marker in MARKERS):
        return None
    return (
        f"the tokenizer has no special tokens {START} and {STOP}: conversations spell them "
        "out as text"
    )


Turns = list[tuple[str, str, bool]]
"""(role, content, whether it is learned) in order."""


def _turns(messages: Messages, read_only: tuple[int, ...] = ()) -> Turns:
    return [
        (role, content, role == ASSISTANT and i not in read_only)
        for i, (role, content) in enumerate(messages)
        if role in ROLES
    ]


def _rendered(turns: Turns) -> str:
    return "".join(f"{START}{role}\n{content}{STOP}\n" for role, content, _ in turns)


def _encode_spelled_out(
    tokenizer: Tokenizer, talks: list[Turns]
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    out, texts = [], [_rendered(turns) for turns in talks]
    for turns, text, (ids, spans) in zip(talks, texts, tokenizer.encode_with_spans(texts)):
        learned, total = np.zeros(len(ids), np.bool_), 0
        for begin, end in _bodies(turns):
            inside, num_bytes = _inside(text, spans, begin, end)
            learned, total = learned | inside, total + num_bytes
        out.append((ids, learned, total))
    return out


def _inside(text: str, spans: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, int]:
    """Return which tokens (n,) lie wholly inside [begin, end) of the text, and the number of its
    bytes that no token from outside reaches into."""
    first, last = spans[:, 0], spans[:, 1]
    before, after = last[(first < begin) & (last > begin)], first[(first < end) & (last > end)]
    text = text[max([begin, *before.tolist()]) : min([end, *after.tolist()])]
    return (first >= begin) & (last <= end), num_bytes_of(text)


def _bodies(turns: Turns) -> Iterator[tuple[int, int]]:
    """Yield [begin, end) of each learned message in the rendered text, with its closing marker and
    line end."""
    end = 0
    for role, content, is_learned in turns:
        begin = end + len(f"{START}{role}\n")
        end = begin + len(f"{content}{STOP}\n")
        if is_learned:
            yield begin, end
