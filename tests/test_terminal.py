"""A terminal that is closed, a pipe that nobody reads, a disk that is full: what cannot be shown is
lost, the work is not."""

import contextlib
import os
import pty
import subprocess
import sys
import threading
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


def test_a_reader_that_is_behind_is_waited_for_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream that does not block takes nothing while it is full."""
    monkeypatch.setattr("core.terminal.PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("core.terminal._Unbreakable.patience", 0.5)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text, read = "x" * (1 << 19), bytearray()

    def reads_slowly() -> None:
        while not read.endswith(b"\n"):
            time.sleep(0.01)
            read.extend(os.read(reader, 1 << 16))

    thread = threading.Thread(target=reads_slowly)
    thread.start()
    stream = never_fails(None, writer)
    print(text, file=stream, flush=True)
    thread.join(30)
    assert read.decode() == f"{text}\n", "a slow reader gets all of it"
    begun = time.monotonic()
    for _ in range(20):
        print(text, file=stream, flush=True)
    assert time.monotonic() - begun < 5.0, "where nobody reads, that is found out once"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "line, code", [("nothing", 2), pytest.param("t", 0, marks=pytest.mark.slow)]
)
def test_a_full_stream_that_does_not_block_changes_no_exit_code(
    line: str, code: int, make_project: Callable[..., Project]
) -> None:
    project = make_project({"t": SHORT})
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    command = [sys.executable, "main.py"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command,
        cwd=project.folder,
        env=env,
        input=line,
        text=True,
        stdout=writer,
        stderr=writer,
        timeout=240,
    )
    os.close(reader)
    os.close(writer)
    assert ended.returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("how", ["| head -n 1", ">&- 2>&-"])
def test_a_run_ends_well_without_anybody_to_read_what_it_shows(
    how: str, make_project: Callable[..., Project]
) -> None:
    project = make_project({"t": SHORT})
    command = f"echo t | {sys.executable} main.py {how}; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=project.folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert project.finished() and project.events()[-1]["reason"] == "max_steps"
    assert not [event for event in project.events("warning") if "stopped" in event["message"]], (
        "views go on"
    )


@pytest.mark.slow
def test_a_connection_that_drops_saves(make_project: Callable[..., Project]) -> None:
    """SIGHUP and a terminal that answers every write with an error, as after an ssh that is lost:
    saved, exit code 130."""
    project = make_project({"t": LONG})
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.folder)
        os.execve(
            sys.executable,
            [sys.executable, "main.py"],
            {**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1"},
        )
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
