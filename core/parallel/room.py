"""Room for all weights on every rank's device, before they are brought together: in the midst of it
one that has none would leave the others waiting.

In:    a number of weights
Out:   OutOfMemoryError on every rank, where one of them has no room
State: none
"""

import torch
import torch.distributed as dist


def make_sure_of_room(weights: int, device: torch.device, group: dist.ProcessGroup) -> None:
    """Raises OutOfMemoryError on every rank where one of them has no room for so many weights in
    fp32."""
    has_room = torch.ones(1, device=device)
    try:
        reserve(4 * weights, device)
    except torch.OutOfMemoryError:
        has_room.zero_()
    dist.all_reduce(has_room, dist.ReduceOp.MIN, group)
    if not has_room:
        raise torch.OutOfMemoryError(
            f"a device has no room for all weights ({4 * weights / 2**30:,.1f} GiB) at once"
        )


def reserve(size: int, device: torch.device) -> None:
    """Allocate so many bytes, and give them back. Raises OutOfMemoryError."""
    torch.empty(size, dtype=torch.uint8, device=device)
