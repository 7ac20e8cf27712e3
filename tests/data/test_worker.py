"""The processes that read: they end with the program, however it ends."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import threading, time
from core.data.worker import ROWS_PER_MESSAGE, Worker
rows = list(range(ROWS_PER_MESSAGE))
worker = Worker(zip, rows)
worker.begin(rows)
worker.next_row(threading.Event())
print(worker._process.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_ends_with_a_program_that_was_killed() -> None:
    """kill -9 leaves the program no time to end it, and it would wait for its next position for ever."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        assert is_running(pid)
        program.kill()
    until = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < until, "it outlived the program"
        time.sleep(0.05)
