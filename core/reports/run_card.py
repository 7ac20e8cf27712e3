"""The files that a run leaves beside its metrics: the resolved preset, the run card, the curves.

In:    events
Out:   logs/<lineage>/preset.json, run.json, loss.png
State: the card so far
"""

import json
import statistics
import subprocess
from collections import deque
from pathlib import Path
from typing import Any, TypeGuard

from core.files import read_json, write_file
from core.metrics.events import LOG
from core.reports.curves import plot_losses
from core.runtime import versions
from core.ui.progress import FINISHED

RECENT_STEPS = 10_000
"""Number of steps whose median speed the card gives; a long run remembers no more."""

SAME_RUNS = ("preset", "device", "world_size")
"""Keys that are equal in two runs if one takes as long as the other."""


class RunCard:
    """Writes preset.json at the start, and run.json at the start, after the first step, at
    evaluations and at the end."""

    def __init__(self, folder: Path, preset: dict[str, Any], started: float, root: Path):
        """
        folder    the lineage's folder in logs/
        preset    resolved, as JSON
        started   unix time at which main.py began; `seconds_to_first_step` counts from there
        root      the project, whose git commit is written down
        """
        self._folder, self._preset, self._started, self._root = folder, preset, started, root
        self._card: dict[str, Any] = {}
        self._speeds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._began: float | None = None  # when the run began, if this process has seen that
        self._run_tokens: int | None = 0

    def update(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "run_start":
            self._begin(event)
        elif kind == "step":
            self._speeds.append(event["tokens_per_second"])
            self._run_tokens = event.get("run_tokens")
            if "seconds_to_first_step" in self._card:
                return
            self._card["seconds_to_first_step"] = round(event["time"] - self._started, 2)
        elif kind == "eval":
            left_out = ("event", "losses")
            self._card["last_eval"] = {k: v for k, v in event.items() if k not in left_out}
        elif kind == "run_end":
            self._end(event)
        else:
            return
        if self._speeds:
            # significant digits, not decimals: a slow speed is not 0
            self._card["tokens_per_second"] = float(f"{statistics.median(self._speeds):.4g}")
        _write(self._folder / "run.json", self._card)
        # the folder may have been removed since
        if kind == "run_start" or not (self._folder / "preset.json").exists():
            _write(self._folder / "preset.json", self._preset)

    def _begin(self, event: dict[str, Any]) -> None:
        left_out = ("event", "time", "step", "tokens")
        facts = {key: value for key, value in event.items() if key not in left_out}
        self._began = event["time"] if facts.get("run_step") == 0 else None
        self._card = {
            **facts,
            "started": self._started,
            "git_commit": _git_commit(self._root),
            "versions": versions(),
        }
        before = read_card(self._folder)
        same_run = all(before.get(key) == facts.get(key) for key in SAME_RUNS)
        if "whole_run" in before and same_run:
            self._card["whole_run"] = before["whole_run"]

    def _end(self, event: dict[str, Any]) -> None:
        for key in ("reason", "step", "tokens"):
            self._card[key] = event[key]
        self._card["ended"] = event["time"]
        if event["reason"] in FINISHED and self._began is not None:
            seconds = round(event["time"] - self._began, 2)
            self._card["whole_run"] = {"seconds": seconds, "tokens": self._run_tokens}


def read_card(folder: Path) -> dict[str, Any]:
    """Return the run card that an earlier run left; {} where none can be read. Its values may be
    anything."""
    try:
        card = read_json(folder / "run.json")
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def is_positive(value: Any) -> TypeGuard[float]:
    """Tell whether a value is a number above zero that can be calculated with."""
    return isinstance(value, int | float) and 1e-9 < value < 1e18


class LossPlot:
    """Redraws loss.png at evaluations and at the end."""

    def __init__(self, folder: Path):
        self._folder = folder

    def update(self, event: dict[str, Any]) -> None:
        if event["event"] in ("eval", "run_end"):
            plot_losses(self._folder / LOG, self._folder / "loss.png")


def _write(path: Path, value: dict[str, Any]) -> None:
    write_file(path, json.dumps(value, indent=2) + "\n")


def _git_commit(root: Path) -> str | None:
    """Return the commit of the program, with a "+" if files were changed since."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
