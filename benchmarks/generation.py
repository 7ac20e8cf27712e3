"""The worth of a cache of keys and values, and of a batch, in generation on a CPU.

    python benchmarks/generation.py

Each line is a model of the default preset's size, with random weights: 256 new tokens after a
prompt of 32, nucleus sampling and 3-gram blocking as in samples, without a cache and with it, in
turns, in one process with one thread. Prints the tokens per second of processor time (others may
use the machine too) in every repetition, and the median of their ratios. The tokens are the same,
which is checked. Below stands what eight rows in one batch give over eight after each other, with
the cache."""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measuring import sized
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.generation.engine import GenerationRow, TextGenerator, advance
from core.generation.sampling import SamplingParams
from core.models.polychromatic import PolychromaticLM, PolychromaticSettings
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from core.preset.settings import TokenizerSettings

REPETITIONS, NEW_TOKENS, PROMPT, CONTEXT, ROWS = sized((3, 256, 32, 512, 8), (1, 8, 32, 64, 2))
MODELS = {
    "simple_lm, 4 x 256": (SimpleLM, SimpleLMSettings(seq_length=CONTEXT), 8192),
    "polychromatic, 4 x 256": (
        PolychromaticLM,
        PolychromaticSettings(
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=768,
        ),
        8192,
    ),
}


class Numbers:
    """A tokenizer of as many tokens as a model knows; its end comes up seldom."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.eos_id, self.vocab_size, self._decode = vocab_size - 1, vocab_size, tokenizer.decode

    def decode(self, ids: list[int]) -> str:
        return self._decode([token % 256 for token in ids])


def rows_of(tokenizer: Any, count: int) -> list[GenerationRow]:
    # random weights give flat scores; at this temperature a few tokens share most of the
    # probability, as in trained models
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.05, top_p=0.95, no_repeat_ngram=3)
    return [
        GenerationRow(tokenizer, [(7 * i + number) % 251 for i in range(PROMPT)], params, number)
        for number in range(count)
    ]


def seconds(model: Any, tokenizer: Any, batches: list[list[GenerationRow]]) -> float:
    began = time.process_time()
    for rows in batches:
        for _ in advance(TextGenerator(model, tokenizer, CONTEXT), rows):
            pass
    return time.process_time() - began


def new_tokens(rows: list[GenerationRow]) -> int:
    return sum(len(row.ids) - PROMPT for row in rows)


def report(name: str, names: tuple[str, str], speeds: list[tuple[float, float]]) -> None:
    ratios = [second / first for first, second in speeds]
    columns = "   ".join(
        f"{word} {' '.join(f'{s:5.0f}' for s in column)}"
        for word, column in zip(names, zip(*speeds))
    )
    print(
        f"{name:24s} tokens/s {columns}   x {statistics.median(ratios):.1f} ({min(ratios):.1f} to "
        f"{max(ratios):.1f})",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    bytes_ = build_tokenizer(TokenizerSettings(type="byte"), [])
    for name, (kind, settings, vocab_size) in MODELS.items():
        torch.manual_seed(0)
        model, tokenizer = kind(settings, vocab_size).eval(), Numbers(bytes_, vocab_size)
        new_cache, speeds, batched = model.new_cache, [], []
        seconds(model, tokenizer, [rows_of(tokenizer, 1)])  # warm
        for _ in range(REPETITIONS):
            timed = []
            for cache in (lambda: None, new_cache):
                model.new_cache = cache
                rows = rows_of(tokenizer, 1)
                timed.append((seconds(model, tokenizer, [rows]), rows))
            (slow, plain), (fast, cached) = timed
            assert plain[0].ids == cached[0].ids, "a cache changes no text"
            speeds.append((new_tokens(plain) / slow, new_tokens(cached) / fast))
            alone, together = rows_of(tokenizer, ROWS), rows_of(tokenizer, ROWS)
            took = (
                seconds(model, tokenizer, [[row] for row in alone]),
                seconds(model, tokenizer, [together]),
            )
            batched.append((new_tokens(alone) / took[0], new_tokens(together) / took[1]))
        report(name, ("plain", "cached"), speeds)
        report(f"  {ROWS} rows, cached", ("in turn", "batch"), batched)


if __name__ == "__main__":
    main()
