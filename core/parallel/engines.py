"""The engines, and the choice among them.

In:    `train.engine`, the ranks, what a model needs and what a device has
Out:   an Engine, and what is told of the choice
State: none

    single      one process: everything on one device
    ddp         every rank holds everything, and gradients are averaged
    fsdp        every rank holds a share of weights, gradients and optimizer state
    deepspeed   every rank holds a share of what its ZeRO stage names, and the rest whole
"""

import atexit
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # torch does not declare it
    HashStore,
)

from core.errors import UserError
from core.parallel.processes import device_group
from core.parallel.protocol import Engine, Parallel
from core.parallel.replicated import Replicated

SPARE = 1 / 16
"""Of a device's memory: for what the exchange takes, and the device's own."""


def check_engine(choice: str, config: Mapping[str, Any], world_size: int) -> None:
    """Raises UserError where an engine cannot run on so many ranks, or is not installed.

    config   what goes through to DeepSpeed
    """
    if choice == "deepspeed":
        from core.parallel.deepspeed import check_deepspeed  # optional, and slow to import

        check_deepspeed(config)
    if choice == "single" and world_size > 1:
        raise UserError(
            f'train.engine is "single", and there are {world_size} processes. Start main.py '
            'without torchrun, or set train.engine to "auto".'
        )


def choose_engine(
    choice: str,
    config: Mapping[str, Any],
    parallel: Parallel,
    device: torch.device,
    needed: int,
    available: int,
) -> tuple[Engine, str]:
    """Build the engine that a preset names; "auto": one that the model fits.

    config      what goes through to DeepSpeed
    needed      bytes of weights, gradients and optimizer state, and what a row takes
    available   bytes that one rank may use
    """
    ranks = parallel.world_size
    size = f"the model with its optimizer ({needed / 2**30:,.2f} GiB)"
    if ranks > 1 and choice == "auto":
        choice = "ddp" if needed <= (1 - SPARE) * available else "fsdp"
        fits = "fits one device" if choice == "ddp" else "does not fit one device"
        note = f"engine {choice}: {size} {fits}"
    elif choice in ("auto", "ddp") and ranks == 1:
        note = "" if choice == "auto" else 'engine "ddp" is "single" here: there is one process'
        choice = "single"
    else:
        note = f"engine {choice}: {size}"
    if choice == "deepspeed":
        note += f", ZeRO stage {config['zero_optimization']['stage']}"
        from core.parallel.zero import open_deepspeed

        return open_deepspeed(config, parallel.device_group or _group_of_one(device)), note
    if choice == "fsdp":
        note += f"; each of {ranks} processes keeps a share of it" if ranks > 1 else ""
        from core.parallel.fsdp import FSDP  # slow to import

        return FSDP(parallel.device_group or _group_of_one(device)), note
    return Replicated(parallel.device_group if choice == "ddp" else None), note


def _group_of_one(device: torch.device) -> dist.ProcessGroup:
    """Return a process group of this process alone."""
    if not dist.is_initialized():
        store = HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    return device_group(device)
