"""The metrics log: what is on disk after resumes, kills and failures."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from core.errors import UserError
from core.metrics.events import read_events
from core.metrics.log import MetricsLog
from core.metrics.log_file import check_log
from tests.project import Project, tiny_preset, train_here


def steps(path):
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


def filled(path, n=5):
    log = MetricsLog(path)
    for step in range(1, n + 1):
        log.emit("step", step=step, tokens=step * 100, loss=1.0 / step)
    return log


def test_an_event_has_the_common_fields_and_its_own(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    returned = log.emit("eval", step=3, tokens=300, losses={"cosine": 0.5})
    (line,) = (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == returned
    assert list(returned)[:4] == ["event", "step", "tokens", "time"]
    assert isinstance(returned["time"], float) and returned["losses"] == {"cosine": 0.5}


def test_a_resumed_run_leaves_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = filled(path)
    log.emit("warning", step=5, tokens=500, message="after the checkpoint")
    log.close()
    resumed = MetricsLog(path)
    resumed.rewind(3)
    resumed.emit("step", step=4, tokens=400, loss=0.1)
    resumed.close()
    assert steps(path) == [1, 2, 3, 4]
    assert [event["event"] for event in read_events(path)] == ["step"] * 4


@pytest.mark.parametrize(("step", "kept"), [(1, 1), (4, 4), (5, 5), (1000, 5)])
def test_rewinding_keeps_every_line_up_to_the_step(tmp_path, step, kept):
    path = tmp_path / "metrics.jsonl"
    log = filled(path)
    log.rewind(step)
    log.emit("step", step=9999, tokens=1)
    assert steps(path) == [*range(1, kept + 1), 9999]


def test_rewinding_to_the_beginning_sets_the_old_log_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        log = filled(path)
        log.rewind(0)
        assert path.read_bytes() == b""
        log.close()
    assert [steps(path.with_name(f"metrics.before-{n}.jsonl")) for n in (1, 2)] == [
        [1, 2, 3, 4, 5]
    ] * 2


def test_a_line_that_is_not_ours_survives_a_rewind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, 2).close()
    path.write_bytes(b"a note\n[1]\n" + path.read_bytes())
    log = MetricsLog(path)
    log.rewind(1)
    assert (
        path.read_bytes().splitlines()[:2] == [b"a note", b"[1]"]
        and path.read_bytes().count(b"\n") == 3
    )


@pytest.mark.parametrize("tail", [b'{"event": "step", "st', b"\x00" * 70_000, b'{"event": "x"}'])
def test_a_half_written_last_line_is_cut_off(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    filled(path, 2).close()
    with open(path, "ab") as file:
        file.write(tail)
    log = MetricsLog(path)
    log.emit("step", step=3, tokens=3)
    assert steps(path) == [1, 2, 3]


def test_a_killed_process_leaves_every_line_it_has_shown(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from core.metrics.log import "
        "MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(50): log.emit('step', step=step, tokens=0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=os.getcwd())
    assert done.returncode == -9
    assert steps(path) == list(range(50))


def test_numbers_json_has_no_word_for_become_null(tmp_path):
    class Scalar:
        ndim = 0

        def item(self):
            return math.inf

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.emit(
        "step",
        step=1,
        tokens=1,
        loss=math.nan,
        losses={"a": -math.inf, "b": 2.0},
        norms=[math.nan, 1],
        other=Scalar(),
    )
    log.emit(
        "sample",
        step=1,
        tokens=1,
        text="half a pair \ud800 and \u2028 a line separator",
        path=tmp_path,
    )
    first, second = (
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    assert first["loss"] is None and first["losses"] == {"a": None, "b": 2.0}
    assert first["norms"] == [None, 1] and first["other"] is None
    assert second["text"].endswith("a line separator") and second["path"] == str(tmp_path)


class Recorder:
    def __init__(self):
        self.seen, self.closed = [], False

    def update(self, event):
        self.seen.append(event)

    def close(self):
        self.closed = True


class Broken:
    def __init__(self):
        self.calls = 0

    def update(self, event):
        self.calls += 1
        raise ValueError("no such colour")

    def close(self):
        raise OSError("nor this")


def test_a_view_that_fails_is_dropped_and_named(tmp_path):
    path, recorder, broken = tmp_path / "metrics.jsonl", Recorder(), Broken()
    log = MetricsLog(path, [broken, recorder])
    log.emit("step", step=7, tokens=70)
    log.emit("step", step=8, tokens=80)
    assert broken.calls == 1
    assert [event["event"] for event in recorder.seen] == ["step", "warning", "step"]
    assert (
        "Broken" in recorder.seen[1]["message"] and "no such colour" in recorder.seen[1]["message"]
    )
    assert steps(path) == [7, 7, 8]


def test_ctrl_c_in_a_view_is_not_swallowed():
    class Interrupted:
        def update(self, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MetricsLog(None, [Interrupted()]).emit("step", step=1, tokens=1)


def test_without_a_path_nothing_is_written_but_views_are_fed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    with MetricsLog(None, [recorder]) as log:
        log.emit("step", step=1, tokens=1)
        log.rewind(100)
        log.sync()
    assert len(recorder.seen) == 1 and recorder.closed
    assert list(tmp_path.iterdir()) == []


def test_closing_goes_on_past_a_view_that_cannot_be_closed(tmp_path):
    recorder = Recorder()
    log = MetricsLog(tmp_path / "m.jsonl", [Broken(), recorder])
    log.close()
    assert recorder.closed


def test_a_full_disk_stops_nothing_and_leaves_no_torn_line(tmp_path, capsys):
    class FillsUp:
        """A file that takes half of a line and then has no room, until someone makes some."""

        def __init__(self, file):
            self.file, self.full = file, False

        def write(self, data):
            if not self.full:
                return self.file.write(data)
            self.file.write(bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log._file.raw = disk = FillsUp(log._file.raw)
    log.emit("step", step=1, tokens=1)
    disk.full = True
    log.emit("step", step=2, tokens=1)
    log.emit("step", step=3, tokens=1)
    assert not path.read_bytes().endswith(b"\n")
    disk.full = False
    log.emit("step", step=4, tokens=1)
    assert steps(path) == [1, 4]
    assert capsys.readouterr().err.count("No space left") == 1


@pytest.mark.parametrize("again", [True, False])
def test_an_old_log_that_cannot_be_set_aside_stops_nothing(again, tmp_path, capsys, monkeypatch):
    """Where it can be opened again events follow in it; where it cannot they are shown, and no
    more."""
    path = tmp_path / "metrics.jsonl"
    log = filled(path, 2)

    def refuse(*_):
        raise OSError("no renaming here")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        if not again:
            patch.setattr(os, "open", refuse)
        log.rewind(0)
    assert log.emit("step", step=3, tokens=1)["step"] == 3
    log.sync()
    log.close()
    assert steps(path) == ([1, 2, 3] if again else [1, 2])
    assert "cannot be written" in capsys.readouterr().err


def test_a_log_that_cannot_be_opened_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    log = MetricsLog(tmp_path / "file" / "metrics.jsonl")
    log.emit("step", step=1, tokens=1)
    log.close()
    assert "cannot be written" in capsys.readouterr().err


def test_reading_passes_over_what_is_no_event(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, 9).close()
    with open(path, "ab") as file:
        file.write(
            b'not json\n[1]\n{"no": "event"}\n\xff\xfe\n{"event": "eval"}\n{"event": 5, "step": '
            b'9, "tokens": 9}\n'
        )
        file.write(
            bytes(5000)
            + b"\n"
            + b"[" * 100_000
            + b'\n{"event": "eval", "step": true, "tokens": 9}\n'
        )
        file.write(b'{"event": "eval", "step": 9, "tokens": 9}\n{"event": "st')
    assert [event["event"] for event in read_events(path)] == ["step"] * 9 + ["eval"]
    assert [event["step"] for event in read_events(path, most=4)] == [1, 5, 9, 9]
    assert list(read_events(tmp_path / "none.jsonl")) == []


def test_what_is_no_file_has_no_events_and_hangs_nobody(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        assert list(read_events(tmp_path / name)) == []
        log = MetricsLog(tmp_path / name)
        log.emit("step", step=1, tokens=1)
        assert log.rewind(1) == []
        log.close()
        with pytest.raises(UserError, match=r"the log .* cannot be written: .* Then start again"):
            check_log(tmp_path / name)
    assert capsys.readouterr().err.count("it is no file but a folder, a pipe or a device") == 2


@pytest.mark.parametrize("content", [None, b"", bytes(9000), b"\xff\n[1]\n"])
def test_a_log_that_was_deleted_is_told(tmp_path, content):
    """The checkpoint is of step 7, the log holds nothing of it."""
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    (note,) = MetricsLog(path).rewind(7)
    assert "is gone" in note and "the checkpoint is of step 7" in note and str(path) in note


def test_a_log_that_ends_before_the_checkpoint_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = filled(path, 5)
    (note,) = log.rewind(7)
    assert "ends at step 5, the checkpoint is of step 7" in note
    assert log.rewind(5) == [] == log.rewind(3), "whole logs are not remarked on"


@pytest.mark.parametrize("gone", ["removed", "moved", "replaced", "a pipe"])
def test_a_log_that_is_taken_away_while_it_is_written_is_written_anew(tmp_path, gone):
    """Whole, and told once: in the log, and to whoever watches."""
    path, seen = tmp_path / "t" / "metrics.jsonl", []
    log = filled(path, 3)
    log.views.append(
        type("Watching", (), {"update": lambda self, event: seen.append(event["event"])})()
    )
    if gone == "moved":
        path.parent.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(path.parent)
    if gone == "replaced":
        path.parent.mkdir()
        path.write_text("precious")
    if gone == "a pipe":
        path.parent.mkdir()
        os.mkfifo(path)
    log.emit("step", step=4, tokens=400)
    log.sync()
    log.sync()
    log.emit("eval", step=4, tokens=400)
    log.close()
    assert [event["event"] for event in read_events(path)] == ["step"] * 4 + ["warning", "eval"]
    (told,) = (event for event in read_events(path) if event["event"] == "warning")
    assert told["step"] == 4 and str(path) in told["message"] and "written anew" in told["message"]
    assert seen == ["step", "warning", "eval"]
    aside = path.with_name("metrics.before-1.jsonl")
    assert aside.exists() == (gone in ("replaced", "a pipe")) == (aside.name in told["message"])
    if gone == "replaced":
        assert aside.read_text() == "precious"


def test_a_log_that_is_emptied_while_it_is_written_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = filled(path, 3)
    size = path.stat().st_size
    os.truncate(path, 0)
    log.emit("step", step=4, tokens=400)
    log.emit("eval", step=4, tokens=400)
    log.close()
    assert b"\0" not in path.read_bytes()
    assert [(event["event"], event["step"]) for event in read_events(path)] == [
        ("step", 4),
        ("warning", 4),
        ("eval", 4),
    ]
    assert f"its last {size:,} bytes are lost" in list(read_events(path))[1]["message"]


def test_the_files_of_a_run_are_there_again(tmp_path):
    """The folder is removed after the first evaluation: at the next, everything is in it that
    was."""

    class Removes:
        removed = False

        def update(self, event):
            if event["event"] == "step" and event["step"] == 4:
                shutil.rmtree(tmp_path / "logs" / "t")
                Removes.removed = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.import_module("core.jobs.train"), "view_for", lambda console: Removes()
        )
        train_here(tiny_preset(train={"eval_at_start": True}), tmp_path)
    assert Removes.removed and Project(tmp_path).steps() == [1, 2, 3, 4, 5]
    assert {"metrics.jsonl", "run.json", "preset.json"} <= {
        path.name for path in (tmp_path / "logs" / "t").iterdir()
    }


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="nothing is read-only to root"
)
def test_a_log_that_may_not_be_written_is_told_before_the_first_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path).close()
    path.chmod(0o444)
    as_others = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    program = (
        "import sys; from pathlib import Path; from core.metrics.log_file import check_log; "
        "check_log(Path(sys.argv[1]))"
    )
    ended = subprocess.run(
        [*as_others, sys.executable, "-c", program, str(path)], capture_output=True, text=True
    )
    assert (
        "cannot be written: Permission denied. Give this user the right to write there."
        in ended.stderr
    )
