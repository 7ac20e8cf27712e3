"""What the auxiliary heads add to one training step.

    python benchmarks/heads.py [gpt2]

Each variant runs in a process of its own, the variants taking turns; a step is 32 x 256 tokens in documents of 100, through the
default preset's model (bf16 where native), places, forward, losses, heads, backward and update, without data loading. With
"gpt2", the vocabulary has 50,257 tokens. Prints each variant's median step in milliseconds for every repetition, and the ratio of
its median to the first's.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("off", "policy", "value", "dynamics", "span_contrastive", "all four")
REPETITIONS, STEPS, WARM_UP = 3, 6, 2
ROWS, SEQ_LENGTH, DOCUMENT = 32, 256, 100
VOCAB_SIZES = {"default": 8192, "gpt2": 50257}


def step_seconds(variant: str, vocab_size: int) -> float:
    """Median seconds of a step, in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    from core.contracts import Batch
    from core.heads import HEADS
    from core.heads.stack import HeadStack
    from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
    from core.losses.stack import LossStack
    from core.models.simple_lm import SimpleLM, SimpleLMSettings
    from core.runtime import detect_runtime, keep_freed_memory
    from core.settings import AuxiliarySettings
    from core.trainer import Objective

    runtime = detect_runtime()
    device, dtype = runtime.device, runtime.compute_dtype("auto")
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    settings = SimpleLMSettings()
    model, stack = SimpleLM(settings, vocab_size), LossStack([CrossEntropy(CrossEntropySettings())])
    wanted = {f"enable_{name}": True for name in HEADS if variant in (name, "all four")}
    heads = HeadStack(HEADS, AuxiliarySettings(**wanted), settings.hidden_size, vocab_size) if wanted else None
    objective = Objective(model, stack, 1, heads).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    ids = torch.randint(0, vocab_size, (ROWS, SEQ_LENGTH))
    positions = torch.arange(SEQ_LENGTH).expand(ROWS, SEQ_LENGTH)
    documents, sources = (positions // DOCUMENT).int(), torch.zeros(ROWS, SEQ_LENGTH, dtype=torch.int32)
    rows = Batch(ids, ids.roll(-1, 1), positions % DOCUMENT, documents, sources, packed=True)
    seconds = []
    for step in range(WARM_UP + STEPS):
        started = time.perf_counter()
        counts, batch = {}, rows
        if heads is not None:
            batch = heads.choose(rows, 0, step, list(range(ROWS)))
            counts = heads.count(batch)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = objective(batch.to(device), ids.numel(), 0.0, counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def main(size: str) -> None:
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(REPETITIONS):
        for variant in VARIANTS:
            run = subprocess.run([sys.executable, __file__, size, variant], capture_output=True, text=True, check=True)
            found[variant].append(json.loads(run.stdout.splitlines()[-1]))
    for variant, seconds in found.items():
        ratios = [own / first for own, first in zip(seconds, found[VARIANTS[0]])]
        times = " ".join(f"{1000 * s:6.0f}" for s in seconds)
        print(f"{variant:20s} {times} ms   x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    size, *variant = sys.argv[1:] or ["default"]
    if variant:
        print(json.dumps(step_seconds(variant[0], VOCAB_SIZES[size])))
    else:
        main(size)
