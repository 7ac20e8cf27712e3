"""The worth of the memory head beyond the context: in speed, and in nats on long documents.

    python benchmarks/memory.py speed
    python benchmarks/memory.py 62_memory_cpu

speed    a model of the default preset's size with random weights writes 256 tokens after a prompt
         that fills its context of 256; plain (the whole context is read for each token) and with a
         memory, in turns, in one process with one thread. Prints the tokens per second of processor
         time (others may use the machine too), and median and range of their ratios.
a preset that was trained with the head: on held-out documents longer than three contexts, -log p of
the same tokens after
         memory   the window that generation has, of at least half a context, behind its summary
         last     the same window behind a summary of the half context before it alone: what is
                  carried on from further back is the difference to `memory`
         cut      the same window with nothing before it
         plain    the last whole context before each token: what generation without a memory reads,
                  one pass a token
         Each document counts by its tokens; differences come with a 95 % bootstrap interval over
         documents.
"""

import random
import statistics
import sys
import tempfile
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.generation import Numbers
from benchmarks.measuring import sized, trained_by
from core.contracts import plain_batch
from core.data.tokenizer_build import build_tokenizer
from core.generation.engine import GenerationRow, TextGenerator, advance
from core.generation.sampling import SamplingParams
from core.heads import AuxiliarySettings
from core.heads.memory import Memory, read
from core.models.readout import full_scores
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from core.preset.settings import TokenizerSettings

ROOT = Path(__file__).resolve().parent.parent
REPETITIONS, NEW_TOKENS, CONTEXT, VOCAB = sized((5, 256, 256, 8192), (1, 8, 64, 300))
DOCUMENTS, WINDOWS = sized((40, 6), (2, 1))


def speed() -> None:
    torch.manual_seed(0)
    model = SimpleLM(SimpleLMSettings(seq_length=CONTEXT), VOCAB).eval()
    memory = Memory(AuxiliarySettings(), 256, VOCAB).eval()
    tokenizer: Any = Numbers(build_tokenizer(TokenizerSettings(type="byte"), []), VOCAB)
    speeds: list[list[float]] = []
    for repetition in range(1 + REPETITIONS):
        found = []
        for own in (None, memory):
            params = SamplingParams(
                max_tokens=NEW_TOKENS, temperature=0.05, top_p=0.95, no_repeat_ngram=3
            )
            row = GenerationRow(tokenizer, [(7 * i) % 251 for i in range(CONTEXT)], params, 0)
            began = time.process_time()
            for _ in advance(TextGenerator(model, tokenizer, CONTEXT, memory=own), [row]):
                pass
            found.append((len(row.ids) - CONTEXT) / (time.process_time() - began))
        speeds += [found] if repetition else []  # the first warms up
    ratios = [with_memory / plain for plain, with_memory in speeds]
    told = "   ".join(
        f"{word} {' '.join(f'{s:5.0f}' for s in own)}"
        for word, own in zip(("plain", "memory"), zip(*speeds))
    )
    print(
        f"tokens/s {told}   x {statistics.median(ratios):.1f} ({min(ratios):.1f} to "
        f"{max(ratios):.1f})"
    )


def long_documents(name: str, root: Path = ROOT) -> None:
    from core.data.corpus import open_held_out
    from core.parallel.single import Single

    trained = trained_by(name, root)
    heads = trained.heads()
    assert heads is not None and "memory" in heads, f"{name} was trained without the memory head"
    corpus, _ = open_held_out(trained.preset, root, Single(), trained.made_with, trained.held_out)
    context = trained.preset.model.seq_length
    documents = chain.from_iterable(corpus.held_out_inputs(trained.tokenizer).values())
    long = islice(
        (torch.from_numpy(ids).long() for ids in documents if len(ids) > 3 * context), DOCUMENTS
    )
    found = [nats(trained.model, heads["memory"], ids, context) for ids in long]
    total = sum(count for _, count in found)
    means = {how: sum(sums[how] for sums, _ in found) / total for how in found[0][0]}
    print(
        f"{len(found)} documents, {total:,} tokens; nats per token: "
        + ", ".join(f"{how} {x:.4f}" for how, x in means.items())
    )
    for how in ("cut", "last", "plain"):
        low, high = interval([(sums[how] - sums["memory"], count) for sums, count in found])
        print(
            f"  memory saves against {how}: {means[how] - means['memory']:+.4f} ({low:+.4f} to "
            f"{high:+.4f})"
        )


@torch.no_grad()
def nats(model: Any, memory: Any, ids: Tensor, context: int) -> tuple[dict[str, float], int]:
    """Sums of -log p over the second halves of a document's first windows, (T,); and how many
    tokens they have."""
    half, width = context // 2, context - memory.slots
    starts = [start for start in range(2 * half, len(ids) - width, half)][:WINDOWS]
    row, sums, count = ids[None], dict.fromkeys(("memory", "last", "cut", "plain"), 0.0), 0
    summary, compressed = None, 0
    for start in starts:
        while compressed < start:
            summary = memory.compress(model, row[:, compressed : compressed + half], summary)
            compressed += half
        last = memory.compress(model, row[:, start - half : start], None)
        window, targets = row[:, start : start + width], ids[start + half + 1 : start + width + 1]
        for how, before in (("memory", summary), ("last", last), ("cut", None)):
            sums[how] += nll(read(model, window, before), targets)
        rows = ids.unfold(0, context, 1)  # row i ends before token i + context
        rows = rows[start + half + 1 - context : start + width + 1 - context]
        for rows_, own in zip(rows.split(64), targets.split(64)):
            output = model(plain_batch(rows_))
            output.hidden = output.hidden[:, -1:].transpose(0, 1)  # (1, 64, D)
            sums["plain"] += nll(output, own)
        count += len(targets)
    return sums, count


def nll(output: Any, targets: Tensor) -> float:
    """The sum of -log p of the last targets: hidden (1, T, D), (n,)."""
    scores = full_scores(output.readout, output.hidden[0, -len(targets) :])
    return float(torch.nn.functional.cross_entropy(scores.double(), targets, reduction="sum"))


def interval(found: list[tuple[float, int]]) -> tuple[float, float]:
    """95 % of the means that other draws of as many documents would give."""
    draws = random.Random(0)
    means = []
    for _ in range(2000):
        sample = draws.choices(found, k=len(found))
        means.append(sum(x for x, _ in sample) / sum(n for _, n in sample))
    cuts = statistics.quantiles(means, n=40)
    return cuts[0], cuts[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sized(False, True):
        speed()
        with tempfile.TemporaryDirectory() as folder:
            long_documents("62_memory_cpu", Path(folder))
        sys.exit()
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    speed() if sys.argv[1] == "speed" else long_documents(sys.argv[1])
