"""Comparisons in processes of their own: interrupted, killed at any moment, on two ranks."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable

import pexpect
import pytest

from core.errors import UserError
from tests.jobs.comparisons import TRIALS, compare_here, preset_of, report
from tests.project import NO_HUB, Project, differences

KILLS = 3
"""kill -9 so many times in test_killed_at_any_moment; raise it for a long night."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STEPS = 30
LONG = preset_of(
    model={"dropout": 0.1},
    train={"max_steps": STEPS, "checkpoint_every_steps": 7, "eval_every_tokens": 2000},
    data={
        "sources": [
            {"type": "text", "path": "texts"},
            {"type": "text", "path": "core/data/**/*.py", "name": "code"},
        ],
        "mix_strategy": "weighted",
        "source_weights": [0.6, 0.4],
    },
)


def all_steps(project: Project) -> int:
    return sum(project.num_steps(f"t/{trial}") for trial in TRIALS)


def assert_same_outcome(project: Project, other: Project) -> None:
    for trial in TRIALS:
        assert project.steps(f"t/{trial}") == list(range(1, STEPS + 1))
        assert (
            differences(
                project.checkpoint(lineage=f"t/{trial}"), other.checkpoint(lineage=f"t/{trial}")
            )
            == []
        ), trial
        ends = [
            [e["receipt"] for e in p.events("run_end", f"t/{trial}")][-1] for p in (project, other)
        ]
        assert ends[0] == ends[1]
    mine, others = (report(p.folder) for p in (project, other))
    for key in ("speed", "memory"):
        for found in (mine, others):
            for variant in found["variants"]:
                variant.pop(key, None)
    assert [v["name"] for v in mine["variants"]] == [v["name"] for v in others["variants"]]
    assert (project.folder / "logs" / "t" / "report.md").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """LONG through main.py, in one go."""
    project = Project.make(tmp_path_factory.mktemp("uninterrupted") / "project", {"t": LONG})
    result = project.run("t")
    assert result.code == 0 and "Traceback" not in result.text, result.text
    html = (project.folder / "logs" / "t" / "report.html").read_text()
    assert "higher" in html and "<svg" in html
    assert (
        (project.folder / "logs" / "t" / "higher" / "2" / "loss.png")
        .read_bytes()
        .startswith(b"\x89PNG")
    )
    return project


def ctrl_c_on_a_terminal(project: Project) -> None:
    """Chosen with Enter; the table above the running trial's dashboard; Ctrl-C leaves the table,
    the cursor and a hint."""
    env = {**os.environ, **NO_HUB, "OMP_NUM_THREADS": "1"}
    how = {
        "cwd": str(project.folder),
        "env": env,
        "timeout": 90,
        "dimensions": (40, 110),
        "encoding": "utf-8",
    }
    terminal = pexpect.spawn(sys.executable, ["main.py"], **how)
    try:
        terminal.expect("Rates")
        time.sleep(1.0)
        terminal.send("\r")
        for part in ("seed 1 +seed 2 +mean +difference", "trial 2 of 4", "lineage t/higher/1"):
            terminal.expect(part)
        terminal.sendintr()
        terminal.expect("interrupted in trial")
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 130
    finally:
        terminal.close(force=True)
    assert project.finished("t/as_it_is/1")


@pytest.mark.slow
def test_interrupted_it_reports_and_the_next_start_goes_on(
    make_project: Callable[..., Project], uninterrupted: Project
) -> None:
    """Ctrl-C on a terminal, which shows one picture, and SIGTERM without one: the end is bit for
    bit the same."""
    project = make_project({"00_best_general": {**LONG, "lineage": "t"}})
    ctrl_c_on_a_terminal(project)
    (project.folder / "logs" / "t" / "report.html").unlink()
    result = project.run_until("", lambda: all_steps(project) >= 70, signal.SIGTERM)
    assert result.code == 130 and "Traceback" not in result.text, result.text
    assert "interrupted in trial" in result.err and "start again to go on" in result.err
    assert (project.folder / "logs" / "t" / "report.html").exists()
    assert project.run("").code == 0
    assert_same_outcome(project, uninterrupted)


@pytest.mark.slow
def test_killed_at_any_moment(make_project: Callable[..., Project], uninterrupted: Project) -> None:
    """kill -9 while starting, training, evaluating, saving, reporting, between trials: the end is
    bit for bit the same."""
    project, moments = make_project({"t": LONG}), random.Random(7)
    for kill in range(KILLS):
        goal, seen = (all_steps(project) + moments.randint(1, 45)) if kill else 1, []

        def ready(
            goal: int = goal, seen: list[float] = seen, delay: float = moments.uniform(0, 1.5)
        ) -> bool:
            if not seen and all_steps(project) >= goal:
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= delay

        result = project.run_until("t", ready, signal.SIGKILL)
        assert result.code in (-9, 0), result.text
        if result.code == 0:  # a kill after the end is none
            break
    else:
        assert project.run("t").code == 0
    assert_same_outcome(project, uninterrupted)
    assert [path.name for path in (project.folder / "checkpoints" / "t").rglob("*_prev*")] == []


@pytest.mark.skips_updates
@pytest.mark.slow
def test_two_ranks_agree(make_project: Callable[..., Project]) -> None:
    """Under torchrun: the plan, what is done, who diverged; killed and resumed. One process alone
    may not go on with it."""
    wild = {"name": "wild", "set": {"train": {"learning_rate": 100.0, "weight_decay": 100.0}}}
    preset = preset_of(
        variants=[preset_of()["variants"][0], wild],
        train={"max_steps": 12, "checkpoint_every_steps": 3},
    )
    whole, project = make_project({"t": preset}, "whole"), make_project({"t": preset})
    result = whole.run("t", command=TORCHRUN)
    assert result.code == 0, result.text
    steps = lambda: project.num_steps("t/as_it_is/2")  # noqa: E731
    result = project.run_until("t", lambda: steps() >= 5, signal.SIGKILL, command=TORCHRUN)
    assert result.code == -9, result.text
    with pytest.raises(UserError, match="begun on 2 processes and this is 1"):
        compare_here(preset, project.folder)
    result = project.run("t", command=TORCHRUN)
    assert result.code == 0, result.text
    for seed in (1, 2):
        assert whole.events("run_start", f"t/as_it_is/{seed}")[0]["world_size"] == 2
        assert (
            differences(*(p.checkpoint(lineage=f"t/as_it_is/{seed}") for p in (whole, project)))
            == []
        )
    assert report(project.folder)["variants"][1]["name"] == "wild"
    state = json.loads((project.folder / "logs" / "t" / "state.json").read_text())
    assert {entry["status"] for entry in state["trials"].values()} == {"diverged"} and len(
        state["trials"]
    ) == 2
