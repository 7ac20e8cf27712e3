"""The slots of a lineage, read on every rank.

In:    the store, the ranks
Out:   one state, the same on all of them
State: none
"""

from pathlib import Path

import torch

from core.checkpoint.state import CheckpointState
from core.checkpoint.store import CheckpointStore, LoadedSlot
from core.parallel.protocol import Parallel
from core.parallel.ranks import on_rank_zero


def load_slot(
    store: CheckpointStore, parallel: Parallel, skip: int = 0, settled: bool = False
) -> LoadedSlot:
    """Load a slot on every rank; rank 0 alone judges slots and moves damaged ones aside."""
    state: CheckpointState | None = None

    def judge() -> tuple[Path | None, list[str]]:
        nonlocal state
        state, path, notes = store.load(skip, settled=settled)
        return path, notes

    path, notes = on_rank_zero(parallel, judge)
    if path is not None and state is None:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return LoadedSlot(state, path, notes)
