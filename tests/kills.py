"""Runs that are killed at random moments, again and again, and still end in the same bits: by hand
`python -m tests.kills`.

    python -m tests.kills --kills 60                 kill -9, over all presets
    python -m tests.kills --kills 60 --signal HUP    a connection that drops

Moments: while it starts, in the middle of steps, in an evaluation, while samples are drawn, and at
the end of the run. Compared with an uninterrupted run are, bit for bit, the weights of model and
heads, optimizer, progress and position in the data; and every field in the log of each step,
evaluation, sample and change of the mix, but times, speeds and memory.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.project import Project, Result, differences, measured, merged, tiny_preset

STEPS = 60
BASE = tiny_preset(
    tokenizer={"type": "bpe", "vocab_size": 300},
    train={
        "max_steps": STEPS,
        "checkpoint_every_steps": 5,
        "eval_every_tokens": 1500,
        "eval_tokens": 600,
    },
    data={
        "sources": [
            {"type": "text", "path": "texts"},
            {"type": "text", "path": "core/data/**/*.py", "name": "code"},
        ],
        "mix_strategy": "weighted",
        "source_weights": [0.6, 0.4],
    },
    generate={"prompts": ["The ", "In year"], "max_tokens": 16, "temperature": 0.8},
)
NEOBERT = {"type": "neobert", "head": "distance", "num_layers": 2, "intermediate_size": 64}
POLYCHROMATIC = {
    "type": "polychromatic",
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
}
CURRICULUM = {"candidates": 2, "bucket_weights": [{"from": 1, "to": 0}, 0.5]}
ON = {
    "enable_value": True,
    "enable_dynamics": True,
    "enable_adaptive_sources": True,
    "adaptive_interval_tokens": 2000,
}
PRESETS = {
    "language": merged(BASE, {"model": {"dropout": 0.1}}),
    "masked": merged(
        BASE,
        {
            "model": NEOBERT,
            "losses": [{"type": "harmonic"}],
            "generate": {"prompts": ["the [MASK]"]},
            "train": {"eval_tokens": 150},
        },
    ),
    "routed": merged(
        BASE, {"model": POLYCHROMATIC, "train": {"optimizer": "muon", "curriculum": CURRICULUM}}
    ),
    "heads": merged(
        BASE,
        {
            "auxiliary": ON,
            "train": {"eval_at_start": True, "max_steps": STEPS // 2, "runs": 2},
            "data": {"workers": 1},
        },
    ),
}
"""Presets with everything that has a state: dropout, masks, noise, a trained tokenizer, a mix that
follows losses, a curriculum, two runs."""
MOMENTS = ("start", "any", "eval", "sample", "end")


def finished(project: Project) -> bool:
    """Return whether nothing is left to do: the last run's last event is in the log."""
    ends = [event["reason"] for event in project.events("run_end")]
    runs = json.loads((project.folder / "configs" / "t.json").read_text())["train"].get("runs", 1)
    return ends.count("max_steps") == runs


def last_event(log: Path) -> dict:
    """Read the last whole line of a log."""
    lines = log.read_bytes()[-65536:].split(b"\n")[:-1] if log.exists() else []
    if lines and lines[-1].startswith(b"{"):
        return json.loads(lines[-1])
    return {"event": "", "step": 0}


def moment(
    kind: str, project: Project, evaluated: list[int], chance: random.Random
) -> Callable[[], bool]:
    """Return a function that says whether the moment has come, to be called again and again. A run
    that ends before is not killed.

    evaluated   the steps after which there is an evaluation; the last one is the end
    """
    log = project.folder / "logs" / "t" / "metrics.jsonl"
    begun, before = time.monotonic(), log.stat().st_mtime_ns if log.exists() else 0
    reached = max(project.steps(), default=0)
    ahead = chance.randrange(1, 25)
    next_evaluated = min([step for step in evaluated if step >= reached], default=0)
    targets = {"start": 0, "end": evaluated[-1], "any": reached + ahead}
    target = min(targets.get(kind, next_evaluated), evaluated[-1])
    afters = {"start": ("",), "any": ("step",), "sample": ("eval", "sample")}
    after = afters.get(kind, ("step", "checkpoint"))
    delay = chance.uniform(0.0, {"start": 4.0, "end": 0.5, "eval": 0.2}.get(kind, 0.03))
    seen: list[float] = []

    def ready() -> bool:
        if not seen:
            begins = kind == "start" or (log.exists() and log.stat().st_mtime_ns > before)
            last = last_event(log) if begins and kind != "start" else {"event": "", "step": 0}
            if begins and last["step"] >= target and last["event"] in after:
                seen.append(begun if kind == "start" else time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= delay

    return ready


def survive(
    project: Project, whole: Project, kills: int, how: signal.Signals, chance: random.Random
) -> Counter[str]:
    """Kill the run and start it again until it is over; compare; and begin anew until it was killed
    so many times. Returns the number of kills at each kind of moment."""
    done, evaluated = Counter[str](), [event["step"] for event in whole.events("eval")]
    while done.total() < kills:
        for part in ("checkpoints", "logs"):
            shutil.rmtree(project.folder / part, ignore_errors=True)
        while not finished(project) and done.total() < kills:
            kind = chance.choice(MOMENTS)
            result = project.run_until("t", moment(kind, project, evaluated, chance), how)
            killed = (-how, 130) if how != signal.SIGKILL else (-how,)
            assert result.code in (*killed, 0), result.text
            assert "Traceback" not in result.text, result.text
            done[kind] += result.code in killed
        while not finished(project):
            ended(project.run("t"))
        compare(whole, project)
    return done


def compare(whole: Project, project: Project) -> None:
    assert differences(whole.checkpoint(), project.checkpoint()) == []
    assert list((project.folder / "checkpoints").glob("*.damaged*")) == []
    assert measured(whole.events()) == measured(project.events())


def ended(result: Result) -> None:
    assert result.code == 0 and "Traceback" not in result.text, result.text


def uninterrupted(whole: Project) -> Project:
    """Run the project in one go."""
    ended(whole.run("t"))
    assert finished(whole)
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "HUP", "TERM", "INT"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    options = parser.parse_args()
    how, total = signal.Signals[f"SIG{options.signal}"], Counter[str]()
    count = len(options.presets)
    for number, name in enumerate(options.presets):
        with tempfile.TemporaryDirectory() as folder:
            whole = uninterrupted(Project.make(Path(folder) / "whole", {"t": PRESETS[name]}))
            project = Project.make(Path(folder) / "killed", {"t": PRESETS[name]})
            kills = options.kills * (number + 1) // count - options.kills * number // count
            killed = survive(project, whole, kills, how, random.Random(f"{options.seed} {name}"))
        total += killed
        times = f"{killed.total()} times {how.name}"
        print(f"{name}: {times}, the same bits: {dict(killed)}", flush=True)
    print(f"all: {total.total()} times {how.name}: {dict(total)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
