"""The blocks of a trunk: what is brought together, and freed, one after the other.

In:    a model
Out:   its blocks
State: none
"""

from collections import Counter

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a trunk: the children of its outermost lists, but for those that share
    a parameter with anything else."""
    found: list[nn.Module] = []

    def look_into(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                look_into(child)

    look_into(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [block for block in found if _stands_alone(block, uses)]


def _stands_alone(block: nn.Module, uses: Counter[int]) -> bool:
    own = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
    return bool(own) and all(uses[key] == count for key, count in own.items())
