"""Data parallelism over torchrun's processes: each holds the whole model, gradients are averaged
(torch DDP)."""

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.parallel.protocol import T

HOST_TIMEOUT = timedelta(hours=2)
"""Rank 0 may train a tokenizer or open slow sources while the others wait."""


class DDP:
    """Many processes that each hold the whole model; see core/parallel/protocol.py."""

    def __init__(self, device: torch.device, store: Any, rank: int, world_size: int):
        self.rank, self.world_size, self._device = rank, world_size, device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=HOST_TIMEOUT
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        ids = [self._device.index] if self._device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel)
        return nullcontext() if last else module.no_sync()

    def sum(self, numbers: list[float]) -> list[float]:
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        dist.destroy_process_group()
