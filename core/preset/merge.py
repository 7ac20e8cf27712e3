"""Presets as JSON: laid over each other, and compared.

In:    decoded JSON, resolved or not
Out:   the merged preset; the least difference; what changed, in words
State: none
"""

import json
from collections.abc import Collection
from typing import Any

from core.preset.base import PresetBase


def preset_json(preset: PresetBase) -> dict:
    """The resolved preset as plain JSON: what is broadcast, logged and kept in checkpoints."""
    return preset.model_dump(mode="json", by_alias=True, exclude={"schema_", "extends"})


def merge(base: Any, own: Any) -> Any:
    """`own` over `base`: objects are merged key by key (unless their `type` changes), everything
    else is replaced."""
    if not (isinstance(base, dict) and isinstance(own, dict)) or own.get(
        "type", base.get("type")
    ) != base.get("type"):
        return own
    return {**base, **{key: merge(base.get(key), value) for key, value in own.items()}}


def difference(base: dict, other: dict) -> dict:
    """The least that merged over `base` gives `other`; both are resolved."""
    found = {}
    for key, value in other.items():
        before = base.get(key)
        if value == before and key in base:
            continue
        both = isinstance(before, dict) and isinstance(value, dict)
        alike = both and before.keys() <= value.keys() and before.get("type") == value.get("type")
        found[key] = difference(before, value) if alike else value
    return found


def changed(
    before: dict[str, Any], now: dict[str, Any], path: str = "", free: Collection[str] = ()
) -> list[str]:
    """Tell what differs between two resolved sections: "train.learning_rate was 0.003, is 0.01".

    free   paths that may differ

    A key that one of them lacks came with another version of this program, with a default that
    changed nothing.
    """
    found = []
    for key in now.keys() & before.keys():
        where = f"{path}{key}"
        if where in free or now[key] == before[key]:
            continue
        if isinstance(now[key], dict) and isinstance(before[key], dict):
            found += changed(before[key], now[key], f"{where}.", free)
        else:
            was, is_now = (_short(json.dumps(value)) for value in (before[key], now[key]))
            found.append(f"{where} was {was}, is {is_now}")
    return sorted(found)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
