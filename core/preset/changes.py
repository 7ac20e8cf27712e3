"""Changes between two resolved presets that make a run compute something else.

In:    two presets as JSON, of the same lineage
Out:   each change in words
State: none
"""

import json
from typing import Any

FREE = (
    "name",
    "description",
    "lineage",
    "job",
    "variants",
    "seeds",
    "compare",
    "logging",
    "tokenize",
    "evaluate",
    "interpret",
)
FREE_KEYS = (
    "data.workers",
    "data.cache_gigabytes",
    "train.checkpoint_every_minutes",
    "train.checkpoint_every_steps",
)
"""Sections and keys that may change between two starts: they change nothing in what a run
computes."""
LONGEST_VALUE = 60
"""Characters of a value that are shown."""


def describe_changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Return each change as "train.learning_rate was 0.003, is 0.01", sorted by its path.

    A key that only one of the presets has was added by another version of this program, with a
    default that changes nothing.

    path   where the two dicts stand in the presets: "" or "model."
    """
    changes = []
    for key in now.keys() & before.keys():
        where = f"{path}{key}"
        if where in (*FREE, *FREE_KEYS) or now[key] == before[key]:
            continue
        if isinstance(now[key], dict) and isinstance(before[key], dict):
            changes += describe_changes(before[key], now[key], f"{where}.")
        else:
            changes.append(f"{where} was {_shortened(before[key])}, is {_shortened(now[key])}")
    return sorted(changes)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
