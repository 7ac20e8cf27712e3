"""The content of a checkpoint: every key with its type, and what must be true between them; each
slot is held against it.

In:    what `torch.load` gave
Out:   why that is no state of a training run, in words
State: none
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor
from typing_extensions import TypedDict

from core.parallel.shards import Stored, full

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Named = dict[str, InstanceOf[Tensor]]
Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""A tuple that is written as a list, as JSON would."""


def _json_of_a_tokenizer(text: str) -> str:
    try:
        found = json.loads(text)
    except RecursionError:
        found = None
    if not (isinstance(found, dict) and isinstance(found.get("model"), dict)):
        raise ValueError("is no tokenizer")
    return text


class ProgressState(TypedDict):
    """core/training/progress.py, Progress. `fraction` and the ledger came later; before it there
    was `source_tokens`."""

    step: Count
    tokens: Count
    run: Annotated[int, Field(ge=1, lt=1 << 63)]
    run_step: Count
    run_tokens: Count
    horizon_step: Count
    horizon_tokens: Count
    horizon_runs: Count
    finished: bool
    skipped: Count
    fraction: NotRequired[Annotated[float, Field(ge=0, le=1)]]
    evaluation_due: NotRequired[bool]
    bad_in_a_row: NotRequired[Count]
    ledger: NotRequired[dict[str, dict[str, float | None]]]
    source_tokens: NotRequired[dict[str, Count]]


class RandomState(TypedDict):
    """All random draws are functions of these two."""

    seed: int
    step: Count


class SnapshotState(TypedDict):
    """core/data/mixing.py, Mixer.snapshot. After a change of the data section the first four are
    kept."""

    index: Count
    cursors: dict[str, dict[str, Any]]
    passed: NotRequired[dict[str, Count]]
    current: NotRequired[Count]
    ended: NotRequired[list[str]]
    drawn: NotRequired[dict[str, list[int]]]
    origin: NotRequired[Count]
    rates: NotRequired[list[float]]
    horizon_tokens: NotRequired[Count]
    factors: NotRequired[dict[str, float]]


class HeldOutState(TypedDict):
    """core/data/validation.py, HoldOut.state."""

    held: dict[str, list[int]]
    released: list[int]
    sources: NotRequired[list[str]]
    fraction: NotRequired[Annotated[float, Field(ge=0, le=1)]]


class DataState(TypedDict):
    """core/data/loader.py, Loader.state."""

    rows: Count
    lanes: dict[
        Digits, Annotated[tuple[Count, list[Annotated[tuple[Count, Count], Listed]]], Listed]
    ]
    snapshot: SnapshotState | None
    drops: dict[str, int]
    renewals: list[Count]
    passed_over: NotRequired[Count]
    receipts: dict[Digits, str]
    receipt: str
    fingerprint: str
    contents: NotRequired[dict[str, str]]
    epoch_tokens: NotRequired[Count | None]
    held_out: NotRequired[HeldOutState | None]
    draws: NotRequired[
        list[Annotated[tuple[Count, Count, Count] | tuple[Count, Count, Count, Count], Listed]]
    ]
    factors: NotRequired[list[Annotated[tuple[Count, dict[str, float]], Listed]]]


class AdaptiveState(TypedDict, total=False):
    """core/training/source_weights.py, SourceWeights.state: empty where weights are not adapted."""

    factors: dict[str, float]
    sums: dict[str, float]
    counts: dict[str, Count]
    tokens: Count


class TokenizerState(TypedDict):
    """core/data/tokenizer.py, Tokenizer.state."""

    json: Annotated[str, AfterValidator(_json_of_a_tokenizer)]
    eos_id: Count


class PresetState(TypedDict):
    """The resolved preset that the newest step was trained with. Its keys may be another version's:
    these are always there."""

    name: str
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]


class CheckpointState(TypedDict):
    """A whole checkpoint."""

    model: Annotated[Named, Field(min_length=1)]
    heads: Named
    # by parameter name; those of heads begin with "heads."
    optimizer: dict[str, dict[str, InstanceOf[Tensor] | float]]
    progress: ProgressState
    rng: RandomState
    data: DataState
    tokenizer: TokenizerState
    preset: PresetState
    format: NotRequired[int]
    adaptive: NotRequired[AdaptiveState]
    wandb_id: NotRequired[str | None]
    init_from: NotRequired[str | None]
    compile_from_step: NotRequired[Count | None]
    compile_failed: NotRequired[bool]


class NewestState(TypedDict):
    """The parts of the newest checkpoint that a preview needs, and its file."""

    path: Path
    progress: ProgressState
    preset: PresetState
    data: DataState


OPTIMIZERS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
"""What AdamW and Muon keep of a parameter."""
_SCHEMA = TypeAdapter(CheckpointState)


def held_out_of(state: CheckpointState) -> dict[str, Any] | None:
    """Return what the lineage held out from training, see HoldOut.state; None where an older
    version did not write it."""
    held_out = state["data"].get("held_out")
    return None if held_out is None else dict(held_out)


def problem_of(state: Any) -> str | None:
    """Return why this is no state that a run can go on from; None where it is one. No tensor's
    content is looked at but step counts; see `not_finite`."""
    try:
        _SCHEMA.validate_python(state, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        value = "" if first["type"] == "missing" else f" is {reprlib.repr(first['input'])}"
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}{value}: {message[0].lower()}{message[1:]}"
    return _counts_problem(state) or _tensors_problem(state) or _optimizer_problem(state)


def tensor_problem(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be loaded as a weight; None where it can be."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        return "is sparse, nested or quantized; weights are dense"
    if tensor.device.type != "cpu" and not isinstance(tensor, Stored):
        return f"has no content here (device {tensor.device})"
    return "is complex; weights are real" if tensor.is_complex() else None


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity, in one pass over all of them.
    Every rank must call it."""
    # torch cannot test numbers of 8 bits
    computed = {
        name: tensor.float() if tensor.itemsize == 1 else tensor for name, tensor in tensors.items()
    }
    return [name for name, tensor in computed.items() if not full(tensor.isfinite().all())]


def _parameters(state: CheckpointState) -> dict[str, Tensor]:
    """Return the tensors of model and heads by the names that the optimizer knows them by. Buffers
    are among them."""
    return state["model"] | {f"heads.{name}": tensor for name, tensor in state["heads"].items()}


def _tensors_problem(state: CheckpointState) -> str | None:
    """Check that tensors are dense, in memory and real, and that those which are trained are
    floating-point; a buffer may count or mask."""
    trained = state["optimizer"]
    for name, tensor in _parameters(state).items():
        if (problem := tensor_problem(tensor)) is not None:
            return f"model.{name} {problem}"
        if name in trained and not tensor.is_floating_point():
            return f"model.{name} is {tensor.dtype}, and it is trained: weights are floating-point"
    for name, entry in trained.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and (problem := tensor_problem(value)) is not None:
                return f"optimizer.{name}.{key} {problem}"
            if isinstance(value, Tensor) and not value.is_floating_point():
                return f"optimizer.{name}.{key} is {value.dtype}, not floating-point"
    return None


def _counts_problem(state: CheckpointState) -> str | None:
    """Check that no count is larger than a count it is part of: each update trains at least one
    token; a run, and the runs that share their schedules, are parts of the lineage's life."""
    done: Mapping[str, Any] = state["progress"]
    if state["rng"]["step"] != done["step"]:
        return f"progress.step is {done['step']}, rng.step {state['rng']['step']}"
    for less, more in (
        ("step", "tokens"),
        ("run_step", "step"),
        ("horizon_step", "step"),
        ("run_tokens", "tokens"),
        ("horizon_tokens", "tokens"),
    ):
        if done[less] > done[more]:
            return (
                f"progress.{less} is {done[less]}, more than progress.{more}, which is {done[more]}"
            )
    return None


def _optimizer_problem(state: CheckpointState) -> str | None:
    """Check that each entry is of a parameter that is there, of its shape, and no older than the
    lineage."""
    parameters = _parameters(state)
    for name, entry in state["optimizer"].items():
        if name not in parameters:
            return f"optimizer.{name}: no parameter has this name"
        if set(entry) not in OPTIMIZERS:
            return f"optimizer.{name} has {', '.join(entry) or 'nothing'}: another optimizer's"
        moments = [value for key, value in entry.items() if key != "step"]
        if any(
            not isinstance(each, Tensor) or each.shape != parameters[name].shape for each in moments
        ):
            return f"optimizer.{name} has another shape than its parameter"
        step = torch.as_tensor(entry.get("step", 0.0))
        if step.numel() != 1:
            return f"optimizer.{name}.step is {step.numel()} numbers"
        if not 0 <= float(step) <= state["progress"]["step"]:
            return (
                f"optimizer.{name}.step is {float(step):.0f}, progress.step "
                f"{state['progress']['step']}"
            )
    return None
