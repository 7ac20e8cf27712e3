"""Which documents are held out, and the held-out rows that evaluation reads.

In:    opened sources
Out:   HoldOut: is this document for validation?  and held-out documents, one by one or in rows
State: none; both are functions of the sources' content and the preset
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from core.data.documents import Document, Encoded, Source, held_out_by_hash
from core.data.encoding import encode
from core.data.objectives import IGNORE_INDEX, Objective
from core.data.packing import Packer, Place, Row
from core.data.tokenizer import MASK, Tokenizer
from core.errors import SourceUnavailable

SMALL_CORPUS = 300
"""Documents below which a hash may well hold out none at all; such a source holds out its last ones instead."""
SMALL_SHARE = 0.05
PSEUDO_TOKENS, PSEUDO_CONTEXT = 1024, 128
"""Tokens that are hidden one at a time, and of how many their context is made: each costs a row of its own."""
SCAN_DOCUMENTS = 20_000
"""Documents of a source searched for held-out ones; a stream would be read for hours otherwise."""


@dataclass
class HoldOut:
    """Validation by a stable hash of the text, or, for small sources, the last documents, by the digests of their texts.

    A text is held out of every source or of none, wherever else it occurs.
    """

    fraction: float
    held: dict[str, list[int]] = field(default_factory=dict)  # small sources: digests of what they hold out
    released: list[int] = field(default_factory=list)  # digests that the hash would hold out, and a small source needs
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._held = {digest for digests in self.held.values() for digest in digests}
        self._released = set(self.released)

    def holds(self, document: Document) -> bool:
        digest = document.digest
        return digest in self._held or (held_out_by_hash(digest, self.fraction) and digest not in self._released)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: what was held out stays so when files are added."""
        return {"held": self.held, "released": self.released}


def may_train(hold_out: HoldOut, min_text_length: int, document: Document) -> bool:
    """Whether a document is long enough, and not held out."""
    return not document.is_shorter_than(min_text_length) and not hold_out.holds(document)


def plan_hold_out(sources: list[Source], fraction: float, min_text_length: int, before: dict[str, Any] | None = None) -> HoldOut:
    """Decide how each source is split. Finite sources are counted, but no further than SMALL_CORPUS documents.

    before  the state of an earlier plan: its choices stand for sources that still hold what they held out
    """
    before = before or {"held": {}, "released": []}
    held: dict[str, list[int]] = {}
    released, notes = set(before["released"]), []
    for source in sources:
        found = _small(source, min_text_length)
        if not found:
            continue
        digests = {digest for _, digest in found}
        earlier = before["held"].get(source.name)
        if earlier is not None and (not earlier or digests & set(earlier)):
            held[source.name] = earlier
            chosen = [digest for digest in earlier if digest in digests]
        else:
            # by key, not by place: an epoch's order is shuffled, a key's order is that of the files and pages
            ordered = [digest for _, digest in sorted(found, key=lambda each: _natural(each[0]))]
            chosen = held[source.name] = ordered[len(ordered) - _small_share(len(ordered)) :]
        left = digests - set(chosen)
        if all(held_out_by_hash(digest, fraction) for digest in left):
            released |= left
        told = f"holds out its last {len(chosen)}" if chosen else "is too small to hold anything out"
        notes.append(f"{source.name} has only {len(found)} documents; validation {told}")
    return HoldOut(fraction, held, sorted(released), notes)


def _small(source: Source, min_text_length: int) -> list[tuple[str, int]]:
    """(key, digest) of each document of a small finite source; none of another."""
    found: list[tuple[str, int]] = []
    try:
        for document in source.stream({}) if source.finite else ():
            if not document.is_shorter_than(min_text_length):
                found.append((document.key, document.digest))
            if len(found) >= SMALL_CORPUS:
                return []
    except SourceUnavailable:  # training will meet the same error, and drop the source
        return []
    return found


def _small_share(count: int) -> int:
    return 0 if count == 1 else max(1, round(count * SMALL_SHARE))


def _natural(key: str) -> tuple[str, int]:
    name, _, piece = key.rpartition("#")
    return (name, int(piece)) if piece.isdigit() else (key, 0)


def held_out_documents(
    source: Source, hold_out: HoldOut, tokenizer: Tokenizer, min_text_length: int
) -> Iterator[tuple[int, Encoded]]:
    """(its place among the source's documents, its tokens) of each document that is held out, among the first SCAN_DOCUMENTS."""
    try:
        for scanned, document in enumerate(islice(source.stream({}), SCAN_DOCUMENTS)):
            if not document.is_shorter_than(min_text_length) and hold_out.holds(document):
                yield scanned, encode(tokenizer, [document])[0]
    except SourceUnavailable:
        return  # what came before still measures; training reports the failure


def validation_rows(
    sources: list[Source],
    hold_out: HoldOut,
    tokenizer: Tokenizer,
    objective: Objective,
    seq_length: int,
    tokens: int,
    min_text_length: int,
) -> list[Row]:
    """Packed rows of held-out documents: about `tokens` of them, shared evenly among the sources that have any."""
    rows: list[Row] = []
    for number, source in enumerate(sources):
        wanted = tokens // len(sources)
        packer = Packer(number, seq_length, tokenizer.eos_id, Place())
        collected = 0
        documents = held_out_documents(source, hold_out, tokenizer, min_text_length)
        while collected < wanted and (found := next(documents, None)) is not None:
            scanned, encoded = found
            inputs, labels = objective(encoded, scanned)
            known = tokenizer.num_bytes(encoded.ids) if encoded.num_bytes is None else encoded.num_bytes
            packer.add(scanned, number, encoded.digest, False, inputs, labels, known)
            collected += len(inputs)
        while collected > 0:
            row = packer.row()
            collected -= int((row.source_ids >= 0).sum())
            rows.append(row)
    return rows


def hide_one(rows: list[Row], tokenizer: Tokenizer) -> list[Row]:
    """Rows in each of which one token is hidden and is the only target: what pseudo-perplexity asks.

    They are the beginnings of some of `rows`, of masked tokens, from all over them; every token has its turn but special ones.
    """
    mask_id = tokenizer.special_id(MASK)
    size = min(PSEUDO_CONTEXT, len(rows[0].input_ids)) if rows else 1
    count = min(len(rows), PSEUDO_TOKENS // size)
    found: list[Row] = []
    for row in (rows[i * len(rows) // count] for i in range(count)):
        whole = np.where(row.labels >= 0, row.labels, row.input_ids)[:size]
        may = (row.source_ids[:size] >= 0) & ~np.isin(whole, tokenizer.special_ids)
        for t in np.flatnonzero(may).tolist():
            input_ids, labels = whole.copy(), np.full(size, IGNORE_INDEX, dtype=np.int32)
            input_ids[t], labels[t] = mask_id, whole[t]
            kept = {name: getattr(row, name)[:size] for name in ("position_ids", "document_ids", "source_ids")}
            found.append(replace(row, input_ids=input_ids, labels=labels, **kept))
    return found
