"""The processes that torchrun started, as ranks.

In:    torchrun's rendezvous store
Out:   Processes: numbers and objects travel over the host, tensors over the device's own backend
State: the process groups
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from core.parallel.protocol import T

HOST_TIMEOUT = timedelta(hours=2)
"""Rank 0 may train a tokenizer or open slow sources while the others wait."""
DEVICE_TIMEOUT = timedelta(minutes=15)
"""No step takes so long: a rank that does not come by then has died, or hangs."""


class Processes:
    """Many processes; see core/parallel/protocol.py."""

    def __init__(self, device: torch.device, store: Any, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=HOST_TIMEOUT
        )
        self.device_group = device_group(device)

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


def device_group(device: torch.device) -> dist.ProcessGroup:
    """Return the group of all ranks that tensors on the device travel in: on a GPU one of its own,
    with a clock of its own."""
    if device.type != "cuda":
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    group = dist.new_group(backend="nccl", timeout=DEVICE_TIMEOUT, device_id=device)
    assert group is not None
    return group
