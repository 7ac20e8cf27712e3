"""What the benchmarks measure with: time that waits for the device, memory at its peak, a process of its own.

Used by scripts that have put the project's folder on sys.path.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_a_process(function: Callable, *arguments: Any) -> Any:
    """What `function` returns in a new process, so that neither side sees the other's heap."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(function, arguments)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory `run` adds to what there is before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():  # not Linux: the highest so far, which was hardly raised before
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    clear.write_text("5")  # forget the peak so far
    before = _status_bytes(status, "VmRSS")
    run()
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, field: str) -> int:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024
