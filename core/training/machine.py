"""The machine that a run computes on, as the parts of training know it.

In:    the runtime, the ranks, the preset's precision
Out:   Machine
State: none
"""

from dataclasses import dataclass

import torch

from core.parallel.protocol import Parallel
from core.runtime import Runtime


@dataclass(frozen=True)
class Machine:
    """A device, the ranks it is one of, and the precision that large products are computed in."""

    runtime: Runtime
    parallel: Parallel
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.runtime.device
