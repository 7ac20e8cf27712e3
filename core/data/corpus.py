"""A preset's data, opened: its sources, what is held out, and everything made from them.

In:    the data section of a preset
Out:   Corpus: text for a tokenizer, a pipeline of rows, held-out rows, and what fixes their order
State: none; where a run stands is a Position
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.data.chat import chat_note
from core.data.documents import Document, Source
from core.data.encoding import encode
from core.data.mixing import USUAL_RATE, Mixer, MixSettings, SourceFailed
from core.data.objectives import build_objective, next_token
from core.data.packing import Row
from core.data.pipeline import PipelineSettings
from core.data.pipeline_factory import PipelineFactory
from core.data.position import Position
from core.data.source_size import (
    Shares,
    counter,
    repetition_warnings,
    sampled_documents,
    tokens_of_pass,
)
from core.data.sources import build_source, is_own_path, open_sources
from core.data.token_cache import cached_sources
from core.data.tokenizer import MARKERS, MASK, Tokenizer
from core.data.validation import (
    HoldOut,
    held_out_documents,
    may_train,
    plan_hold_out,
    validation_rows,
)
from core.errors import NoData, UserError
from core.parallel.protocol import Parallel
from core.preset.base import PresetBase
from core.preset.data import DataSettingsBase
from core.preset.settings import MASKED_TOKENS, NEXT_TOKEN, SourceSettings, objective_of
from core.randomness import derive_seed
from core.schedules import limits, value_at

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

    settings: DataSettingsBase
    root: Path
    seed: int
    sections: list[SourceSettings]  # of the sources that opened
    sources: list[Source]
    failed: dict[str, str]  # name: why it could not be opened
    mix: MixSettings
    hold_out: HoldOut
    objective: str = NEXT_TOKEN

    @property
    def names(self) -> list[str]:
        """The sources' names, in the preset's order."""
        return [source.name for source in self.sources]

    @property
    def notes(self) -> list[str]:
        """Remarks of the sources and on the hold-out, for the screen."""
        notes = [
            note if source.name in note else f"{source.name}: {note}"
            for source in self.sources
            for note in source.notes
        ]
        return notes + self.hold_out.notes

    def may_train(self, document: Document) -> bool:
        """Return whether a document is long enough, and not held out."""
        return may_train(self.hold_out, self.settings.min_text_length, document)

    def sample_texts(self, characters: int) -> list[str]:
        """Read training text in the run's own order and mix, to train a tokenizer on."""
        once, drops = replace(self.mix, max_epochs=1), dict[str, int]()
        while True:
            texts, length = [], 0
            try:
                for draw in Mixer(self.sources, once, self.may_train, Position(drops=drops)):
                    if draw.document and draw.document.text:
                        texts.append(draw.document.text)
                        length += len(draw.document.text)
                    if length >= characters or draw.index >= characters // 100:
                        break
                return texts
            except SourceFailed as failure:  # training will drop it too, loudly
                drops[failure.name] = 0

    @property
    def has_chat(self) -> bool:
        """True where a source gives conversations."""
        return any(section.type == "chat" for section in self.sections)

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens that its documents need."""
        chat = MARKERS if self.has_chat else ()
        return (*chat, MASK) if self.objective == MASKED_TOKENS else chat

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if the objective or a source cannot use this tokenizer."""
        build_objective(self.objective, tokenizer, self.settings.mask_fraction, self.seed)
        for source in self.sources:
            getattr(source, "check_tokenizer", lambda tokenizer: None)(tokenizer)

    def tokenizer_remarks(self, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        """Return (notes, warnings) about its documents under this tokenizer.

        Raises UserError if the tokenizer has no token for anything in a source.
        """
        notes, warnings = list[str](), list[str]()
        if self.has_chat and (note := chat_note(tokenizer)) is not None:
            notes.append(note)
        tokenized = [section.name for section in self.sections if section.type == "tokens"]
        if tokenized and not tokenizer.is_lossless:
            notes.append(
                f"bits per byte of {', '.join(tokenized)} are approximate: tokens under such a "
                "tokenizer do not say their bytes"
            )
        for source in self.sources if not tokenizer.is_complete else ():
            texts = [document.text for document in sampled_documents(source) if document.text]
            unread = tokenizer.unread(texts)
            if unread.characters and unread.characters == unread.of:
                raise UserError(
                    f"the tokenizer has no token for anything that {source.name} says ({unread}); "
                    f"{OTHER_TOKENIZER}."
                )
            if unread.characters:
                (warnings if unread.share >= MUCH_UNREAD else notes).append(
                    f"{source.name}: {unread}. They are read as unknown: {OTHER_TOKENIZER}"
                )
        return notes, warnings

    @property
    def needs_rates(self) -> bool:
        """True where the mix depends on how many tokens have been drawn."""
        scheduled = any(not isinstance(weight, int | float) for weight in self.mix.weights)
        return self.mix.strategy == "weighted" and (scheduled or self.mix.unit == "tokens")

    def rates(self, tokenizer: Tokenizer) -> tuple[float, ...]:
        """Measure tokens per character of each source on some of its documents; 0.25 where it has
        no text."""
        rates = []
        for source in self.sources:
            documents = [document for document in sampled_documents(source) if document.text]
            tokens = sum(len(encoded.ids) for encoded in encode(tokenizer, documents))
            characters = sum(len(document.text) for document in documents)
            rates.append(tokens / characters if documents and tokens else USUAL_RATE)
        return tuple(rates)

    def epoch_tokens(self, tokenizer: Tokenizer, limit: int) -> tuple[int, list[str]]:
        """Count the training tokens of one pass over all sources, `limit` at most: what schedules
        span under max_epochs. Return them, and notes."""
        total = 0.0
        count = counter(tokenizer, self.may_train, 2 if self.objective == MASKED_TOKENS else 1)
        # through the cache: what is fetched to be counted is not fetched again to be read
        for source, weight in zip(self._cached(self.sources, tokenizer), self.mix.weights):
            if self.mix.strategy == "weighted" and limits(weight)[1] <= 0:
                continue
            tokens = tokens_of_pass(source, count, limit - total)
            if tokens is None:
                return limit, [
                    f"nobody knows how large {source.name} is: schedules span {limit:,} tokens a "
                    "pass"
                ]
            total += tokens
            if total >= limit:
                return limit, []
        return round(total), []

    def repetition_warnings(self, tokenizer: Tokenizer, tokens: int) -> list[str]:
        """Return a warning for each source that a run of `tokens` reads too many times."""
        strategy = self.mix.strategy
        weights: list[float] | None = [1.0] * len(self.sources)
        if strategy == "weighted":  # over the run
            weights = [sum(value_at(each, x / 10) for x in range(11)) for each in self.mix.weights]
        elif strategy == "sequential":
            weights = None
        advice = {
            "weighted": "give it a smaller share in data.source_weights, ",
            "round_robin": 'give it a smaller share ("mix_strategy": "weighted", with '
            "source_weights), ",
        }.get(strategy if len(self.sources) > 1 else "", "")
        shares = Shares(weights, strategy == "weighted" and self.mix.unit == "tokens", advice)
        return list(repetition_warnings(self.sources, shares, tokenizer, self.may_train, tokens))

    def validation_rows(
        self,
        tokenizer: Tokenizer,
        seq_length: int,
        tokens: int,
        seed: int | None = None,
        only: str | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> list[Row]:
        """Return about `tokens` of held-out rows, read in the order of `seed`; None: the run's.
        With one seed, runs of several seeds are measured on one text.

        only      the source to read
        between   called after each document that is read; may raise, to stop
        """
        sources = [source for source in self.sources if only in (None, source.name)]
        if seed is None:
            seed = self.seed
        if seed != self.seed:
            sources = [_reordered(source, seed) for source in sources]
        masks = derive_seed(seed, "validation")
        return validation_rows(
            self._cached(sources, tokenizer),
            self.hold_out,
            tokenizer,
            build_objective(self.objective, tokenizer, self.settings.mask_fraction, masks),
            seq_length,
            tokens,
            self.settings.min_text_length,
            between,
        )

    def held_out_inputs(self, tokenizer: Tokenizer) -> dict[str, Iterator[np.ndarray]]:
        """Return, for each source, its held-out documents as a model reads them: (n,) int32 each,
        in the run's order."""
        shortest = self.settings.min_text_length
        return {
            source.name: (
                next_token(encoded, tokenizer.eos_id)[0]
                for _, encoded in held_out_documents(source, self.hold_out, tokenizer, shortest)
            )
            for source in self._cached(self.sources, tokenizer)
        }

    def pipeline_factory(
        self, tokenizer: Tokenizer, seq_length: int, mix: MixSettings | None = None
    ) -> PipelineFactory:
        """Return what makes this run's pipelines. `mix`: in place of the preset's."""
        data = self.settings
        settings = PipelineSettings(
            mix=mix or self.mix,
            lanes=data.lanes,
            seq_length=seq_length,
            packing=data.packing,
            min_text_length=data.min_text_length,
            objective=self.objective,
            mask_fraction=data.mask_fraction,
        )
        return PipelineFactory(
            sections=self.sections,
            root=self.root,
            seed=self.seed,
            tokenizer_state=tokenizer.state(),
            hold_out=self.hold_out,
            settings=settings,
            shuffle=data.shuffle,
            cache_gigabytes=data.cache_gigabytes,
            sources=self.sources,
            tokenizer=tokenizer,
        )

    def contents(self) -> dict[str, str]:
        """Return, for each source, a text that changes when its files do."""
        return {source.name: source.contents() for source in self.sources}

    def _cached(self, sources: list[Source], tokenizer: Tokenizer) -> list[Source]:
        return cached_sources(sources, self.root, self.settings.cache_gigabytes, tokenizer)


def _reordered(source: Source, seed: int) -> Source:
    """Return the source with the order that another seed gives it."""
    other = copy.copy(source)
    other.seed = seed  # type: ignore[attr-defined]  # every source of ours orders its shards by it
    return other


def open_corpus(
    preset: PresetBase, root: Path, parallel: Parallel, held_out: Mapping[str, Any] | None = None
) -> Corpus:
    """Open a preset's sources side by side, on every rank. Raises NoData, with every reason, when
    none is left.

    held_out  what an earlier start of the lineage held out, see HoldOut.state
    """
    data, seed = preset.data, preset.train.seed
    opened, failed = open_sources([build_source(section, root, seed) for section in data.sources])
    for of_rank in parallel.gather(failed):
        failed = {**of_rank, **failed}
    sources = [source for source in opened if source.name not in failed]
    _check_opened(preset, root, failed)
    weights = data.source_weights or [1.0] * len(data.sources)
    in_use = [i for i, section in enumerate(data.sources) if section.name not in failed]
    mix = MixSettings(
        strategy=data.mix_strategy,
        weights=tuple(weights[i] for i in in_use),
        seed=seed,
        max_epochs=preset.train.max_epochs,
        unit=data.weights_of,
    )
    # what fixes the order is found out once: a file or a line that fails one rank alone must not
    # give it another order
    plan = None
    if parallel.rank == 0:
        plan = plan_hold_out(sources, data.validation_fraction, data.min_text_length, held_out)
    hold_out = parallel.broadcast(plan)
    assert hold_out is not None, "rank 0 has made a plan"
    return Corpus(
        settings=data,
        root=root,
        seed=seed,
        sections=[data.sources[i] for i in in_use],
        sources=sources,
        failed=failed,
        mix=mix,
        hold_out=hold_out,
        objective=objective_of(preset.model),
    )


def _check_opened(preset: PresetBase, root: Path, failed: dict[str, str]) -> None:
    """Raise NoData where no source opened, or where a path on this machine did not."""

    def reasons(sections: list[SourceSettings]) -> str:
        return "\n".join(f"  {section.name}: {failed[section.name]}" for section in sections)

    failing = [section for section in preset.data.sources if section.name in failed]
    if len(failing) == len(preset.data.sources):
        raise NoData(f"no source of preset {preset.name} could be opened:\n{reasons(failing)}")
    if own := [section for section in failing if is_own_path(section, root)]:
        raise NoData(
            f"preset {preset.name} names paths that give no text. Mend them, or take them out of "
            f"it:\n{reasons(own)}"
        )


def open_held_out(
    preset: PresetBase,
    root: Path,
    alone: Parallel,
    made_with: dict[str, Any] | None,
    held_out: Mapping[str, Any] | None,
) -> tuple[Corpus, list[str]]:
    """Open the preset's data, split as it was for training; return it, and notes. Raises NoData.

    alone       the ranks: one process
    made_with   the preset of the training, as JSON: where it held out less than this one, so does
                this
    held_out    the split in the training's checkpoint
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
    left_out = [f"source {name} left out: {reason}" for name, reason in corpus.failed.items()]
    return corpus, notes + left_out
