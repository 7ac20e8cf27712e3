"""What a checkpoint costs on several ranks of FSDP: as one file, which rank 0 gathers and writes,
and in shares, which every rank writes for itself.

    python benchmarks/saving.py

Training sessions as main.py makes them. For each form: seconds that training stands still for a
save, seconds until it is on the disk, and the memory that a rank needs for it beyond what it had,
the most of all ranks; then the same of a start that goes on from it, on as many ranks and on one.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ranks_of_torchrun, sized

RANKS = 2
REPETITIONS = sized(5, 1)
SHAPE = sized(
    {"hidden_size": 512, "num_layers": 8, "num_heads": 8},
    {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
)
FORMS = ("file", "shares")


def high_water() -> float:
    """The most memory that this process has had, in megabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def opened(folder: Path) -> tuple[Any, Any, Any]:
    """A session on the ranks that torchrun started, what it runs on, and its megabytes before."""
    from core.assembly.session import build_training
    from core.preset.decode import decode_preset
    from core.registry import Preset

    runtime, parallel = ranks_of_torchrun()
    sections = {
        "model": {**SHAPE, "seq_length": 32},
        "tokenizer": {"type": "byte"},
        "train": {"engine": "fsdp", "per_gpu_batch_size": 2, "eval_tokens": 0, "max_steps": 1},
        "data": {"sources": ["python_stdlib"], "lanes": 8},
    }
    preset = decode_preset(sections, Preset, "t", "t")
    session = build_training(preset, runtime, parallel, folder, lambda *_: [], lambda: False)
    return session, runtime, parallel


def save_run(folder: Path) -> None:
    """Save again and again, in turn; leaves a lineage of each form."""
    import shutil

    from core.jobs.train import train_to_the_end
    from core.runtime import forget_peak_memory

    session, runtime, parallel = opened(folder)
    trainer = session.trainer
    with mock.patch.object(trainer.engine, "close"):  # it saves on
        train_to_the_end(session, 1)
    for repetition in range(REPETITIONS):
        for form in FORMS:
            forget_peak_memory(runtime)
            parallel.gather(0)
            before, started = high_water(), time.monotonic()
            trainer.saver.save(whole=form == "file")
            held = time.monotonic() - started
            trainer.store.wait()
            parallel.gather(0)  # rank 0 writes a file alone
            row = (held, time.monotonic() - started, high_water() - before)
            most = [max(each) for each in zip(*parallel.gather(row))]
            if runtime.rank == 0:
                print(json.dumps({"form": form, "row": most}), flush=True)
                if repetition == 0:
                    shutil.copytree(folder / "checkpoints", folder / form / "checkpoints")
                    shutil.copytree(folder / "logs", folder / form / "logs")
    size = sum(p.numel() for p in trainer.model.parameters())
    if runtime.rank == 0:
        print(json.dumps({"form": "size", "row": [size]}), flush=True)
    parallel.close()


def start_run(folder: Path) -> None:
    """Go on from what is there; the memory is counted from before the model is made."""
    # code is no part of what is counted
    import core.assembly.session  # noqa: F401
    from core.checkpoint import shares  # noqa: F401
    from core.parallel import fsdp  # noqa: F401

    before, started = high_water(), time.monotonic()
    session, runtime, parallel = opened(folder)
    assert session.trainer.progress.step == 1
    row = (time.monotonic() - started, high_water() - before)
    most = [max(each) for each in zip(*parallel.gather(row))]
    if runtime.rank == 0:
        print(json.dumps({"form": folder.name, "row": most}))
    parallel.close()


def measure(ranks: int, *arguments: str) -> list[dict[str, Any]]:
    """One run in fresh processes; the lines that rank 0 prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    finished = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), __file__, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if finished.returncode:
        sys.exit(f"{arguments} on {ranks} failed:\n{finished.stderr[-3000:]}")
    return [json.loads(line) for line in finished.stdout.splitlines() if line[:1] == "{"]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(RANKS, "save", folder)
        (size,) = [line["row"][0] for line in lines if line["form"] == "size"]
        print(f"{size / 1e6:.1f} M parameters, {RANKS} ranks, {REPETITIONS} repetitions")
        for form in FORMS:
            rows = list(zip(*[line["row"] for line in lines if line["form"] == form]))
            print(
                f"  save, {form:6s}  held {spread(rows[0])} s  on disk {spread(rows[1])} s  "
                f"memory {spread(rows[2])} MB",
                flush=True,
            )
        for ranks in (RANKS, 1):
            for form in FORMS:
                found = [
                    measure(ranks, "start", str(Path(folder) / form))[-1]["row"]
                    for _ in range(min(3, REPETITIONS))
                ]
                seconds, megabytes = zip(*found)
                print(
                    f"  start on {ranks}, {form:6s}  {spread(seconds)} s  "
                    f"memory {spread(megabytes)} MB",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:]:
        {"save": save_run, "start": start_run}[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
