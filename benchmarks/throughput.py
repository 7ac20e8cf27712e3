"""Tokens per second of the whole training loop, against transformers.Trainer on the same network,
batch and text.

    python benchmarks/throughput.py

Both sides train a GPT-2-shaped network (pre-norm, GELU, learned positions, tied readout) on the
standard library's source with the same tokenizer, each run in a process of its own, the sides
taking turns: ours, the Trainer with its defaults (fp32, no compile), the Trainer with its best
settings here (bf16, torch.compile, fused AdamW). Ours is the training session that main.py makes:
it reads and tokenizes while it trains; the Trainer's rows lie ready in memory. Needs `pip install
accelerate`; without, ours runs alone. The rate is taken over the steps after the first ones, so
that nobody's start-up or compiling counts; start-up is printed beside it.

Prints a row per run, and the ratios' median and spread.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import sized

ROOT = Path(__file__).resolve().parent.parent
REPETITIONS = sized(3, 1)
STEPS, WARM_UP = sized((18, 6), (3, 1))
ROWS, SEQ_LENGTH = sized((16, 256), (2, 32))
SHAPE = sized(
    {"hidden_size": 256, "num_layers": 4, "num_heads": 4},
    {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
)
VOCABULARIES = sized((8192, 50_257), (300,))
SIDES = (
    ("ours", "trainer_defaults", *sized(("trainer_best",), ()))
    if find_spec("accelerate")
    else ("ours",)
)


def preset_of(vocab_size: int) -> Any:
    from core.preset.decode import decode_preset
    from core.registry import Preset

    sections = {
        "model": {**SHAPE, "seq_length": SEQ_LENGTH, "activation": "gelu_tanh"},
        "tokenizer": {"type": "bpe", "vocab_size": vocab_size},
        "train": {
            "per_gpu_batch_size": ROWS,
            "learning_rate": 5e-5,
            "eval_tokens": 0,
            "max_steps": STEPS,
            "compile": sized("always", "never"),
        },
        "data": {"sources": ["python_stdlib"]},
    }
    return decode_preset(sections, Preset, "benchmark", "benchmark")


def make_text(vocab_size: int, folder: Path) -> None:
    """Writes the tokenizer for both sides, and the Trainer's rows: (STEPS * ROWS, SEQ_LENGTH) token
    ids."""
    import numpy as np

    from core.data.corpus import open_corpus
    from core.data.tokenizer_build import build_tokenizer
    from core.parallel.single import Single

    preset = preset_of(vocab_size)
    texts = open_corpus(preset, ROOT, Single()).sample_texts(sized(10_000_000, 100_000))
    tokenizer = build_tokenizer(preset.tokenizer, texts)
    ids = np.concatenate(tokenizer.encode_batch(texts)).astype(np.int64)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.state()))
    np.save(folder / "rows.npy", np.resize(ids, (STEPS * ROWS, SEQ_LENGTH)))


def ours(vocab_size: int, folder: Path) -> list[float]:
    """The end of every step, in seconds, of a training session as main.py makes it."""
    from core.assembly.session import build_training
    from core.jobs.train import train_to_the_end
    from core.parallel.single import Single
    from core.runtime import detect_runtime, prepare

    runtime = detect_runtime()
    prepare(runtime)
    state = json.loads((folder / "tokenizer.json").read_text())
    with tempfile.TemporaryDirectory() as root:
        session = build_training(
            preset_of(vocab_size),
            runtime,
            Single(),
            Path(root),
            lambda *_: [],
            lambda: False,
            state,
        )
        train_to_the_end(session, 1)
        lines = (Path(root) / "logs" / "benchmark" / "metrics.jsonl").read_text().splitlines()
    return [event["time"] for event in map(json.loads, lines) if event["event"] == "step"]


def trainer(vocab_size: int, folder: Path, best: bool) -> list[float]:
    """The same of transformers.Trainer."""
    import numpy as np
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    rows = torch.from_numpy(np.load(folder / "rows.npy"))
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=SEQ_LENGTH,
        n_embd=SHAPE["hidden_size"],
        n_layer=SHAPE["num_layers"],
        n_head=SHAPE["num_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.time())

    settings: dict[str, Any] = {"bf16": True, "torch_compile": True} if best else {}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )
    # the Trainer shifts inside the model
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(
        model=GPT2LMHeadModel(config), args=arguments, train_dataset=data, callbacks=[Clock()]
    ).train()
    return ends


def measure(side: str, vocab_size: int, folder: Path) -> dict[str, float]:
    """One run in a fresh process: tokens per second after the warm-up, and seconds before it was
    over."""
    finished = subprocess.run(
        [sys.executable, __file__, side, str(vocab_size), str(folder)],
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        sys.exit(f"{side} failed:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    for vocab_size in VOCABULARIES:
        print(f"\n{SHAPE}, {ROWS} x {SEQ_LENGTH} tokens a step, vocabulary {vocab_size:,}")
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        with tempfile.TemporaryDirectory() as folder:
            make_text(vocab_size, Path(folder))
            for repetition in range(REPETITIONS):
                for side in SIDES:
                    result = measure(side, vocab_size, Path(folder))
                    rates[side].append(result["tokens_per_second"])
                    numbers = (
                        f"{result['tokens_per_second']:9,.0f} tokens/s  warm after "
                        f"{result['warm']:.0f} s"
                    )
                    print(f"  {repetition + 1} {side:18s} {numbers}", flush=True)
        for side in SIDES[1:]:
            ratios = [a / b for a, b in zip(rates["ours"], rates[side])]
            print(
                f"  ours / {side:18s} {statistics.median(ratios):.2f}  ({min(ratios):.2f} to "
                f"{max(ratios):.2f})"
            )


def one_run(side: str, vocab_size: int, folder: Path) -> None:
    started = time.time()
    ends = (
        ours(vocab_size, folder)
        if side == "ours"
        else trainer(vocab_size, folder, side == "trainer_best")
    )
    assert len(ends) == STEPS, f"{len(ends)} steps instead of {STEPS}"
    rate = (STEPS - WARM_UP) * ROWS * SEQ_LENGTH / (ends[-1] - ends[WARM_UP - 1])
    print(json.dumps({"tokens_per_second": rate, "warm": ends[WARM_UP - 1] - started}))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one_run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
