"""The worth of single choices in one training step on a CPU: kept memory, explicit attention,
torch.compile.

    python benchmarks/step.py

Each variant runs in a process of its own, the variants taking turns; a step is 32 x 256 tokens
through the default preset's model (bf16 where native), forward, losses, backward and update,
without data loading. Prints each variant's median step in milliseconds for every repetition, and
the ratio of its median to the first's."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import sized

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("as shipped", "memory returned", "SDPA's flash kernel", *sized(("compiled",), ()))
REPETITIONS, STEPS, WARM_UP = sized((3, 6, 2), (1, 1, 1))
ROWS, SEQ_LENGTH, VOCAB_SIZE = sized((32, 256, 8192), (2, 32, 300))
SIZES: dict[str, Any] = sized(
    {}, {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "seq_length": 32}
)


def step_seconds(variant: str) -> float:
    """Median seconds of a step, in this process."""
    import torch

    from core.contracts import Batch
    from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
    from core.losses.stack import LossStack
    from core.models import attention
    from core.models.simple_lm import SimpleLM, SimpleLMSettings
    from core.runtime import detect_runtime, keep_freed_memory

    if variant != "memory returned":
        keep_freed_memory()
    if variant == "SDPA's flash kernel":
        attention.EXPLICIT_UP_TO = 0
    torch.manual_seed(0)
    dtype = detect_runtime().compute_dtype("auto")
    model, stack = (
        SimpleLM(SimpleLMSettings(**SIZES), VOCAB_SIZE),
        LossStack([CrossEntropy(CrossEntropySettings())]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, VOCAB_SIZE, (ROWS, SEQ_LENGTH))
    positions = torch.arange(SEQ_LENGTH).expand(ROWS, SEQ_LENGTH)
    documents, sources = (positions // 100).int(), torch.zeros(ROWS, SEQ_LENGTH, dtype=torch.int32)
    batch = Batch(ids, ids.roll(-1, 1), positions % 100, documents, sources, packed=True)
    if variant == "compiled":
        model.compile()
    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = stack(model(batch), batch, ids.numel(), 0.0, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def main() -> None:
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(REPETITIONS):
        for variant in VARIANTS:
            run = subprocess.run(
                [sys.executable, __file__, variant], capture_output=True, text=True, check=True
            )
            found[variant].append(json.loads(run.stdout.splitlines()[-1]))
    for variant, seconds in found.items():
        ratios = [own / first for own, first in zip(seconds, found[VARIANTS[0]])]
        times = " ".join(f"{1000 * s:6.0f}" for s in seconds)
        print(
            f"{variant:20s} {times} ms   x {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f})"
        )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(step_seconds(sys.argv[1])))
    else:
        main()
