"""Weights made before: the newest slot of a lineage, a file of ours, one that PolychromaticLM
published, or anybody's.

In:    a lineage, or a file's path, as a preset's `init_from` says it
Out:   Weights: tensors by name, and what the file says beside them
State: none; nothing is ever written or renamed here

    ours                 {"format", "model", "progress", "tokenizer", "preset", ...}
    PolychromaticLM's    {"model", "optimizer", "scheduler", "step", "tau"}, as its files are; or,
                         as its specification says, {"model_state_dict", "optimizer_state_dict",
                         "scheduler_state_dict", "step", "tau"}
    anybody's            {name: tensor}, also as .safetensors
"""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint.fitting import load_model
from core.checkpoint.slots import CheckpointStore, Damaged, label, read_checkpoint
from core.checkpoint.state import CheckpointState, held_out_of, not_finite, tensor_problem
from core.contracts import call_if_defined
from core.errors import UserError
from core.file_names import shares_name, slot_name
from core.files import own_path
from core.parallel.shards import full
from core.preset.merge import changed
from core.preset.settings import Settings

SUFFIXES = (".pth", ".pt", ".safetensors")
"""What makes a name that of a file."""

MODEL_KEYS = ("model", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name."""

FITTING = (
    "Give the preset's model the settings they were made with, and their tokenizer; or "
    "name other weights."
)


@dataclass
class Weights:
    """Weights that somebody made, and what is known of how."""

    model: dict[str, Tensor]
    path: Path
    where: str  # the file, as people are told of it
    step: int | None = None
    fraction: float = 1.0  # how far the schedules had come
    tokenizer: dict[str, Any] | None = None
    preset: dict[str, Any] | None = None  # the resolved preset they were made with, as JSON
    notes: list[str] = field(default_factory=list)
    tokens: int | None = None  # that they were trained on
    # what they were not, see HoldOut.state in core/data/validation.py
    held_out: dict[str, Any] | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)  # of auxiliary heads
    receipt: str | None = None  # of the data they were trained on
    init_from: str | None = None  # the weights that their lineage began with

    @classmethod
    def of(
        cls, state: CheckpointState, path: Path, where: str, notes: list[str] | None = None
    ) -> "Weights":
        """Take the weights of one of our own checkpoints. Older ones do not say how far schedules
        had come."""
        progress = state["progress"]
        return cls(
            model=state["model"],
            path=path,
            where=where,
            step=progress["step"],
            fraction=progress.get("fraction", float(progress.get("finished", False))),
            tokenizer=dict(state["tokenizer"]),
            preset=dict(state["preset"]),
            notes=notes or [],
            tokens=progress["tokens"],
            held_out=held_out_of(state),
            heads=state.get("heads", {}),
            receipt=state["data"]["receipt"],
            init_from=state.get("init_from"),
        )

    def __str__(self) -> str:
        return self.where if self.step is None else f"{self.where}, step {self.step:,}"

    def load_into(self, model: nn.Module, advice: str = FITTING) -> list[str]:
        """Put them into a model; returns remarks. Raises CheckpointError naming everything that
        does not fit."""
        notes = self.prepare(model)
        return notes + self.fill(model, advice)

    def prepare(self, model: nn.Module) -> list[str]:
        """Make weights and model fit each other, as far as may be; returns remarks."""
        notes: list[str] = []
        self._check_kinds({})
        call_if_defined(model, "prepare_load", self.model, notes)
        self._check_kinds(model.state_dict())
        return notes

    def fill(self, model: nn.Module, advice: str) -> list[str]:
        """Put them into a model that they were prepared for, and that may be shared out since;
        returns remarks. Every rank must call it."""
        notes = load_model(model, self.model, self.where, advice=advice)
        loaded = {name: t for name, t in model.state_dict().items() if name in self.model}
        heads = {f"heads.{name}": full(tensor) for name, tensor in self.heads.items()}
        if odd := not_finite(loaded | heads):
            names = ", ".join(odd[:4]) + (", ..." if len(odd) > 4 else "")
            notes.append(
                f"not finite in {self.where}: {names}: nothing is learned from such weights; take "
                "an older checkpoint"
            )
        return notes

    def _check_kinds(self, own: dict[str, Tensor]) -> None:
        """Raises UserError where a tensor is of a kind that copying would turn into other weights,
        or cannot copy."""
        for name, tensor in self.model.items():
            problem = tensor_problem(tensor)
            if (
                problem is None
                and name in own
                and own[name].is_floating_point()
                and not tensor.is_floating_point()
            ):
                problem = f"is {tensor.dtype}; weights are floating-point"
            if problem is not None:
                raise UserError(
                    f"{self.where}: {name} {problem}. Save it anew as plain floating-point "
                    "weights, or name another."
                )

    def other_settings(self, model: Settings) -> list[str]:
        """Tell what their `model` section said otherwise than this one: "model.seq_length was 128,
        is 256"."""
        return (
            changed(self.preset["model"], model.model_dump(mode="json"), "model.")
            if self.preset is not None
            else []
        )


def is_file(origin: str) -> bool:
    """Return whether `init_from` names a file; else it is a lineage."""
    return "/" in origin or origin.endswith(SUFFIXES)


def find_weights(origin: str, root: Path) -> Weights:
    """Find what `init_from` names. Raises UserError saying what there is, or what to run first."""
    if is_file(origin):
        return read_weights(own_path(origin, root), origin)
    return newest_weights(origin, root)


def preview_weights(origin: str, root: Path) -> str:
    """Return what the menu calls the weights that `init_from` names; quick, as nothing but the step
    is read. Raises UserError."""
    path = own_path(origin, root)
    if is_file(origin):
        if path.is_dir() and path.parent.name.endswith("_sharded"):
            return str(read_weights(path, origin))
        if not path.is_file():
            raise _no_file(origin)
        step = _step(_read_torch(path, origin)) if zipfile.is_zipfile(path) else None
        return str(Weights({}, path, origin, step))
    found = CheckpointStore(root / "checkpoints", origin).peek()
    if found is None:
        raise _no_lineage(origin, root)
    return str(Weights({}, found["path"], label(found["path"]), found["progress"]["step"]))


def newest_weights(lineage: str, root: Path) -> Weights:
    """The newest slot of a lineage that can be read; its files stay as they are. Raises
    UserError."""
    store = CheckpointStore(root / "checkpoints", lineage)
    state, path, notes = store.load(read_only=True)
    if state is not None and path is not None:
        return Weights.of(state, path, label(path), notes)
    if notes:
        raise UserError(
            f'no checkpoint of the lineage "{lineage}" can be read:\n  ' + "\n  ".join(notes)
        )
    raise _no_lineage(lineage, root)


def read_weights(path: Path, where: str) -> Weights:
    """The weights in a file. Raises UserError, or CheckpointError where a newer version of this
    program wrote it.

    where   what people are told it is called
    """
    shared = path.is_dir() and path.parent.name.endswith("_sharded")
    if not (shared or path.is_file()):
        raise _no_file(where)
    if path.suffix == ".safetensors":
        return Weights(_bare(_read_safetensors(path, where), where), path, where)
    state = {} if shared else _read_torch(path, where)
    if shared or ("format" in state and "progress" in state):
        try:
            return Weights.of(read_checkpoint(path, mmap=True), path, where)
        except Damaged as reason:
            raise UserError(
                f"{where} is damaged ({reason}). Name another file, or the lineage it comes from."
            ) from None
    model = next((state[key] for key in MODEL_KEYS if isinstance(state.get(key), dict)), None)
    if model is None:
        return Weights(_bare(state, where), path, where)
    tau = state.get("tau")
    return Weights(
        _bare(model, where),
        path,
        where,
        _step(state),
        1.0 if tau is None else fraction_of(float(tau)),
    )


def fraction_of(tau: float) -> float:
    """Compute how far a run of PolychromaticLM had come: its tau falls from 1 to 0.1 (specification
    001)."""
    return min(max((1.0 - tau) / 0.9, 0.0), 1.0)


def _step(state: dict[str, Any]) -> int | None:
    progress = state.get("progress")
    step = progress.get("step") if isinstance(progress, dict) else state.get("step")
    return step if isinstance(step, int) else None


def _no_file(where: str) -> UserError:
    return UserError(
        f"{where} does not exist. A path is relative to the folder of main.py; a lineage has no / "
        "in its name."
    )


def _no_lineage(lineage: str, root: Path) -> UserError:
    whose = (
        f'the preset "{lineage}"'
        if (root / "configs" / f"{lineage}.json").exists()
        else f'a preset of lineage "{lineage}"'
    )
    folder = root / "checkpoints"
    names = {path.name.removesuffix(slot_name("")) for path in folder.glob(slot_name("*"))}
    shared = (path.parent.name for path in folder.glob(shares_name("*")))
    names |= {name.removesuffix(shares_name("").split("/")[0]) for name in shared}
    others = f" There are checkpoints of {', '.join(sorted(names))}." if names else ""
    return UserError(f"checkpoints/{slot_name(lineage)} is not there: run {whose} first.{others}")


def _read_torch(path: Path, where: str) -> dict[str, Any]:
    try:
        # a published checkpoint is three times its weights: what is not used stays on the disk
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}.") from None
    except Exception as error:  # whatever reading a damaged or foreign file may raise
        reason = (
            str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        )
        raise UserError(
            f"{where} cannot be read as tensors and plain values, and code in a file is never run "
            f"({reason}). Load it where it "
            "was made, and save only the state dict, best as .safetensors."
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{where} holds a {type(state).__name__}, not weights by name.")
    return state


def _read_safetensors(path: Path, where: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where} cannot be read: {error}.") from None


def _bare(model: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors under the model's own names."""
    if not model or not all(isinstance(value, Tensor) for value in model.values()):
        keys = ", ".join(map(str, list(model)[:6])) or "nothing"
        raise UserError(
            f"{where} holds no weights that this program knows: {keys}. Save it as a state dict, "
            f"{{name: tensor}}."
        )
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in model)), None):
        model = {name.removeprefix(prefix): value for name, value in model.items()}
    return dict(model)
