"""The compare job: trials paired on the same data, stopped and killed anywhere, gone on with, never
run twice, reported."""

import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch

from core.assembly import Preset
from core.data.corpus import open_corpus
from core.data.tokenizer import Tokenizer, build_tokenizer
from core.errors import Interrupted, NoData, UserError
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.preview import preset_card
from core.runtime import detect_runtime, forget_peak_memory
from tests.documents import GUIDE, block_of, files_named
from tests.project import NO_HUB, Project, differences, merged, story, tiny_preset

job = importlib.import_module("core.jobs.compare")

KILLS = 3
"""kill -9 so many times in test_killed_at_any_moment; raise it for a long night."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


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


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training a tiny model, and so does freeing all memory; the slow
    tests do both."""
    monkeypatch.setattr("core.reports.run_card.plot_losses", lambda *_: None)
    monkeypatch.setattr(job, "write_report", lambda comparison, folder: None)
    monkeypatch.setattr(job, "forget_peak_memory", lambda runtime: True)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """preset_of(), run in one go: its folder, which nobody may change, and what was told."""
    root = tmp_path_factory.mktemp("compared")
    drawn = job.write_report

    def write_report(comparison: Any, folder: Path) -> None:
        """The last one: those before it, one a trial, take longer than the trials; the slow tests
        have them."""
        if len(list(root.glob("checkpoints/t/*/*_current.pth"))) == len(TRIALS):
            drawn(comparison, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.reports.run_card.plot_losses", lambda *_: None)
        patch.setattr(job, "write_report", write_report)
        return root, compare_here(preset_of(), root)


@pytest.fixture
def finished(compared: tuple[Path, str], tmp_path: Path, no_plots: None) -> Path:
    """A copy of it."""
    return shutil.copytree(compared[0], tmp_path / "finished")


# what comes out -----------------------------------------------------------------------------------


def test_variants_of_a_seed_differ_in_nothing_but_the_idea(compared: tuple[Path, str]) -> None:
    """The same data, the same first loss, the same tokenizer; another seed is another draw of data
    and weights."""
    root, told = compared
    project = Project(root)
    ends = {trial: project.events("run_end", f"t/{trial}")[0] for trial in TRIALS}
    assert {end["reason"] for end in ends.values()} == {"max_steps"} and {
        end["tokens"] for end in ends.values()
    } == {4 * 4 * 32}
    receipts = [ends[trial]["receipt"] for trial in TRIALS]
    assert receipts[0] == receipts[1] != receipts[2] == receipts[3]
    first = [project.events("step", f"t/{trial}")[0]["loss"] for trial in TRIALS]
    assert first[0] == first[1] != first[2] == first[3]
    last = [project.events("step", f"t/{trial}")[-1]["loss"] for trial in TRIALS]
    assert last[0] != last[1] and last[2] != last[3]
    assert (
        len({project.checkpoint(lineage=f"t/{trial}")["tokenizer"]["json"] for trial in TRIALS})
        == 1
    )
    for part in (
        "trial 1 of 4: as it is, seed 1",
        "trial 4 of 4: higher, seed 2",
        "higher is",
        "report.html",
    ):
        assert part in told


def test_every_seed_is_measured_on_the_same_text(finished: Path) -> None:
    """The held-out documents that come first would be others with each seed."""

    def measured(seed: int, validation_seed: int | None) -> list[int]:
        preset = decode_preset(
            tiny_preset(train={"seed": seed}, data={"validation_fraction": 0.2}), Preset, "t", "t"
        )
        corpus = open_corpus(preset, finished, Single())
        rows = corpus.validation_rows(
            Tokenizer.from_state(build_tokenizer(preset.tokenizer, []).state()),
            32,
            200,
            validation_seed,
        )
        return [token for row in rows for token in row.input_ids.tolist()]

    seeds = range(6)
    assert len({tuple(measured(seed, None)) for seed in seeds}) > 1
    assert len({tuple(measured(seed, job.VALIDATION_SEED)) for seed in seeds}) == 1
    project = Project(finished)
    # their quotient is the text's tokens per byte
    evals = [project.events("eval", f"t/{trial}")[-1] for trial in TRIALS]
    assert len({round(event["bits_per_byte"] / event["cross_entropy"], 12) for event in evals}) == 1


def test_what_a_comparison_leaves(compared: tuple[Path, str]) -> None:
    """The report, each trial's usual files, one checkpoint of each, the shared tokenizer; nothing
    half-written."""
    root, _ = compared
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and "texts" not in path.parts
    }
    (tokenizer,) = [name for name in found if name.startswith("checkpoints/t/tokenizer_")]
    expected = {
        f"logs/t/{name}" for name in ("report.html", "report.md", "metrics.json", "state.json")
    } | {tokenizer}
    expected |= {
        f"logs/t/{trial}/{name}"
        for trial in TRIALS
        for name in ("metrics.jsonl", "run.json", "preset.json")
    }
    expected |= {f"checkpoints/t/{trial}_current.pth" for trial in TRIALS}
    assert found == expected
    code = block_of(GUIDE, "logs/<lineage>/report.html")
    for name in (
        name
        for variant in ("as_it_is", "higher")
        for name in files_named(code, lineage="t", variant=variant, seed="1")
    ):
        assert list(root.glob(name)), f"the guide says that a comparison leaves {name}"
    paths = {
        e["path"] for trial in TRIALS for e in Project(root).events("checkpoint", f"t/{trial}")
    }
    assert paths == {f"checkpoints/t/{trial}_current.pth" for trial in TRIALS}
    memory = [e["memory_mb"] for e in Project(root).events("step", "t/higher/2")]
    assert memory[-1] > 50


def test_what_is_done_is_not_done_again(finished: Path) -> None:
    before = files(finished)
    told = compare_here(
        preset_of(name="Another name", description="and another description"), finished
    )
    assert files(finished) == before
    assert (
        "All 4 trials were done already" in told
        and "add seeds or variants" in told
        and "higher is" in told
    )


def test_seeds_and_variants_can_be_added(finished: Path) -> None:
    """Only what is new is run; the tokenizer of the others is used."""
    before = files(finished)
    more = preset_of(seeds=[1, 2, 3])
    more["variants"] += [{"name": "lower", "set": {"train": {"learning_rate": 0.0003}}}]
    told = compare_here(more, finished)
    after = files(finished)
    assert {name: after[name] for name in before} == before
    new = {
        Path(name).parent.relative_to("logs/t").as_posix()
        for name in after.keys() - before.keys()
        if "metrics.jsonl" in name
    }
    assert new == {"lower/1", "lower/2", "as_it_is/3", "higher/3", "lower/3"}
    assert "trial 3 of 9: lower, seed 1" in told
    project = Project(finished)
    assert (
        len(
            {
                project.checkpoint(lineage=f"t/{trial}")["tokenizer"]["json"]
                for trial in ["as_it_is/1", *new]
            }
        )
        == 1
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"max_steps": 5}}, "as it is, seed 1: train.max_steps was 4, is 5"),
        (
            {
                "variants": [
                    {"name": "as it is"},
                    {"name": "higher", "set": {"train": {"learning_rate": 0.02}}},
                ]
            },
            "higher, seed 1: train.learning_rate was 0.01, is 0.02",
        ),
    ],
)
def test_a_changed_preset_is_refused(changes: dict, told: str, finished: Path) -> None:
    """With what differs and what to do, before anything is touched; other processes are another
    step, and so refused, too."""
    before = files(finished)
    with pytest.raises(UserError) as caught:
        compare_here(preset_of(**changes), finished)
    assert (
        told in str(caught.value)
        and '"lineage"' in str(caught.value)
        and "logs/t/higher\n" in str(caught.value)
    )
    assert files(finished) == before
    same = decode_preset(preset_of(), Preset, "t", "t")
    with pytest.raises(UserError, match="begun on 1 processes and this is 2"):
        job.standing(same, finished, 2)


def test_deleted_trials_run_anew(finished: Path) -> None:
    """What the refusal says to delete is enough; a log that was deleted alone is missed."""
    changed = preset_of(
        variants=[
            {"name": "as it is"},
            {"name": "higher", "set": {"train": {"learning_rate": 0.02}}},
        ]
    )
    shutil.rmtree(finished / "logs" / "t" / "higher")
    with pytest.raises(
        UserError,
        match=r"(?s)has runs that are over.* is gone.*delete these folders.*put the logs back",
    ) as told:
        compare_here(preset_of(), finished)
    assert "other settings" not in str(told.value)
    shutil.rmtree(finished / "checkpoints" / "t" / "higher")
    before = files(finished)
    compare_here(changed, finished)
    after = files(finished)
    assert {name: after[name] for name in before} == before
    assert Project(finished).events("run_start", "t/higher/1")[0]["resumed_from"] is None


def test_the_menu_tells_how_far_it_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root, told in (
        (tmp_path, "starts fresh"),
        (finished, "4 of 4 runs are done; writes the report anew"),
    ):
        preset = decode_preset(preset_of(), Preset, "t", "t")
        card = preset_card("9_t", preset, detect_runtime(), root)
        assert (
            "compares higher with as it is, each with seeds 1, 2: 4 runs" in card.preview()
            and told in card.preview()
        )
        assert "at most 4 steps" in card.preview() and card.description.startswith("short")
    changed = decode_preset(preset_of(seeds=[1, 2, 3], train={"max_steps": 9}), Preset, "t", "t")
    assert "begun with other settings" in "\n".join(job.preview_compare(changed, finished))


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a peak cannot be forgotten, and a note says so"
)
def test_the_peak_of_an_earlier_trial_is_forgotten() -> None:
    runtime = detect_runtime()
    held = torch.ones(75_000_000)  # 286 MB
    high = runtime.memory_mb()
    del held
    assert runtime.memory_mb() == pytest.approx(high, abs=20)
    assert forget_peak_memory(runtime) and runtime.memory_mb() < high - 250


# trials that come to nothing ----------------------------------------------------------------------


@pytest.mark.skips_updates
@pytest.mark.slow
def test_a_variant_that_diverges_is_recorded_and_the_others_go_on(
    tmp_path: Path, no_plots: None
) -> None:
    """Each of its seeds is run; a new start does not try them again, and does run what is new."""
    wild = {"name": "wild", "set": {"train": {"learning_rate": 100.0, "weight_decay": 100.0}}}
    preset = preset_of(
        variants=[{"name": "as it is"}, wild, preset_of()["variants"][1]], train={"max_steps": 12}
    )
    told = compare_here(preset, tmp_path)
    state = json.loads((tmp_path / "logs" / "t" / "state.json").read_text())
    assert {key: entry["status"] for key, entry in state["trials"].items()} == {
        "wild/1": "diverged",
        "wild/2": "diverged",
    }
    assert "not finite" in state["trials"]["wild/1"]["note"] and "wild, seed 1: diverged" in told
    assert (
        Project(tmp_path).finished("t/higher/2")
        and Project(tmp_path).events("run_end", "t/wild/2")[0]["reason"] == "diverged"
    )
    before = files(tmp_path)
    told = compare_here(preset, tmp_path)
    assert files(tmp_path) == before and "done already" in told and "wild, seed 1: diverged" in told
    tamed = merged(
        preset,
        {
            "variants": [
                preset["variants"][0],
                merged(wild, {"set": {"train": {"learning_rate": 0.001}}}),
            ]
        },
    )
    with pytest.raises(UserError, match=r"wild, seed 1: train.learning_rate was 100.0, is 0.001"):
        compare_here(tamed, tmp_path)


@pytest.mark.slow
def test_a_hopeless_variant_is_stopped_and_not_run_with_other_seeds(
    tmp_path: Path, no_plots: None
) -> None:
    """From a third of the budget on, compared with the baseline at the same tokens; never the
    baseline."""
    slow = {"name": "slow", "set": {"train": {"learning_rate": 1e-9}}}
    changes = {
        "max_steps": 12,
        "learning_rate": 0.005,
        "eval_every_tokens": 256,
        "schedule": {"type": "constant", "warmup": 0.0},
    }
    preset = preset_of(
        variants=[{"name": "as it is"}, slow], train=changes, compare={"stop_worse_by": 0.2}
    )
    told = compare_here(preset, tmp_path)
    project = Project(tmp_path)
    evals = project.events("eval", "t/slow/1")
    assert evals[-1]["tokens"] == project.events("run_end", "t/slow/1")[0]["tokens"] == 512, (
        "a third of 1536, not before"
    )
    assert project.events("run_end", "t/slow/1")[0]["reason"] == "interrupted"
    assert not (tmp_path / "logs" / "t" / "slow" / "2").exists() and project.finished(
        "t/as_it_is/2"
    )
    assert (
        "slow, seed 1: stopped early" in told
        and "nats worse than as it is after 512 of 1,536 tokens" in told
    )
    assert "slow, seed 2: stopped early: not run, as seed 1 was stopped early" in told
    before = files(tmp_path)
    assert "done already" in compare_here(preset, tmp_path) and files(tmp_path) == before
    compare_here(merged(preset, {"compare": {"stop_worse_by": None}}), tmp_path)
    assert project.steps("t/slow/1") == list(range(1, 13)), (
        "without the rule it goes on where it was stopped"
    )
    assert project.finished("t/slow/1") and project.finished("t/slow/2")


def test_a_verdict_that_a_kill_left_unrecorded_is_found_again() -> None:
    watch = job.Watch(0.5, "base", [(100, 3.0), (200, 2.0), (300, 1.0)])
    for tokens, value, hopeless in (
        (90, 9.0, False),
        (100, 3.4, False),
        (200, None, False),
        (300, 9.0, False),
        (200, 2.6, True),
    ):
        watch.update({"event": "eval", "tokens": tokens, "cross_entropy": value})
        assert bool(watch.verdict) == hopeless
    assert watch.verdict == "0.600 nats worse than base after 200 of 300 tokens"
    lenient = job.Watch(None, "base", [(300, 1.0)])
    lenient.update({"event": "eval", "tokens": 200, "cross_entropy": 99.0})
    assert not lenient.verdict


def test_without_data_the_comparison_ends(tmp_path: Path, no_plots: None) -> None:
    with pytest.raises(NoData):
        compare_here(preset_of(data={"sources": [{"type": "text", "path": "nowhere"}]}), tmp_path)


# interruptions ------------------------------------------------------------------------------------


def test_stopped_between_and_inside_trials(
    compared: tuple[Path, str], tmp_path: Path, no_plots: None, monkeypatch: Any
) -> None:
    """Asked to stop at every step of the plan in turn, it ends as if it had never been."""

    class Stop:
        asked = 0

        def __enter__(self) -> "Stop":
            self.left = Stop.asked
            return self

        def __exit__(self, *_: Any) -> None: ...

        def __call__(self) -> bool:
            self.left -= 1
            return self.left < 0

    monkeypatch.setattr(job, "StopRequest", Stop)
    never = 10**9  # it is asked between the tokens of samples, too
    for asked in (0, 3, 6, 2, 4, never):
        Stop.asked = asked
        if asked < never:
            with pytest.raises(Interrupted, match="start again to go on"):
                compare_here(preset_of(), tmp_path)
        else:
            compare_here(preset_of(), tmp_path)
    for trial in TRIALS:
        one, other = (
            Project(root).checkpoint(lineage=f"t/{trial}") for root in (compared[0], tmp_path)
        )
        assert differences(one, other) == [], trial
        assert Project(tmp_path).steps(f"t/{trial}") == [1, 2, 3, 4]


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


# other ways to run it -----------------------------------------------------------------------------


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
