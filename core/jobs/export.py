"""The `export` job: a trained model in the formats of others, proved to say the same.

In:    a preset: its `init_from` or its lineage's newest checkpoint, its data, its section `export`
Out:   exports/<lineage>/; where asked for, the same on the Hugging Face Hub
State: none

    weights --> the library's architecture --> files aside --> fresh process: equal? --> in place

Under torchrun rank 0 does it alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from pydantic import Field

from core.checkpoint.weights import is_file, preview_weights
from core.data.corpus import open_held_out
from core.errors import NoData, UserError
from core.export.architectures import check_exportable
from core.export.files import Exported, export_model, export_weights
from core.export.proof import ProofText, alternating, proof_text
from core.export.push import push
from core.file_names import file_name
from core.parallel.protocol import Parallel
from core.parallel.single import Single
from core.preset.base import PresetBase
from core.preset.settings import Settings
from core.runtime import Runtime
from core.trained import Trained, load_trained
from core.ui.evaluate import EvaluateView

FOLDER = "exports"


class ExportSettings(Settings):
    """The export job: a trained model in the formats of others."""

    as_: Literal["transformers", "weights"] = Field("transformers", alias="as")
    """transformers: files that AutoModelForCausalLM loads, for models whose architecture that
    library has. weights: the tensors under their own names, for any model."""
    gguf: list[Literal["f32", "f16", "q8_0"]] = Field([])
    """Also GGUF files with matrices of these numbers, which llama.cpp, Ollama and LM Studio read.
    Needs the package gguf."""
    proof_tokens: int = Field(512, ge=2, le=1_000_000)
    """Held-out tokens on which the exported model is compared with the trained one."""
    push_to: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository of the Hugging Face Hub, such as "me/my-model", that gets the files as well, with
    the token of `.env`."""
    private: bool = True
    """Whether a repository that is made for it is private."""


class ExportPreset(PresetBase):
    """A preset, as the export job reads it."""

    export: ExportSettings = ExportSettings()
    """The files of the export job."""


def export(
    preset: ExportPreset,
    runtime: Runtime,
    parallel: Parallel,
    root: Path,
    started: float,
    console: TextIO,
) -> None:
    """Write the files, and push them where that is asked for. Raises UserError, with what was there
    before untouched."""
    if parallel.rank != 0:  # nor does it wait: a collective operation has a clock running
        return
    with EvaluateView(console) as view:
        # on the CPU, where every product of fp32 is one
        trained = load_trained(preset, root, replace(runtime, device=torch.device("cpu")))
        for note in trained.notes:
            view.tell(f"note  {note}")
        settings, target = preset.export, target_of(preset, root)
        if settings.as_ == "transformers":
            check_exportable(trained)
        text = _held_out_text(trained, root, view)
        if settings.as_ == "weights":
            exported = export_weights(trained, target, root, text)
        else:
            exported = export_model(trained, target, root, text, [*settings.gguf])
        for line in _summary(exported, target.relative_to(root)):
            view.tell(line)
        if settings.push_to is not None:
            address = push(target, settings.push_to, settings.private)
            view.tell(f"pushed to {address}")


def preview_export(preset: ExportPreset, root: Path) -> list[str]:
    """Return what the menu shows before the job is chosen."""
    try:
        weights = preview_weights(preset.init_from or preset.lineage, root)
    except UserError as error:
        return [f"cannot start yet: {error}"]
    settings = preset.export
    what = "for transformers" if settings.as_ == "transformers" else "its weights alone"
    kinds = "".join(f", GGUF {kind}" for kind in settings.gguf)
    lines = [f"exports {weights}: {what}{kinds}", f"writes {target_of(preset, Path())}/"]
    return lines + ([f"pushes to {settings.push_to}"] if settings.push_to is not None else [])


def export_files(preset: ExportPreset, root: Path) -> list[Path]:
    """Return the files of the export that is there."""
    return list(target_of(preset, root).glob("*"))


def target_of(preset: PresetBase, root: Path) -> Path:
    """Return the folder of a preset's export: it has the name of the lineage that is exported."""
    origin = preset.init_from
    lineage = origin if origin and not is_file(origin) else preset.lineage
    return root / FOLDER / file_name(lineage)


def _held_out_text(trained: Trained[Any], root: Path, view: EvaluateView) -> ProofText:
    """Return text that the model was not trained on; the preset's prompts where there is none to
    read."""
    preset = trained.preset
    documents: Iterator[Any] = iter(())
    try:
        corpus, notes = open_held_out(preset, root, Single(), trained.made_with, trained.held_out)
        corpus.check_tokenizer(trained.tokenizer)
        documents = alternating(corpus.held_out_inputs(trained.tokenizer))
    except NoData as error:
        notes = [f"no held-out text: {' '.join(str(error).split())}"]
    for note in notes:
        view.tell(f"note  {note}")
    return proof_text(
        trained.tokenizer,
        documents,
        preset.generate.prompts,
        preset.model.seq_length,
        preset.export.proof_tokens,
    )


def _summary(exported: Exported, target: Path) -> list[str]:
    proof = exported.proof
    if exported.architecture is None:
        return [f"written {target}/: weights and tokenizer, read back equal"]
    lines = [f"note  not in the export: {each}" for each in exported.left_out]
    lines.append(
        f"proved in a fresh process, on {proof.tokens:,} tokens of {proof.text}: logits within "
        f"{proof.max_difference:.2g}, {proof.said} greedy tokens the same"
    )
    lines += [f"{name}: {sentence}" for name, sentence in proof.gguf.items()]
    return [*lines, f"written {target}/: {exported.architecture}"]
