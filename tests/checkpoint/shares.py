"""A lineage with checkpoints in shares, for the tests: on one process, which has all of them."""

from pathlib import Path
from typing import Any

from core.checkpoint.slots import CheckpointStore, label
from core.parallel.shards import full

SHARED: dict[str, Any] = {
    "train": {"engine": "fsdp", "checkpoint_every_steps": 2, "max_steps": 5},
    "model": {"tie_embeddings": True},
    "auxiliary": {"enable_value": True},
}


def whole(state: Any) -> dict[str, Any]:
    """The state with every tensor read."""
    found = {part: {n: full(t) for n, t in state[part].items()} for part in ("model", "heads")}
    optimizer = {
        name: {key: full(value) for key, value in entry.items()}
        for name, entry in state["optimizer"].items()
    }
    return {**state, **found, "optimizer": optimizer}


def store(root: Path) -> CheckpointStore:
    return CheckpointStore(root / "checkpoints", "t")


def forms(root: Path) -> list[str]:
    """The slots that are there."""
    both = (*store(root).slots, *store(root).shares)
    return sorted(label(path) for path in both if path.exists())


def step_of(root: Path, slot: int = 0) -> int:
    state = store(root).load(skip=slot)[0]
    assert state is not None
    return state["progress"]["step"]
