"""The tokenize job from the outside: shipped presets, kills, torchrun."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import NoData, UserError
from tests.jobs.test_tokenize import KILLS, files, preset_of, tokenize_here
from tests.project import ROOT, Project, merged, story, train_here

# from the outside ---------------------------------------------------------------------------------


def shipped(stem: str, **changes: Any) -> dict:
    return merged(json.loads((ROOT / "configs" / f"{stem}.json").read_text()), changes)


def test_the_shipped_presets_tokenize_and_then_train(tmp_path: Path) -> None:
    """91 and 92 as they are, but for their length. 92 first: it says that 91 comes first."""
    base = shipped("90_quick_test", train={"max_steps": 3, "eval_tokens": 200})
    own = shipped("92_train_on_tokens")
    preset = {
        key: value for key, value in merged(base, own).items() if key not in ("extends", "$schema")
    }
    with pytest.raises(
        NoData,
        match=r"data/tokens/python_stdlib holds no manifest.json: make it first.*91_tokenize_local",
    ):
        train_here(preset, tmp_path)
    first = shipped(
        "91_tokenize_local", tokenize={"chunk_tokens": 20_000, "max_tokens": 60_000, "workers": 0}
    )
    tokenize_here(first | {"tokenizer": {"type": "bpe", "vocab_size": 400}}, tmp_path)
    events = train_here(preset, tmp_path)
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    start = next(event for event in events if event["event"] == "run_start")
    assert start["sources"] == ["python_stdlib"]
    for kind, told in (
        ("bpe", 'no source has text to train a "bpe" on'),
        ("byte", "made with another tokenizer than this run"),
    ):
        with pytest.raises(
            UserError, match=rf'{told}(.|\n)*"type": "file", "path": ".*data/tokens/tokenizer.json"'
        ):
            train_here({**preset, "tokenizer": {"type": kind}, "lineage": "other"}, tmp_path)


@pytest.mark.slow
def test_91_and_92_from_the_command_line(make_project: Callable[..., Project]) -> None:
    """As a person would, with the presets' own sizes."""
    stems = ("90_quick_test", "91_tokenize_local", "92_train_on_tokens")
    project = make_project(
        {stem: (ROOT / "configs" / f"{stem}.json").read_text() for stem in stems}
    )
    refused = project.run("92_train_on_tokens")
    assert (
        refused.code == 3 and "91_tokenize_local" in refused.err and "Traceback" not in refused.text
    )
    began = time.monotonic()
    written = project.run("91_tokenize_local")
    assert written.code == 0 and "2,00" in written.out and time.monotonic() - began < 60, (
        written.text
    )
    trained = project.run("92_train_on_tokens")
    assert trained.code == 0 and project.steps("92_train_on_tokens") == list(range(1, 21)), (
        trained.text
    )


def impatient(project: Project, preset: dict) -> None:
    """Many documents, and a program that saves after every few of them."""
    path = project.folder / "core" / "data" / "tokenize_source.py"
    text = path.read_text()
    for before, after in (
        ("SAVE_SECONDS = 5.0", "SAVE_SECONDS = 0.0"),
        ("BATCH_CHARACTERS = 250_000", "BATCH_CHARACTERS = 4000"),
    ):
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)
    lines = [json.dumps({"text": story(number)}) for number in range(600)]
    (project.folder / "rows.jsonl").write_text("\n".join(lines))
    project.write_preset("t", preset)


ROWS = preset_of(
    data={"sources": [{"type": "text", "path": "rows.jsonl"}]},
    tokenizer={"type": "bpe", "vocab_size": 400},
    tokenize={"chunk_tokens": 15_000, "workers": 2},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """ROWS, left alone."""
    project = Project.make(tmp_path_factory.mktemp("whole") / "project", {})
    impatient(project, ROWS)
    assert project.run("t").code == 0
    return project


def written(project: Project) -> int:
    try:
        return json.loads((project.folder / "tokens" / "rows" / "manifest.json").read_text())[
            "total_tokens"
        ]
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_killed_at_any_moment_it_comes_out_the_same(
    whole: Project, make_project: Callable[..., Project]
) -> None:
    """kill -9, Ctrl-C in between; no process of the pool is left behind, and the files are those of
    a run left alone."""
    project = make_project({})
    impatient(project, ROWS)
    total, rng = written(whole), random.Random(time.time_ns())
    for number in range(KILLS):
        goal = written(project) + rng.randint(1, total // KILLS)
        sent = signal.SIGINT if number == 1 else signal.SIGKILL
        process = project.start("t")
        end = time.monotonic() + 120
        while process.poll() is None and written(project) < goal and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(process.pid, sent)  # the job alone: its pool must notice by itself
        out, err = process.communicate(timeout=60)
        if sent == signal.SIGINT and process.returncode != 0:
            assert (
                process.returncode == 130
                and "everything is saved" in err
                and "Traceback" not in err
            ), out + err
        assert none_left(project), "a process of the pool outlived the job"
    assert project.run("t").code == 0
    assert files(project.folder / "tokens") == files(whole.folder / "tokens")


def none_left(project: Project) -> bool:
    """Whether, within some seconds, no process runs in the project's folder."""
    for _ in range(100):
        running = subprocess.run(
            ["ls", "-l", *(f"/proc/{p}/cwd" for p in os.listdir("/proc") if p.isdigit())],
            capture_output=True,
        )
        if str(project.folder) not in running.stdout.decode():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_under_torchrun_one_rank_does_it_all(
    whole: Project, make_project: Callable[..., Project]
) -> None:
    project = make_project({})
    impatient(project, ROWS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = project.run("t", command=torchrun)
    assert result.code == 0 and result.out.count("to train on it") == 1, result.text
    assert files(project.folder / "tokens") == files(whole.folder / "tokens")
