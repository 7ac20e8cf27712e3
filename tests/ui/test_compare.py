"""The view of a comparison: fits any screen, shows every trial's standing, and nobody's name can
draw on the screen."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from core.comparison.results import Comparison, collect
from core.comparison.trials import Trial
from core.metrics.log import MetricsLog
from core.ui.compare import ComparisonDashboard, ComparisonLines, ComparisonState
from tests.ui import stream
from tests.ui.test_dashboard import FORBIDDEN


def trials_of(folder: Path, names: list[str], seeds: int) -> list[Trial]:
    pairs = [(seed, i) for seed in range(1, seeds + 1) for i in range(len(names))]
    return [Trial(names[i], seed, {}, folder / str(i) / str(seed), "waiting") for seed, i in pairs]


def ended(trial: Trial, value: float) -> Trial:
    """The trial, finished with this cross-entropy."""
    with MetricsLog(trial.folder / "metrics.jsonl") as log:
        log.emit("eval", step=9, tokens=900, cross_entropy=value)
    return replace(trial, status="finished")


def compared(trials: list[Trial]) -> Comparison:
    return collect(trials, name="Names", description="")


def started(budget: int = 1000, **more: object) -> dict:
    return {
        "event": "run_start",
        "budget_tokens": budget,
        "tokens_per_step": 10,
        "preset": "x",
        "step": 0,
        "tokens": 0,
        **more,
    }


def step(tokens: int) -> dict:
    numbers = {
        "step": tokens // 100,
        "tokens": tokens,
        "run_tokens": tokens,
        "tokens_per_second": 10.0,
        "loss": 1.0,
        "time": 0.0,
    }
    return {"event": "step", **numbers}


def rows(state: ComparisonState, width: int = 100, variants: int = 9) -> dict[str, list[str]]:
    """First word of each line -> the others."""
    return {line.plain.split()[0]: line.plain.split()[1:] for line in state.table(width, variants)}


def test_the_table_tells_how_each_trial_stands(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, ["base", "good", "wild", "slow"], 3)
    trials[0], trials[1] = ended(trials[0], 2.0), ended(trials[1], 1.5)
    trials[2], trials[3] = (
        replace(trials[2], status="diverged"),
        replace(trials[3], status="stopped early"),
    )
    trials[4] = ended(trials[4], 2.2)
    state = ComparisonState("Names", lambda: 0.0)
    state.show(compared(trials))
    state.begin(trials[5], 6)
    for event in (started(), step(100), step(340)):
        state.update(event)
    assert rows(state) == {
        "──": [
            "cross-entropy",
            "seed",
            "1",
            "seed",
            "2",
            "seed",
            "3",
            "mean",
            "difference",
            "─" * 29,
        ],
        "base": ["2.0000", "2.2000", "·", "2.1000", "baseline"],
        "good": ["1.5000", "▸34.0", "%", "·", "1.5000", "−0.5000"],
        "wild": ["diverged", "·", "·"],
        "slow": ["stopped", "·", "·"],
    }
    head = state.head(100, 9)
    assert "trial 6 of 12" in head[1].plain and f"{(5 + 0.34) / 12 * 100:.1f} %" in head[1].plain


def test_the_time_left_counts_whole_trials(tmp_path: Path) -> None:
    now = [0.0]
    trials = trials_of(tmp_path, ["base", "other"], 2)
    state = ComparisonState("Names", lambda: now[0])
    state.show(compared(trials))
    assert state._seconds_left(4) is None
    state.begin(trials[0], 1)
    for event in (started(), step(100), step(200)):
        state.update(event)
    assert state._seconds_left(4) == pytest.approx(80 + 3 * 100), "by the rate of the running one"
    now[0] = 120.0
    trials[0] = ended(trials[0], 2.0)
    state.show(compared(trials))
    assert state._seconds_left(3) == pytest.approx(3 * 120), (
        "by what trials took, evaluation and all"
    )
    state.begin(trials[1], 2)
    assert state._seconds_left(3) == pytest.approx(3 * 120)


@pytest.mark.parametrize(
    ("width", "height"), [(80, 23), (110, 44), (200, 60), (40, 12), (20, 5), (10, 1)]
)
@pytest.mark.parametrize(("variants", "seeds"), [(2, 1), (3, 12), (30, 3)])
def test_every_line_fits_the_screen(
    width: int, height: int, variants: int, seeds: int, tmp_path: Path
) -> None:
    names = ["狐狸" * 30, stream.NASTY, *[f"variant {i}" for i in range(28)]][:variants]
    trials = trials_of(tmp_path, names, seeds)
    trials[0] = ended(trials[0], 2.0)
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    view = ComparisonDashboard(io.StringIO(), "Names", lambda: 1000.0, console)
    view.state.show(compared(trials))
    for events in ([], list(stream.run(steps=20))):
        view.begin(trials[-1], len(trials))
        for event in events:
            view.update(event)
        out = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
        out.print(view.render(), crop=False)
        lines = out.file.getvalue().rstrip("\n").split("\n")
        assert len(lines) <= height and max(cell_len(line) for line in lines) <= width
        assert not FORBIDDEN.search("".join(lines))
        assert height < 20 or "▸" in "".join(lines), "the running trial is among those shown"


def test_a_small_terminal_shows_table_and_dashboard(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, ["base", "other"], 3)
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=False)
    view = ComparisonDashboard(io.StringIO(), "Names", lambda: 1000.0, console)
    view.state.show(compared(trials))
    view.begin(trials[0], 1)
    warned = {"event": "warning", "message": "told before the start", "step": 0, "tokens": 0}
    for event in [warned, *list(stream.run())[:60]]:
        view.update(event)
    shown = view.render().plain
    for part in ("trial 1 of 6", "seed 3", "Best general", "tokens/s", "evaluation at"):
        assert part in shown, part
    console.height = 60
    assert "told before the start" in view.render().plain


def test_plain_lines_say_each_thing_once(tmp_path: Path) -> None:
    out = io.StringIO()
    trials = trials_of(tmp_path, ["base", "other"], 1)
    with ComparisonLines(out, "Names") as view:
        view.show(compared(trials))
        assert out.getvalue() == "", "a table without one value says nothing"
        for i, trial in enumerate(trials):
            view.begin(trial, i + 1)
            for event in stream.run(steps=10, notes=["a note", f"a note on {trial.variant}"]):
                view.update(event)
            trials[i] = ended(trial, 2.0 - i)
            view.show(compared(trials))
        view.finish(["the verdict"])
    told = out.getvalue()
    assert not FORBIDDEN.search(told.replace("\n", ""))
    assert re.findall(r"trial \d of \d: .*", told) == [
        "trial 1 of 2: base, seed 1",
        "trial 2 of 2: other, seed 1",
    ]
    assert (
        told.count("note  a note\n") == 1
        and told.count("sources  ") == 1
        and "note  a note on other" in told
    )
    assert (
        not re.search(r"^(sample|checkpoint)  ", told, re.MULTILINE)
        and told.count("finished: ") == 2
    )
    assert told.endswith("  other              1.0000     1.0000     −1.0000\nthe verdict\n")


def test_plain_lines_have_room_for_every_seed(tmp_path: Path) -> None:
    out, trials = io.StringIO(), trials_of(tmp_path, ["base", "other"], 15)
    trials[0] = ended(trials[0], 2.0)
    ComparisonLines(out, "Names").show(compared(trials))
    assert (
        all(f"seed {seed} " in out.getvalue() for seed in range(1, 16))
        and "2.0000" in out.getvalue()
    )
