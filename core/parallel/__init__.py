"""One small interface over one device and many: what differs between them, and nothing else.

`Single` and `DDP` have the same methods. Numbers and objects travel over the host (gloo), gradients
over the device's own backend.
"""

from core.parallel.ddp import DDP
from core.parallel.ranks import on_rank_zero, rank_zero_first
from core.parallel.single import Single
from core.parallel.slots import load_slot

__all__ = ["DDP", "Single", "load_slot", "on_rank_zero", "rank_zero_first"]
