"""A preset's data, opened: its sources, what is held out, and everything made from them.

In:    the data section of a preset
Out:   Corpus: text for a tokenizer, a pipeline of rows, held-out rows, and what fixes their order
State: none; where a run stands is a Position
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from core.data.amount import counter, tokens_of_pass, too_often
from core.data.chat import MARKERS, chat_note
from core.data.documents import Document, Source
from core.data.encoding import MemoizedEncoder, encode
from core.data.mixing import USUAL_RATE, Mixer, MixSettings, SourceFailed
from core.data.objectives import build_objective, next_token
from core.data.packing import Row
from core.data.pipeline import Pipeline, PipelineSettings
from core.data.position import Position
from core.data.shuffle import ShuffledSource
from core.data.sources import build_source, is_own_path, open_sources
from core.data.sources.shards import ShardSource, ShardView
from core.data.token_cache import CachedSource, TokenCache
from core.data.tokenizer import MASK, Tokenizer
from core.data.validation import (
    HoldOut,
    held_out_documents,
    may_train,
    plan_hold_out,
    validation_rows,
)
from core.errors import NoData, SourceUnavailable, UserError
from core.preset.settings import MASKED_TOKENS, NEXT_TOKEN, objective_of
from core.randomness import derive_seed
from core.schedules import limits, value_at

RATE_DOCUMENTS, RATE_FILES, RATE_STREAMS = 256, 64, 4
"""What is read of a source to measure its tokens per character: so many documents, spread over so
many files, or, of what comes over a network, so many shards. Neighbours are alike: the first 256
documents of source code were 6 % off (docs/LOG.md)."""

MUCH_UNREAD = 0.01
"""Share of a source's characters without a token that is no mishap of single characters any
more."""
OTHER_TOKENIZER = (
    'take a tokenizer made for such text, or "tokenizer": {"type": "bpe", '
    '"vocab_size": 8192}, which can write any'
)


@dataclass
class Corpus:
    """The sources of a run that every rank could open."""

    settings: Any  # the data section
    root: Path
    seed: int
    sections: list[Any]  # of the sources that opened
    sources: list[Source]
    failed: dict[str, str]  # name: why it could not be opened
    mix: MixSettings
    hold_out: HoldOut
    objective: str = NEXT_TOKEN

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        told = [
            note if s.name in note else f"{s.name}: {note}"
            for s in self.sources
            for note in s.notes
        ]
        return told + self.hold_out.notes

    def may_train(self, document: Document) -> bool:
        return may_train(self.hold_out, self.settings.min_text_length, document)

    def sample_texts(self, characters: int) -> list[str]:
        """Training text in the run's own order and mix: what a tokenizer is trained on."""
        drops: dict[str, int] = {}
        while True:
            texts, length = [], 0
            try:
                for draw in Mixer(
                    self.sources, replace(self.mix, max_epochs=1), self.may_train, drops
                ):
                    if draw.document and draw.document.text:
                        texts.append(draw.document.text)
                        length += len(draw.document.text)
                    if length >= characters or draw.index >= characters // 100:
                        break
                return texts
            except SourceFailed as failure:  # training will drop it too, loudly
                drops[failure.name] = 0

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens its documents need."""
        chat = MARKERS if any(section.type == "chat" for section in self.sections) else ()
        return (*chat, MASK) if self.objective == MASKED_TOKENS else chat

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError if the objective or a source cannot do with it."""
        build_objective(self.objective, tokenizer, self.settings.mask_fraction, self.seed)
        for source in self.sources:
            getattr(source, "check_tokenizer", lambda tokenizer: None)(tokenizer)

    def told_of(self, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        """(notes, warnings): what a person should know of its documents under this tokenizer.

        Raises UserError where it has tokens for nothing that a source says.
        """
        note = (
            chat_note(tokenizer)
            if any(section.type == "chat" for section in self.sections)
            else None
        )
        notes, warnings = [note] if note else [], []
        if chunks := [
            s.name for s in self.sections if s.type == "tokens" and not tokenizer.is_lossless
        ]:
            notes.append(
                f"bits per byte of {', '.join(chunks)} are approximate: tokens under such a "
                "tokenizer do not say their bytes"
            )
        for source in self.sources if not tokenizer.is_complete else ():
            unread = tokenizer.unread(
                [document.text for document in _spread(source) if document.text]
            )
            told = f"{source.name}: {unread}. They are read as unknown: {OTHER_TOKENIZER}"
            if unread.characters and unread.characters == unread.of:
                raise UserError(
                    f"the tokenizer has no token for anything that {source.name} says ({unread}); "
                    f"{OTHER_TOKENIZER}."
                )
            if unread.characters:
                (warnings if unread.share >= MUCH_UNREAD else notes).append(told)
        return notes, warnings

    @property
    def needs_rates(self) -> bool:
        """Whether the mix asks how many tokens have been drawn."""
        scheduled = any(not isinstance(weight, int | float) for weight in self.mix.weights)
        return self.mix.strategy == "weighted" and (scheduled or self.mix.unit == "tokens")

    def rates(self, tokenizer: Tokenizer) -> tuple[float, ...]:
        """Tokens per character of each source, measured on some of its documents; 0.25 where it has
        no text."""
        found = []
        for source in self.sources:
            documents = [document for document in _spread(source) if document.text]
            tokens = sum(len(encoded.ids) for encoded in encode(tokenizer, documents))
            found.append(
                tokens / sum(len(d.text) for d in documents) if documents and tokens else USUAL_RATE
            )
        return tuple(found)

    def epoch_tokens(self, tokenizer: Tokenizer, limit: int) -> tuple[int, list[str]]:
        """Training tokens of one pass over all sources, `limit` at most; remarks. What schedules
        span under max_epochs."""
        total = 0.0
        count = counter(tokenizer, self.may_train, 2 if self.objective == MASKED_TOKENS else 1)
        # through the cache: what is fetched to be counted is not fetched again to be read
        for source, weight in zip(
            cached(self.sources, self.root, self.settings.cache_gigabytes, tokenizer),
            self.mix.weights,
        ):
            if self.mix.strategy == "weighted" and limits(weight)[1] <= 0:
                continue
            held = tokens_of_pass(source, count, limit - total)
            if held is None:
                return limit, [
                    f"nobody knows how large {source.name} is: schedules span {limit:,} tokens a "
                    "pass"
                ]
            total += held
            if total >= limit:
                return limit, []
        return round(total), []

    def too_often(self, tokenizer: Tokenizer, tokens: int) -> list[str]:
        """Sentences on the sources that a run of so many tokens reads over and over."""
        strategy = self.mix.strategy
        # over the run
        weights = [sum(value_at(weight, x / 10) for x in range(11)) for weight in self.mix.weights]
        given = (
            None
            if strategy == "sequential"
            else weights
            if strategy == "weighted"
            else [1.0] * len(weights)
        )
        of_tokens = strategy == "weighted" and self.mix.unit == "tokens"
        advice = {
            "weighted": "give it a smaller share in data.source_weights, ",
            "round_robin": 'give it a smaller share ("mix_strategy": "weighted", with '
            "source_weights), ",
        }.get(strategy if len(self.sources) > 1 else "", "")
        return list(
            too_often(self.sources, given, of_tokens, tokenizer, self.may_train, tokens, advice)
        )

    def validation_rows(
        self,
        tokenizer: Tokenizer,
        seq_length: int,
        tokens: int,
        seed: int | None = None,
        only: str | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> list[Row]:
        """Held-out rows, read in the order of `seed`; left out, the run's. Runs of several seeds
        are measured on one text so.

        only      of this source
        between   called after each document that is read; may raise, to stop
        """
        sources = [source for source in self.sources if only in (None, source.name)]
        sources = (
            sources
            if seed in (None, self.seed)
            else [_reordered(source, seed) for source in sources]
        )
        sources = cached(sources, self.root, self.settings.cache_gigabytes, tokenizer)
        masks = derive_seed(self.seed if seed is None else seed, "validation")
        objective = build_objective(self.objective, tokenizer, self.settings.mask_fraction, masks)
        shortest = self.settings.min_text_length
        return validation_rows(
            sources, self.hold_out, tokenizer, objective, seq_length, tokens, shortest, between
        )

    def held_out_inputs(self, tokenizer: Tokenizer) -> dict[str, Iterator[np.ndarray]]:
        """Of each source, its held-out documents one by one, as a model reads them: (its tokens,)
        each, in the run's order."""
        sources = cached(self.sources, self.root, self.settings.cache_gigabytes, tokenizer)
        how = self.hold_out, tokenizer, self.settings.min_text_length
        return {
            source.name: (
                next_token(encoded, tokenizer.eos_id)[0]
                for _, encoded in held_out_documents(source, *how)
            )
            for source in sources
        }

    def pipeline_factory(
        self, tokenizer: Tokenizer, seq_length: int, mix: MixSettings | None = None
    ) -> "PipelineFactory":
        data = self.settings
        predicts = self.objective, data.mask_fraction
        settings = PipelineSettings(
            mix or self.mix, data.lanes, seq_length, data.packing, data.min_text_length, *predicts
        )
        return PipelineFactory(
            self.sections,
            self.root,
            self.seed,
            tokenizer.state(),
            self.hold_out,
            settings,
            data.shuffle,
            data.cache_gigabytes,
            self.sources,
            tokenizer,
        )

    def contents(self) -> dict[str, str]:
        """For each source, what changes when its files do."""
        return {source.name: source.contents() for source in self.sources}


@dataclass
class PipelineFactory:
    """Makes a Pipeline, here or in a worker process; opened sources and the tokenizer do not
    travel, they are made again."""

    sections: list[Any]
    root: Path
    seed: int
    tokenizer_state: dict[str, Any]
    hold_out: HoldOut
    settings: PipelineSettings
    shuffle: str = "shards"  # or "documents"
    cache_gigabytes: float = 0.0
    sources: list[Source] | None = None
    tokenizer: Tokenizer | None = None
    encode: MemoizedEncoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sources": None, "tokenizer": None, "encode": None}

    def __call__(self, position: Position, lanes: list[int]) -> Pipeline:
        if self.sources is None or self.tokenizer is None:
            self.sources = [
                build_source(section, self.root, self.seed) for section in self.sections
            ]
            for source in self.sources:
                source.patient = True  # a Hub that is away for a moment costs no source in mid-run
                try:
                    source.open()
                except SourceUnavailable as error:
                    # a dropped one is only asked for turns it can no longer take
                    if source.name not in position.drops:
                        raise SourceFailed(source.name, str(error)) from None
            self.tokenizer = Tokenizer.from_state(self.tokenizer_state)
        sources = cached(self.sources, self.root, self.cache_gigabytes, self.tokenizer)
        if self.shuffle == "documents":
            sources = [
                ShuffledSource(s, self.seed) if isinstance(s, ShardSource | ShardView) else s
                for s in sources
            ]
        self.encode = self.encode or MemoizedEncoder(self.tokenizer)
        return Pipeline(
            sources, self.tokenizer, self.encode, self.hold_out, self.settings, position, lanes
        )

    def fingerprint(self) -> str:
        """Equal exactly when the order and content of rows are, as long as the sources' contents
        are."""
        mix = replace(self.settings.mix, rates=(), horizon_tokens=0)  # kept in the checkpoint
        order = asdict(self.settings) | {"mix": mix}
        if order["objective"] == NEXT_TOKEN:
            del order["objective"], order["mask_fraction"]
        described = [
            f"PipelineSettings({', '.join(f'{key}={value!r}' for key, value in order.items())})",
            [section.model_dump(mode="json") for section in self.sections],
            self.hold_out.fraction,
            self.shuffle,
            hashlib.sha256(self.tokenizer_state["json"].encode()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _reordered(source: Source, seed: int) -> Source:
    """The source with the order that another seed gives it."""
    other = copy.copy(source)
    other.seed = seed  # type: ignore[attr-defined]  # every source of ours orders its shards by it
    return other


def _spread(source: Any) -> list[Document]:
    """Some documents from all over a source."""
    if not isinstance(source, ShardSource):
        return list(islice(source.stream({}), RATE_DOCUMENTS))
    order = source.order(0)
    step = max(1, len(order) // (RATE_FILES if source.finite else RATE_STREAMS))
    found: list[Document] = []
    for shard in order[::step]:
        try:
            found += [
                document
                for _, document in islice(
                    source.read(shard, 0), max(1, RATE_DOCUMENTS * step // len(order))
                )
            ]
        except Exception:  # training will meet the same error, and say what it means
            continue
    return found


def cached(
    sources: list[Source], root: Path, gigabytes: float, tokenizer: Tokenizer
) -> list[Source]:
    """The sources seen through the token cache."""
    if gigabytes <= 0:
        return sources
    cache = TokenCache(root, int(gigabytes * 1e9))
    return [
        CachedSource(source, cache, tokenizer) if isinstance(source, ShardSource) else source
        for source in sources
    ]


def open_corpus(
    preset: Any, root: Path, parallel: Any, held_out: dict[str, Any] | None = None
) -> Corpus:
    """Open a preset's sources side by side, on every rank. Raises NoData, with every reason, when
    none is left.

    held_out  what an earlier start of the lineage held out, see HoldOut.state
    """
    data, seed = preset.data, preset.train.seed
    opened, failed = open_sources([build_source(section, root, seed) for section in data.sources])
    for other in parallel.gather(failed):
        failed = {**other, **failed}
    sources = [source for source in opened if source.name not in failed]
    if not sources:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise NoData(f"no source of preset {preset.name} could be opened:\n{reasons}")
    if own := [
        section for section in data.sources if section.name in failed and is_own_path(section, root)
    ]:
        reasons = "\n".join(f"  {section.name}: {failed[section.name]}" for section in own)
        raise NoData(
            f"preset {preset.name} names paths that give no text. Mend them, or take them out of "
            f"it:\n{reasons}"
        )
    sections = [section for section in data.sources if section.name not in failed]
    weights = dict(
        zip(
            (section.name for section in data.sources),
            data.source_weights or [1.0] * len(data.sources),
        )
    )
    shares = tuple(weights[s.name] for s in sections)
    mix = MixSettings(data.mix_strategy, shares, seed, preset.train.max_epochs, data.weights_of)
    # what fixes the order is found out once: a file or a line that fails one rank alone must not
    # give it another order
    plan = (
        plan_hold_out(sources, data.validation_fraction, data.min_text_length, held_out)
        if parallel.rank == 0
        else None
    )
    hold_out = parallel.broadcast(plan)
    return Corpus(
        data, root, seed, sections, sources, failed, mix, hold_out, objective_of(preset.model)
    )


def open_held_out(
    preset: Any, root: Path, alone: Any, made_with: dict | None, held_out: dict | None
) -> tuple[Corpus, list[str]]:
    """The preset's data, split as it was for training; remarks. Raises NoData.

    alone       the ranks: one process
    made_with   the preset of the training, as JSON: where it held out less than this one, so does
                this
    held_out    of the training's checkpoint
    """
    notes = []
    data = preset.data
    trained = (made_with or {}).get("data", {}).get("validation_fraction", data.validation_fraction)
    if trained < data.validation_fraction:
        notes.append(
            f"validation_fraction is {trained:g}, as in training: the rest of "
            f"{data.validation_fraction:g} was trained on"
        )
        data = data.model_copy(update={"validation_fraction": trained})
    corpus = open_corpus(preset.model_copy(update={"data": data}), root, alone, held_out)
    return corpus, notes + [
        f"source {name} left out: {reason}" for name, reason in corpus.failed.items()
    ]
