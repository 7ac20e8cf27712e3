"""The worth of a planner's looking ahead, and its cost in generation.

    python benchmarks/planner.py [59_planner_cpu]

Of the model that a preset has trained (run it first), on a tenth of the documents: those held out,
and others, few of which a short run has read. Every other one fits routers anew, on features that
stay as they are; the rest tell log q - log p of their tokens, as means over documents with their
standard errors. Each router has the planner's form and sees a part of the features, so that what
comes of looking ahead can be told from what comes of a second look at the model's own distribution.
"as trained" is the planner of the checkpoint. Below: tokens per second of processor time, with the
planner and without, in turns, on one thread."""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring import sized, trained_by
from core.contracts import plain_batch
from core.data.corpus import open_held_out
from core.generation.engine import GenerationRow, TextGenerator, advance
from core.generation.sampling import SamplingParams
from core.heads.planner import WIDTH, Planner, look_ahead
from core.parallel.single import Single
from core.trained import Trained, build_generator

ROOT = Path(__file__).resolve().parent.parent
# N positions, C candidates, f features

DOCUMENT_ROWS = 8
"""A document's first rows: many documents tell more than one long one."""
SHARE = sized(0.1, 0.01)
"""Of the documents."""
STEPS, BATCH, LEARNING_RATE = sized(1500, 2), 256, 2e-3
REPETITIONS, NEW_TOKENS, PROMPT = sized((5, 100, 16), (1, 4, 16))


def read(trained: Trained, documents: list[np.ndarray]) -> dict[str, Tensor]:
    """Collect for every position: features (N, C, f), log p of the candidates (N, C), which of them
    came (N,) or -1, the document (N,)."""
    heads, guide = trained.heads(), build_generator(trained).planner
    length = trained.preset.model.seq_length
    assert heads is not None and guide is not None, "this model has no planner"
    planner = heads["planner"]
    assert isinstance(planner, Planner)
    found: dict[str, list[Tensor]] = {
        "features": [],
        "log_p": [],
        "came": [],
        "gain": [],
        "document": [],
    }
    for number, document in enumerate(documents):
        ids = torch.from_numpy(document[: length * DOCUMENT_ROWS + 1].astype(np.int64))
        count = (len(ids) - 1) // length
        if count == 0:
            continue
        rows, targets = ids[: count * length].view(count, length), ids[1 : count * length + 1]
        with torch.no_grad():
            output = trained.model(plain_batch(rows))
            hidden = output.hidden.flatten(0, 1)
            scores = output.readout(hidden)
            log_p, tokens = scores.log_softmax(-1), scores.topk(planner.candidates)[1]
            came = tokens == targets[:, None]
            found["features"].append(
                look_ahead(hidden, scores, tokens, heads.heads, output.readout.table)
            )
            found["gain"].append(
                (guide(hidden, scores).log_softmax(-1) - log_p).gather(1, targets[:, None])[:, 0]
            )
        found["log_p"].append(log_p.gather(1, tokens))
        found["came"].append(torch.where(came.any(1), came.int().argmax(1), -1))
        found["document"].append(torch.full_like(targets, number))
    return {name: torch.cat(each) for name, each in found.items()}


def gain(change: Tensor, part: dict[str, Tensor]) -> Tensor:
    """log q - log p of the tokens that came: (N, C) -> (N,)."""
    norm = torch.log1p((part["log_p"].exp() * torch.expm1(change)).sum(1))
    own = change.gather(1, part["came"].clamp(min=0)[:, None])[:, 0]
    return torch.where(part["came"] >= 0, own, 0.0) - norm


def fitted(
    columns: list[int], fit: dict[str, Tensor], test: dict[str, Tensor], seed: int
) -> Tensor:
    """The gain on `test` of a router that sees some features."""

    def seen(part: dict[str, Tensor]) -> Tensor:
        own = part["features"][..., columns]
        return torch.cat([own, own - own.mean(1, keepdim=True)], dim=-1)

    features, random = seen(fit), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    first, last = nn.Linear(features.shape[-1], WIDTH), nn.Linear(WIDTH, 1)
    router = nn.Sequential(first, nn.GELU(), last)
    nn.init.normal_(first.weight, std=features.shape[-1] ** -0.5)
    for p in last.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.AdamW(router.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (STEPS - step) / (0.3 * STEPS))
    )
    for _ in range(STEPS):
        at = torch.randint(len(features), (BATCH,), generator=random)
        loss = -gain(
            router(features[at])[..., 0], {name: each[at] for name, each in fit.items()}
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return gain(router(seen(test))[..., 0], test)


def summary(gains: Tensor, documents: Tensor) -> str:
    means = [gains[documents == number].mean().item() for number in documents.unique()]
    return f"{statistics.fmean(means):+.4f} ± {statistics.stdev(means) / len(means) ** 0.5:.4f}"


def speeds(trained: Trained) -> None:
    generators: dict[str, Any] = {"without": None, "with": build_generator(trained).planner}
    found: dict[str, list[float]] = {name: [] for name in generators}
    for number in range(REPETITIONS + 1):
        for name, guide in generators.items():
            generator = TextGenerator(
                trained.model, trained.tokenizer, trained.preset.model.seq_length, guide
            )
            row = GenerationRow(
                trained.tokenizer,
                list(range(PROMPT)),
                SamplingParams(max_tokens=NEW_TOKENS, temperature=0.9, top_p=0.95),
                number,
            )
            began = time.process_time()
            for _ in advance(generator, [row]):
                pass
            if number:
                found[name].append((len(row.ids) - PROMPT) / (time.process_time() - began))
    ratios = [a / b for a, b in zip(found["with"], found["without"])]
    for name, each in found.items():
        print(f"{name:8s} {statistics.median(each):6.0f} tokens/s")
    print(f"ratio    {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main(stem: str, root: Path) -> None:
    torch.set_num_threads(1)
    trained = trained_by(stem, root)
    corpus, _ = open_held_out(trained.preset, root, Single(), trained.made_with, trained.held_out)
    corpus.hold_out = replace(corpus.hold_out, fraction=SHARE)
    documents = [each for own in corpus.held_out_inputs(trained.tokenizer).values() for each in own]
    fit, test = read(trained, documents[0::2]), read(trained, documents[1::2])
    steps = trained.preset.auxiliary.rollout_steps
    count = fit["features"].shape[-1]
    parts = {
        "log p": [0],
        "log p, policy": [0, 1],
        "and the first step's value": [0, 1, steps + 1],
        "all but values": list(range(steps + 1)),
        "all but the rollout's tokens": [0, 1, *range(steps + 1, count)],
        "all": list(range(count)),
    }
    print(
        f"{trained.where}, step {trained.step}: {len(fit['came']):,} positions to fit, "
        f"{len(test['came']):,} to measure"
    )
    print(
        f"came among the candidates: {(test['came'] >= 0).float().mean():.3f}; cross-entropy is "
        "lower by, in nats per token:"
    )
    print(f"{'as trained':30s} {summary(test['gain'], test['document'])}")
    for name, columns in parts.items():
        print(f"{name:30s} {summary(fitted(columns, fit, test, 0), test['document'])}", flush=True)
    speeds(trained)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else "59_planner_cpu", sized(ROOT, Path(folder)))
