"""Every rank holds the whole of everything; gradients are averaged by torch DDP where there are
several.

Engines "single" and "ddp".
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.parallel.updates import TorchUpdates

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Replicated(TorchUpdates):
    """Whole weights on every rank; see Engine in core/parallel/protocol.py."""

    compiles = True
    savers: "DeviceMesh | None" = None

    def __init__(self, group: dist.ProcessGroup | None = None):
        """`group`: of the ranks; None where there is one."""
        self.name, self._group = "single" if group is None else "ddp", group

    def place(self, model: nn.Module, heads: nn.Module | None, device: torch.device) -> None:
        model.to(device)
        if heads is not None:
            heads.to(device)

    def wrap(self, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> nn.Module:
        self._objective = objective
        if self._group is None:
            return objective
        # every rank computes the same buffers: temperatures, tables of positions
        return DistributedDataParallel(
            objective,
            process_group=self._group,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def one_pass(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return module.no_sync()

    def trial(self) -> AbstractContextManager[None]:
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def weights_of(self, module: nn.Module) -> dict[str, torch.Tensor]:
        return module.state_dict()

    def collect(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: dict(state) for name, state in states.items()}
