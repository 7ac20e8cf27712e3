"""Trains one preset after the other on the ranks that torchrun started: a matrix of them costs one
start.

    torchrun --standalone --nproc_per_node=2 -m tests.parallel.many cases.json "" | folder

In:    a JSON list of [preset, folder]; the name of the folder where something fails, which is
       "out of memory": on rank 1, in the first pass, a trial; "out of memory, backward": in the
       backward pass of that; "no room": on rank 1, to gather all weights; "bad steps": the loss is
       no number in some steps
Out:   each folder's log and checkpoints; on standard output, a line for each that was refused
"""

import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from benchmarks.measuring import ranks_of_torchrun
from core.errors import UserError
from core.jobs.train import train
from core.parallel.room import reserve
from core.preset.decode import decode_preset
from core.registry import Preset
from core.training.passes import Passes

BAD = (3, 8, 9, 10, 11, 12)
"""Steps taken before a bad one."""


class Fails(Passes):
    """On rank 1 the first pass, a trial as on a GPU, is out of memory in the middle."""

    def __init__(self, module: Any, model: Any, *arguments: Any):
        super().__init__(module, model, *arguments)
        self.fitted = False
        if self._parallel.rank == 1:
            handle = model.layers[-1].register_forward_pre_hook(lambda *_: self._fail())
            self._remove = handle.remove

    def _fail(self) -> None:
        self._remove()
        raise torch.OutOfMemoryError("no memory")


class FailsBackward(Passes):
    """The same in its backward pass."""

    def __init__(self, module: Any, model: Any, *arguments: Any):
        super().__init__(module, model, *arguments)
        self.fitted = False
        if self._parallel.rank == 1:
            self._handle = model.layers[0].register_forward_hook(self._prepare)

    def _prepare(self, module: Any, inputs: Any, hidden: torch.Tensor) -> None:
        self._handle.remove()
        hidden.register_hook(no_room)


class Poisons(Passes):
    """The loss of some steps is no number, on the last rank alone."""

    def gradients(self, rows: Any, progress: float, step: int) -> Any:
        if step not in BAD or self._parallel.rank < self._parallel.world_size - 1:
            return super().gradients(rows, progress, step)
        layer = cast(Any, self._model).layers[-1]
        handle = layer.register_forward_hook(lambda module, inputs, hidden: hidden * math.nan)
        try:
            return super().gradients(rows, progress, step)
        finally:
            handle.remove()


def no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


def main(cases: list[tuple[dict, str]], failing: str) -> None:
    runtime, parallel = ranks_of_torchrun()
    with (
        mock.patch("core.reports.run_card.plot_losses"),
        mock.patch("core.reports.curves_masked.plot_masked"),
    ):
        for number, (preset, folder) in enumerate(cases):
            decoded = decode_preset(preset, Preset, "t", "t")
            what = failing if Path(folder).name == failing else ""
            passes = {
                "out of memory": Fails,
                "out of memory, backward": FailsBackward,
                "bad steps": Poisons,
            }.get(what, Passes)
            room = no_room if what == "no room" and runtime.rank == 1 else reserve
            try:
                with (
                    mock.patch("core.training.trainer.Passes", passes),
                    mock.patch("core.parallel.room.reserve", room),
                ):
                    train(decoded, runtime, parallel, Path(folder), 0.0, io.StringIO())
            except UserError as error:
                if runtime.rank == 0:
                    print(f"{number}: {error}", flush=True)
    with contextlib.suppress(Exception):
        parallel.close()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
