"""What each engine costs a step, and what each rank keeps: one process against DDP, FSDP and
DeepSpeed's stages of ZeRO on several ranks of this machine.

    python benchmarks/engines.py

Every run is a training session as main.py makes it, on the standard library's source, with the same
rows in a step however many ranks share them; the engines take turns. On a CPU the ranks share its
cores, each with a thread: the ratio to DDP on as many ranks tells what sharing costs, and nothing
is faster for being many.

Prints a row per run: tokens per second over the steps after the first ones, and megabytes of
weights, gradients and optimizer state that a rank keeps between two steps.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ranks_of_torchrun, sized

ROOT = Path(__file__).resolve().parent.parent
REPETITIONS = sized(3, 1)
STEPS, WARM_UP = sized((14, 4), (3, 1))
ROWS, SEQ_LENGTH = sized((16, 256), (4, 32))  # of a step, over all ranks
SHAPE = sized(
    {"hidden_size": 256, "num_layers": 4, "num_heads": 4},
    {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
)
RUNS = sized(
    (
        *(("single", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)),
        *((f"deepspeed {stage}", 2) for stage in (1, 2, 3)),
        *((f"deepspeed {stage}", 4) for stage in (1, 2, 3)),
    ),
    (("single", 1), ("fsdp", 2), ("deepspeed 3", 2)),
)


def one_run(engine: str, folder: Path) -> None:
    """Train on the ranks that torchrun started; rank 0 prints a JSON line."""
    from core.assembly.session import build_training
    from core.jobs.train import train_to_the_end
    from core.preset.decode import decode_preset
    from core.registry import Preset

    engine, _, stage = engine.partition(" ")
    zero = {"stage": int(stage or 0), "stage3_param_persistence_threshold": 0}
    runtime, parallel = ranks_of_torchrun()
    sections = {
        "model": {**SHAPE, "seq_length": SEQ_LENGTH},
        "tokenizer": {"type": "byte"},
        "train": {
            "engine": engine,
            **({"deepspeed": {"zero_optimization": zero}} if stage else {}),
            "per_gpu_batch_size": ROWS // parallel.world_size,
            "learning_rate": 5e-5,
            "eval_tokens": 0,
            "max_steps": STEPS,
            "compile": "never",
        },
        "data": {"sources": ["python_stdlib"], "lanes": 8},
    }
    preset = decode_preset(sections, Preset, "benchmark", "benchmark")
    session = build_training(preset, runtime, parallel, folder, lambda *_: [], lambda: False)
    with mock.patch.object(session.trainer.engine, "close"):  # what is kept is counted before
        train_to_the_end(session, 1)
    megabytes = sum(kept_by(session.trainer)) / 1e6
    if runtime.rank == 0:
        lines = (folder / "logs" / "benchmark" / "metrics.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "step"]
        seconds = events[-1]["time"] - events[WARM_UP - 1]["time"]
        rate = (STEPS - WARM_UP) * ROWS * SEQ_LENGTH / seconds
        print(json.dumps({"tokens_per_second": rate, "megabytes": megabytes}))
    parallel.close()


def kept_by(trainer: Any) -> list[int]:
    """Bytes of the tensors that this rank keeps in a step: weights, gradients, and what the
    optimizer updates, where those are others, and remembers."""
    optimizers = [o for o in trainer.optimizer.optimizers if o.state]
    weights = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]
    updated = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    kept = [*weights, *weights, *states]
    if trainer.engine.name == "deepspeed":  # whose gradients stage 1 keeps whole
        stage = trainer.settings.zero_stage
        kept = [*weights, *(weights if stage == 1 else updated), *updated, *states]
    own = [t.to_local() if hasattr(t, "to_local") else t for t in kept if t.ndim]
    return [t.numel() * t.element_size() for t in own]


def measure(engine: str, ranks: int) -> dict[str, float]:
    """One run in fresh processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), __file__]
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(
            [*command, engine, folder],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if finished.returncode:
        sys.exit(f"{engine} on {ranks} failed:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    print(f"{SHAPE}, {ROWS} x {SEQ_LENGTH} tokens a step, one thread a rank")
    rates: dict[tuple[str, int], list[float]] = {run: [] for run in RUNS}
    for repetition in range(REPETITIONS):
        for engine, ranks in RUNS:
            result = measure(engine, ranks)
            rates[engine, ranks].append(result["tokens_per_second"])
            print(
                f"  {repetition + 1} {engine:11s} x {ranks}  {result['tokens_per_second']:8,.0f} "
                f"tokens/s  {result['megabytes']:7.1f} MB a rank",
                flush=True,
            )
    for engine, ranks in RUNS:
        other = ("ddp" if ranks > 1 else "single", ranks)
        if engine in ("single", "ddp") or other not in rates:
            continue
        ratios = [a / b for a, b in zip(rates[engine, ranks], rates[other])]
        print(
            f"  {engine} / {other[0]} x {ranks}: {statistics.median(ratios):.2f}  "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    one_run(sys.argv[1], Path(sys.argv[2])) if sys.argv[1:] else main()
