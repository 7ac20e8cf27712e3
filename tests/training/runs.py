"""Trainers assembled from small presets, and what their runs left behind, for the tests."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.assembly.session import TrainingSession, build_training
from core.checkpoint.slots import CheckpointStore
from core.contracts import ModelOutput
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from tests.project import Project, differences, merged, story, tiny_preset

SAME = 1e-5
"""Weights this close are the same but for the order in which floats were added: a hundredth of one
update (AdamW makes every update about as large as the learning rate, however small the
gradient)."""
UPHILL = {"candidates": 3, "bucket_weights": [{"from": 1, "to": 0}, 0, {"from": 0, "to": 1}]}
"""A curriculum from easy to hard."""
EXACT = {"train": {"precision": "fp32", "eval_tokens": 0}}


def session(
    root: Path, should_stop: Callable[[], bool] = lambda: False, **changes: Any
) -> TrainingSession:
    """A trainer, ready to go, as the train job builds it; evaluation is off unless asked for."""
    (root / "texts").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        (root / "texts" / f"story{number:02}.txt").write_text(story(number, 1 + number % 7))
    preset = decode_preset(tiny_preset(**merged(EXACT, changes)), Preset, "t", "t")
    return build_training(preset, detect_runtime(), Single(), root, lambda *_: [], should_stop)


def finish(built: TrainingSession) -> str:
    """Train to the end and close what is open."""
    try:
        return built.trainer.train()
    finally:
        built.trainer.loader.close()
        built.trainer.store.wait()
        built.log.close()


def weights(built: TrainingSession) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in built.trainer.model.named_parameters()}


def events(root: Path, kind: str) -> list[dict]:
    return Project(root).events(kind)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=0, msg=lambda told, name=name: f"{name}: {told}"
        )


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def poison(built: TrainingSession, bad: Callable[[int], bool]) -> list[dict[str, Tensor]]:
    """Make the loss NaN at these steps (counted from 1); returns the weights at the start of each
    step, as they come."""
    seen: list[dict[str, Tensor]] = []
    trainer = built.trainer

    def hook(module: Any, inputs: Any, output: ModelOutput) -> ModelOutput | None:
        seen.append(weights(built))
        return (
            ModelOutput(output.hidden * math.nan, output.readout)
            if bad(trainer.progress.step + 1)
            else None
        )

    trainer.model.register_forward_hook(hook)
    return seen


def limit_rows(built: TrainingSession, most: int) -> None:
    """A device whose memory holds so many rows; the trainer looks for what fits, as before a GPU's
    first step."""

    def hook(module: Any, inputs: Any) -> None:
        if len(inputs[0].labels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    built.trainer.model.register_forward_pre_hook(hook)
    built.trainer.passes.fitted = False


MEASURED = {
    "train": {
        "eval_tokens": 200,
        "eval_every_tokens": 512,
        "max_steps": 10,
        "checkpoint_every_steps": 4,
    }
}
"""An evaluation at steps 4, 8 and 10, each where a checkpoint is due."""


class Gone(BaseException):
    """The program is ended here, as a kill would."""


def slot(root: Path) -> dict[str, Any] | None:
    """The progress in the newest checkpoint."""
    state = CheckpointStore(root / "checkpoints", "t").load()[0]
    return None if state is None else state["progress"]


def warnings_of(root: Path) -> list[str]:
    """The warnings, but for the one that so little text holds less out than is asked for."""
    messages = [event["message"] for event in events(root, "warning")]
    return [message for message in messages if "train.eval_tokens" not in message]


def same_log(one: Path, other: Path) -> bool:
    """Every step, evaluation and sample once, with the same numbers."""
    kinds = {
        "step": ("loss", "grad_norm"),
        "eval": ("cross_entropy",),
        "sample": ("text",),
        "run_end": ("reason", "receipt"),
    }
    found = [
        [
            (kind, e["step"], *(e[key] for key in keys))
            for kind, keys in kinds.items()
            for e in events(root, kind)
        ]
        for root in (one, other)
    ]
    return found[0] == found[1]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Check that the newest checkpoints of two projects are equal, bit for bit."""
    assert differences(Project(one).checkpoint(), Project(other).checkpoint()) == []
