"""The engines: the same training on each, whatever the number of ranks, and runs that change from
one to another."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.parallel.engines import choose_engine
from core.parallel.processes import Processes
from core.parallel.single import Single
from core.preset.decode import read_preset
from core.registry import Preset
from tests.documents import GUIDE, block_of
from tests.preset.test_shipped import CONFIGS, shrunk
from tests.project import (
    NO_HUB,
    ROOT,
    Project,
    differences,
    kill_group,
    merged,
    tiny_preset,
    write_stories,
)

pytestmark = pytest.mark.slow

STEPS = 10
PRESETS = [
    path
    for path in CONFIGS
    if ("_cpu" in path.stem or path.stem == "90_quick_test")
    and read_preset(path, Preset).job == "train"
    and read_preset(path, Preset).init_from is None
]
"""Every preset for a CPU that trains from the beginning."""
OTHERS: dict[str, dict] = {
    "muon": tiny_preset(train={"optimizer": "muon"}),
    "a frozen block": tiny_preset(train={"trainable": ["layers.1"]}),
    "frozen blocks": tiny_preset(
        model={"tie_embeddings": False}, train={"trainable": ["lm_head", "norm"]}
    ),
    "curriculum": tiny_preset(train={"curriculum": {"candidates": 2}}),
}
CASES = [path.stem for path in PRESETS] + list(OTHERS)


def run_all(cases: list[tuple[dict, Path]], ranks: int, fail_on_rank_1: str = "") -> str:
    """Train on so many ranks, one preset after the other; returns what was refused.

    fail_on_rank_1   the folder whose first pass is out of memory there; "no room": see many.py
    """
    listed = cases[0][1].parent / f"cases_{ranks}.json"
    listed.write_text(json.dumps([(preset, str(folder)) for preset, folder in cases]))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else [])]
    result = subprocess.run(
        [*command, "-m", "tests.parallel.many", str(listed), fail_on_rank_1],
        cwd=ROOT,
        env={**os.environ, **NO_HUB, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-9000:]
    assert "Warning" not in result.stderr, result.stderr[-9000:]
    return result.stdout


def case(name: str, models: Path) -> dict:
    """The preset in fp32, for ten steps, without what depends on which rows are computed
    together: drawn noise, and spans that are told from those of other rows."""
    paths = {path.stem: path for path in PRESETS}
    preset = OTHERS[name] if name in OTHERS else shrunk(read_preset(paths[name], Preset), models)
    changes: dict[str, Any] = {
        "lineage": "t",
        "train": {
            "max_steps": STEPS,
            "precision": "fp32",
            "learning_rate": 1e-4,
            "muon_learning_rate": 1e-3,  # its update is computed in bf16
            "per_gpu_batch_size": 4,
            "eval_tokens": 100,
        },
    }
    if "auxiliary" in preset:
        changes["auxiliary"] = {"enable_span_contrastive": False}
    if "dropout" in preset["model"]:
        changes["model"] = {"dropout": 0.0}
    if "routing" in preset["model"]:
        changes["model"] = {"routing": {"noise": False}}
    return merged(preset, changes)


def losses(folder: Path) -> list[float]:
    project = Project(folder)
    measured = [value for event in project.events("eval") for value in event["losses"].values()]
    return [event["loss"] for event in project.events("step")] + measured


@pytest.mark.parametrize("half", [0, 1])
def test_every_engine_trains_as_one_process_does(half: int, tmp_path: Path) -> None:
    """The same losses and evaluations, and the same data; one rank of fsdp gives the same bits."""
    names, engines = CASES[half::2], [("single", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2)]
    of_ranks: dict[int, list[tuple[dict, Path]]] = {1: [], 2: []}
    for name, (engine, ranks) in itertools.product(names, engines):
        folder = tmp_path / name / f"{engine} {ranks}"
        folder.mkdir(parents=True)
        write_stories(folder)
        train = {"engine": engine, "accumulation_steps": 4 // ranks}
        of_ranks[ranks].append((merged(case(name, tmp_path / "model"), {"train": train}), folder))
    for ranks, cases in of_ranks.items():
        assert run_all(cases, ranks) == ""
    for name, (engine, ranks) in itertools.product(names, engines[1:]):
        alone, other = tmp_path / name / "single 1", tmp_path / name / f"{engine} {ranks}"
        assert len(losses(alone)) > STEPS
        assert losses(other) == pytest.approx(losses(alone), abs=1e-4), f"{name}, {other.name}"
        one, two = Project(alone).checkpoint(), Project(other).checkpoint()
        assert one["data"]["receipt"] == two["data"]["receipt"], f"{name}, {other.name}"
        assert one["model"].keys() == two["model"].keys(), f"{name}, {other.name}"
        if (engine, ranks) == ("fsdp", 1):
            assert differences(one, two) == [], name


# runs that change from one engine to another ------------------------------------------------------

LONG = tiny_preset(
    model={"dropout": 0.0},
    train={
        "max_steps": 60,
        "learning_rate": 1e-4,
        "precision": "fp32",
        "checkpoint_every_steps": 5,
        "optimizer": "muon",
        "muon_learning_rate": 1e-3,
    },
    auxiliary={"enable_value": True},
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def on(engine: str, ranks: int) -> tuple[dict, list[str]]:
    """The long preset on an engine, and the command that starts so many ranks."""
    train = {"engine": engine, "accumulation_steps": 4 // ranks}
    return merged(LONG, {"train": train}), [sys.executable, *(TORCHRUN if ranks > 1 else [])]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The long preset on two ranks of fsdp, in one go."""
    preset, command = on("fsdp", 2)
    project = Project.make(tmp_path_factory.mktemp("straight") / "project", {"t": preset})
    result = project.run("t", command=command)
    assert result.code == 0 and "Traceback" not in result.text, result.text
    return project


def test_a_run_goes_from_engine_to_engine(
    straight: Project, make_project: Callable[..., Project]
) -> None:
    """Two ranks, one, two again; ddp, fsdp, single: nothing is read twice or left out, and the
    losses are those of a run that stayed."""
    project = make_project({})
    for goal, engine, ranks in ((15, "ddp", 2), (30, "fsdp", 2), (45, "single", 1)):
        preset, command = on(engine, ranks)
        project.write_preset("t", preset)
        reached = lambda goal=goal: project.num_steps() >= goal  # noqa: E731
        result = project.run_until("t", reached, signal.SIGINT, command=command)
        assert result.text.count("everything is saved") == 1, result.text
        assert goal <= project.num_steps() < 60
    preset, command = on("fsdp", 1)
    project.write_preset("t", preset)
    assert project.run("t", command=command).code == 0
    assert project.steps() == list(range(1, 61))
    assert project.checkpoint()["data"]["receipt"] == straight.checkpoint()["data"]["receipt"]
    assert losses(project.folder) == pytest.approx(losses(straight.folder), abs=1e-4)
    engines = [event["engine"] for event in project.events("run_start")]
    assert engines == ["ddp", "fsdp", "single", "fsdp"]


def test_a_killed_rank_costs_nothing(
    straight: Project, make_project: Callable[..., Project]
) -> None:
    """kill -9 of one rank: torchrun ends the other, and the next start goes on, bit for bit."""
    preset, command = on("fsdp", 2)
    project = make_project({"t": preset})
    process = project.start("t", command=command)
    try:
        end = time.monotonic() + 120
        while project.num_steps() < 23 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(rank_of(project, 1), signal.SIGKILL)
        process.communicate(timeout=120)
    finally:
        kill_group(process)
        project.kill_what_is_left()
    assert project.num_steps() >= 23 and not project.finished()
    result = project.run("t", command=command)
    assert result.code == 0 and "goes on from step" in result.text, result.text
    assert differences(straight.checkpoint(), project.checkpoint()) == []
    assert project.steps() == list(range(1, 61))


def rank_of(project: Project, rank: int) -> int:
    """The process that is this rank of a project's run."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                here = Path(os.readlink(entry / "cwd")) == project.folder
                main = b"main.py" in (entry / "cmdline").read_bytes()
                if here and main and f"RANK={rank}".encode() in variables:
                    return int(entry.name)
    raise AssertionError(f"no process is rank {rank}")


def test_two_machines_train_as_one(straight: Project, make_project: Callable[..., Project]) -> None:
    """Two launchers that meet at an address, as on two machines that share the folder."""
    preset, _ = on("fsdp", 2)
    project = make_project({"t": preset})
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"]
    both = [project.start("t", command=command) for _ in range(2)]
    try:
        told = [process.communicate(timeout=200) for process in both]
    finally:
        for process in both:
            kill_group(process)
        project.kill_what_is_left()
    assert [process.returncode for process in both] == [0, 0], told
    assert differences(straight.checkpoint(), project.checkpoint()) == []


def test_the_guides_slurm_script(make_project: Callable[..., Project]) -> None:
    """With the parts of SLURM that it calls as short scripts: one machine of two processes."""
    project, tools = make_project({"t": tiny_preset()}), {}
    tools["scontrol"] = 'test "$1 $2" = "show hostnames" && echo localhost'
    tools["srun"] = 'exec "$@"'
    (project.folder / "bin").mkdir()
    for name, code in tools.items():
        (project.folder / "bin" / name).write_text(f"#!/bin/sh\n{code}\n")
        (project.folder / "bin" / name).chmod(0o755)
    (project.folder / ".venv").symlink_to(sys.prefix)
    script = block_of(GUIDE, "#!/bin/bash\n#SBATCH")
    for theirs, ours in (("00_best_general", "t"), ("=8", "=2"), (":29500", f":{free_port()}")):
        assert theirs in script
        script = script.replace(theirs, ours)
    variables = {"SLURM_JOB_NODELIST": "first", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    path = f"{project.folder / 'bin'}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=project.folder,
        env={**os.environ, **NO_HUB, **variables, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert project.finished() and project.events("run_start")[0]["world_size"] == 2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# what an engine refuses, and what it survives -----------------------------------------------------


def test_out_of_memory_on_one_rank_halves_the_micro_batch_on_all(tmp_path: Path) -> None:
    """In the middle of a pass, where the other rank waits for it to gather weights."""
    cases = []
    for name in ("whole", "fails"):
        (tmp_path / name).mkdir()
        write_stories(tmp_path / name)
        preset, _ = on("fsdp", 2)
        cases.append((merged(preset, {"train": {"max_steps": 4}}), tmp_path / name))
    assert run_all(cases, 2, fail_on_rank_1="fails") == ""
    warnings = [event["message"] for event in Project(tmp_path / "fails").events("warning")]
    assert warnings == ["out of memory: micro-batches have 2 rows now, and there are more of them"]
    assert losses(tmp_path / "fails") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_one_process_is_not_many(make_project: Callable[..., Project]) -> None:
    project = make_project({"t": on("single", 2)[0]})
    result = project.run("t", command=on("single", 2)[1])
    assert result.code != 0 and "core/launch.py" not in result.text  # no trace of ours
    assert result.text.count('train.engine is "single", and there are 2 processes') == 1
    assert not list(project.folder.glob("checkpoints/*.pth"))


@pytest.mark.parametrize(
    ("needed", "available", "name"), [(15, 16, "ddp"), (16, 16, "fsdp")], ids=["fits", "does not"]
)
def test_auto_takes_what_fits(needed: int, available: int, name: str) -> None:
    parallel = Processes.__new__(Processes)
    parallel.rank, parallel.world_size = 0, 2
    parallel.device_group = process_group()
    engine, note = choose_engine("auto", parallel, torch.device("cpu"), needed, available)
    assert engine.name == name and name in note


def test_one_process_takes_what_it_names() -> None:
    process_group()
    for choice, name in (("auto", "single"), ("ddp", "single"), ("fsdp", "fsdp")):
        assert choose_engine(choice, Single(), torch.device("cpu"), 1, 0)[0].name == name


def process_group() -> dist.ProcessGroup:
    """The group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def test_no_room_for_all_weights_costs_the_evaluation(tmp_path: Path) -> None:
    """The run goes on, on both ranks, and says so."""
    (tmp_path / "no room").mkdir()
    write_stories(tmp_path / "no room")
    preset = merged(on("fsdp", 2)[0], {"train": {"max_steps": 4}})
    assert run_all([(preset, tmp_path / "no room")], 2, fail_on_rank_1="no room") == ""
    project = Project(tmp_path / "no room")
    (told,) = [e["message"] for e in project.events("warning") if "evaluation" in e["message"]]
    assert "no room for all weights" in told and "the run goes on without" in told
    assert project.steps() == [1, 2, 3, 4] and project.events("eval") == []
    assert project.finished() and project.checkpoint()["progress"]["finished"]
