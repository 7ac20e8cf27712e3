"""Mends tokenizers that lack a token for unknown text, and measures how much of a text has no
token.

In:    a tokenizers-library JSON, as a dict; or a tokenizer and texts
Out:   the same with a token for unknown text, every token at the id it was made with; or how much
       of the texts is not read
State: none
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import UserError

UNKNOWN = "<unk>"
LARGEST_ID = 1 << 24
"""A token beyond this one would cost gigabytes of embeddings: somebody's mistake."""
UNLIKELY = 100.0
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
EXAMPLE_CHARACTERS = 20

Spans = Sequence[tuple[np.ndarray, np.ndarray]]


def mended(facts: dict[str, Any], end: str, where: str) -> dict[str, Any] | None:
    """Return the tokenizer with a token for unknown text, where it may meet some and has none, or
    only `end` for it; None where nothing needs mending.

    The library numbers added tokens by the size of the vocabulary. One with holes in its ids, or
    one that grows here, gets them into the vocabulary itself, each at its id, and `end` behind the
    others where it is not there. Raises UserError for an id that is absurd.
    """
    facts = copy.deepcopy(facts)
    facts["added_tokens"] = facts.get("added_tokens") or []
    model, added = facts["model"], facts["added_tokens"]
    vocabulary = _ids_of(model)
    ids = {token["content"]: token["id"] for token in added} | vocabulary
    size, unknown = max(ids.values(), default=-1) + 1, unknown_of(model)
    if size > LARGEST_ID:
        raise UserError(
            f"{where} has a token of id {size - 1:,}: no model has so many. Number its tokens "
            "from 0 on"
        )
    lacking = not is_complete(facts) and (unknown not in vocabulary or unknown == end)
    # a BPE that leaves out merges at random gives one text many encodings
    chance = bool(model.get("dropout"))
    if chance:
        model["dropout"] = None
    if not lacking and size == len(ids):
        return facts if chance else None
    new = [end]
    if lacking:
        unknown = unknown if unknown not in (None, end) else UNKNOWN
        new.append(unknown)
    for name in new:
        if name not in ids:
            ids[name] = max(ids.values(), default=-1) + 1
            added.append(
                dict.fromkeys(FLAGS, False) | {"id": ids[name], "content": name, "special": True}
            )
    # a piece's place is its id; what was no piece before is never the likeliest one
    if isinstance(model["vocab"], list):
        names = {i: name for name, i in ids.items()}
        worst = min((score for _, score in model["vocab"]), default=0.0)
        places = range(len(model["vocab"]), max(names) + 1)
        model["vocab"] += [[names.get(i, f"<hole {i}>"), worst - UNLIKELY] for i in places]
        model["unk_id"] = ids[unknown]
    else:
        model["vocab"] = ids
        model["unk_token"] = unknown
    return facts


def unknown_of(model: dict[str, Any]) -> str | None:
    """Return the token for what the model does not know, whether its vocabulary has it or not."""
    if isinstance(model["vocab"], list):
        index = model.get("unk_id")
        return None if index is None else model["vocab"][index][0]
    return model.get("unk_token")


def is_complete(facts: dict[str, Any]) -> bool:
    """Return whether every text can be written: by tokens for all 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    model, vocabulary = facts["model"], _ids_of(facts["model"])
    in_bytes = any(
        '"ByteLevel"' in json.dumps(facts.get(part)) for part in ("pre_tokenizer", "normalizer")
    )
    if (
        model.get("type", "BPE") == "BPE"
        and in_bytes
        and vocabulary.keys() >= set(ByteLevel.alphabet())
    ):
        return not model.get("end_of_word_suffix") or all(
            c + model["end_of_word_suffix"] in vocabulary for c in ByteLevel.alphabet()
        )
    return bool(model.get("byte_fallback")) and all(
        f"<0x{byte:02X}>" in vocabulary for byte in range(256)
    )


def _ids_of(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    return (
        {piece: i for i, (piece, _) in enumerate(vocabulary)}
        if isinstance(vocabulary, list)
        else vocabulary
    )


@dataclass(frozen=True)
class Unread:
    """The part of some texts that has no token; white space counts only where it is lost."""

    characters: int
    of: int
    example: str  # what is lost first

    @property
    def share(self) -> float:
        return self.characters / self.of if self.of else 0.0

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.3g} % of the characters have no token (first: "
            f"{json.dumps(self.example, ensure_ascii=False)})"
        )


def unread(texts: Sequence[str], encoded: Spans, unknown_id: int | None) -> Unread:
    """Measure the part of texts that has no token: what the unknown token stands for, and what no
    token does. White space that no token stands for does not count: a tokenizer may pass over it.

    encoded   (ids (n,), spans (n, 2)) of each text
    """
    lost, of, example = 0, 0, ""
    for text, (ids, spans) in zip(texts, encoded):
        is_unknown = ids == (-1 if unknown_id is None else unknown_id)
        unknown = _covered(len(text), spans[is_unknown])
        known = _covered(len(text), spans[~is_unknown])
        blank = np.array([character.isspace() for character in text], dtype=bool)
        is_lost = ~known & (unknown | ~blank)
        lost, of = lost + int(is_lost.sum()), of + int((is_lost | ~blank).sum())
        if not example and is_lost.any():
            begin = int(np.argmax(is_lost))
            length = int(np.argmin(np.append(is_lost[begin:], False)))
            example = text[begin : begin + min(length, EXAMPLE_CHARACTERS)]
    return Unread(lost, of, example)


def _covered(length: int, spans: np.ndarray) -> np.ndarray:
    """Return for each character whether any of the spans (n, 2) covers it: (length,) bool."""
    open_spans = np.zeros(length + 1, dtype=np.int64)
    np.add.at(open_spans, spans[:, 0], 1)
    np.add.at(open_spans, spans[:, 1], -1)
    return np.cumsum(open_spans)[:-1] > 0
