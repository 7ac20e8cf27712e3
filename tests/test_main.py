"""From the outside: `python main.py` in a copy of the project, one line of standard input, files
and exit codes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.kills import PRESETS, survive
from tests.kills import uninterrupted as uninterrupted_run
from tests.project import NO_HUB, Project, Result, differences, measured, merged, tiny_preset

KILLS = 5
"""kill -9 so many times in test_killed_at_any_moment; `python -m tests.kills` does it over four
presets, as often as asked."""

STEPS = 160
LONG = tiny_preset(
    model={"dropout": 0.1},
    tokenizer={"type": "bpe", "vocab_size": 300},
    train={
        "max_steps": STEPS,
        "checkpoint_every_steps": 7,
        "eval_every_tokens": 16_000,
        "accumulation_steps": 2,
    },
    data={
        "sources": [
            {"type": "text", "path": "texts"},
            {"type": "text", "path": "core/data/**/*.py", "name": "code"},
        ],
        "mix_strategy": "weighted",
        "source_weights": [0.6, 0.4],
    },
)
"""Some seconds of training with everything that has a state: dropout, a trained tokenizer, a
weighted mix, evaluations."""


def assert_ended(result: Result, code: int) -> None:
    """The exit code, and never a traceback."""
    assert result.code == code, result.text
    assert "Traceback" not in result.text, result.text


def assert_refused(result: Result, *told: str) -> None:
    """The user's mistake: exit code 2, and each of these in the message."""
    assert_ended(result, 2)
    for part in told:
        assert part in result.err, result.err


# a run and what it leaves -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run that nobody asked for by name, with broken presets beside it. Not to be changed;
    `copy_of` it is."""
    presets = {
        "00_best_general": tiny_preset(
            name="Tiny one", lineage="lm", train={"checkpoint_every_steps": 2}
        )
    }
    presets |= {
        "10_other": tiny_preset(),
        "bad_key": tiny_preset(model={"num_layer": 2}),
        "bad_json": "{",
    }
    project = Project.make(tmp_path_factory.mktemp("finished") / "project", presets)
    assert_ended(project.run(None), 0)
    return project


def copy_of(project: Project, folder: Path) -> Project:
    return Project(shutil.copytree(project.folder, folder / "project"))


@pytest.mark.slow
def test_closed_standard_input_takes_the_default(finished: Project) -> None:
    """A cluster job or a service: no terminal, no line, not even an open descriptor."""
    assert (
        finished.steps("lm") == [1, 2, 3, 4, 5]
        and not (finished.folder / "logs" / "10_other").exists()
    )


@pytest.mark.slow
def test_a_run_leaves_what_the_interface_says(finished: Project) -> None:
    """Files, event fields, checkpoint."""
    project = finished
    logs = project.folder / "logs" / "lm"
    assert {path.name for path in logs.iterdir()} == {
        "metrics.jsonl",
        "preset.json",
        "run.json",
        "loss.png",
    }
    assert (logs / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = {path.name for path in (project.folder / "checkpoints").iterdir()}
    assert saved == {"lm_current.pth", "lm_prev.pth", "lm_prev2.pth", "simple_lm_trained.pth"}
    fields = {
        "run_start": {"preset", "lineage", "run", "resumed_from", "parameters", "world_size"},
        "step": {
            "loss",
            "losses",
            "learning_rate",
            "grad_norm",
            "tokens_per_second",
            "sources",
            "skipped",
        },
        "eval": {"cross_entropy", "perplexity", "bits_per_byte", "token_accuracy", "losses"},
        "sample": {"prompt", "text"},
        "checkpoint": {"path", "seconds"},
        "run_end": {"reason"},
    }
    found = project.events(lineage="lm")
    assert {event["event"] for event in found} >= set(fields)
    for event in found:
        assert {"event", "step", "tokens", "time"} | fields.get(event["event"], set()) <= set(event)
    assert [event["path"] for event in found if event["event"] == "checkpoint"] == [
        "checkpoints/lm_current.pth"
    ] * 3
    step = project.events("step", "lm")[-1]
    account = {"loss", "weight", "tokens", "documents", "epochs"}
    assert set(step["sources"]) == {"texts"} and set(step["sources"]["texts"]) == account
    assert step["tokens"] == 5 * 4 * 32 and found[-1]["reason"] == "max_steps"
    card, preset = (
        json.loads((logs / "run.json").read_text()),
        json.loads((logs / "preset.json").read_text()),
    )
    assert {
        "parameters",
        "tokens_per_step",
        "device",
        "versions",
        "sources",
        "git_commit",
        "seconds_to_first_step",
    } <= set(card)
    assert preset["model"]["hidden_size"] == 32 and preset["train"]["seed"] == 42
    first = project.checkpoint(lineage="lm")
    assert first["progress"]["step"] == 5 and first["progress"]["tokens"] == step["tokens"]


@pytest.mark.slow
def test_no_room_for_a_checkpoint_is_told_before_the_first_step_and_the_next_start_goes_on(
    finished: Project, tmp_path: Path
) -> None:
    """Exit code 2 before anything is trained, the older checkpoint untouched. Then a second start
    is the next run of the same lineage; the log never repeats a step."""
    project = copy_of(finished, tmp_path)
    before = {path: path.read_bytes() for path in (project.folder / "checkpoints").iterdir()}
    (project.folder / "limited.py").write_text(
        "import resource, runpy\nresource.setrlimit(resource.RLIMIT_FSIZE, (150_000, "
        "resource.RLIM_INFINITY))\n"
        "runpy.run_path('main.py', run_name='__main__')\n"
    )
    assert min(map(len, before.values())) > 150_000
    run = [sys.executable, "limited.py"]
    done = subprocess.run(
        run, cwd=project.folder, input="Tiny one\n", capture_output=True, text=True, timeout=120
    )
    assert_refused(
        Result(done.returncode, done.stdout, done.stderr), "cannot be written", "File too large"
    )
    assert project.steps("lm") == [1, 2, 3, 4, 5]
    assert {
        path: path.read_bytes() for path in (project.folder / "checkpoints").iterdir()
    } == before

    result = project.run("Tiny one")
    assert_ended(result, 0)
    assert "run 2 begins from the weights of step 5" in result.out
    assert project.steps("lm") == list(range(1, 11))
    starts = project.events("run_start", "lm")
    assert [(e["run"], e["resumed_from"]) for e in starts] == [(1, None), (2, "step 5")]
    # the data went on, too: nothing of the first run's place in it was lost
    first, second = (each.checkpoint(lineage="lm") for each in (finished, project))
    assert second["progress"]["step"] == 10 and second["data"]["rows"] == 2 * first["data"]["rows"]


@pytest.mark.slow
def test_presets_of_one_lineage_improve_one_model(finished: Project, tmp_path: Path) -> None:
    """Another preset of the lineage goes on from the same weights, with its own data and the stored
    tokenizer, and says so."""
    project, before = copy_of(finished, tmp_path), finished.checkpoint(lineage="lm")
    second = {"lineage": "lm", "train": {"learning_rate": 1e-12}}
    project.write_preset(
        "second",
        tiny_preset(**second, data={"sources": [{"type": "text", "path": "core/**/*.py"}]}),
    )
    result = project.run("second")
    assert_ended(result, 0)
    assert (
        "the mix begins anew" in result.out
        and "run 2 begins from the weights of step 5" in result.out
    )
    after = project.checkpoint(lineage="lm")
    for name, weight in before["model"].items():
        torch.testing.assert_close(after["model"][name], weight, atol=1e-6, rtol=0)
    assert project.steps("lm") == list(range(1, 11)) and after["progress"]["run"] == 2
    starts = project.events("run_start", "lm")
    assert [(e["run"], e["resumed_from"]) for e in starts] == [(1, None), (2, "step 5")]


@pytest.fixture(scope="module")
def from_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path, Result]:
    """The default, by an empty line, started from an empty folder, on sources of which all but one
    cannot be had.

    Both optimizers; Python tells in standard error what it imports.
    """
    folder = tmp_path_factory.mktemp("from_elsewhere")
    sources, weights = ["pdf", "wikipedia", {"type": "text", "path": "texts"}], [0.3, 0.3, 0.4]
    data = {"sources": sources, "mix_strategy": "weighted", "source_weights": weights}
    preset = tiny_preset(data=data, train={"optimizer": "muon"}, lineage="t")
    project = Project.make(folder / "project", {"00_best_general": preset})
    (project.folder / "pdfs" / "torn.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)) * 20)
    (folder / "elsewhere").mkdir()
    run = [sys.executable, "-X", "importtime", str(project.folder / "main.py")]
    env = {**os.environ, **NO_HUB, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        run,
        cwd=folder / "elsewhere",
        env=env,
        input="\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    return project, folder / "elsewhere", Result(done.returncode, done.stdout, done.stderr)


def test_an_empty_line_takes_the_default_from_any_folder(
    from_elsewhere: tuple[Project, Path, Result],
) -> None:
    """All paths are relative to the folder of main.py, wherever it is started from."""
    project, elsewhere, result = from_elsewhere
    assert_ended(result, 0)
    assert project.steps() == [1, 2, 3, 4, 5] and list(elsewhere.iterdir()) == []
    told = [line for line in result.err.splitlines() if not line.startswith("import time:")]
    assert (
        told[0].startswith("No preset was named, so 00_best_general starts.")
        and "echo 00_best_general | python" in told[0]
    )


def test_sources_that_cannot_be_had_are_dropped_with_a_warning(
    from_elsewhere: tuple[Project, Path, Result],
) -> None:
    """A corrupt PDF in pdfs/, no network: each is named, and the run goes on with what is left."""
    project, _, result = from_elsewhere
    assert_ended(result, 0)
    told = {
        e["message"].split()[1]: e["message"]
        for e in project.events("warning")
        if e["message"].startswith("source ")
    }
    assert (
        set(told) == {"pdf", "wikipedia"}
        and "torn.pdf" in told["pdf"]
        and "cannot reach" in told["wikipedia"]
    )
    assert all(f"source {name} dropped" in result.out for name in told)
    last = project.events("step")[-1]
    assert last["sources"].keys() == {"texts"} and last["sources"]["texts"]["weight"] == 1.0


def test_a_run_that_compiles_nothing_never_loads_the_compiler(
    from_elsewhere: tuple[Project, Path, Result],
) -> None:
    """To import it takes longer than these five steps: drawing for the menu, optimizers and
    evaluations do without."""
    project, _, result = from_elsewhere
    assert project.events("eval") and "core.training.trainer" in result.err
    assert "torch._dynamo" not in result.err


# mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--max-steps", "5"), ("configs/t.json",), ("",)]
)
def test_arguments_are_refused_in_one_line(
    arguments: tuple[str, ...], make_project: Callable[..., Project]
) -> None:
    project = make_project({"t": tiny_preset()})
    result = project.run("t", *arguments)
    assert_refused(result, "takes no arguments", " ".join(arguments), "configs/*.json")
    assert len(result.text.strip().splitlines()) == 1 and not (project.folder / "logs").exists()


@pytest.mark.slow
def test_mistakes_in_a_preset_are_told_when_it_is_chosen(
    make_project: Callable[..., Project],
) -> None:
    """Misspelt key, broken JSON, a name that is no preset: one clear message each. `finished` ran
    beside such presets."""
    project = make_project(
        {
            "bad_key": tiny_preset(model={"num_layer": 2}, train={"lerning_rate": 1.0}),
            "bad_json": '{\n  "name": "x",\n  "train": {"seed": 1,}\n}',
        }
    )
    assert_refused(
        project.run("bad_key"),
        "bad_key.json has 2 problems",
        'model.num_layer  unknown key; did you mean "num_layers"?',
        'train.lerning_rate  unknown key; did you mean "learning_rate"?',
    )
    assert_refused(project.run("bad_json"), "bad_json.json has 1 problem", "line 3 column 23")
    project.write_preset("good", tiny_preset())
    assert_refused(project.run("goood"), 'no preset is called "goood"', 'did you mean "good"?')
    assert not (project.folder / "logs").exists() and not (project.folder / "checkpoints").exists()


def test_without_any_source_training_halts(make_project: Callable[..., Project]) -> None:
    """Exit code 3, every reason told, and no synthetic data in their place. It takes seconds, not
    minutes."""
    data = {"sources": ["wikipedia", "pdf", {"type": "text", "path": "nowhere"}]}
    project = make_project({"t": tiny_preset(data=data)})
    began = time.monotonic()
    result = project.run("t")
    assert time.monotonic() - began < 60
    assert_ended(result, 3)
    for name in ("wikipedia: ", "pdf: ", "nowhere: "):
        assert name in result.err
    assert not (project.folder / "checkpoints").exists()


# interruptions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """LONG, run in one go."""
    project = Project.make(tmp_path_factory.mktemp("uninterrupted") / "project", {"t": LONG})
    assert_ended(project.run("t"), 0)
    assert project.steps() == list(range(1, STEPS + 1))
    return project


def new_step(project: Project, count: int) -> Callable[[], bool]:
    """Whether so many steps were logged since now."""
    before = project.num_steps()
    return lambda: project.num_steps() >= before + count


def assert_same_outcome(project: Project, uninterrupted: Project) -> None:
    """Weights, optimizer, progress and data bit for bit; every step, evaluation and sample once,
    with the same numbers."""
    assert differences(uninterrupted.checkpoint(), project.checkpoint()) == []
    assert measured(uninterrupted.events()) == measured(project.events())


@pytest.mark.slow
def test_ctrl_c_sigterm_and_sighup_save_and_the_next_start_goes_on(
    make_project: Callable[..., Project], uninterrupted: Project
) -> None:
    """Exit code 130, the step finished and saved, how to go on is told; in the end it is as if
    nothing had happened."""
    project = make_project({"t": LONG})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        result = project.run_until("t", new_step(project, 30), number)
        assert_ended(result, 130)
        assert "everything is saved" in result.err
        last = project.events()[-1]
        assert last["event"] == "run_end" and last["reason"] == "interrupted"
        assert project.checkpoint()["progress"]["step"] == last["step"] == project.steps()[-1]
    assert_ended(project.run("t"), 0)
    assert_same_outcome(project, uninterrupted)


@pytest.mark.slow
def test_killed_at_any_moment(make_project: Callable[..., Project], uninterrupted: Project) -> None:
    """kill -9, again and again, while starting, training, evaluating, sampling and ending: the end
    is bit for bit the same."""
    survive(make_project({"t": LONG}), uninterrupted, KILLS, signal.SIGKILL, random.Random(2))


@pytest.mark.slow
def test_killed_with_heads_workers_and_several_runs(make_project: Callable[..., Project]) -> None:
    """The same where weights of sources follow losses, a process reads the data, and one run begins
    after another."""
    preset = PRESETS["heads"]
    survive(
        make_project({"t": preset}),
        uninterrupted_run(make_project({"t": preset}, "whole")),
        3,
        signal.SIGKILL,
        random.Random(3),
    )


@pytest.mark.slow
def test_workers_change_nothing_and_stop_with_their_run(
    make_project: Callable[..., Project], uninterrupted: Project
) -> None:
    """Data read by worker processes gives the same run; Ctrl-C reaches them too, and leaves none
    behind."""
    project = make_project({"t": merged(LONG, {"data": {"workers": 2}})})
    result = project.run_until("t", new_step(project, 30), signal.SIGINT)
    assert_ended(result, 130)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(project.folder) not in listed
    assert_ended(project.run("t"), 0)
    one, other = uninterrupted.checkpoint(), project.checkpoint()
    one["data"]["fingerprint"] = other["data"]["fingerprint"]
    assert [d for d in differences(one, other) if d != "data"] == []
    assert [e["loss"] for e in uninterrupted.events("step")] == [
        e["loss"] for e in project.events("step")
    ]
