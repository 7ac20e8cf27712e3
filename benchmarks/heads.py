"""The time that auxiliary heads add to one training step.

    python benchmarks/heads.py [gpt2]

A step is 32 x 256 tokens in documents of 100, through the default preset's model (bf16 where
native): places, forward, losses, heads, backward and update, without data loading. With "gpt2", the
vocabulary has 50,257 tokens. All variants live in one process and take turns step by step, so that
whatever else the machine does meets them alike; on a CPU, the seconds are those of the process, not
of the clock. Prints each variant's median step in milliseconds, and median and range of its ratios
to the first's."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import sized

ROOT = Path(__file__).resolve().parent.parent
ON = {
    "off": (),
    "policy": ("policy",),
    "value": ("value",),
    "dynamics": ("dynamics",),
    "span_contrastive": ("span_contrastive",),
    "all four": ("policy", "value", "dynamics", "span_contrastive"),
    "rollouts": ("policy", "value", "rollouts"),
    "planner": ("policy", "value", "rollouts", "planner"),
    "memory": ("memory",),
    "draft": ("draft",),
}

ROUNDS, WARM_UP = sized((12, 2), (1, 1))
ROWS, SEQ_LENGTH, DOCUMENT = sized((32, 256, 100), (2, 128, 100))
SIZES: dict[str, Any] = sized(
    {}, {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "seq_length": 128}
)
AFTER = 32  # tokens behind a summary: twice as many fit into a document
VOCAB_SIZES = {"default": sized(8192, 257), "gpt2": 50257}


def make_step(variant: str, vocab_size: int) -> Callable[[int], float]:
    """A function that takes a step, given its number, and returns its seconds."""
    import torch

    from core.contracts import Batch
    from core.heads import HEADS, AuxiliarySettings
    from core.heads.stack import HeadStack
    from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
    from core.losses.stack import LossStack
    from core.models.simple_lm import SimpleLM, SimpleLMSettings
    from core.runtime import detect_runtime
    from core.training.objective import Objective

    runtime = detect_runtime()
    device, dtype = runtime.device, runtime.compute_dtype("auto")
    torch.manual_seed(0)
    settings = SimpleLMSettings(**SIZES)
    model, stack = SimpleLM(settings, vocab_size), LossStack([CrossEntropy(CrossEntropySettings())])
    wanted: Any = {f"enable_{name}": True for name in ON[variant]} | {"memory_tokens_after": AFTER}
    heads = (
        HeadStack(HEADS, AuxiliarySettings(**wanted), settings.hidden_size, vocab_size)
        if ON[variant]
        else None
    )
    objective = Objective(model, stack, 1, heads).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    ids = torch.randint(0, vocab_size, (ROWS, SEQ_LENGTH))
    positions = torch.arange(SEQ_LENGTH).expand(ROWS, SEQ_LENGTH)
    documents, sources = (
        (positions // DOCUMENT).int(),
        torch.zeros(ROWS, SEQ_LENGTH, dtype=torch.int32),
    )
    rows = Batch(ids, ids.roll(-1, 1), positions % DOCUMENT, documents, sources, packed=True)

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step(number: int) -> float:
        started = now()
        counts, batch = {}, rows
        if heads is not None:
            batch = heads.choose(rows, 0, number, list(range(ROWS)))
            counts = heads.count(batch)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = objective(batch.to(device), ids.numel(), 0.0, counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now() - started

    return step


def main(vocab_size: int) -> None:
    from core.runtime import detect_runtime, keep_freed_memory

    if detect_runtime().device.type == "cpu":
        keep_freed_memory()
    steps = {variant: make_step(variant, vocab_size) for variant in ON}
    found: dict[str, list[float]] = {variant: [] for variant in ON}
    for number in range(WARM_UP + ROUNDS):
        for variant, step in steps.items():
            seconds = step(number)
            if number >= WARM_UP:
                found[variant].append(seconds)
    for variant, times in found.items():
        ratios = [own / first for own, first in zip(times, found["off"])]
        told = f"x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{variant:20s} {1000 * statistics.median(times):7.1f} ms   {told}")


if __name__ == "__main__":
    main(VOCAB_SIZES[sys.argv[1] if len(sys.argv) > 1 else "default"])
