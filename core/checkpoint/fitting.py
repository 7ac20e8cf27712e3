"""Fits saved weights into a module, by name and shape.

In:    tensors by name
Out:   notes on what is new and what was left out; CheckpointError naming what does not fit
State: none
"""

from collections.abc import Callable

import torch

from core.errors import CheckpointError
from core.parallel.shards import Stored, is_sharded, like

LINEAGE_OF_ITS_OWN = (
    'Give the preset a "lineage" of its own, or its model the settings it was trained with.'
)


def load_model(
    module: torch.nn.Module,
    saved: dict[str, torch.Tensor],
    where: str,
    may_differ: Callable[[str], bool] = lambda name: False,
    advice: str = LINEAGE_OF_ITS_OWN,
) -> list[str]:
    """Load weights by name and shape; returns remarks.

    may_differ   names that may be missing on either side
    advice       what to do where they do not fit
    Raises CheckpointError naming everything that does not fit; nothing is changed then.
    """
    own = module.state_dict(keep_vars=True)
    filled = {id(tensor) for name, tensor in own.items() if name in saved}
    # tied: kept once
    missing = [n for n in sorted(own.keys() - saved.keys()) if id(own[n]) not in filled]
    unknown = sorted(saved.keys() - own.keys())
    wrong = [
        f"{name} is {tuple(saved[name].shape)} there, {tuple(own[name].shape)} here"
        for name in sorted(own.keys() & saved.keys())
        if own[name].shape != saved[name].shape
    ]
    problems = wrong
    problems += [f"{name} is missing there" for name in missing if not may_differ(name)]
    problems += [f"{name} is unknown here" for name in unknown if not may_differ(name)]
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"the weights in {where} do not fit this preset's model:\n  "
            + "\n  ".join(problems[:8])
            + more
            + f"\n{advice} Nothing was overwritten."
        )

    def ready(name: str, tensor: torch.Tensor) -> torch.Tensor:
        # whole ones in memory are copied from there: twice on the device may be too much
        in_parts = name in own and (is_sharded(own[name]) or isinstance(tensor, Stored))
        return like(tensor, own[name]) if in_parts else tensor

    module.load_state_dict({n: ready(n, t) for n, t in saved.items()}, strict=False)
    return [f"{name} is new: starts untrained" for name in missing] + [
        f"{name} was left out" for name in unknown
    ]
