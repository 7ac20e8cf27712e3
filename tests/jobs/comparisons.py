"""A small comparison, run in this process, and what it leaves: for the tests of the compare job."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from tests.project import merged, story, tiny_preset

job = importlib.import_module("core.jobs.compare")


def preset_of(**changes: Any) -> dict:
    """Two learning rates, two seeds."""
    preset = tiny_preset(
        name="Rates",
        job="compare",
        seeds=[1, 2],
        variants=[
            {"name": "as it is"},
            {"name": "higher", "set": {"train": {"learning_rate": 0.01}}},
        ],
        tokenizer={"type": "bpe", "vocab_size": 300},
        train={"max_steps": 4},
    )
    return merged(preset, changes)


def compare_here(preset: dict, root: Path) -> str:
    """Run the job in this process; what it tells."""
    (root / "texts").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        (root / "texts" / f"story{number:02}.txt").write_text(story(number))
    console = io.StringIO()
    job.compare(
        decode_preset(preset, Preset, "t", "t"), detect_runtime(), Single(), root, 0.0, console
    )
    return console.getvalue()


def files(root: Path) -> dict[str, bytes]:
    """What trials have left; reports are written anew each time."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    reports = ("report.html", "report.md", "metrics.json", "state.json")
    return {name: path.read_bytes() for name, path in found.items() if path.name not in reports}


def report(root: Path) -> dict:
    return json.loads((root / "logs" / "t" / "metrics.json").read_text())


TRIALS = [f"{variant}/{seed}" for seed in (1, 2) for variant in ("as_it_is", "higher")]
