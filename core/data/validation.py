"""Which documents are held out, and the held-out rows that evaluation reads.

In:    opened sources
Out:   HoldOut: is this document for validation?  and rows of held-out documents
State: none; both are functions of the sources' content and the preset
"""

from dataclasses import dataclass, field

from core.data.documents import Document, Source, held_out_by_hash
from core.data.encoding import encode
from core.data.objectives import next_token
from core.data.packing import Packer, Place, Row
from core.data.tokenizer import Tokenizer
from core.errors import SourceUnavailable

SMALL_CORPUS = 300
"""Documents below which a hash may well hold out none at all; such a source holds out its last ones instead."""
SMALL_SHARE = 0.05
SCAN_DOCUMENTS = 20_000
"""Documents of a source searched for held-out ones; a stream would be read for hours otherwise."""


@dataclass
class HoldOut:
    """Validation by a stable hash of the text, or, for small sources, by name of the last documents."""

    fraction: float
    keys: dict[str, set[str]] = field(default_factory=dict)  # small sources: the keys of their held-out documents
    notes: list[str] = field(default_factory=list)

    def holds(self, source: str, document: Document) -> bool:
        if source in self.keys:
            return document.key in self.keys[source]
        return held_out_by_hash(document, self.fraction)


def may_train(hold_out: HoldOut, min_text_length: int, source: str, document: Document) -> bool:
    """Whether a document is long enough, and not held out."""
    return not document.is_shorter_than(min_text_length) and not hold_out.holds(source, document)


def plan_hold_out(sources: list[Source], fraction: float, min_text_length: int) -> HoldOut:
    """Decide how each source is split. Finite sources are counted, but no further than SMALL_CORPUS documents."""
    plan = HoldOut(fraction)
    for source in sources:
        if not source.finite:
            continue
        keys = []
        try:
            for document in source.stream({}):
                if not document.is_shorter_than(min_text_length):
                    keys.append(document.key)
                if len(keys) >= SMALL_CORPUS:
                    break
        except SourceUnavailable:
            continue  # training will meet the same error, and drop the source
        if 0 < len(keys) < SMALL_CORPUS:
            # by key, not by place: an epoch's order is shuffled, a key's order is that of the files and pages
            held = sorted(keys, key=_natural)[len(keys) - _small_share(len(keys)) :]
            plan.keys[source.name] = set(held)
            told = f"holds out its last {len(held)}" if held else "is too small to hold anything out"
            plan.notes.append(f"{source.name} has only {len(keys)} documents; validation {told}")
    return plan


def _small_share(count: int) -> int:
    return 0 if count == 1 else max(1, round(count * SMALL_SHARE))


def _natural(key: str) -> tuple[str, int]:
    name, _, piece = key.rpartition("#")
    return (name, int(piece)) if piece.isdigit() else (key, 0)


def validation_rows(
    sources: list[Source], hold_out: HoldOut, tokenizer: Tokenizer, seq_length: int, tokens: int, min_text_length: int
) -> list[Row]:
    """Packed rows of held-out documents: about `tokens` of them, shared evenly among the sources that have any."""
    rows: list[Row] = []
    for number, source in enumerate(sources):
        wanted = tokens // len(sources)
        packer = Packer(number, seq_length, tokenizer.eos_id, Place())
        collected = 0
        try:
            for scanned, document in enumerate(source.stream({})):
                if collected >= wanted or scanned >= SCAN_DOCUMENTS:
                    break
                if document.is_shorter_than(min_text_length) or not hold_out.holds(source.name, document):
                    continue
                encoded = encode(tokenizer, [document])[0]
                inputs, labels = next_token(encoded, tokenizer.eos_id)
                packer.add(scanned, number, encoded.digest, False, inputs, labels)
                collected += len(inputs)
        except SourceUnavailable:
            pass  # what was collected still measures; training reports the failure
        while collected > 0:
            row = packer.row()
            collected -= int((row.source_ids >= 0).sum())
            rows.append(row)
    return rows
