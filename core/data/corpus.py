"""A preset's data, opened: its sources, what is held out, and everything made from them.

In:    the data section of a preset
Out:   Corpus: text for a tokenizer, a pipeline of rows, held-out rows, and what fixes their order
State: none; where a run stands is a Position
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.documents import Document, Source
from core.data.mixing import Mixer, MixSettings, SourceFailed
from core.data.packing import Row
from core.data.pipeline import Pipeline, PipelineSettings, Position
from core.data.sources import build_source, open_sources
from core.data.tokenizer import Tokenizer
from core.data.validation import HoldOut, may_train, plan_hold_out, validation_rows
from core.errors import NoData, SourceUnavailable


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

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        told = [note if s.name in note else f"{s.name}: {note}" for s in self.sources for note in s.notes]
        return told + self.hold_out.notes

    def may_train(self, source: str, document: Document) -> bool:
        return may_train(self.hold_out, self.settings.min_text_length, source, document)

    def sample_texts(self, characters: int) -> list[str]:
        """Training text in the run's own order and mix: what a tokenizer is trained on."""
        drops: dict[str, int] = {}
        while True:
            texts, length = [], 0
            try:
                for draw in Mixer(self.sources, self.mix, self.may_train, drops):
                    if draw.document:
                        texts.append(draw.document.text)
                        length += len(draw.document.text)
                    if length >= characters or draw.index >= characters // 100:
                        break
                return texts
            except SourceFailed as failure:  # training will drop it too, loudly
                drops[failure.name] = 0

    def epoch_tokens(self, tokenizer: Tokenizer, limit: int) -> int:
        """Training tokens of one pass over all sources, counted; stops at `limit`. What schedules span under max_epochs."""
        total = 0
        for source in self.sources:
            if not source.finite:
                return limit
            try:
                for document in source.stream({}):
                    if self.may_train(source.name, document):
                        total += len(tokenizer.encode_batch([document.text])[0]) + 1
                    if total >= limit:
                        return limit
            except SourceUnavailable:
                continue
        return total

    def validation_rows(self, tokenizer: Tokenizer, seq_length: int, tokens: int) -> list[Row]:
        return validation_rows(self.sources, self.hold_out, tokenizer, seq_length, tokens, self.settings.min_text_length)

    def pipeline_factory(self, tokenizer: Tokenizer, seq_length: int) -> "PipelineFactory":
        data = self.settings
        settings = PipelineSettings(self.mix, data.lanes, seq_length, data.packing, data.min_text_length)
        state = tokenizer.state()
        return PipelineFactory(self.sections, self.root, self.seed, state, self.hold_out, settings, self.sources, tokenizer)


@dataclass
class PipelineFactory:
    """Makes a Pipeline, here or in a worker process; opened sources and the tokenizer do not travel, they are made again."""

    sections: list[Any]
    root: Path
    seed: int
    tokenizer_state: dict[str, Any]
    hold_out: HoldOut
    settings: PipelineSettings
    sources: list[Source] | None = None
    tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sources": None, "tokenizer": None}

    def __call__(self, position: Position, lanes: list[int]) -> Pipeline:
        if self.sources is None or self.tokenizer is None:
            self.sources = [build_source(section, self.root, self.seed) for section in self.sections]
            for source in self.sources:
                try:
                    source.open()
                except SourceUnavailable as error:
                    if source.name not in position.drops:  # a dropped one is only asked for turns it can no longer take
                        raise SourceFailed(source.name, str(error)) from None
            self.tokenizer = Tokenizer.from_state(self.tokenizer_state)
        return Pipeline(self.sources, self.tokenizer, self.hold_out, self.settings, position, lanes)

    def fingerprint(self) -> str:
        """Equal exactly when the order and content of rows are."""
        described = [
            repr(self.settings),
            [section.model_dump(mode="json") for section in self.sections],
            self.hold_out.fraction,
            hashlib.sha256(self.tokenizer_state["json"].encode()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def open_corpus(preset: Any, root: Path, parallel: Any) -> Corpus:
    """Open a preset's sources side by side, on every rank. Raises NoData, with every reason, when none is left."""
    data, seed = preset.data, preset.train.seed
    opened, failed = open_sources([build_source(section, root, seed) for section in data.sources])
    for other in parallel.gather(failed):
        failed = {**other, **failed}
    sources = [source for source in opened if source.name not in failed]
    if not sources:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise NoData(f"no source of preset {preset.name} could be opened:\n{reasons}")
    sections = [section for section in data.sources if section.name not in failed]
    weights = dict(zip((section.name for section in data.sources), data.source_weights or [1.0] * len(data.sources)))
    mix = MixSettings(data.mix_strategy, tuple(weights[s.name] for s in sections), seed, preset.train.max_epochs)
    hold_out = plan_hold_out(sources, data.validation_fraction, data.min_text_length)
    return Corpus(data, root, seed, sections, sources, failed, mix, hold_out)


def data_position(saved: dict[str, Any] | None, fingerprint: str, names: list[str]) -> tuple[Position, list[str]]:
    """Where to go on reading. After a change of the data section each source goes on where it was, the mix begins anew."""
    if saved is None:
        return Position(0, {}, None, {}), []
    lanes = {int(lane): tuple(after) for lane, after in saved["lanes"].items()}
    if saved["fingerprint"] == fingerprint:
        return Position(saved["rows"], lanes, saved["snapshot"], dict(saved["drops"])), []
    cursors = (saved["snapshot"] or {}).get("cursors", {})
    kept = [name for name in names if cursors.get(name)]
    note = "the data section, the tokenizer or the reachable sources have changed since the checkpoint: the mix begins anew"
    note += f"; {', '.join(kept)} go on where they were" if kept else ""
    return Position(0, {}, {"index": 0, "cursors": cursors}, {}), [note]
