"""The validation hold-out: which documents are held out, and the rows that evaluation reads.

In:    opened sources
Out:   HoldOut, which knows a held-out document; held-out documents, one by one or in rows
State: none; both are functions of the sources' content and the preset
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from core.data.documents import Document, Encoded, Source, held_out_by_hash, shorter_than
from core.data.encoding import encode
from core.data.objectives import IGNORE_INDEX, Objective
from core.data.packing import LanePosition, Packer, Row
from core.data.tokenizer import MASK, Tokenizer
from core.errors import SourceUnavailable

SMALL_CORPUS = 1000
"""A source of fewer different texts has an exact share held out: a hash might hold out too few of
them, or none."""
SMALL_DOCUMENTS = 20_000
"""Documents that are read at most to find so many different texts."""
PSEUDO_TOKENS, PSEUDO_CONTEXT = 1024, 128
"""Tokens that are hidden one at a time, and of how many their context is made: each costs a row of
its own."""
SCAN_LOCAL, SCAN_STREAM = 2_000_000_000, 200_000_000
"""Characters of a source that are searched for held-out documents: what comes over a network would
be read for hours."""
ENOUGH = 0.9
"""Part of the tokens asked for; with fewer, there is a warning."""


@dataclass
class HoldOut:
    """The split of the data: held out are the texts whose stable hash is below a fraction, and of a
    small source that fraction of its texts, at least one and never all.

    A text is held out of every source or of none, wherever else it occurs.
    """

    fraction: float
    # small sources: digests of what they hold out
    held: dict[str, list[int]] = field(default_factory=dict)
    # digests that the hash would hold out, and are trained on
    released: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # all that this lineage has trained on
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._held = {digest for digests in self.held.values() for digest in digests}
        self._released = set(self.released)

    def holds(self, document: Document) -> bool:
        return self.holds_digest(document.digest)

    def holds_digest(self, digest: int) -> bool:
        return digest in self._held or (
            held_out_by_hash(digest, self.fraction) and digest not in self._released
        )

    def state(self) -> dict[str, Any]:
        """Return the split for the checkpoint: what was held out stays so when files are added, and
        what was not is never held out later."""
        return {
            "held": self.held,
            "released": self.released,
            "sources": self.sources,
            "fraction": self.fraction,
        }


def may_train(hold_out: HoldOut, min_text_length: int, document: Document) -> bool:
    """Return whether a document is long enough, and not held out."""
    return not document.is_shorter_than(min_text_length) and not hold_out.holds(document)


def plan_hold_out(
    sources: list[Source],
    fraction: float,
    min_text_length: int,
    before: Mapping[str, Any] | None = None,
) -> HoldOut:
    """Decide how each source is split. Finite sources are looked through, but no further than
    SMALL_CORPUS different texts.

    before  the state of an earlier plan: its choices stand, and so does its fraction where it was
            the smaller one: what may have been trained on is not held out. Of what was added the
            hash decides; and of a new small source too, where its texts may stand in a larger one
            that was trained on
    """
    known = before or {"held": {}, "released": [], "sources": []}
    requested, fraction = fraction, min(fraction, known.get("fraction", fraction))
    names = {source.name for source in sources}
    trained = set(known.get("sources", names | known["held"].keys()))
    looked = {source.name: _texts_of(source, min_text_length) for source in sources}
    small = {name: texts for name, (texts, _) in looked.items() if texts}
    choice = _Choice(small, fraction, known, trained)
    new = [
        name for name, texts in small.items() if not texts.keys() & set(known["held"].get(name, ()))
    ]
    for name in sorted(new, key=lambda name: len(small[name])):
        choice.add(name)
    choice.release_sources_held_out_whole()
    held = {
        name: [digest for digest in digests if digest in choice.chosen]
        for name, digests in known["held"].items()
    }
    held |= {name: sorted(small[name].keys() & choice.chosen) for name in new}
    plan = HoldOut(fraction, held, sorted(choice.released), sorted(trained | names))
    plan.notes = [f"{name}: {short}" for name, (_, short) in looked.items() if short]
    plan.notes += [_note(name, texts, plan) for name, texts in small.items()]
    if fraction < requested:
        plan.notes.append(
            f"validation_fraction is {fraction:g}, as before: the rest of {requested:g} has been "
            "trained on"
        )
    return plan


class _Choice:
    """The choice of what small sources hold out.

    small     source -> {digest: documents}
    trained   sources that the lineage has trained on
    """

    def __init__(
        self,
        small: dict[str, Counter[int]],
        fraction: float,
        known: Mapping[str, Any],
        trained: set[str],
    ):
        self._small, self._fraction, self._trained = small, fraction, trained
        self._held_before = HoldOut(fraction, known["held"], known["released"]).holds_digest
        self.chosen = {digest for digests in known["held"].values() for digest in digests}
        self.released = set(known["released"])

    def add(self, name: str) -> None:
        """Choose what a new small source holds out."""
        texts, trained = self._small[name], self._trained
        by_hash = {digest for digest in texts if held_out_by_hash(digest, self._fraction)}
        if name in trained or trained - self._small.keys():
            self.chosen |= by_hash - self.released
            return
        learned = {
            digest
            for other in trained
            for digest in self._small[other]
            if not self._held_before(digest)
        }
        free = texts.keys() - self.released - learned
        # of few copies first: held out with all of them, it would leave little to train on
        for digest in sorted(free, key=lambda digest: (texts[digest], digest)):
            if len(texts.keys() & self.chosen) >= _share(len(texts), self._fraction):
                break
            if self._leaves_some(digest):
                self.chosen.add(digest)
        self.released |= by_hash - self.chosen
        self.released |= set(texts) if len(texts) == 1 else set()

    def _leaves_some(self, digest: int) -> bool:
        """Return whether every source that has the text keeps others to train on."""
        having = [texts for texts in self._small.values() if digest in texts]
        return all(len(texts.keys() - self.chosen) > 1 for texts in having)

    def release_sources_held_out_whole(self) -> None:
        """Train on a source of which nothing else is left, as when files were taken away."""
        for texts in self._small.values():
            if all(self._holds(digest) for digest in texts):
                self.chosen -= texts.keys()
                self.released |= texts.keys()

    def _holds(self, digest: int) -> bool:
        by_hash = held_out_by_hash(digest, self._fraction) and digest not in self.released
        return digest in self.chosen or by_hash


def _texts_of(source: Source, min_text_length: int) -> tuple[Counter[int], str]:
    """Return {digest: documents} of the texts of a small finite source, else {}; and a note on how
    many are too short."""
    found: Counter[int] = Counter()
    short = looked = 0
    try:
        for document in islice(source.stream({}), SMALL_DOCUMENTS) if source.finite else ():
            looked += 1
            if document.is_shorter_than(min_text_length):
                short += 1
            else:
                found[document.digest] += 1
            if len(found) >= SMALL_CORPUS:
                break
    except SourceUnavailable:  # training will meet the same error, and drop the source
        return Counter(), ""
    all_of_it = len(found) < SMALL_CORPUS and looked < SMALL_DOCUMENTS
    of = f"{'' if all_of_it else 'the first '}{looked:,} {'text' if looked == 1 else 'texts'}"
    told = (
        f"{short:,} of {of} {'is' if short == 1 else 'are'} {shorter_than(min_text_length)} and "
        "left out"
        if short
        else ""
    )
    return Counter() if len(found) >= SMALL_CORPUS else found, told


def _share(texts: int, fraction: float) -> int:
    """Return how many of so many texts to hold out: at least one, but not the only one."""
    return min(max(1, round(texts * fraction)), texts - 1)


def _note(name: str, texts: Counter[int], plan: HoldOut) -> str:
    held, documents = sum(plan.holds_digest(digest) for digest in texts), texts.total()
    copies = f" ({documents:,} documents)" if documents > len(texts) else ""
    if len(texts) == 1:
        return f"{name} has only one text{copies}: nothing of it can be held out for validation"
    return f"{name} holds out {held:,} of its {len(texts):,} texts{copies} for validation"


def held_out_documents(
    source: Source,
    hold_out: HoldOut,
    tokenizer: Tokenizer,
    min_text_length: int,
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Encoded]]:
    """Yield (place among the source's documents, tokens) of each document that is held out, as far
    as a source is searched."""
    left = SCAN_LOCAL if source.finite else SCAN_STREAM
    try:
        for scanned, document in enumerate(source.stream({})):
            between()
            if not document.is_shorter_than(min_text_length) and hold_out.holds(document):
                yield scanned, encode(tokenizer, [document])[0]
            left -= document.size
            if left <= 0:
                return
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
    between: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Pack held-out documents into rows: about `tokens`, shared evenly among the sources that have
    so many.

    between   called after each document that is read; may raise, to stop
    """
    numbers = range(len(sources))
    packers = [Packer(number, seq_length, tokenizer.eos_id, LanePosition()) for number in numbers]
    documents = [
        held_out_documents(source, hold_out, tokenizer, min_text_length, between)
        for source in sources
    ]
    collected, open_ones, wanted = [0] * len(sources), [*numbers], tokens // len(sources)
    while open_ones:
        for number in open_ones:
            while (
                collected[number] < wanted and (found := next(documents[number], None)) is not None
            ):
                scanned, encoded = found
                inputs, labels = objective(encoded, scanned)
                known = (
                    tokenizer.num_bytes(encoded.ids)
                    if encoded.num_bytes is None
                    else encoded.num_bytes
                )
                packers[number].add(scanned, number, encoded.digest, False, inputs, labels, known)
                collected[number] += len(inputs)
        full = [number for number in open_ones if collected[number] >= wanted]
        # what some lack is taken of the others
        more = (tokens - sum(collected)) // max(len(full), 1) if len(full) < len(open_ones) else 0
        open_ones, wanted = (full, wanted + more) if more > 0 else ([], wanted)
    rows: list[Row] = []
    for packer, left in zip(packers, collected):
        while left > 0:
            row = packer.row()
            left -= int((row.source_ids >= 0).sum())
            rows.append(row)
    return rows


def shortfall(rows: list[Row], asked: int) -> str | None:
    """Return a warning where far fewer tokens were found than asked for."""
    found = sum(int((row.source_ids >= 0).sum()) for row in rows)
    if found >= ENOUGH * asked:
        return None
    return (
        f"{found:,} tokens are evaluated, not the {asked:,} of train.eval_tokens: no more are "
        "held out in what is searched "
        f"(all of a local source, up to {SCAN_LOCAL / 1e9:.0f} GB of text; "
        f"{SCAN_STREAM / 1e6:.0f} MB of a stream). "
        "For more, raise data.validation_fraction, or add text"
    )


def hide_one(rows: list[Row], tokenizer: Tokenizer) -> list[Row]:
    """Return rows in each of which one token is hidden and is the only target, for
    pseudo-perplexity.

    They are the beginnings of some of `rows`, from all over them; every token except special ones
    has its turn.
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
            kept = {
                name: getattr(row, name)[:size]
                for name in ("position_ids", "document_ids", "source_ids")
            }
            found.append(replace(row, input_ids=input_ids, labels=labels, **kept))
    return found
