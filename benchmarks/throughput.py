"""Tokens per second of the whole training loop, against transformers.Trainer on the same network, batch and text.

    python benchmarks/throughput.py

Both sides train a GPT-2-shaped network (pre-norm, GELU, learned positions, tied readout) on the same packed text, each run in
a process of its own, the sides taking turns: ours, the Trainer with its defaults (fp32, no compile), the Trainer with its best
settings here (bf16, torch.compile, fused AdamW). Needs `pip install accelerate`. The rate is taken over the steps after the
first ones, so that nobody's start-up or compiling counts; start-up is printed beside it.

Prints a row per pair of runs and the ratios' median and spread.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPETITIONS = 3
STEPS, WARM_UP = 18, 6
ROWS, SEQ_LENGTH = 16, 256
SHAPE = {"hidden_size": 256, "num_layers": 4, "num_heads": 4}
VOCABULARIES = (8192, 50_257)
SIDES = ("ours", "trainer_defaults", "trainer_best")


def token_rows(vocab_size: int) -> Any:
    """(STEPS * ROWS, SEQ_LENGTH + 1) token ids of the standard library, spread over the vocabulary."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from core.assembly import Preset
    from core.data.corpus import open_corpus
    from core.data.tokenizer import build_tokenizer
    from core.parallel import Single
    from core.preset import decode_preset
    from core.settings import TokenizerSettings

    preset = decode_preset({"data": {"sources": ["python_stdlib"]}}, Preset, "benchmark", "benchmark")
    texts = open_corpus(preset, ROOT, Single()).sample_texts(3_000_000)
    tokenizer = build_tokenizer(TokenizerSettings(type="bpe", vocab_size=8192), texts)
    ids = np.concatenate(tokenizer.encode_batch(texts)).astype(np.int64)
    needed = STEPS * ROWS * (SEQ_LENGTH + 1)
    return (np.resize(ids, needed) * (vocab_size // 8192)).reshape(STEPS * ROWS, SEQ_LENGTH + 1)


def ours(vocab_size: int, folder: Path) -> list[float]:
    """The end of every step, in seconds, of the project's own trainer, fed with the rows."""
    import torch

    sys.path.insert(0, str(ROOT))
    from core.assembly import Preset, build_model, build_stack
    from core.checkpoint import CheckpointStore
    from core.contracts import Batch
    from core.data.loader import StepRows
    from core.data.pipeline import Position
    from core.data.source_weights import SourceWeights
    from core.horizon import Horizon, Progress
    from core.metrics import MetricsLog
    from core.objective import Objective
    from core.optim import Optimizer
    from core.parallel import Single
    from core.preset import decode_preset
    from core.runtime import detect_runtime, prepare
    from core.settings import AuxiliarySettings
    from core.trainer import Trainer

    preset = decode_preset(
        {
            "model": {**SHAPE, "seq_length": SEQ_LENGTH, "activation": "gelu_tanh"},
            "train": {
                "per_gpu_batch_size": ROWS,
                "learning_rate": 5e-5,
                "eval_tokens": 0,
                "max_steps": STEPS,
                "compile": "always",
            },
            "data": {"sources": ["python_stdlib"]},
        },
        Preset,
        "benchmark",
        "benchmark",
    )
    runtime = detect_runtime()
    prepare(runtime)
    rows = torch.from_numpy(token_rows(vocab_size))

    class Rows:
        """The loader's interface over rows in memory, as the Trainer's data set is."""

        source_names, dropped, skipped, position = ("text",), (), {}, Position()

        def __init__(self) -> None:
            self.step = 0

        def next_step(self, should_stop: Any) -> StepRows:
            ids = rows[self.step * ROWS : (self.step + 1) * ROWS]
            self.step += 1
            zeros = torch.zeros(ROWS, SEQ_LENGTH, dtype=torch.int32)
            positions = torch.arange(SEQ_LENGTH).expand(ROWS, SEQ_LENGTH)
            batch = Batch(ids[:, :-1], ids[:, 1:], positions, zeros, zeros, True)
            tokens = ROWS * SEQ_LENGTH
            return StepRows(batch, tokens, tokens, [tokens], [0], [0])

        def state(self) -> dict:
            return {}

    model = build_model(preset, vocab_size)
    tables = {"embedding.weight", "lm_head.weight"}
    log = MetricsLog(folder / "metrics.jsonl")
    horizon = Horizon(10**9, 10**9, STEPS, STEPS)
    Trainer(
        Objective(model, build_stack(preset), 1),
        Optimizer(list(model.named_parameters()), tables, preset.train),
        Rows(),
        Single(),
        runtime,
        preset.train,
        horizon,
        Progress(),
        log,
        CheckpointStore(folder, "benchmark"),
        evaluate=lambda model, progress: None,
        show=lambda model, step: [],
        extra_state={},
        should_stop=lambda: False,
        source_weights=SourceWeights({"text": 1.0}, AuxiliarySettings()),
        compile_from_step=1,
    ).train()
    log.close()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["time"] for event in events if event["event"] == "step"]


def trainer(vocab_size: int, folder: Path, best: bool) -> list[float]:
    """The same of transformers.Trainer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    rows = torch.from_numpy(token_rows(vocab_size))
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

    settings = {"bf16": True, "torch_compile": True} if best else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )
    ids = rows[:, :-1]  # the Trainer shifts inside the model: same inputs, same positions
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return ends


def measure(side: str, vocab_size: int) -> dict[str, float]:
    """One run in a fresh process: tokens per second after the warm-up, and seconds before it was over."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, side, str(vocab_size), folder]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            sys.exit(f"{side} failed:\n{finished.stderr[-3000:]}")
        return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    for vocab_size in VOCABULARIES:
        print(f"\n{SHAPE}, {ROWS} x {SEQ_LENGTH} tokens a step, vocabulary {vocab_size:,}")
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for repetition in range(REPETITIONS):
            for side in SIDES:
                result = measure(side, vocab_size)
                rates[side].append(result["tokens_per_second"])
                numbers = f"{result['tokens_per_second']:9,.0f} tokens/s  warm after {result['warm']:.0f} s"
                print(f"  {repetition + 1} {side:18s} {numbers}", flush=True)
        for side in SIDES[1:]:
            ratios = [a / b for a, b in zip(rates["ours"], rates[side])]
            print(f"  ours / {side:18s} {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def one_run(side: str, vocab_size: int, folder: Path) -> None:
    started = time.time()
    ends = ours(vocab_size, folder) if side == "ours" else trainer(vocab_size, folder, side == "trainer_best")
    assert len(ends) == STEPS, f"{len(ends)} steps instead of {STEPS}"
    rate = (STEPS - WARM_UP) * ROWS * SEQ_LENGTH / (ends[-1] - ends[WARM_UP - 1])
    print(json.dumps({"tokens_per_second": rate, "warm": ends[WARM_UP - 1] - started}))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one_run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
