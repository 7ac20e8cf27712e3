"""Checkpoints in shares on several ranks: killed at any moment, gone on from by any engine on any
number of ranks."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.checkpoint.slots import CheckpointStore
from core.checkpoint.state import CheckpointState
from tests.checkpoint.shares import whole
from tests.parallel.test_engines import LONG, Run, command, losses, on, rank_of, run_all
from tests.project import Project, differences, kill_group, merged

pytestmark = pytest.mark.slow

STEPS = 30
OFTEN = {"train": {"checkpoint_every_steps": 1, "max_steps": STEPS, "eval_tokens": 0}}
"""Almost always in the middle of a save."""
FSDP: Run = ("fsdp", 2)
PRESET = merged(on(LONG, FSDP), OFTEN)


def newest(project: Project) -> tuple[CheckpointState, Path]:
    state, path, notes = CheckpointStore(project.folder / "checkpoints", "t").load(read_only=True)
    assert state is not None and path is not None and notes == []
    return state, path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two ranks of fsdp, in one go."""
    project = Project.make(tmp_path_factory.mktemp("straight") / "p", {"t": PRESET})
    result = project.run("t", command=command(FSDP))
    assert result.code == 0 and "Traceback" not in result.text, result.text
    return project


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same, killed whole: its newest checkpoint is in shares."""
    project = Project.make(tmp_path_factory.mktemp("killed") / "p", {"t": PRESET})
    reached = lambda: project.num_steps() >= 7  # noqa: E731
    project.run_until("t", reached, signal.SIGKILL, command=command(FSDP))
    return project


def test_each_rank_writes_its_own_share(killed: Project) -> None:
    _, path = newest(killed)
    assert path.name == "current" and not list((killed.folder / "checkpoints").glob("*.pth"))
    sizes = [file.stat().st_size for file in path.glob("*.distcp")]
    assert len(sizes) == 2 and max(sizes) < 1.05 * min(sizes)


def test_weights_are_the_same_bits_on_any_engine_and_number_of_ranks(
    killed: Project, tmp_path: Path
) -> None:
    """Read by a run that takes no step, and saves what it has in one file."""
    state, _ = newest(killed)
    step = state["progress"]["step"]
    of_ranks: dict[int, list[tuple[dict, Path]]] = {1: [], 2: []}
    for engine, ranks in (("fsdp", 1), ("single", 1), ("ddp", 2), ("fsdp", 2)):
        folder = tmp_path / f"{engine} {ranks}"
        for part in ("checkpoints", "logs", "texts"):
            shutil.copytree(killed.folder / part, folder / part)
        train = {"engine": engine, "max_steps": step, "accumulation_steps": 4 // ranks}
        of_ranks[ranks].append((merged(PRESET, {"train": train}), folder))
    for ranks, cases in of_ranks.items():
        assert run_all(cases, ranks) == ""
        for _, folder in cases:
            saved = Project(folder).checkpoint()
            assert saved["progress"]["step"] == step and saved["progress"]["finished"]
            assert differences(whole(state), saved) == ["progress"], folder.name


@pytest.mark.parametrize("run", [("deepspeed 2", 2), ("deepspeed 3", 1)], ids=str)
def test_deepspeed_goes_on_from_shares(run: Run, tmp_path: Path) -> None:
    """Which are all that a killed run of fsdp leaves."""
    adamw = merged(LONG, {"train": {"optimizer": "adamw"}})
    preset = merged(on(adamw, FSDP), OFTEN)
    project = Project.make(tmp_path / "project", {"t": preset})
    reached = lambda: project.num_steps() >= 7  # noqa: E731
    project.run_until("t", reached, signal.SIGKILL, command=command(FSDP))
    state, _ = newest(project)
    step = state["progress"]["step"]
    goes_on = merged(on(preset, run), {"train": {"max_steps": step}})
    assert run_all([(goes_on, project.folder)], run[1]) == ""
    assert differences(whole(state), project.checkpoint()) == ["progress"]


def test_a_run_goes_from_shares_to_file_and_back(
    straight: Project, killed: Project, tmp_path: Path
) -> None:
    """fsdp on 2 ranks and on 1, ddp on 2, one process, fsdp on 2, killed each time: nothing is read
    twice or left out, and the losses are those of a run that stayed."""
    project = Project(Path(shutil.copytree(killed.folder, tmp_path / "project")))
    plan = [(12, "fsdp", 1), (17, "ddp", 2), (22, "single", 1)]
    for goal, engine, ranks in plan:
        run = (engine, ranks)
        project.write_preset("t", merged(on(LONG, run), OFTEN))
        reached = lambda goal=goal: project.num_steps() >= goal  # noqa: E731
        project.run_until("t", reached, signal.SIGKILL, command=command(run))
        _, path = newest(project)
        assert (path.suffix == ".pth") == (engine != "fsdp")
    project.write_preset("t", PRESET)
    result = project.run("t", command=command(FSDP))
    assert result.code == 0 and "Traceback" not in result.text, result.text
    assert project.steps() == list(range(1, STEPS + 1))
    assert project.checkpoint()["data"]["receipt"] == straight.checkpoint()["data"]["receipt"]
    assert losses(project.folder) == pytest.approx(losses(straight.folder), abs=1e-4)
    assert not list((project.folder / "checkpoints").rglob("*.tmp"))


def test_a_rank_that_is_killed_in_a_save_costs_nothing(
    straight: Project, make_project: Callable[..., Project]
) -> None:
    """kill -9 of rank 0, which moves the slots: the same bits in the end."""
    project = make_project({"t": PRESET})
    folder = project.folder / "checkpoints" / "t_sharded"
    process = project.start("t", command=command(FSDP))
    try:
        end, rank = time.monotonic() + 120, None
        while time.monotonic() < end:
            if project.num_steps() >= 8:
                rank = rank or rank_of(project, 0)
                if any(folder.glob(".*.tmp")):
                    os.kill(rank, signal.SIGKILL)
                    break
            time.sleep(0.001)
        process.communicate(timeout=120)
    finally:
        kill_group(process)
        project.kill_what_is_left()
    assert any(folder.glob(".*.tmp")) and not project.finished()
    result = project.run("t", command=command(FSDP))
    assert result.code == 0 and "Traceback" not in result.text, result.text
    assert differences(straight.checkpoint(), project.checkpoint()) == []
    assert project.steps() == list(range(1, STEPS + 1))
    assert not list((project.folder / "checkpoints").rglob("*.damaged*"))
    assert not list((project.folder / "checkpoints").rglob("*.tmp"))


LIMIT = """
import os, resource
if os.environ.get("RANK") == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


def test_a_rank_that_cannot_write_keeps_all_from_moving(
    make_project: Callable[..., Project],
) -> None:
    """Told once a save, by its cause; the run goes on, and rank 0 saves its end in one file."""
    project = make_project({"t": merged(on(LONG, FSDP), {"train": {"max_steps": 12}})})
    (project.folder / "sitecustomize.py").write_text(LIMIT)
    result = project.run("t", command=command(FSDP), PYTHONPATH=str(project.folder))
    assert result.code == 0 and "Traceback" not in result.text, result.text
    told = [e["message"] for e in project.events("warning") if "not saved" in e["message"]]
    assert len(told) == 3 and "File too large" in told[0] and "ulimit" in told[0], told
    assert [e["path"] for e in project.events("checkpoint")] == ["checkpoints/t_current.pth"]
    assert list((project.folder / "checkpoints" / "t_sharded").iterdir()) == []
    assert project.finished()
