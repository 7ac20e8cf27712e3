"""The files a run leaves beside its metrics: the resolved preset, the run card, the curves.

In:    events
Out:   logs/<lineage>/preset.json, run.json, loss.png
State: the card so far
"""

import json
import statistics
import subprocess
from collections import deque
from pathlib import Path
from typing import Any

from core.files import read_json, write_file
from core.metrics.events import LOG
from core.reports.curves import plot_losses
from core.runtime import versions
from core.ui.progress import FINISHED

RECENT_STEPS = 10_000
"""Of which the card tells the median speed: a long run keeps no more."""

SAME_RUNS = ("preset", "device", "world_size")
"""What two runs have in common of which one takes as long as the other."""


class RunCard:
    """Writes preset.json at the start, and run.json at the start, after the first step, at
    evaluations and at the end."""

    def __init__(self, folder: Path, preset: dict[str, Any], started: float, root: Path):
        """`started`: unix time at which main.py began, so that `seconds_to_first_step` counts
        everything."""
        self._folder, self._preset, self._started, self._root = folder, preset, started, root
        self._card: dict[str, Any] = {}
        self._speeds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._begun: float | None = None  # when the run began, where this process has seen that
        self._run_tokens = 0

    def update(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "run_start":
            facts = {k: v for k, v in event.items() if k not in ("event", "time", "step", "tokens")}
            self._begun = event["time"] if facts.get("run_step") == 0 else None
            self._card = {
                **facts,
                "started": self._started,
                "git_commit": _git_commit(self._root),
                "versions": versions(),
            }
            before = read_card(self._folder)
            if "whole_run" in before and all(
                before.get(key) == facts.get(key) for key in SAME_RUNS
            ):
                self._card["whole_run"] = before["whole_run"]
        elif kind == "step":
            self._speeds.append(event["tokens_per_second"])
            self._run_tokens = event.get("run_tokens")
            if "seconds_to_first_step" in self._card:
                return
            self._card["seconds_to_first_step"] = round(event["time"] - self._started, 2)
        elif kind == "eval":
            self._card["last_eval"] = {
                k: v for k, v in event.items() if k not in ("event", "losses")
            }
        elif kind == "run_end":
            self._card |= {
                "reason": event["reason"],
                "step": event["step"],
                "tokens": event["tokens"],
                "ended": event["time"],
            }
            if event["reason"] in FINISHED and self._begun is not None:
                self._card["whole_run"] = {
                    "seconds": round(event["time"] - self._begun, 2),
                    "tokens": self._run_tokens,
                }
        else:
            return
        if self._speeds:
            # a slow one is not 0
            self._card["tokens_per_second"] = float(f"{statistics.median(self._speeds):.4g}")
        _write(self._folder / "run.json", self._card)
        # the folder may have been removed since
        if kind == "run_start" or not (self._folder / "preset.json").exists():
            _write(self._folder / "preset.json", self._preset)


def read_card(folder: Path) -> dict[str, Any]:
    """The run card that an earlier run left; {} where there is none that can be read. Its values
    may be anything."""
    try:
        card = read_json(folder / "run.json")
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def is_positive(value: Any) -> bool:
    """Whether it is a number above zero that can be reckoned with."""
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
    """The commit this program is at, with a "+" when files were changed since."""
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return (
            subprocess.run(
                run, capture_output=True, text=True, timeout=5, check=True
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
