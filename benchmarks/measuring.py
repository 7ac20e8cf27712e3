"""Tools that the benchmarks measure with: time that waits for the device, memory at its peak, a
process of its own, and sizes.

Used by scripts that have put the project's folder on sys.path. Each of them takes `--short`: the
same at sizes that take seconds, to see that it runs (tests/test_benchmarks.py); its numbers mean
nothing."""

import io
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PRESETS = Path(__file__).resolve().parent.parent / "configs"

if "--short" in sys.argv:
    sys.argv.remove("--short")
    os.environ["BENCHMARK_SHORT"] = "1"  # for the processes that a benchmark starts, too


def sized(usual: T, short: T) -> T:
    """Choose the size of a benchmark: the full one, or that of `--short`."""
    return short if os.environ.get("BENCHMARK_SHORT") else usual


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_a_process(function: Callable, *arguments: Any) -> Any:
    """Call `function` in a new process, so that neither side sees the other's heap; under
    `--short` in this one."""
    if sized(False, True):
        return function(*arguments)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(function, arguments)


def ranks_of_torchrun() -> tuple[Any, Any]:
    """This process's runtime, and the ranks that torchrun started it among; itself without it."""
    from core.launch import rendezvous_store
    from core.parallel.processes import Processes
    from core.parallel.single import Single
    from core.runtime import detect_runtime, prepare

    runtime = detect_runtime()
    prepare(runtime)
    rank, size = runtime.rank, runtime.world_size
    if size == 1:
        return runtime, Single()
    return runtime, Processes(runtime.device, rendezvous_store(), rank, size)


def trained_by(stem: str, root: Path) -> Any:
    """The model that a preset has trained in `root`; under `--short` one that it trains there for
    two steps."""
    from core.jobs.train import train
    from core.parallel.single import Single
    from core.preset.decode import read_preset
    from core.registry import Preset
    from core.runtime import detect_runtime
    from core.trained import load_trained

    preset, runtime = read_preset(PRESETS / f"{stem}.json", Preset), detect_runtime()
    if sized(False, True):
        few = {"max_steps": 2, "eval_tokens": 500}
        preset = preset.model_copy(update={"train": preset.train.model_copy(update=few)})
        train(preset, runtime, Single(), root, 0.0, io.StringIO())
    return load_trained(preset, root, runtime)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory `run` adds to what there is before it; at least a byte, so that there are
    ratios."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return max(1, torch.cuda.max_memory_allocated() - before)
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():  # not Linux: the highest so far, which was hardly raised before
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return max(1, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
    clear.write_text("5")  # forget the peak so far
    before = _status_bytes(status, "VmRSS")
    run()
    return max(1, _status_bytes(status, "VmHWM") - before)


def _status_bytes(status: Path, field: str) -> int:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024
