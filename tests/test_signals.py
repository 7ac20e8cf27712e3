"""Signals that ask the program to stop: who they reach, and who they do not."""

import os
import signal
import subprocess
import sys
import time

from core.signals import STOP_SIGNALS, StopRequest, signals_held


def test_what_asks_the_program_to_stop_does_not_end_its_compiler() -> None:
    """A terminal sends Ctrl-C, and a dropped connection SIGHUP, to the whole group: the children go
    on, and this one is asked."""
    for number in STOP_SIGNALS:
        with StopRequest() as stop:
            with signals_held():
                child = subprocess.Popen(
                    [sys.executable, "-c", "print('begun', flush=True); input()"],
                    stdin=-1,
                    stdout=-1,
                )
                assert child.stdout is not None and child.stdout.readline() == b"begun\n"
                child.send_signal(number)
                os.kill(os.getpid(), number)
            # another thread of the tests may have got it, and tells this one in its turn
            end = time.monotonic() + 20
            while not stop() and time.monotonic() < end:
                time.sleep(0.01)
            assert stop(), "once what is held is let go"
            child.communicate(b"\n", timeout=60)
            assert child.returncode == 0, f"ended by {number}"
    assert len(STOP_SIGNALS) == 3


def test_a_signal_that_nohup_keeps_away_stays_away() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
    finally:
        signal.signal(signal.SIGHUP, before)
