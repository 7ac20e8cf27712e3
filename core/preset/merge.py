"""Presets as JSON: laid over each other, and compared.

In:    decoded JSON, resolved or not
Out:   the merged preset; the least difference; what changed, in words
State: none
"""

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # models use `changed`, and can be imported without presets
    from core.preset.base import PresetBase


def preset_json(preset: "PresetBase") -> dict[str, Any]:
    """Return the resolved preset as plain JSON, as it is broadcast, logged and kept in
    checkpoints."""
    return preset.model_dump(mode="json", by_alias=True, exclude={"schema_", "extends"})


def merge(base: Any, changes: Any) -> Any:
    """Lay `changes` over `base`: objects are merged key by key (unless their `type` changes),
    everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if changes.get("type", base.get("type")) != base.get("type"):
        return changes
    return {**base, **{key: merge(base.get(key), value) for key, value in changes.items()}}


def difference(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the least that merged over `base` gives `other`; both are resolved."""
    changes: dict[str, Any] = {}
    for key, value in other.items():
        before = base.get(key)
        if value == before and key in base:
            continue
        changes[key] = value
        if not (isinstance(before, dict) and isinstance(value, dict)):
            continue
        if before.keys() <= value.keys() and before.get("type") == value.get("type"):
            changes[key] = difference(before, value)
    return changes


def changed(
    before: dict[str, Any], now: dict[str, Any], path: str = "", free: Collection[str] = ()
) -> list[str]:
    """Tell what differs between two resolved sections: "train.learning_rate was 0.003, is 0.01".

    free   paths that may differ

    A key that one of them lacks came with another version of this program, with a default that
    changed nothing.
    """
    lines: list[str] = []
    for key in now.keys() & before.keys():
        where = f"{path}{key}"
        if where in free or now[key] == before[key]:
            continue
        if isinstance(now[key], dict) and isinstance(before[key], dict):
            lines += changed(before[key], now[key], f"{where}.", free)
        else:
            was, is_now = (_short(json.dumps(value)) for value in (before[key], now[key]))
            lines.append(f"{where} was {was}, is {is_now}")
    return sorted(lines)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
