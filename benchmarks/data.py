"""From text to ready batches: ours against `datasets.map(tokenizer, batched=True)` and group_texts,
on one core each.

    python benchmarks/data.py

Both sides read the same JSON lines with the same tokenizer, and end with int64 tensors of 32 rows.
They run by turns, each in a process of its own that may use one core, so that a busy machine slows
both; a ratio above 1 means that ours is faster. Then: how full packed rows are, and how long a
training run on all cores waits for data."""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import sized

ROOT = Path(__file__).resolve().parent.parent
ROWS, SEQ_LENGTH, VOCAB_SIZE = sized((32, 1024, 8192), (4, 64, 300))
DOCUMENTS = sized(12_000, 60)
REPETITIONS = sized(5, 1)
TRAIN_STEPS = sized(60, 2)
LEAST_RATIO, LEAST_FILL = 1.0, 0.97


def write_corpus(folder: Path) -> None:
    """Pieces of the standard library's source text, of mixed lengths: most a page, some a line,
    some a whole file."""
    from core.data.sources import build_source
    from core.data.sources.text import PythonStdlibSettings

    text = "\n".join(
        document.text for document in build_source(PythonStdlibSettings(), ROOT, 1).stream({})
    )
    draw = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as out:
        for _ in range(DOCUMENTS):
            length = min(int(draw.lognormvariate(7.0, 1.1)), 60_000)
            start = draw.randrange(len(text) - length)
            out.write(json.dumps({"text": text[start : start + length]}) + "\n")


def write_tokenizer(folder: Path) -> None:
    from core.data.tokenizer_build import build_tokenizer
    from core.preset.settings import TokenizerSettings

    with (folder / "corpus.jsonl").open() as lines:
        sample = [json.loads(line)["text"] for line, _ in zip(lines, range(2000))]
    tokenizer = build_tokenizer(TokenizerSettings(vocab_size=VOCAB_SIZE), sample)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.state()))


def tokenizer_of(folder: Path) -> Any:
    from core.data.tokenizer import Tokenizer

    return Tokenizer.from_state(json.loads((folder / "tokenizer.json").read_text()))


def loader_of(folder: Path, packing: str, workers: int = 0) -> Any:
    """The loader as a training run makes it."""
    from core.data.loader import Layout, Loader
    from core.data.mixing import MixSettings
    from core.data.pipeline import PipelineSettings
    from core.data.pipeline_factory import PipelineFactory
    from core.data.position import Position
    from core.data.sources import build_source
    from core.data.sources.text import TextSettings
    from core.data.validation import HoldOut
    from core.parallel.single import Single

    section = TextSettings(path="corpus.jsonl")
    source, tokenizer = build_source(section, folder, 1), tokenizer_of(folder)
    source.open()
    settings = PipelineSettings(
        MixSettings("round_robin", (1.0,), 1, max_epochs=1), 24, SEQ_LENGTH, packing, 1
    )
    state = tokenizer.state()
    factory = PipelineFactory(
        [section], folder, 1, state, HoldOut(0.0), settings, sources=[source], tokenizer=tokenizer
    )
    layout = Layout(ROWS, 24, ["corpus"], packed=packing != "padding")
    return Loader(factory, Position(), Single(), layout, workers)


def ours(folder: Path, packing: str = "documents") -> tuple[int, float]:
    """(real tokens in batches, share of positions that are real)."""
    loader = loader_of(folder, packing)
    tokens = positions = 0
    full = [0, 0]
    while (step := loader.next_step()) is not None:
        tokens += step.num_tokens
        positions += step.batch.labels.numel()
        # the end of the data, where lanes run dry, is not what is asked
        if step.num_tokens > 0.9 * ROWS * SEQ_LENGTH:
            full = [full[0] + step.num_tokens, full[1] + step.batch.labels.numel()]
    loader.close()
    return tokens, full[0] / max(full[1], 1)


def theirs(folder: Path) -> tuple[int, float]:
    """The usual way, as in the Hugging Face examples' run_clm.py; its batches come from a
    DataLoader."""
    import datasets
    import torch
    from transformers import PreTrainedTokenizerFast, default_data_collator

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(folder)._backend, eos_token="<|endoftext|>"
    )
    tokenizer.model_max_length = 1 << 30
    rows = datasets.load_dataset(
        "json",
        data_files=str(folder / "corpus.jsonl"),
        split="train",
        cache_dir=os.environ["CACHE"],
    )

    def tokenize(examples: dict) -> dict:
        return tokenizer(
            [text + "<|endoftext|>" for text in examples["text"]], return_attention_mask=False
        )

    def group_texts(examples: dict) -> dict:
        ids = [token for document in examples["input_ids"] for token in document]
        total = len(ids) // SEQ_LENGTH * SEQ_LENGTH
        blocks = [ids[i : i + SEQ_LENGTH] for i in range(0, total, SEQ_LENGTH)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    tokens = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    blocks = tokens.map(group_texts, batched=True, remove_columns=tokens.column_names)
    found = 0
    for batch in torch.utils.data.DataLoader(blocks, ROWS, collate_fn=default_data_collator):
        found += batch["labels"].numel()
    return found, 1.0


def side(folder: Path, name: str) -> tuple[int, float, float]:
    """(tokens, seconds, share of real positions) of one side in a process that may use one core."""
    with tempfile.TemporaryDirectory() as cache:
        single = {
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CACHE": cache,
        }
        command = [sys.executable, __file__, name, str(folder)]
        done = subprocess.run(
            command, env={**os.environ, **single}, capture_output=True, text=True, check=True
        )
    tokens, seconds, fill = done.stdout.split()[-3:]
    return int(tokens), float(seconds), float(fill)


def run_side(name: str, folder: Path) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    import core.data.corpus  # noqa: F401  # imports are not what is measured, on either side

    torch.set_num_threads(1)
    if name == "theirs":
        import datasets  # noqa: F401
        import transformers  # noqa: F401
    started = time.perf_counter()
    tokens, fill = theirs(folder) if name == "theirs" else ours(folder, name)
    print(tokens, time.perf_counter() - started, fill)


def waits(folder: Path) -> list[float]:
    """Seconds that each step of a training run on all cores waited for its rows; the first step
    fills the queue."""
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary)
        shutil.copytree(
            ROOT / "core", project / "core", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(ROOT / "main.py", project)
        for name in ("configs", "checkpoints", "logs"):
            (project / name).mkdir()
        preset = {
            "lineage": "waits",
            "model": sized({}, {"seq_length": 32, "hidden_size": 32, "num_heads": 2}),
            "train": {
                "per_gpu_batch_size": sized(32, 2),
                "max_steps": TRAIN_STEPS,
                "eval_tokens": 0,
            },
            "data": {
                "sources": [
                    {"type": "text", "path": str(folder / "corpus.jsonl"), "name": "corpus"}
                ]
            },
        }
        (project / "configs" / "waits.json").write_text(json.dumps(preset))
        command = [sys.executable, "main.py"]
        subprocess.run(
            command, input="waits\n", text=True, cwd=project, check=True, stdout=subprocess.DEVNULL
        )
        events = [
            json.loads(line)
            for line in (project / "logs/waits/metrics.jsonl").read_text().splitlines()
        ]
    return [event["data_seconds"] for event in events if event["event"] == "step"]


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder)
        write_tokenizer(folder)
        rates: dict[str, list[float]] = {"documents": [], "best_fit": [], "theirs": []}
        fills: dict[str, float] = {}
        for _ in range(REPETITIONS):
            for name in rates:
                tokens, seconds, fills[name] = side(folder, name)
                rates[name].append(tokens / seconds)
        failed = False
        for name in ("documents", "best_fit"):
            ratios = sorted(a / b for a, b in zip(rates[name], rates["theirs"]))
            middle = statistics.median(ratios)
            failed |= middle < LEAST_RATIO or fills[name] < LEAST_FILL
            print(
                f"{name:<10} {statistics.median(rates[name]):>10,.0f} tokens/s on one core, "
                f"{middle:.2f} x datasets.map ({ratios[0]:.2f}-{ratios[-1]:.2f}); rows "
                f"{fills[name]:.1%} real"
            )
        print(f"{'theirs':<10} {statistics.median(rates['theirs']):>10,.0f} tokens/s on one core")
        waited = waits(folder)
        late = [seconds for seconds in waited[1:] if seconds > 0.001]
        failed |= bool(late)
        print(
            f"training: {len(late)} of {len(waited) - 1} steps after the first waited for data; "
            f"most {max(waited[1:]):.4f} s"
        )
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_side(sys.argv[1], Path(sys.argv[2]))
    else:
        sys.exit(main())
