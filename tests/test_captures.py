"""The screens that README and guide show are those that the program shows: `python
docs/captures.py` makes them anew."""

import io
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from core.comparison.trials import plan
from core.errors import PresetError
from core.jobs.compare import ComparisonReporter
from core.metrics.log import MetricsLog
from core.parallel.single import Single
from core.preset.decode import read_preset
from core.registry import Preset
from core.ui.compare import ComparisonDashboard
from tests.project import ROOT

captures = runpy.run_path(str(ROOT / "docs" / "captures.py"))
terminal = sys.modules["docs.terminal"]
SHOWN = {
    name: lines
    for path in captures["DOCUMENTS"]
    for name, lines in captures["blocks"](path.read_text()).items()
}
MAKE = "run: python docs/captures.py"


def test_every_capture_is_in_a_document_and_fits_its_width() -> None:
    assert set(SHOWN) == set(captures["CAPTURES"])
    assert max(len(line) for lines in SHOWN.values() for line in lines) <= 100


def test_the_menu_is_the_real_one(tmp_path: Path) -> None:
    """Line by line, but for the machine it runs on."""
    lines = captures["menu"](captures["copy_of_the_project"](tmp_path / "project"))
    for shown, line in zip(SHOWN["menu"], lines, strict=True):
        assert shown == line or (shown.startswith("  on ") and line.startswith("  on ")), MAKE


def test_mistakes_are_told_as_the_guide_shows(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "t_bad.json"
    path.write_text(captures["json"].dumps(captures["BAD_PRESET"]))
    with pytest.raises(PresetError) as told:
        read_preset(path, Preset)
    assert str(told.value).replace(f"{tmp_path}/", "").splitlines() == SHOWN["mistakes"], MAKE


def test_the_comparison_says_what_its_numbers_say(tmp_path: Path) -> None:
    """The values of the README's table, put into the logs of the preset's trials: the program shows
    the same verdicts."""
    preset = read_preset(ROOT / "configs" / "38_cosine_compare_cpu.json", Preset)
    trials = []
    for trial in plan(preset, tmp_path):
        (row,) = [line for line in SHOWN["comparison"] if line.startswith(f"  {trial.variant} ")]
        value = float(
            row.removeprefix(f"  {trial.variant} ").split()[preset.seeds.index(trial.seed)]
        )
        with MetricsLog(trial.folder / "metrics.jsonl") as log:
            log.emit("eval", step=100, tokens=100, cross_entropy=value)
        trials.append(replace(trial, status="finished"))
    written, screen = io.StringIO(), terminal.Screen(24, 100)
    reporter = ComparisonReporter(preset, tmp_path, Single(), written)
    console = Console(file=written, width=100, height=24, force_terminal=True)
    reporter.view = ComparisonDashboard(written, preset.name, console=console)
    with reporter.view:
        reporter.show(trials)
        reporter.finish(trials, nothing_was_done=False)
    screen.show(written.getvalue().replace("\n", "\r\n"))
    # what befell the run that is shown
    shown = [line for line in SHOWN["comparison"] if not line.startswith("warning ")]
    assert captures["shape"](screen.lines()) == captures["shape"](shown), MAKE


def test_a_screen_is_what_was_written_last() -> None:
    screen = terminal.Screen(3, 10)
    screen.show("one\r\ntwo\r\n\x1b[31mthree\x1b[0m\r\nfour")
    assert screen.lines() == ["two", "three", "four"], "the first line was scrolled out"
    screen.show("\x1b[2A\r\x1b[2KTWO\x1b[1B\r\x1b[3Cxx\x1b[K")
    assert screen.lines() == ["TWO", "thrxx", "four"]
    screen.show("\x1b[?1049h\x1b[2J\x1b[Hmenu\x1b[?1049l\x1b[?25h")
    assert screen.lines() == ["TWO", "thrxx", "four"], "a full-screen program leaves what was there"
    screen.show("\x1b[3;1H0123456789ab\x1b]0;title\x07")
    assert screen.lines() == ["thrxx", "0123456789", "ab"], (
        "a line that is too long goes on in the next"
    )
