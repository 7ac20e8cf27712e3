"""The files of an export: written into a folder aside, proved there, and only then in their place.

In:    a Trained, what is asked for, text to prove it with
Out:   exports/<name>/ as a whole, or what was there before
State: none

    model.safetensors  config.json  generation_config.json  tokenizer.json
    tokenizer_config.json  <name>-<kind>.gguf ...  README.md

Weights alone: model.safetensors under our own names, preset.json, the tokenizer, README.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core.errors import UserError
from core.export.architectures import Mapped, as_transformers
from core.export.card import model_card
from core.export.gguf_file import Kind, check_gguf, write_gguf
from core.export.proof import Proof, ProofText, prove
from core.export.tokenizer_files import end_ids, transformers_tokenizer
from core.files import cause, replacing_folder, write_file
from core.preset.merge import preset_json
from core.trained import Trained


@dataclass(frozen=True)
class Exported:
    """An export that was written. `architecture`: the library's name; None for weights alone."""

    architecture: str | None
    left_out: list[str]
    proof: Proof


def export_model(
    trained: Trained[Any], target: Path, root: Path, text: ProofText, gguf: list[Kind]
) -> Exported:
    """Write a model as the transformers library loads it, and GGUF files. Raises UserError, with
    nothing written."""
    mapped = as_transformers(trained)
    if gguf:
        check_gguf(mapped.model, trained.tokenizer)
    names = {f"{target.name}-{kind}.gguf": kind for kind in gguf}
    try:
        with replacing_folder(target) as folder:
            _write_model(trained, mapped, folder)
            for name, kind in names.items():
                write_gguf(folder / name, mapped.model, trained.tokenizer, kind)
            proof = prove(trained, folder, text, [*names])
            exported = Exported(type(mapped.model).__name__, mapped.left_out, proof)
            _write_card(trained, exported, target, folder, root)
    except (OSError, SafetensorError) as error:
        raise _not_written(error, target) from None
    return exported


def export_weights(trained: Trained[Any], target: Path, root: Path, text: ProofText) -> Exported:
    """Write weights under their own names, those of auxiliary heads included. Raises UserError,
    with nothing written."""
    weights = {name: tensor.cpu() for name, tensor in trained.model.state_dict().items()}
    weights |= {f"heads.{name}": tensor for name, tensor in trained.saved_heads.items()}
    made = trained.made_with or preset_json(trained.preset)
    try:
        with replacing_folder(target) as folder:
            path = folder / "model.safetensors"
            # names that share a tensor get one each: a file of weights is read by name
            save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, path)
            with safe_open(path, "pt") as file:
                if odd := [n for n, t in weights.items() if not torch.equal(file.get_tensor(n), t)]:
                    raise UserError(f"{path} does not hold what was written: {', '.join(odd[:4])}")
            write_file(folder / "preset.json", json.dumps(made, indent=2) + "\n")
            transformers_tokenizer(trained).save_pretrained(folder)
            proof = prove(trained, folder, text, [], logits=False)
            exported = Exported(None, [], proof)
            _write_card(trained, exported, target, folder, root)
    except (OSError, SafetensorError) as error:
        raise _not_written(error, target) from None
    return exported


def _write_model(trained: Trained[Any], mapped: Mapped, folder: Path) -> None:
    mapped.model.generation_config.eos_token_id = end_ids(trained.tokenizer)
    mapped.model.save_pretrained(folder)
    transformers_tokenizer(trained).save_pretrained(folder)


def _write_card(
    trained: Trained[Any], exported: Exported, target: Path, folder: Path, root: Path
) -> None:
    card = model_card(
        name=target.name,
        trained=trained,
        proof=exported.proof,
        left_out=exported.left_out,
        root=root,
        architecture=exported.architecture,
    )
    write_file(folder / "README.md", card)


def _not_written(error: Exception, target: Path) -> UserError:
    reason = cause(error, target) if isinstance(error, OSError) else f"{error}. Free some space."
    return UserError(
        f"{target} cannot be written, and what was there is as before: {reason} Then start again."
    )
