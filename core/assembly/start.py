"""The start of a run: a checkpoint of its lineage, other weights, or nothing.

In:    a preset, the checkpoints on the disk
Out:   Start; the tokenizer; the run's progress
State: none
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.checkpoint.lineage import changed_sources
from core.checkpoint.slots import CheckpointStore, label, load_slot, store_of
from core.checkpoint.state import CheckpointState, NewestState
from core.checkpoint.weights import Weights, find_weights
from core.data.corpus import Corpus
from core.data.sources.tokens import TokensSettings
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import SAMPLE_CHARACTERS, build_tokenizer
from core.errors import UserError
from core.file_names import slot_name
from core.metrics.events import LOG
from core.metrics.log_file import check_log
from core.parallel.protocol import Parallel
from core.parallel.ranks import on_rank_zero, rank_zero_first
from core.preset.base import PresetBase
from core.preset.settings import TokenizerSettings
from core.training.progress import Progress, begin_next_run


@dataclass
class Remarks:
    """Notes and warnings for a person, before training starts."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Start:
    """The state that a run goes on from. `weights` are those of `saved`, where there is a
    checkpoint."""

    store: CheckpointStore
    saved: CheckpointState | None
    weights: Weights | None

    @property
    def init_from(self) -> str | None:
        """The weights that the lineage began with, as text."""
        if self.saved is not None:
            return self.saved.get("init_from")
        return str(self.weights) if self.weights is not None else None

    @property
    def compiler_failed(self) -> bool:
        """True where torch.compile failed in the run that the checkpoint is of."""
        return self.saved is not None and self.saved.get("compile_failed", False)

    def is_of(self, preset: PresetBase) -> bool:
        """Return whether the checkpoint's newest step was trained with this preset."""
        return self.saved is not None and self.saved["preset"]["name"] == preset.name


def find_start(preset: PresetBase, root: Path, parallel: Parallel, remarks: Remarks) -> Start:
    """Find what to go on from, on every rank: the lineage's newest slot; where it has none, the
    weights that `init_from` names, if it does. Raises UserError."""
    store = store_of(preset, root)

    def prepare() -> list[str]:
        check_log(root / "logs" / preset.lineage / LOG)
        return store.prepare()

    remarks.notes += on_rank_zero(parallel, prepare)
    saved, path, notes = load_slot(store, parallel)
    remarks.notes += notes
    origin = preset.init_from
    if saved is not None and path is not None:
        if origin:
            remarks.notes.append(
                f'init_from "{origin}" is not used again: the lineage goes on from its own '
                "checkpoint"
            )
        where = slot_name(preset.lineage, "*") if path in store.slots else label(path)
        return Start(store, saved, Weights.of(saved, path, where))
    if origin is None:
        return Start(store, None, None)
    weights = rank_zero_first(parallel, lambda: find_weights(origin, root))
    remarks.notes += [
        *weights.notes,
        f"weights from {weights}; optimizer and schedules start afresh",
    ]
    if changes := weights.other_settings(preset.model):
        remarks.notes.append(f"they were made with other settings: {'; '.join(changes)}")
    return Start(store, None, weights)


def note_changed_sources(
    preset: PresetBase, start: Start, corpus: Corpus, remarks: Remarks
) -> None:
    """Remark on sources that differ from those that the checkpoint was trained on."""
    if start.saved is None:
        return
    notes = changed_sources(start.saved, preset, corpus.failed)
    (remarks.warnings if start.is_of(preset) else remarks.notes).extend(notes)


def choose_tokenizer(
    preset: PresetBase,
    start: Start,
    parallel: Parallel,
    corpus: Corpus,
    given: dict[str, Any] | None,
    remarks: Remarks,
) -> Tokenizer:
    """Take the tokenizer that came with the weights, else the one given; else make one, on rank 0,
    and send it to the others. Raises UserError."""
    weights = start.weights
    if weights is not None and weights.tokenizer is not None and weights.preset is not None:
        if weights.preset["tokenizer"] != preset.tokenizer.model_dump(mode="json"):
            remarks.notes.append("the checkpoint's tokenizer is used; the preset's differs")
        return Tokenizer.from_state(weights.tokenizer)
    if given is not None:
        return Tokenizer.from_state(given)

    def make() -> dict[str, Any]:
        if weights is not None:
            return tokenizer_state_of(weights, preset.tokenizer, corpus.root)
        needs_text = preset.tokenizer.type == "bpe"
        if needs_text and all(section.type == "tokens" for section in corpus.sections):
            section = corpus.sections[0]
            assert isinstance(section, TokensSettings)
            beside = Path(section.path).parent / "tokenizer.json"
            raise UserError(
                'no source has text to train a "bpe" on, all are tokens already. Name the '
                f'tokenizer that made them: "tokenizer": {{"type": "file", "path": "{beside}"}}'
            )
        texts = corpus.sample_texts(SAMPLE_CHARACTERS) if needs_text else []
        return build_tokenizer(preset.tokenizer, texts, corpus.markers, root=corpus.root).state()

    return Tokenizer.from_state(on_rank_zero(parallel, make))


def tokenizer_state_of(weights: Weights, settings: TokenizerSettings, root: Path) -> dict[str, Any]:
    """Return the tokenizer whose tokens the weights mean: the file's, or else the preset's. Raises
    UserError."""
    if weights.tokenizer is not None:
        return weights.tokenizer
    if settings.type == "bpe":
        raise UserError(
            f'{weights.where} has no tokenizer with it, and a "bpe" trained here would give its '
            "tokens other meanings. Name the one the weights were trained with: "
            '"tokenizer": "Qwen/Qwen3-0.6B-Base", or {"type": "file", "path": "..."}.'
        )
    return build_tokenizer(settings, [], root=root).state()


def progress_of(
    preset: PresetBase, start: Start, is_missing: Callable[[int], bool], remarks: Remarks
) -> Progress:
    """Go on with an interrupted run, or begin the next one.

    is_missing   tells whether the log lacks the evaluation at a step
    """
    saved = start.saved
    if saved is None:
        return Progress(evaluation_due=preset.train.eval_at_start)
    progress = Progress.of(saved["progress"])
    progress.evaluation_due = progress.evaluation_due and is_missing(progress.step)
    action = next_action(preset, saved, lambda: progress.evaluation_due)
    if action == "run":
        remarks.notes.append(
            f"run {progress.run} goes on from step {progress.step}, {progress.run_tokens:,} "
            "tokens into it"
        )
        return progress
    if action == "evaluation":
        remarks.notes.append(
            f"run {progress.run} was trained to its end and saved, but not evaluated: that is "
            "done now"
        )
        return progress
    before = f'run {progress.run} of "{saved["preset"]["name"]}"'
    if progress.evaluation_due and progress.finished:
        remarks.notes.append(f"{before} was ended before its last evaluation")
    if not progress.finished:
        remarks.notes.append(f"{before} was left at {progress.run_tokens:,} tokens")
    begin_next_run(progress, preset.train.runs if start.is_of(preset) else 1)
    remarks.notes.append(f"run {progress.run} begins from the weights of step {progress.step}")
    return progress


def next_action(
    preset: PresetBase, saved: CheckpointState | NewestState, is_missing: Callable[[], bool]
) -> Literal["run", "evaluation", "next run"]:
    """Decide what a start does with a lineage's checkpoint.

    is_missing   tells whether the log lacks the evaluation at the checkpoint's step
    """
    progress = saved["progress"]
    if saved["preset"]["name"] != preset.name:
        return "next run"
    if not progress["finished"]:
        return "run"
    return "evaluation" if progress.get("evaluation_due") and is_missing() else "next run"
