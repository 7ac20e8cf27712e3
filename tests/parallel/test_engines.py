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
from collections import defaultdict
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
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
STAGES = ["deepspeed 1", "deepspeed 2", "deepspeed 3"]
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
Run = tuple[str, int]
"""An engine, with its stage of ZeRO, and a number of ranks: ("deepspeed 3", 2)."""


def on(preset: dict, run: Run) -> dict:
    """The preset on an engine, with as many rows in a step whatever the ranks."""
    engine, _, stage = run[0].partition(" ")
    train: dict[str, Any] = {"engine": engine, "accumulation_steps": 4 // run[1]}
    if stage:
        # small parameters are shared out too
        threshold = {"stage3_param_persistence_threshold": 0} if stage == "3" else {}
        train["deepspeed"] = {"zero_optimization": {"stage": int(stage), **threshold}}
    return merged(preset, {"train": train})


def command(run: Run) -> list[str]:
    """What starts main.py on so many ranks."""
    return [sys.executable, *([*TORCHRUN, f"--nproc_per_node={run[1]}"] if run[1] > 1 else [])]


def run_all(cases: list[tuple[dict, Path]], ranks: int, failing: str = "") -> str:
    """Train on so many ranks, one preset after the other; returns what was refused.

    failing   the folder where something fails, and what: see many.py
    """
    listed = cases[0][1].parent / f"cases_{ranks}.json"
    listed.write_text(json.dumps([(preset, str(folder)) for preset, folder in cases]))
    launcher = command(("", ranks))
    result = subprocess.run(
        [*launcher, "-m", "tests.parallel.many", str(listed), failing],
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
    changes["train"] |= {} if name in OTHERS else {"optimizer": "adamw"}  # which ZeRO takes too
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


def run_matrix(names: list[str], runs: list[Run], root: Path) -> None:
    """Train each preset on each of the engines, in folders of their own."""
    of_ranks: dict[int, list[tuple[dict, Path]]] = defaultdict(list)
    for name, run in itertools.product(names, runs):
        folder = folder_of(root, name, run)
        folder.mkdir(parents=True)
        write_stories(folder)
        of_ranks[run[1]].append((on(case(name, root / "model"), run), folder))
    for ranks, cases in of_ranks.items():
        assert run_all(cases, ranks) == ""


def folder_of(root: Path, name: str, run: Run) -> Path:
    return root / name / f"{run[0]} x {run[1]}"


def check_the_same(names: list[str], runs: list[Run], root: Path) -> None:
    """The same losses and evaluations as in one process, and the same data."""
    for name, run in itertools.product(names, runs):
        alone, other = folder_of(root, name, ("single", 1)), folder_of(root, name, run)
        assert len(losses(alone)) > STEPS
        assert losses(other) == pytest.approx(losses(alone), abs=1e-4), f"{name}, {run}"
        one, two = Project(alone).checkpoint(), Project(other).checkpoint()
        assert one["data"]["receipt"] == two["data"]["receipt"], f"{name}, {run}"
        for key in ("model", "heads", "optimizer"):
            assert one[key].keys() == two[key].keys(), f"{name}, {run}"
        if run == ("fsdp", 1):
            assert differences(one, two) == [], name


@pytest.mark.parametrize("half", [0, 1])
def test_every_engine_trains_as_one_process_does(half: int, tmp_path: Path) -> None:
    """The same losses and evaluations, and the same data; one rank of fsdp gives the same bits."""
    names, runs = CASES[half::2], [("single", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2)]
    run_matrix(names, runs, tmp_path)
    check_the_same(names, runs[1:], tmp_path)


@pytest.mark.parametrize("half", [0, 1])
def test_every_stage_of_zero_trains_as_one_process_does(half: int, tmp_path: Path) -> None:
    names = [name for name in CASES if name not in ("muon", "curriculum")][half::2]
    runs = [("single", 1), *((stage, 2) for stage in STAGES)]
    run_matrix(names, runs, tmp_path)
    check_the_same(names, runs[1:], tmp_path)


def test_other_stages_and_numbers_of_ranks(tmp_path: Path) -> None:
    """One rank that takes four micro-batches, and four ranks that take one each."""
    of_any = [("single", 1), *((stage, 1) for stage in STAGES), ("ddp", 4), ("fsdp", 4)]
    of_any += [("deepspeed 2", 4)]
    run_matrix(["90_quick_test"], of_any, tmp_path)
    check_the_same(["90_quick_test"], of_any[1:], tmp_path)
    of_two = [("single", 1), ("deepspeed 0", 2)]
    run_matrix(["muon", "curriculum"], of_two, tmp_path)
    check_the_same(["muon", "curriculum"], of_two[1:], tmp_path)


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


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict, Run], Project]:
    """Trains a preset on an engine in one go; once."""
    made: dict[str, Project] = {}

    def train(preset: dict, run: Run) -> Project:
        key = json.dumps([preset, run])
        if key not in made:
            folder = tmp_path_factory.mktemp("straight") / "project"
            made[key] = Project.make(folder, {"t": on(preset, run)})
            result = made[key].run("t", command=command(run))
            assert result.code == 0 and "Traceback" not in result.text, result.text
            assert "WARNING" not in result.text, result.text
        return made[key]

    return train


CHAIN: list[Run] = [("fsdp", 2), ("deepspeed 3", 2), ("single", 1), ("deepspeed 1", 2)]


def test_a_run_goes_from_engine_to_engine(
    straight: Callable, make_project: Callable[..., Project]
) -> None:
    """On two ranks, one, two again: nothing is read twice or left out, and the losses are those of
    a run that stayed."""
    preset = merged(LONG, {"train": {"optimizer": "adamw"}})
    whole, project = straight(preset, ("single", 1)), make_project({})
    for i, run in enumerate(CHAIN):
        project.write_preset("t", on(preset, run))
        if run == CHAIN[-1]:
            assert project.run("t", command=command(run)).code == 0
            break
        reached = lambda goal=10 * (i + 1): project.num_steps() >= goal  # noqa: E731
        result = project.run_until("t", reached, signal.SIGINT, command=command(run))
        assert result.text.count("everything is saved") == 1, result.text
        assert 10 * (i + 1) <= project.num_steps() < 60
    assert project.steps() == list(range(1, 61))
    assert project.checkpoint()["data"]["receipt"] == whole.checkpoint()["data"]["receipt"]
    assert losses(project.folder) == pytest.approx(losses(whole.folder), abs=1e-4)
    engines = [event["engine"] for event in project.events("run_start")]
    assert engines == [run[0].partition(" ")[0] for run in CHAIN]


@pytest.mark.parametrize("engine", ["deepspeed 3"])  # fsdp: test_shares.py
def test_a_killed_rank_costs_nothing(
    engine: str, straight: Callable, make_project: Callable[..., Project]
) -> None:
    """kill -9 of one rank: torchrun ends the other, and the next start goes on, bit for bit."""
    run = (engine, 2)
    preset = LONG if engine == "fsdp" else merged(LONG, {"train": {"optimizer": "adamw"}})
    whole, project = straight(preset, run), make_project({"t": on(preset, run)})
    process = project.start("t", command=command(run))
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
    result = project.run("t", command=command(run))
    assert result.code == 0 and "goes on from step" in result.text, result.text
    assert differences(whole.checkpoint(), project.checkpoint()) == []
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


def test_two_machines_train_as_one(
    straight: Callable, make_project: Callable[..., Project]
) -> None:
    """Two launchers that meet at an address, as on two machines that share the folder."""
    whole, project = straight(LONG, ("fsdp", 2)), make_project({"t": on(LONG, ("fsdp", 2))})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"]
    both = [project.start("t", command=launcher) for _ in range(2)]
    try:
        told = [process.communicate(timeout=200) for process in both]
    finally:
        for process in both:
            kill_group(process)
        project.kill_what_is_left()
    assert [process.returncode for process in both] == [0, 0], told
    assert differences(whole.checkpoint(), project.checkpoint()) == []


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


@pytest.mark.parametrize("failing", ["out of memory", "out of memory, backward"])
@pytest.mark.parametrize("engine", ["fsdp", *STAGES])
def test_out_of_memory_on_one_rank_halves_the_micro_batch_on_all(
    engine: str, failing: str, tmp_path: Path
) -> None:
    """In the middle of a pass, where the other rank waits for it to gather weights."""
    cases = []
    preset = merged(LONG, {"train": {"max_steps": 4, "optimizer": "adamw"}})
    for name in ("whole", failing):
        (tmp_path / name).mkdir()
        write_stories(tmp_path / name)
        cases.append((on(preset, (engine, 2)), tmp_path / name))
    assert run_all(cases, 2, failing=failing) == ""
    failed = tmp_path / failing
    halved = "out of memory: micro-batches have 2 rows now, and there are more of them"
    assert told_by(Project(failed)) == [halved]
    assert losses(failed) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def told_by(project: Project) -> list[str]:
    return [event["message"] for event in project.events("warning")]


@pytest.mark.skips_updates
def test_bad_steps_and_the_way_back_are_the_same_on_all(tmp_path: Path) -> None:
    """An update that is skipped leaves no trace; five in a row lead back to a checkpoint."""
    runs: list[Run] = [("single", 1), ("ddp", 2), ("fsdp", 2), *((stage, 2) for stage in STAGES)]
    preset = merged(LONG, {"train": {"max_steps": 16, "optimizer": "adamw"}})
    for run in runs:
        folder = tmp_path / f"{run[0]} x {run[1]}" / "bad steps"
        folder.mkdir(parents=True)
        write_stories(folder)
    for ranks in (1, 2):
        cases = [
            (on(preset, run), tmp_path / f"{run[0]} x {run[1]}" / "bad steps")
            for run in runs
            if run[1] == ranks
        ]
        assert run_all(cases, ranks, failing="bad steps") == ""
    alone, *others = [Project(tmp_path / f"{run[0]} x {run[1]}" / "bad steps") for run in runs]
    told = told_by(alone)
    assert len(told) == 7 and "weights are back at t_current.pth, step 5" in told[-1], told
    for other in others:
        shared = [message.replace("sharded/current", "current.pth") for message in told_by(other)]
        assert shared == told, other.folder
        finite = [loss for loss in losses(alone.folder) if loss == loss]
        assert [loss for loss in losses(other.folder) if loss == loss] == pytest.approx(
            finite, abs=1e-4
        ), other.folder
        one, two = alone.checkpoint(), other.checkpoint()
        for name, weight in one["model"].items():
            assert torch.allclose(two["model"][name], weight, atol=1e-5), (other.folder, name)
        steps = {name: float(state["step"]) for name, state in one["optimizer"].items()}
        assert steps == {n: float(state["step"]) for n, state in two["optimizer"].items()}


def test_one_process_is_not_many(make_project: Callable[..., Project]) -> None:
    project = make_project({"t": on(LONG, ("single", 2))})
    result = project.run("t", command=command(("single", 2)))
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
    device = torch.device("cpu")
    engine, note = choose_engine("auto", {}, parallel, device, needed, available)
    assert engine.name == name and name in note


def test_one_process_takes_what_it_names() -> None:
    process_group()
    for choice, name in (("auto", "single"), ("ddp", "single"), ("fsdp", "fsdp")):
        assert choose_engine(choice, {}, Single(), torch.device("cpu"), 1, 0)[0].name == name


def process_group() -> dist.ProcessGroup:
    """The group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed 3"])
def test_no_room_for_all_weights_costs_the_evaluation(engine: str, tmp_path: Path) -> None:
    """The run goes on, on both ranks, and says so."""
    (tmp_path / "no room").mkdir()
    write_stories(tmp_path / "no room")
    changes = {"train": {"max_steps": 4, "optimizer": "adamw"}}
    preset = merged(on(LONG, (engine, 2)), changes)
    assert run_all([(preset, tmp_path / "no room")], 2, failing="no room") == ""
    project = Project(tmp_path / "no room")
    (told,) = [message for message in told_by(project) if "evaluation" in message]
    assert "no room for all weights" in told and "the run goes on without" in told
    assert project.steps() == [1, 2, 3, 4] and project.events("eval") == []
    assert project.finished() and project.checkpoint()["progress"]["finished"]
