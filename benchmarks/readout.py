"""The chunked readout and losses against the plain computation: time, memory and gradients, side by
side.

    python benchmarks/readout.py

Plain is what one writes first: the readout's scores for all tokens at once, cast to fp32, each loss
by its definition, backward. Times come from one process that runs both by turns, so that a busy
machine slows both; a ratio below 1 means the stack is faster. Memory is the peak a side adds to
what it starts with, gradients included, each side in a process of its own. Where the plain side is
too large for the machine it runs on pieces of the tokens, one after the other, which flatters it;
its memory is then extrapolated from two smaller sizes and marked "~"."""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import in_a_process, now, peak_bytes, sized
from core.contracts import Batch, ModelOutput
from core.losses import LOSSES
from core.losses.base import Chunk, Gradient
from core.losses.chunked import BLOCK_BYTES
from core.losses.softmax import Scratch
from core.losses.stack import LossStack
from core.models.readout import DistanceReadout, LinearReadout
from core.runtime import keep_freed_memory

PENALTIES = ("non_max_sum", "neg_entropy", "neg_max_prob", "top_k_mass")
CE: dict[str, Any] = {"type": "cross_entropy"}
MIXES: dict[str, list[dict[str, Any]]] = {
    "CE": [CE],
    "CE + cosine": [CE, {"type": "cosine"}],
    "CE + cosine, top 256": [CE, {"type": "cosine", "topk": 256}],
    "CE + 4 penalties": [CE, *({"type": "sharpness", "name": p, "penalty": p} for p in PENALTIES)],
    "harmonic": [{"type": "harmonic", "h_exp": -8.0}],
}
ALONE = {
    "z-loss": {"type": "z_loss"},
    **{p: {"type": "sharpness", "penalty": p} for p in PENALTIES},
}
"""Losses whose cost on top of cross-entropy is compared with a softmax pass."""
MAX_TIME_RATIO, MAX_MEMORY_RATIO = 1.0, 0.125


@dataclass(frozen=True)
class Case:
    tokens: int = 8192
    vocab_size: int = 50257
    hidden_size: int = 256
    precision: str = "fp32"  # or bf16 for autocast over fp32 weights
    mix: str = "CE"
    plain_pieces: int = 1


CASES = [Case(mix=mix) for mix in MIXES]
CASES += [Case(vocab_size=151936, mix=mix, plain_pieces=4) for mix in MIXES]
CASES += [Case(hidden_size=768), Case(precision="bf16"), Case(hidden_size=768, precision="bf16")]
CASES = sized(
    CASES,
    [Case(tokens=1024, vocab_size=5000, hidden_size=16, plain_pieces=pieces) for pieces in (1, 2)],
)
REPETITIONS = sized(3, 1)


@dataclass
class Result:
    plain_seconds: list[float]
    chunked_seconds: list[float]
    plain_bytes: int
    chunked_bytes: int
    gradient_difference: float  # the largest, over the largest entry of the plain gradient
    loss_difference: float

    @property
    def time_ratios(self) -> list[float]:
        return [chunked / plain for chunked, plain in zip(self.chunked_seconds, self.plain_seconds)]

    @property
    def memory_ratio(self) -> float:
        return self.chunked_bytes / self.plain_bytes


def measure(case: Case, repetitions: int) -> Result:
    """Both sides of one case."""
    chunked_bytes = in_a_process(_peak_bytes, case, "chunked")
    if case.plain_pieces == 1:
        plain_bytes = in_a_process(_peak_bytes, case, "plain")
    else:
        half, whole = (
            replace(case, tokens=case.tokens // (case.plain_pieces * k), plain_pieces=1)
            for k in (2, 1)
        )
        small, large = (
            in_a_process(_peak_bytes, half, "plain"),
            in_a_process(_peak_bytes, whole, "plain"),
        )
        plain_bytes = large + (large - small) * (case.tokens - whole.tokens) // (
            whole.tokens - half.tokens
        )
    hidden, weight, labels = _tensors(case)
    runs: dict[str, Callable] = {"plain": plain, "chunked": chunked}
    seconds: dict[str, list[float]] = {"plain": [], "chunked": []}
    found: dict[str, Any] = {}
    for repetition in range(repetitions + 1):
        for side in ("plain", "chunked") if repetition % 2 else ("chunked", "plain"):
            hidden.grad = weight.grad = None
            began = now()
            loss = runs[side](hidden, weight, labels, case)
            if repetition:  # the first warms up, and is compared
                seconds[side].append(now() - began)
            else:
                assert hidden.grad is not None and weight.grad is not None
                found[side] = (loss.detach(), hidden.grad, weight.grad)
            del loss
    (loss, *gradients), (chunked_loss, *chunked_gradients) = found["plain"], found["chunked"]
    difference = max(
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(gradients, chunked_gradients)
    )
    loss_difference = abs(float(chunked_loss - loss))
    return Result(
        seconds["plain"],
        seconds["chunked"],
        plain_bytes,
        chunked_bytes,
        difference,
        loss_difference,
    )


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, case: Case) -> Tensor:
    """The sum of the mix's losses over the mean of the tokens, backward included."""
    total = torch.zeros((), device=hidden.device)
    for rows, targets in zip(hidden.chunk(case.plain_pieces), labels.chunk(case.plain_pieces)):
        loss = _plain_losses(rows, weight, targets, case) / len(labels)
        loss.backward()
        total += loss.detach()
    return total


def _plain_losses(hidden: Tensor, weight: Tensor, labels: Tensor, case: Case) -> Tensor:
    if case.mix == "harmonic":  # its authors' recipe is fp32 throughout
        distances = 2.0 - 2.0 * (F.normalize(hidden, dim=1) @ F.normalize(weight, dim=1).T).clamp(
            -1.0, 1.0
        )
        return F.cross_entropy(-8.0 * torch.log(distances + 1e-8), labels, reduction="sum")
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
        logits = F.linear(hidden, weight)  # (P, V)
    logits = logits.float()
    total = F.cross_entropy(logits, labels, reduction="sum")
    if case.mix == "CE":
        return total
    p = logits.softmax(dim=1)
    for loss in MIXES[case.mix][1:]:
        if loss["type"] == "cosine":
            mean = p @ weight
            if "topk" in loss:
                kept = p.topk(loss["topk"], dim=1)
                mean = torch.zeros_like(p).scatter(1, kept.indices, kept.values) @ weight
            total = total + (1.0 - F.cosine_similarity(mean, weight[labels], dim=1)).sum()
        else:
            total = total + 0.01 * _plain_penalty(loss["penalty"], p)
    return total


def _plain_penalty(penalty: str, p: Tensor) -> Tensor:
    if penalty == "neg_entropy":
        return -(p * torch.log(p + 1e-10)).sum()
    if penalty == "top_k_mass":
        return (1.0 - p.topk(5, dim=1).values.sum(dim=1)).sum()
    best = p.max(dim=1).values
    return (1.0 - best).sum() if penalty == "non_max_sum" else -best.sum()


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, case: Case) -> Tensor:
    """The same by the stack."""
    loss = _stack_loss(MIXES[case.mix], hidden, weight, labels, case.precision)
    loss.backward()
    return loss


def _stack_loss(
    losses: list[dict], hidden: Tensor, weight: Tensor, labels: Tensor, precision: str
) -> Tensor:
    zeros = torch.zeros_like(labels)[None]
    batch = Batch(labels[None], labels[None], zeros, zeros, zeros, packed=False)
    stack = LossStack(_built(losses))
    readout = (DistanceReadout if losses[0]["type"] == "harmonic" else LinearReadout)(weight)
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return stack(ModelOutput(hidden[None], readout), batch, stack.count(batch), 0.0, 1)[0]


def cost_of_one_more(vocab_size: int, repetitions: int) -> dict[str, float]:
    """Microseconds a position that each loss of ALONE adds to cross-entropy, and those of a softmax
    pass; medians.

    On one block of scores, as the stack cuts them: a whole step's products would hide a pass in
    their noise, and are the same with and without it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = BLOCK_BYTES[device] // (4 * vocab_size)
    scores, labels = (
        torch.randn(rows, vocab_size, device=device),
        torch.randint(vocab_size, (rows,), device=device),
    )
    out, table, scratch = (
        torch.empty_like(scores),
        torch.randn(vocab_size, 4, device=device),
        Scratch(scores),
    )

    def answer(losses: list[Any]) -> None:
        scratch.give_back()
        chunk = Chunk(scores, labels, table, 0.0, scratch)
        gradient = Gradient(chunk)
        for loss in losses:
            loss.per_token(chunk)
            loss.add_gradient(chunk, 0.1, gradient)
        gradient.write(out)

    jobs: dict[str, Callable[[], Any]] = {"CE": partial(answer, _built([CE]))}
    jobs |= {name: partial(answer, _built([CE, loss])) for name, loss in ALONE.items()}
    jobs["a softmax pass"] = partial(torch.softmax, scores, dim=1, out=out)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(repetitions + 3):
        for name, job in jobs.items():
            began = now()
            job()
            if repetition >= 3:
                seconds[name].append(now() - began)
    found = {name: 1e6 * statistics.median(values) / rows for name, values in seconds.items()}
    return {name: value - found["CE"] if name in ALONE else value for name, value in found.items()}


def _built(losses: list[dict]) -> list[Any]:
    return [LOSSES[each["type"]][1](LOSSES[each["type"]][0](**each)) for each in losses]


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, case.hidden_size, generator=generator)  # (P, D)
    # (V, D)
    weight = torch.randn(case.vocab_size, case.hidden_size, generator=generator).mul_(
        case.hidden_size**-0.5
    )
    labels = torch.randint(case.vocab_size, (case.tokens,), generator=generator)  # (P,)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device)


def _peak_bytes(case: Case, side: str) -> int:
    run = {"plain": plain, "chunked": chunked}[side]
    small = replace(case, tokens=8, vocab_size=512, plain_pieces=1)
    run(*_tensors(small), small)  # threads and libraries are not the loss's
    tensors = _tensors(case)
    return peak_bytes(lambda: run(*tensors, case))


def main() -> None:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    keep_freed_memory()  # as main.py does, and for both sides
    print(f"{device}, torch {torch.__version__}, {REPETITIONS} repetitions")
    heads = [
        "losses",
        "tokens",
        "vocab",
        "D",
        "prec",
        "plain s",
        "chunked s",
        "ratio (min-max)",
        "plain MB",
        "chunked MB",
        "ratio",
    ]
    print(
        "{:<21} {:>7} {:>7} {:>4}  {}   {} {:>10}  {:<21}  {:>10} {:>11}  {}".format(*heads),
        " gradient diff  loss diff",
    )
    worst_time = worst_memory = 0.0
    for case in CASES:
        result = measure(case, REPETITIONS)
        ratios = result.time_ratios
        ratio = statistics.median(ratios)
        worst_time, worst_memory = max(worst_time, ratio), max(worst_memory, result.memory_ratio)
        mark = "~" if case.plain_pieces > 1 else " "
        print(
            f"{case.mix:<21} {case.tokens:>7,} {case.vocab_size:>7,} {case.hidden_size:>4}  "
            f"{case.precision}"
            f"  {statistics.median(result.plain_seconds):8.2f} "
            f"{statistics.median(result.chunked_seconds):10.2f}"
            f"  {ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
            f"  {mark}{result.plain_bytes / 1e6:9.0f} {result.chunked_bytes / 1e6:11.0f}  "
            f"{result.memory_ratio:.3f}"
            f"  {result.gradient_difference:13.1e}  {result.loss_difference:9.1e}",
            flush=True,
        )
    print(
        "what one more loss adds to cross-entropy, microseconds a position at 50,257, without the "
        "products:"
    )
    print(
        "  "
        + ", ".join(
            f"{name} {value:.1f}"
            for name, value in cost_of_one_more(*sized((50257, 100), (300, 1))).items()
        )
    )
    met = worst_time <= MAX_TIME_RATIO and worst_memory <= MAX_MEMORY_RATIO
    wanted = f"time at most {MAX_TIME_RATIO:g} and memory at most {MAX_MEMORY_RATIO:g} of plain"
    print(
        f"wanted: {wanted}; {'met' if met else 'NOT MET'}, with {worst_time:.3f} and "
        f"{worst_memory:.3f} at worst"
    )


if __name__ == "__main__":
    main()
