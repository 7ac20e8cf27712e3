"""The table of jobs that a preset can ask for. Adding one: its file, its line here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from core.jobs.compare import compare, preview_compare
from core.jobs.evaluate import EvaluatePreset, evaluate, preview_evaluate
from core.jobs.export import ExportPreset, export, export_files, preview_export
from core.jobs.generate import generate, preview_generate
from core.jobs.interpret import InterpretPreset, interpret, preview_interpret
from core.jobs.tokenize import TokenizePreset, preview_tokenize, token_files, tokenize
from core.jobs.train import train
from core.parallel.protocol import Parallel
from core.preset.base import PresetBase
from core.runtime import Runtime

P = TypeVar("P", bound=PresetBase)


@dataclass(frozen=True)
class Job(Generic[P]):
    """One thing that a preset can ask for."""

    run: Callable[[P, Runtime, Parallel, Path, float, TextIO], None]
    """The job itself, called on every rank: with the preset, the runtime, the ranks, the root
    folder, the time at which the program was started, and the stream to show on."""
    preset: type[P]
    """PresetBase, or a subclass that adds the job's section."""
    preview: Callable[[P, Path], list[str]] | None = None
    """Lines of the menu, from the preset and the root folder; None: those of training."""
    trains: bool = False
    """The menu also shows size and memory, and offers a fresh start."""
    files: Callable[[P, Path], Iterable[Path]] | None = None
    """Files that the job leaves beside checkpoints and logs, from preset and root folder."""


JOBS: dict[str, Job[Any]] = {
    "train": Job(train, PresetBase, trains=True),
    "tokenize": Job(tokenize, TokenizePreset, preview_tokenize, files=token_files),
    "compare": Job(compare, PresetBase, preview_compare, trains=True),
    "evaluate": Job(evaluate, EvaluatePreset, preview_evaluate),
    "interpret": Job(interpret, InterpretPreset, preview_interpret),
    "generate": Job(generate, PresetBase, preview_generate),
    "export": Job(export, ExportPreset, preview_export, files=export_files),
}
