"""The cost that a curriculum adds to one training step: more rows to read, and a forward pass over
all of them.

    python benchmarks/curriculum.py [rounds]

Steps of 16 x 256 tokens of the standard library's text through the default model (hidden_size 256,
4 layers, a vocabulary of 8,192; bf16 where native), reading and tokenizing included, as the train
job makes them. All variants live in one process and take turns step by step, so that whatever else
the machine does meets them alike; on a CPU, the seconds are those of the process, not of the clock.
Prints each variant's median step in milliseconds, and the median and range of its ratios to the
first's."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import sized

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = sized((None, 2, 3, 4), (None, 2))
ROUNDS, WARM_UP = sized((16, 4), (1, 1))
SIZES = sized({"seq_length": 256}, {"seq_length": 32, "hidden_size": 32, "num_heads": 2})
VOCAB_SIZE = sized(8192, 300)


def make_step(
    candidates: int | None, root: Path, tokenizer: dict | None
) -> tuple[Callable[[], float], dict]:
    """A function that takes a step and returns its seconds; the tokenizer, which all variants
    share."""
    import torch

    from core.assembly.session import build_training
    from core.parallel.single import Single
    from core.preset.decode import decode_preset
    from core.registry import Preset
    from core.runtime import detect_runtime

    train = {
        "per_gpu_batch_size": 16,
        "eval_tokens": 0,
        "curriculum": {"candidates": candidates} if candidates else None,
    }
    bpe = {"type": "bpe", "vocab_size": VOCAB_SIZE}
    sections = {
        "model": SIZES,
        "tokenizer": bpe,
        "train": train,
        "data": {"sources": ["python_stdlib"]},
    }
    preset = decode_preset(sections, Preset, "benchmark", f"{candidates}")
    runtime = detect_runtime()
    built = build_training(preset, runtime, Single(), root, lambda *_: [], lambda: False, tokenizer)
    trainer = built.trainer
    trainer.model.train()

    def now() -> float:
        if runtime.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> float:
        started = now()
        rows = trainer.loader.next_step()
        assert rows is not None
        trainer._train_step(rows)
        return now() - started

    return step, trainer.extra_state["tokenizer"]


def main(rounds: int) -> None:
    from core.runtime import detect_runtime, keep_freed_memory

    if detect_runtime().device.type == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        steps, tokenizer = {}, None
        for candidates in CANDIDATES:
            steps[candidates], tokenizer = make_step(candidates, Path(folder), tokenizer)
        found: dict[int | None, list[float]] = {candidates: [] for candidates in CANDIDATES}
        for number in range(WARM_UP + rounds):
            for candidates, step in steps.items():
                seconds = step()
                if number >= WARM_UP:
                    found[candidates].append(seconds)
    for candidates, times in found.items():
        ratios = [own / first for own, first in zip(times, found[None])]
        told = f"x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{f'{candidates} candidates' if candidates else 'off':14s} "
            f"{1000 * statistics.median(times):7.1f} ms   {told}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
