"""The picture of a run."""

import json
import struct
import subprocess
import sys
import tracemalloc
import zlib

import pytest

from core.metrics.log import MetricsLog
from core.reports.curves import plot_losses
from core.reports.figure import PLOTTED, events_of
from core.reports.run_card import RECENT_STEPS, RunCard
from tests.ui import stream


def written(path, events):
    log = MetricsLog(path)
    for event in events:
        fields = {key: value for key, value in event.items() if key not in ("event", "time")}
        log.emit(event["event"], **fields)
    log.close()


def colours(path):
    """The set of colours in an 8-bit RGBA PNG, near enough: every pixel row's bytes, unfiltered
    where no filter is used."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    body, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            body += data[at + 8 : at + 8 + length]
        at += 12 + length
    return width, height, len(set(zlib.decompress(body)))


@pytest.mark.skips_updates
@pytest.mark.parametrize("steps", [200, 10])
def test_the_curves_are_drawn(tmp_path, steps):
    written(tmp_path / "metrics.jsonl", stream.run(steps=steps))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "new" / "loss.png")
    width, height, values = colours(tmp_path / "new" / "loss.png")
    assert width >= 800 and height >= 600 and values > 100
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_one_step_without_numbers_beside_its_loss(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"event": "step", "step": 1, "tokens": 10, "loss": 2.5}\n{"event": "st'
    )
    plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert colours(tmp_path / "loss.png")[2] > 50


@pytest.mark.parametrize(
    "content", [None, "", '{"event": "step", "step": 1, "tokens": 10, "loss": null}\n', "half a li"]
)
def test_nothing_to_draw_leaves_what_is_there(tmp_path, content):
    if content is not None:
        (tmp_path / "m.jsonl").write_text(content)
    (tmp_path / "loss.png").write_text("the picture before")
    plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_text() == "the picture before"


@pytest.mark.filterwarnings("error")
def test_a_name_may_hold_dollars_and_letters_the_font_lacks(tmp_path):
    written(tmp_path / "m.jsonl", stream.run(steps=10, preset=r"costs $5 \and $x_{ 狐"))
    plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_drawing_takes_no_more_memory_for_a_longer_log(tmp_path):
    """Nor the card: what a view keeps of a run is bounded, whatever the number of steps and
    evaluations."""
    step = json.dumps(
        {"event": "step", "step": 1, "tokens": 10, "loss": 2.5, "losses": {"x" * 300: 1.0}}
    )
    peaks = []
    for count in (3000, 40_000):
        path = tmp_path / f"{count}.jsonl"
        evaluation = '{"event": "eval", "step": 1, "tokens": 10, "number": %d}'
        path.write_text("".join(f"{step}\n{evaluation % i}\n" for i in range(1, count + 1)))
        tracemalloc.start()
        events = events_of(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        numbers = [event["number"] for event in events if event["event"] == "eval"]
        assert PLOTTED / 2 < len(numbers) <= PLOTTED and numbers[-1] == count
        assert len({b - a for a, b in zip(numbers, numbers[1:-1])}) == 1 and numbers[0] == 1
    assert peaks[1] < 2 * peaks[0], peaks
    card = RunCard(tmp_path / "logs", {}, 0.0, tmp_path)
    card.update({"event": "run_start"})
    for _ in range(3 * RECENT_STEPS):
        card.update({"event": "step", "time": 1.0, "tokens_per_second": 1.0})
    assert len(card._speeds) == RECENT_STEPS


def test_importing_draws_in_nothing_heavy():
    code = (
        "import sys, core.metrics.log, core.reports.curves, core.ui.menu, "
        "core.reports.wandb_mirror; print({'matplotlib', 'torch', 'wandb', 'prompt_toolkit'} & "
        "set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
