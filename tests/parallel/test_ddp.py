"""Two processes under torchrun (gloo): the same training, no document twice, killed and resumed bit
for bit, one menu."""

import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.checkpoint.test_lineage import Holder
from tests.project import Project, Result, differences, kill_group, merged, tiny_preset, train_here

pytestmark = pytest.mark.slow

KILLS = 2
STEPS = 170
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

PRESET = tiny_preset(
    model={"dropout": 0.0},
    # a small learning rate: with a large one, the order in which ranks add up floats grows into
    # another run
    train={
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "precision": "fp32",
        "checkpoint_every_steps": 6,
        "eval_every_tokens": 10_000,
    },
    data={
        "sources": [
            {"type": "text", "path": "texts"},
            {"type": "text", "path": "core/parallel/*.py", "name": "code"},
        ],
        "mix_strategy": "weighted",
        "source_weights": [0.5, 0.5],
    },
    # weights that follow from the losses change the order of what is read, again and again, while
    # it is read
    auxiliary={
        "enable_adaptive_sources": True,
        "adaptive_interval_tokens": 4000,
        "adaptive_smoothing": 0.2,
        "adaptive_min_weight": 0.98,
        "adaptive_max_weight": 1.02,
    },
)


def assert_ended(result: Result, code: int = 0) -> None:
    assert result.code == code, result.text
    assert "Traceback" not in result.text, result.text


def on_two(project: Project, line: str = "t", **how: Any) -> Result:
    return project.run(line, command=TORCHRUN, **how)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """PRESET on two ranks, in one go."""
    project = Project.make(tmp_path_factory.mktemp("two") / "project", {"t": PRESET})
    assert_ended(on_two(project))
    return project


def test_two_ranks_train_as_one_with_twice_the_accumulation(
    two_ranks: Project, make_project: Callable[..., Project]
) -> None:
    """The same loss curve, evaluations, token counts and place in the data: the ranks share the
    steps' rows and no more.

    Each rank's share of a step differs, so a document read by both ranks, or by none, would show in
    every loss."""
    one = make_project({})
    train_here(merged(PRESET, {"train": {"accumulation_steps": 2}}), one.folder)
    ours, theirs = one.events("step"), two_ranks.events("step")
    assert [e["step"] for e in ours] == [e["step"] for e in theirs] == list(range(1, STEPS + 1))
    assert [e["tokens"] for e in ours] == [e["tokens"] for e in theirs]
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], abs=1e-5)
    assert [e["grad_norm"] for e in ours] == pytest.approx(
        [e["grad_norm"] for e in theirs], rel=1e-3
    )
    for a, b in zip(ours, theirs):
        assert {name: s["tokens"] for name, s in a["sources"].items()} == {
            name: s["tokens"] for name, s in b["sources"].items()
        }
    measured = [
        [e["cross_entropy"] for e in project.events("eval")] for project in (one, two_ranks)
    ]
    assert len(measured[0]) > 2 and measured[0] == pytest.approx(measured[1], abs=1e-5)
    a, b = one.checkpoint()["data"], two_ranks.checkpoint()["data"]
    assert (a["rows"], a["lanes"]) == (b["rows"], b["lanes"])
    changes = [project.events("reweighted") for project in (one, two_ranks)]
    factors = [
        [{name: source["factor"] for name, source in e["sources"].items()} for e in found]
        for found in changes
    ]
    assert factors[0] == factors[1] and len(factors[0]) > 5 and factors[0][0] != factors[0][-1]
    assert two_ranks.events("run_start")[0]["world_size"] == 2


def test_killed_groups_end_in_the_same_weights(
    two_ranks: Project, make_project: Callable[..., Project]
) -> None:
    """kill -9 of launcher and ranks, more than once: the resumed two-rank run is bit for bit the
    uninterrupted one."""
    project, moments = make_project({"t": PRESET}), random.Random(4)
    for _ in range(KILLS):
        goal = project.num_steps() + moments.randint(5, 50)
        result = project.run_until(
            "t", lambda goal=goal: project.num_steps() >= goal, signal.SIGKILL, command=TORCHRUN
        )
        assert result.code == -9, result.text
        assert not project.finished(), "killed too late to tell anything"
    assert_ended(on_two(project))
    assert project.steps() == list(range(1, STEPS + 1))
    assert differences(two_ranks.checkpoint(), project.checkpoint()) == []
    assert [e["loss"] for e in two_ranks.events("step")] == [
        e["loss"] for e in project.events("step")
    ]


def test_one_two_one_ranks_read_the_same_documents(
    two_ranks: Project, make_project: Callable[..., Project]
) -> None:
    """Killed on one rank, stopped on two, where SIGTERM to the launcher saves on all ranks, ended
    on one: the same chain of consumed documents, the same ledger, the same losses."""
    alone = merged(PRESET, {"train": {"accumulation_steps": 2}})
    project = make_project({"t": alone})
    result = project.run_until("t", lambda: project.num_steps() >= 30, signal.SIGKILL)
    assert result.code == -9 and not project.finished(), result.text

    project.write_preset("t", PRESET)
    process = project.start("t", command=TORCHRUN)
    try:
        end = time.monotonic() + 120
        while project.num_steps() < 70 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    finally:
        kill_group(process)
        project.kill_what_is_left()
    last = project.events()[-1]
    assert (
        last["event"] == "run_end"
        and last["reason"] == "interrupted"
        and 70 <= last["step"] < STEPS
    )
    assert project.checkpoint()["progress"]["step"] == last["step"]

    project.write_preset("t", alone)
    assert_ended(project.run("t"))
    assert project.steps() == list(range(1, STEPS + 1))
    ours, theirs = project.checkpoint(), two_ranks.checkpoint()
    assert (
        ours["data"]["receipt"] == theirs["data"]["receipt"]
        and ours["data"]["receipts"] == theirs["data"]["receipts"]
    )
    for name, account in theirs["progress"]["ledger"].items():
        mine = ours["progress"]["ledger"][name]
        assert {key: mine[key] for key in ("tokens", "documents", "epochs")} == {
            key: account[key] for key in ("tokens", "documents", "epochs")
        }
        assert account["documents"] > 3 and account["epochs"] >= 1
    mine, others = project.events("step"), two_ranks.events("step")
    assert [e["loss"] for e in mine] == pytest.approx([e["loss"] for e in others], abs=1e-5)
    assert [e["tokens"] for e in mine] == [e["tokens"] for e in others]


def test_mistakes_end_every_rank(make_project: Callable[..., Project]) -> None:
    """A preset that is none, a number of ranks that does not divide the lanes, a lineage that
    another process writes to: told, and nobody waits for ever."""
    project = make_project({"t": tiny_preset(data={"lanes": 3}), "held": tiny_preset()})
    for line, told in (
        ("nonsense", 'no preset is called "nonsense"'),
        ("t", "2 processes do not divide data.lanes = 3"),
    ):
        result = on_two(project, line, timeout=120)
        assert result.code != 0 and told in result.err
        assert (
            "Traceback"
            not in result.err.split("torch.distributed.run")[0].split("failed (exitcode")[0]
        )
    assert not (project.folder / "checkpoints").exists()
    holder = Holder(project.folder, "held")
    try:
        result = on_two(project, "held", timeout=120)
    finally:
        holder.end(signal.SIGKILL)
    assert result.code != 0 and f'"held" is in use by process {holder.process.pid}' in result.err


def test_the_menu_under_torchrun(make_project: Callable[..., Project]) -> None:
    """On a terminal rank 0 alone asks; arrow down and Enter start the second preset on both
    ranks."""
    project = make_project(
        {"00_best_general": tiny_preset(), "90_second": tiny_preset(train={"max_steps": 3})}
    )
    terminal = pexpect.spawn(
        TORCHRUN[0],
        [*TORCHRUN[1:], "main.py"],
        cwd=str(project.folder),
        timeout=90,
        dimensions=(40, 120),
        encoding="utf-8",
    )
    try:
        terminal.expect("90_second")
        time.sleep(1.0)
        terminal.send("\x1b[B")
        time.sleep(0.5)
        terminal.send("\r")
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0, terminal.before
    finally:
        terminal.close(force=True)
        project.kill_what_is_left()
    assert project.steps("90_second") == [1, 2, 3]
    assert project.events("run_start", "90_second")[0]["world_size"] == 2
    assert not (project.folder / "logs" / "00_best_general").exists()


def test_rank_0_alone_measures_what_fixes_the_order(tmp_path: Path) -> None:
    """A shard that fails the other rank while the mix is measured, or while validation is planned,
    changes nothing."""
    falling, rising = (
        {"from": x, "to": y, "begin": 0.5, "end": 0.6} for x, y in ((0.9, 0.1), (0.1, 0.9))
    )
    preset = merged(
        PRESET,
        {
            "train": {"max_steps": 40},
            "data": {"source_weights": [falling, rising], "weights_of": "tokens"},
        },
    )
    trap = """
import os
if os.environ.get("RANK") == "1":
    def sampled_documents(source): return []
    def plan_hold_out(*_): return HoldOut(0.5)
"""
    whole, broken = (
        Project.make(tmp_path / "whole", {}),
        Project.make(tmp_path / "broken", {"t": preset}),
    )
    for project in (whole, broken):
        with (project.folder / "core" / "data" / "corpus.py").open("a") as corpus:
            corpus.write(trap)
    # one rank, without the trap
    train_here(merged(preset, {"train": {"accumulation_steps": 2}}), whole.folder)
    assert_ended(on_two(broken))
    assert whole.checkpoint()["data"]["receipt"] == broken.checkpoint()["data"]["receipt"]


def test_the_last_steps_of_a_run_by_epochs_are_the_same(
    make_project: Callable[..., Project],
) -> None:
    """Few texts, of which one rank soon has none: as on one rank, in steps that are not smaller;
    and killed there, in the same weights bit for bit."""
    train = {
        "max_steps": None,
        "max_epochs": 3,
        "eval_tokens": 0,
        "checkpoint_every_steps": 3,
        "per_gpu_batch_size": 4,
    }
    data = {"sources": [{"type": "text", "path": "texts/story0[0-3].txt"}], "lanes": 12}
    preset = tiny_preset(
        model={"dropout": 0.0},
        train={**train, "learning_rate": 1e-4, "precision": "fp32"},
        data=data,
    )
    one = make_project({}, "one")
    two, killed = (make_project({"t": preset}, name) for name in ("two", "killed"))
    train_here(merged(preset, {"train": {"accumulation_steps": 2}}), one.folder)
    assert_ended(on_two(two))
    ours, theirs = one.events("step"), two.events("step")
    assert [e["tokens"] for e in ours] == [e["tokens"] for e in theirs]
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], abs=1e-5)
    assert [e["grad_norm"] for e in ours] == pytest.approx(
        [e["grad_norm"] for e in theirs], rel=1e-3
    )
    sizes = [b["tokens"] - a["tokens"] for a, b in zip(ours, ours[1:])]
    assert len(sizes) > 20 and min(sizes[:-1]) >= 4 * 32 - 31
    for goal in (len(sizes) // 3, 2 * len(sizes) // 3):
        killed.run_until(
            "t", lambda goal=goal: killed.num_steps() >= goal, signal.SIGKILL, command=TORCHRUN
        )
        assert not killed.finished(), "killed too late to tell anything"
    assert_ended(on_two(killed))
    assert differences(two.checkpoint(), killed.checkpoint()) == []
