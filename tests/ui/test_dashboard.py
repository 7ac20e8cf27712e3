"""The views of a run: what fits where, what is shown, and that nobody's text can draw on the
screen."""

import io
import os
import re
import sys
import time

import pexpect
import pytest
from rich.cells import cell_len
from rich.console import Console

from core.ui import text
from core.ui.dashboard import Dashboard, view_for
from core.ui.plain import PlainLines
from core.ui.progress import RunProgress
from core.ui.run_state import QUIET_SECONDS, RunState
from tests.ui import stream

FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def state_of(events):
    events = list(events)
    state = RunState(events[0])
    for event in events[1:]:
        state.update(event)
    return state, events[-1]["time"]


def rendered(state, now, width, height):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(state.draw(width, height, now), crop=False)
    return console.file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize(
    ("width", "height"), [(80, 23), (80, 21), (120, 39), (200, 60), (40, 12), (20, 5), (10, 1)]
)
@pytest.mark.parametrize("until", [1, 2, 60, None])
def test_every_line_fits_the_screen(width, height, until):
    state, now = state_of(list(stream.run())[:until])
    lines = rendered(state, now, width, height)
    assert len(lines) <= height
    assert max(cell_len(line) for line in lines) <= width
    assert not FORBIDDEN.search("".join(lines))


def test_a_small_terminal_shows_one_of_everything():
    state, now = state_of(list(stream.run())[:-1])
    shown = "\n".join(rendered(state, now, 80, 23))
    for part in (
        "Best general",
        "lineage lm",
        "run 2",
        "NVIDIA H200 ×8  bf16  not compiled\n",
        "12.3M parameters",
        "100.0 %",
        "100M of 100M tokens",
        "tokens/s",
        "1.23M",
        "learning rate",
        "grad norm",
        "12.1 GB",
        "2 updates",
        "cross-entropy",
        "bits/byte",
        "wikipedia",
        "80.0 %",
        "checkpoints/lm_current.pth",
        "source [red]",
        "Once upon a time there [bold]was[/bold] [/] red",
    ):
        assert part in shown, part
    assert re.search(r"[▁▂▃▄▅▆▇█]{20}", shown)


def test_a_tall_terminal_is_used():
    state, now = state_of(list(stream.run())[:-1])
    lines = rendered(state, now, 120, 60)
    assert len(lines) > 50
    shown = "\n".join(lines)
    assert "loss of this session" in shown and "source 11" in shown and "main(yyyy" in shown


def test_the_last_evaluation_is_compared_with_the_one_before():
    evals = [event for event in stream.run() if event["event"] == "eval"]
    state = RunState(next(stream.run()))
    state.update(evals[0])
    assert "(" not in state.draw(80, 23, 0).plain.split("perplexity")[0].split("cross-entropy")[1]
    state.update(evals[1])
    expected = f"{evals[1]['cross_entropy'] - evals[0]['cross_entropy']:+.3f}".replace("-", "−")
    assert f"({expected})" in state.draw(80, 23, 0).plain


def test_silence_is_mentioned_while_running_only():
    events = list(stream.run())
    state, now = state_of(events[:-1])
    assert "no news" not in state.draw(80, 23, now + QUIET_SECONDS / 2).plain
    assert "no news for 1m 00s" in state.draw(80, 23, now + 60).plain
    state.update(events[-1])
    assert "no news" not in state.draw(80, 23, now + 60).plain


def test_time_left_leaves_evaluations_and_checkpoints_out():
    events = list(stream.run(steps=200, seconds_per_step=0.5))
    progress = RunProgress(events[0])
    assert progress.seconds_left is None
    for event in events[1:]:
        progress.update(event)
        if event["event"] == "step" and event["step"] == 100:
            break
    # 50M tokens at 1.234M a second are left; the 30 s of each evaluation must not be taken for
    # training.
    assert progress.seconds_left == pytest.approx(50 / 1.234, rel=0.01)
    assert progress.percent == "50.0 %"


@pytest.mark.parametrize(
    ("start", "counted", "percent"),
    [
        ({"max_steps": 20}, "step 10 of 20", "50.0 %"),
        ({"max_steps": 10**6}, "5M of 100M tokens", "5.0 %"),
        ({"max_steps": None, "run_tokens": 4_000_000}, "5M of 100M tokens", "5.0 %"),
    ],
)
def test_the_limit_that_binds_is_the_one_shown(start, counted, percent):
    events = list(stream.run(steps=200, **start))
    progress = RunProgress(events[0])
    for event in events[1:11]:
        progress.update(event)
    assert (progress.counted, progress.percent) == (counted, percent)


def test_a_slow_first_step_does_not_spoil_the_time_left():
    progress = RunProgress({"budget_tokens": 1000, "tokens_per_step": 10})
    for step, speed in ((1, 0.1), (2, 10.0), (3, 10.0)):
        progress.update(
            {"event": "step", "run_step": step, "run_tokens": 10 * step, "tokens_per_second": speed}
        )
    assert progress.seconds_left == pytest.approx(97.0)


def test_the_time_left_counts_the_evaluations_still_to_come():
    """As long as the last one took: at every so many tokens, and one at the end."""
    for limit in ({"budget_tokens": 1000}, {"budget_tokens": 100_000, "max_steps": 100}):
        progress = RunProgress({**limit, "tokens_per_step": 10, "eval_every_tokens": 200})
        for step in range(1, 21):
            progress.update(
                {
                    "event": "step",
                    "step": step,
                    "run_step": step,
                    "run_tokens": 10 * step,
                    "tokens_per_second": 10.0,
                }
            )
        assert progress.seconds_left == pytest.approx(80.0)
        progress.update({"event": "eval", "seconds": 7.0})
        assert progress.seconds_left == pytest.approx(80.0 + 4 * 7.0)
        for step in range(21, 101):
            progress.update(
                {
                    "event": "step",
                    "step": step,
                    "run_step": step,
                    "run_tokens": 10 * step,
                    "tokens_per_second": 10.0,
                }
            )
        assert progress.seconds_left == 7.0
        progress.update({"event": "eval", "seconds": 7.0})
        assert progress.seconds_left == 0.0


def test_a_step_that_compiles_tells_no_rate():
    progress = RunProgress({"budget_tokens": 1000, "tokens_per_step": 10, "compile_from_step": 1})
    for step, speed in ((1, 0.1), (2, 0.001), (3, 10.0)):
        assert progress.seconds_left is None
        progress.update(
            {
                "event": "step",
                "step": step,
                "run_step": step,
                "run_tokens": 10 * step,
                "tokens_per_second": speed,
            }
        )
    assert progress.seconds_left == pytest.approx(97.0)


def test_almost_done_is_not_done():
    progress = RunProgress({"budget_tokens": 100_000_000, "run_tokens": 99_999_999})
    assert progress.percent == "99.9 %"


def test_an_update_is_cheap():
    """In its real arrangement, the drawing thread included: below a millisecond on average at 20
    steps a second."""
    file = io.StringIO()
    console = Console(file=file, width=120, height=40, force_terminal=True)
    spent = []
    with Dashboard(file, console=console) as dashboard:
        for event in list(stream.run(steps=2000))[:41]:
            began = time.perf_counter()
            dashboard.update(event)
            if event["event"] == "step":
                spent.append(time.perf_counter() - began)
            time.sleep(0.05)
    assert len(spent) >= 35
    assert sum(spent) / len(spent) < 1e-3
    assert "Best general" in file.getvalue()


def test_the_dashboard_takes_several_runs_and_events_between_them():
    file = io.StringIO()
    dashboard = Dashboard(
        file, console=Console(file=file, width=80, height=24, force_terminal=True)
    )
    dashboard.update({"event": "warning", "step": 0, "tokens": 0, "time": 0.0, "message": "before"})
    for _ in range(2):
        for event in stream.run(steps=10):
            dashboard.update(event)
    dashboard.update({"event": "warning", "step": 0, "tokens": 0, "time": 0.0, "message": "after"})
    dashboard.close()
    dashboard.close()
    shown = file.getvalue()
    assert "warning  before\n" in shown and "warning  after\n" in shown
    assert shown.count("finished: the token budget is used up (step 10, 100M tokens)") == 2
    # the cursor comes back each time
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2


def test_a_frame_that_cannot_be_drawn_does_not_end_the_drawing():
    file = io.StringIO()
    dashboard = Dashboard(file, console=Console(file=file, width=80, height=24))
    dashboard._state = RunState(next(stream.run()))
    dashboard._state.step = {"loss": "not a number", "step": 1}
    assert "cannot draw" in dashboard.render().plain


def test_on_a_real_terminal(tmp_path):
    """Runs in a pseudo-terminal: the final picture fits it, and the summary is the last line."""
    script = tmp_path / "show.py"
    script.write_text(
        "import sys\nfrom core.ui.dashboard import Dashboard, view_for\nfrom tests.ui import "
        "stream\n"
        "view = view_for(sys.stdout)\nassert isinstance(view, Dashboard), view\n"
        "for event in stream.run(): view.update(event)\nview.close()\n"
    )
    env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": ".", "PYTHONIOENCODING": "utf-8"}
    env.pop("COLUMNS", None), env.pop("LINES", None)
    child = pexpect.spawn(
        sys.executable, [str(script)], dimensions=(24, 80), encoding="utf-8", env=env, timeout=30
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    last_picture = child.before[child.before.rindex("Best general") :].rstrip()
    assert last_picture.count("\n") <= 23
    assert "finished: the token budget is used up" in last_picture.split("\n")[-1]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain_lines(events, seconds_per_event=0.0, file=None):
    clock, file = Clock(), file or io.StringIO()
    with PlainLines(file, clock) as view:
        for event in events:
            clock.now += seconds_per_event
            view.update(event)
    return file.getvalue().splitlines() if isinstance(file, io.StringIO) else None


def test_plain_steps_are_first_last_and_every_five_seconds():
    events = [
        event
        for event in stream.run(steps=200)
        if event["event"] in ("run_start", "step", "run_end")
    ]
    shown = [
        int(line.split()[1])
        for line in plain_lines(events, seconds_per_event=0.5)
        if line.startswith("step")
    ]
    assert shown == [*range(1, 200, 10), 200]
    assert [line.split()[1] for line in plain_lines(events) if line.startswith("step")] == [
        "1",
        "200",
    ]


def test_the_last_plain_step_is_shown_when_a_run_is_cut_short():
    events = [event for event in stream.run() if event["event"] in ("run_start", "step")]
    assert plain_lines(events)[-1].startswith("step 200 ")


def test_plain_lines_have_a_line_for_each_other_event():
    events = list(stream.run(steps=10))
    lines = plain_lines(events)
    for kind, beginning in {
        "eval": "evaluation at",
        "sample": "sample",
        "checkpoint": "checkpoint",
        "warning": "warning",
        "reweighted": "sources reweighted  wikipedia 40.0 % (×0.500, loss 3.100), ",
    }.items():
        assert sum(line.startswith(beginning) for line in lines) == sum(
            event["event"] == kind for event in events
        )
    assert lines[-1] == "finished: the token budget is used up (step 10, 100M tokens)"
    assert lines[0].startswith("Best general  lineage lm  run 2")
    assert not FORBIDDEN.search("".join(lines))
    assert any("resumed from checkpoints/lm_current.pth" in line for line in lines)


def test_plain_lines_survive_a_stream_that_knows_only_ascii():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    plain_lines(stream.run(steps=10), file=file)
    assert b"Best general" in raw.getvalue()


def test_plain_lines_are_flushed_at_once():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="utf-8")
    PlainLines(file).update(next(stream.run()))
    assert b"Best general" in raw.getvalue()


@pytest.mark.parametrize(
    ("term", "encoding", "tty", "expected"),
    [
        ("xterm", "utf-8", True, Dashboard),
        ("xterm", "UTF8", True, Dashboard),
        ("dumb", "utf-8", True, PlainLines),
        ("", "utf-8", True, PlainLines),
        ("xterm", "ascii", True, PlainLines),
        ("xterm", "utf-8", False, PlainLines),
    ],
)
def test_which_view_is_taken(monkeypatch, term, encoding, tty, expected):
    monkeypatch.setenv("TERM", term)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    file.isatty = lambda: tty
    assert type(view_for(file)) is expected


def test_numbers_as_people_read_them():
    assert [text.count(v) for v in (0, 999, 1000, 12_345, 999_999, 12_345_678, 1.5e9, None)] == [
        "0",
        "999",
        "1k",
        "12.3k",
        "1M",
        "12.3M",
        "1.5B",
        "–",
    ]
    assert [text.count(v) for v in (100, 1200, 100_000, 120_000_000)] == [
        "100",
        "1.2k",
        "100k",
        "120M",
    ]
    assert [text.duration(v) for v in (0.4, 59.6, 61, 3840, 90_000)] == [
        "0s",
        "1m 00s",
        "1m 01s",
        "1h 04m",
        "1d 01h",
    ]
    assert [text.number(v) for v in (3.14159, 6e-4, 0, None, 123456.0)] == [
        "3.142",
        "6.0e-04",
        "0",
        "–",
        "1.2e+05",
    ]


def test_foreign_text_is_one_harmless_line():
    assert (
        text.clean("a\x1b[31mb\x1b[0m\x1b]0;title\x07c\nd\te\x9b5A\x00\u202ef\ud800g")
        == "abc d efg"
    )
    assert (
        text.clean("\x1b") == "" and text.clean("\x1b[") in ("", "[") and text.clean(None) == "None"
    )
    assert text.clean("狐狸 é 🦊") == "狐狸 é 🦊"


def test_charts():
    assert text.chart([1, 2, 3, 4, 5, 6, 7, 8], 8) == ["▁▂▃▄▅▆▇█"]
    assert text.chart([5.0] * 3, 8) == ["▁▁▁"]
    assert text.chart([], 8, rows=2) == ["", ""]
    top, bottom = text.chart([0, 15], 2, rows=2)
    assert (top, bottom) == (" █", "▁█")
    assert len(text.chart(list(range(1000)), 33)[0]) == 33


def test_history_is_bounded_and_keeps_the_shape():
    history = text.History(capacity=64)
    for value in range(10_000):
        history.add(value)
    assert 32 <= len(history.values) <= 64
    assert history.values == sorted(history.values)
    assert history.values[0] < 300 and history.values[-1] > 9_600
