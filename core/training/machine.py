"""The machine that a run computes on, as the parts of training know it.

In:    the runtime, the ranks, the preset's precision and engine
Out:   Machine
State: none
"""

from dataclasses import dataclass, field

import torch

from core.parallel.protocol import Engine, Parallel
from core.parallel.replicated import Replicated
from core.runtime import Runtime


@dataclass(frozen=True)
class Machine:
    """A device, the ranks it is one of, the precision that large products are computed in, and
    what keeps the weights."""

    runtime: Runtime
    parallel: Parallel
    dtype: torch.dtype
    engine: Engine = field(default_factory=Replicated)

    @property
    def device(self) -> torch.device:
        return self.runtime.device
