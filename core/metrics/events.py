"""Events as a log holds them, one JSON object a line: read back.

In:    a path, or a line
Out:   events
State: none
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core.files import check_regular

LOG = "metrics.jsonl"
"""The log's name, in the folder of its lineage."""
TAIL = 1 << 22
"""Bytes at the end of a log that hold its last step, and what came after."""
CUT_SHORT = ("interrupted", "failed", "diverged")
"""Reasons of a `run_end` that no evaluation comes before."""


def read_events(path: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield every event of a log, oldest first. Lines that are no whole event are passed over; a
    file that cannot be read has none.

    most   of each kind at most so many, every n-th and the last; the others are not even decoded
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            for line in file if most is None else _thinned(file, most):
                event = decoded(line)
                if isinstance(event.get("event"), str) and all(
                    type(event.get(key)) is int for key in ("step", "tokens")
                ):
                    yield event
    except OSError:
        return


def evaluation_is_missing(path: Path, step: int) -> bool:
    """Tell whether the log ends at this step without the end of an evaluation there: the program
    was ended before or in it."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return step == 0
    for line in reversed(lines):
        if step_of(line) == step and line.startswith(b'{"event": "run_end"'):
            if json.loads(line).get("reason") not in CUT_SHORT:
                return False
        elif line.startswith(b'{"event": "step"'):
            return step_of(line) == step
    return step == 0


def step_of(line: bytes) -> int:
    """Return the step of a line; a line that is no event of ours counts as old, 0."""
    step = decoded(line).get("step")
    return step if type(step) is int else 0


def decoded(line: bytes) -> dict[str, Any]:
    """Return a line's event; {} where it is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _thinned(file: Iterable[bytes], most: int) -> list[bytes]:
    """Keep of each kind of line every n-th and the last, so that there are at most `most`, in
    order."""
    kept: dict[bytes, list[tuple[int, bytes]]] = {}
    counts: Counter[bytes] = Counter()
    every: dict[bytes, int] = {}
    last: dict[bytes, tuple[int, bytes]] = {}
    for number, line in enumerate(file):
        kind = _kind_of(line)
        last[kind] = number, line
        if counts[kind] % every.setdefault(kind, 1) == 0:
            lines = kept.setdefault(kind, [])
            lines.append(last[kind])
            if len(lines) > most - 1:
                kept[kind], every[kind] = lines[::2], 2 * every[kind]
        counts[kind] += 1
    numbered = {each for lines in [*kept.values(), last.values()] for each in lines}
    return [line for _, line in sorted(numbered)]


def _kind_of(line: bytes) -> bytes:
    """Return the beginning of a line that says what event it is, as `MetricsLog.emit` writes it."""
    return line[:40].partition(b",")[0] if line.startswith(b'{"event"') else b""
