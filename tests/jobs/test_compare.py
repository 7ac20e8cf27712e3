"""The compare job: trials paired on the same data, run once, refused when they have changed, and
resumed after a stop."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.comparison.standing import standing_trials
from core.data.corpus import open_corpus
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.errors import Interrupted, UserError
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.preview import preset_card
from core.registry import Preset
from core.runtime import detect_runtime, forget_peak_memory
from tests.documents import GUIDE, block_of, files_named
from tests.jobs.comparisons import TRIALS, compare_here, files, job, preset_of
from tests.project import Project, differences, tiny_preset


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
        standing_trials(same, finished, 2)


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
