"""Conversations as ChatML: the text of one, its tokens, and which of them are learned.

In:    messages: (role, content) in order
Out:   ids and a mask, without the end-of-document token, which objectives.py adds
State: none

    <|im_start|>user⏎What is 2+2?<|im_end|>⏎<|im_start|>assistant⏎It is 4.<|im_end|>⏎
                                                                  ~~~~~~~~~~~~~~~~~~~ learned

A message cannot leave its place: where the markers are special tokens, the tokenizer writes them for no text whatever.
"""

import re
from collections.abc import Iterator

import numpy as np

from core.data.documents import ASSISTANT, ROLES, Messages
from core.data.tokenizer import Tokenizer

START, STOP = MARKERS = ("<|im_start|>", "<|im_end|>")

_WRITTEN_OUT = re.compile(rf"{re.escape(START)}(\w+)\n(.*?){re.escape(STOP)}\n", re.DOTALL)


def render_chat(messages: Messages) -> str:
    """A conversation as a person would see it; not for encoding, since a message may hold what looks like a marker."""
    return "".join(f"{START}{role}\n{content}{STOP}\n" for role, content in _kept(messages))


def encode_chat(tokenizer: Tokenizer, conversations: list[Messages]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids (n,) int32, learned (n,) bool) of each conversation, all of them tokenized in one call.

    Learned are the tokens that lie wholly inside what an assistant says and the marker and line end that close it.
    """
    if chat_note(tokenizer) is not None:
        return _encode_spelled_out(tokenizer, conversations)
    start, stop = (np.array([tokenizer.special_id(marker)], dtype=np.int32) for marker in MARKERS)
    # special tokens cut a text before anything else looks at it: its pieces give the tokens that the whole would
    pieces = [f"{role}\n{content}" for messages in conversations for role, content in _kept(messages)]
    (line_end, _), *rest = tokenizer.encode_with_spans(["\n", *pieces])
    encoded, out = iter(rest), []
    for messages in conversations:
        ids, learned = [np.empty(0, np.int32)], [np.empty(0, np.bool_)]
        for role, _ in _kept(messages):
            piece, spans = next(encoded)
            own = role == ASSISTANT
            ids += [start, piece, stop, line_end]
            learned += [np.zeros(1, np.bool_), own & (spans[:, 0] > len(role)), np.full(1 + len(line_end), own)]
        out.append((np.concatenate(ids), np.concatenate(learned)))
    return out


def encode_turn(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The ids of a conversation up to where the assistant begins to say its next message."""
    if chat_note(tokenizer) is not None:
        return tokenizer.encode_batch([f"{render_chat(messages)}{START}{ASSISTANT}\n"])[0].tolist()
    ((ids, _),) = encode_chat(tokenizer, [messages])
    opening = tokenizer.encode_batch([f"{ASSISTANT}\n"])[0].tolist()
    return [*ids.tolist(), tokenizer.special_id(START), *opening]


def read_turn(text: str) -> Messages | None:
    """The conversation in a prompt that is written out, "<|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎"; None if it is
    none. For prompts of presets: what a person types is never looked into."""
    body = text.removesuffix(f"{START}{ASSISTANT}\n")
    found = tuple(_WRITTEN_OUT.findall(body))
    return found if found and body != text and render_chat(found) == body else None


def chat_note(tokenizer: Tokenizer) -> str | None:
    """What a person should know of conversations under this tokenizer."""
    if all(tokenizer.special_id(marker) is not None for marker in MARKERS):
        return None
    return f"the tokenizer has no special tokens {START} and {STOP}: conversations spell them out as text"


def _encode_spelled_out(tokenizer: Tokenizer, conversations: list[Messages]) -> list[tuple[np.ndarray, np.ndarray]]:
    out = []
    texts = [render_chat(messages) for messages in conversations]
    for messages, (ids, spans) in zip(conversations, tokenizer.encode_with_spans(texts)):
        learned = np.zeros(len(ids), np.bool_)
        for begin, end in _bodies(messages):
            learned |= (spans[:, 0] >= begin) & (spans[:, 1] <= end)
        out.append((ids, learned))
    return out


def _bodies(messages: Messages) -> Iterator[tuple[int, int]]:
    """[begin, end) in the rendered text of what each assistant message says, its closing marker and line end included."""
    end = 0
    for role, content in _kept(messages):
        begin = end + len(f"{START}{role}\n")
        end = begin + len(f"{content}{STOP}\n")
        if role == ASSISTANT:
            yield begin, end


def _kept(messages: Messages) -> Messages:
    return tuple(message for message in messages if message[0] in ROLES)
