"""The worth of a draft head in generation: a small model is trained with one, and then generates
with it and without.

    python benchmarks/drafts.py [FOLDER]

Trains 6 layers of width 192 on the standard library's source for 1.2M tokens, in FOLDER if given,
where they stay for the next time (some minutes). Then the model continues beginnings of files of
that source, at several temperatures, alone and four at once: plainly, and with drafts of some
lengths, in turns, in one process with one thread. Prints tokens per second of processor time
(others may use the machine too), how many drafted tokens were accepted, how many tokens a pass of
the model gave, and median and range of the ratios. The tokens are the same but for rounding;
how many texts differ is printed."""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measuring import sized
from core.data.sources import build_source
from core.data.sources.text import PythonStdlibSettings
from core.generation.engine import GenerationRow, TextGenerator, advance
from core.generation.sampling import SamplingParams
from core.generation.speculative import Drafter
from core.jobs.train import train
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from core.trained import Trained, load_trained

STEPS, CONTEXT, PROMPT, NEW_TOKENS, TEXTS, ROUNDS = sized(
    (300, 256, 48, 192, 4, 3), (2, 32, 8, 8, 2, 1)
)
SHAPE = sized(
    {"hidden_size": 192, "num_layers": 6, "num_heads": 4},
    {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
)
LENGTHS = (2, 4)
PRESET = {
    "name": "drafts",
    "model": {"type": "simple_lm", **SHAPE, "seq_length": CONTEXT},
    "tokenizer": {"type": "bpe", "vocab_size": sized(1024, 300)},
    "train": {
        "per_gpu_batch_size": 16,
        "learning_rate": 2e-3,
        "schedule": {"type": "wsd", "warmup": 0.05, "decay": 0.3},
        "max_steps": STEPS,
        "eval_tokens": sized(30_000, 500),
        "eval_every_tokens": 500_000,
    },
    "auxiliary": {"enable_draft": True, "draft_tokens": 4, "draft_positions": 16},
    "data": {"sources": ["python_stdlib"]},
    "generate": {"prompts": ["def "], "max_tokens": 40},
}


def trained_in(folder: Path) -> Trained:
    """The model, trained there if it is not yet."""
    preset = decode_preset(PRESET, Preset, "drafts", "drafts")
    if not (folder / "checkpoints").exists():
        train(preset, detect_runtime(), Single(), folder, 0.0, sys.stdout)
    return load_trained(preset, folder, detect_runtime())


def prompts_of(trained: Trained) -> list[list[int]]:
    """Beginnings of files, each somewhere else in the library; most of them the model has read."""
    prompts = []
    for number, document in enumerate(
        build_source(PythonStdlibSettings(), Path.cwd(), 1).stream({})
    ):
        ids = trained.tokenizer.encode_batch([document.text])[0].tolist()
        if number % 7 == 0 and len(ids) > PROMPT + NEW_TOKENS:
            prompts.append([trained.tokenizer.eos_id, *ids[: PROMPT - 1]])
        if len(prompts) == TEXTS:
            return prompts
    raise AssertionError("too few files")


def generate(
    generator: TextGenerator, prompts: list[list[int]], params: SamplingParams, at_once: int
) -> tuple[float, list[list[int]]]:
    """Seconds of this process, and the tokens."""
    rows = [
        GenerationRow(generator.tokenizer, prompt, params, seed)
        for seed, prompt in enumerate(prompts)
    ]
    began = time.process_time()
    for first in range(0, len(rows), at_once):
        for _ in advance(generator, rows[first : first + at_once]):
            pass
    return time.process_time() - began, [row.ids for row in rows]


def main(folder: Path) -> None:
    trained = trained_in(folder)
    torch.set_num_threads(1)
    prompts = prompts_of(trained)
    plain = TextGenerator(trained.model, trained.tokenizer, CONTEXT)
    generate(plain, prompts[:1], SamplingParams(max_tokens=20), 1)  # warm
    for temperature, top_p in ((0.0, 1.0), (0.9, 0.95)):
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, top_p=top_p)
        for at_once in (1, 4):
            compare(trained, plain, prompts, params, at_once)


def drafters_of(trained: Trained) -> dict[int, Drafter]:
    """Build a drafter for each length."""
    heads: Any = trained.heads()
    drafters = {length: Drafter(heads["draft"]) for length in LENGTHS}
    for length, drafter in drafters.items():
        drafter.tokens = length
    return drafters


def compare(
    trained: Trained,
    plain: TextGenerator,
    prompts: list[list[int]],
    params: SamplingParams,
    at_once: int,
) -> None:
    """Generate plainly and with drafts of each length, in turns, and print how fast."""
    drafters, speeds = drafters_of(trained), []
    speedups: dict[int, list[float]] = {length: [] for length in LENGTHS}
    different = dict.fromkeys(LENGTHS, 0)
    for _ in range(ROUNDS):
        seconds, texts = generate(plain, prompts, params, at_once)
        speeds.append(sum(len(ids) - PROMPT for ids in texts) / seconds)
        for length, drafter in drafters.items():
            took, drafted = generate(replace(plain, drafter=drafter), prompts, params, at_once)
            speedup = sum(map(len, drafted)) / sum(map(len, texts)) * seconds / took
            speedups[length].append(speedup)
            different[length] = sum(a != b for a, b in zip(texts, drafted))
    speed = statistics.median(speeds)
    print(
        f"temperature {params.temperature:g}, {at_once} at once: plain {speed:.0f} tokens/s",
        flush=True,
    )
    for length, drafter in drafters.items():
        each = speedups[length]
        print(
            f"  drafts of {length}: x {statistics.median(each):.2f} "
            f"({min(each):.2f} to {max(each):.2f}), "
            f"{drafter.accepted / max(drafter.proposed, 1):.0%} of guesses right, "
            f"{drafter.emitted / max(drafter.passes, 1):.2f} tokens a pass, "
            f"{different[length]} of {TEXTS} texts differ",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
