"""A terminal that is closed, a pipe that nobody reads, a disk that is full: what cannot be shown is lost, the work is not."""

import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from core.terminal import never_fails
from tests.project import Project, tiny_preset

SHORT = tiny_preset(train={"max_steps": 3, "eval_tokens": 0})
LONG = tiny_preset(train={"max_steps": 100_000, "eval_tokens": 0})


def test_writing_to_what_is_gone_raises_nothing() -> None:
    """Neither at once nor when it is flushed; what can be written is."""
    reader, writer = os.pipe()
    stream = never_fails(os.fdopen(os.dup(writer), "w"), writer)
    print("read", file=stream, flush=True)
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        print("nobody reads this", file=stream, flush=True)
    full = os.open("/dev/full", os.O_WRONLY)
    print("no room for this", file=never_fails(None, full), flush=True)
    os.close(writer)
    os.close(full)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["| head -n 1", ">&- 2>&-"])
def test_a_run_ends_well_without_anybody_to_read_what_it_shows(how: str, make_project: Callable[..., Project]) -> None:
    project = make_project({"t": SHORT})
    command = f"echo t | {sys.executable} main.py {how}; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], cwd=project.folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert project.finished() and project.events()[-1]["reason"] == "max_steps"
    assert not [event for event in project.events("warning") if "stopped" in event["message"]], "views go on"


@pytest.mark.slow
def test_a_connection_that_drops_saves(make_project: Callable[..., Project]) -> None:
    """SIGHUP and a terminal that answers every write with an error, as after an ssh that is lost: saved, exit code 130."""
    project = make_project({"t": LONG})
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.folder)
        os.execve(sys.executable, [sys.executable, "main.py"], {**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1"})
    end = time.monotonic() + 120
    os.set_blocking(terminal, False)
    while project.num_steps() < 5:
        assert time.monotonic() < end, "it never began"
        time.sleep(0.05)
        try:
            if b"ESC" in (shown := os.read(terminal, 1 << 16)) or b"Enter" in shown:
                os.write(terminal, b"\r")
        except BlockingIOError:
            pass
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    last = project.events()[-1]
    assert last["event"] == "run_end" and last["reason"] == "interrupted"
    assert project.checkpoint()["progress"]["step"] == last["step"] == project.steps()[-1]
