"""The chunked readout and loss against the plain computation: time, memory and gradients, side by side.

    python benchmarks/readout.py

Plain is hidden @ weight.T, cast to fp32, F.cross_entropy, backward. Times come from one process that runs both by turns, so
that a busy machine slows both; a ratio below 1 means the stack is faster. Memory is the peak a side adds to what it starts
with, gradients included, each side in a process of its own.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.contracts import Batch, ModelOutput
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.readout import LinearReadout

TOKENS, VOCAB_SIZE = 4096, 50257
HIDDEN_SIZES = (256, 768)
PRECISIONS = ("fp32", "bf16")
REPETITIONS = 7
MAX_TIME_RATIO, MAX_MEMORY_RATIO = 1.0, 0.2


@dataclass
class Case:
    tokens: int
    vocab_size: int
    hidden_size: int
    precision: str  # fp32, or bf16 for autocast over fp32 weights


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
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:  # one process for each, so that neither sees the other's heap
        plain_bytes, chunked_bytes = (pool.apply(_peak_bytes, (case, side)) for side in ("plain", "chunked"))
    hidden, weight, labels = _tensors(case)
    runs: dict[str, Callable] = {"plain": plain, "chunked": chunked}
    seconds: dict[str, list[float]] = {"plain": [], "chunked": []}
    found = {}
    for repetition in range(repetitions + 1):
        for side in ("plain", "chunked") if repetition % 2 else ("chunked", "plain"):
            hidden.grad = weight.grad = None
            began = _now(hidden)
            loss = runs[side](hidden, weight, labels, case.precision)
            if repetition:  # the first warms up, and is compared
                seconds[side].append(_now(hidden) - began)
            else:
                found[side] = (loss.detach(), hidden.grad, weight.grad)
            del loss
    (loss, *gradients), (chunked_loss, *chunked_gradients) = found["plain"], found["chunked"]
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(gradients, chunked_gradients))
    loss_difference = abs(float(chunked_loss - loss))
    return Result(seconds["plain"], seconds["chunked"], plain_bytes, chunked_bytes, difference, loss_difference)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, precision: str) -> Tensor:
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = F.linear(hidden, weight)  # (P, V)
    loss = F.cross_entropy(logits.float(), labels)
    del logits
    loss.backward()
    return loss


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, precision: str) -> Tensor:
    zeros = torch.zeros_like(labels)[None]
    batch = Batch(labels[None], labels[None], zeros, zeros, zeros, packed=False)
    stack = LossStack([CrossEntropy(CrossEntropySettings())])
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss, _ = stack(ModelOutput(hidden[None], LinearReadout(weight)), batch, stack.count(batch), 0.0, 1)
    loss.backward()
    return loss


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, case.hidden_size, generator=generator)  # (P, D)
    weight = torch.randn(case.vocab_size, case.hidden_size, generator=generator).mul_(case.hidden_size**-0.5)  # (V, D)
    labels = torch.randint(case.vocab_size, (case.tokens,), generator=generator)  # (P,)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device)


def _now(hidden: Tensor) -> float:
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes(case: Case, side: str) -> int:
    run = {"plain": plain, "chunked": chunked}[side]
    run(*_tensors(Case(8, 64, case.hidden_size, case.precision)), case.precision)  # threads and libraries are not the loss's
    tensors = _tensors(case)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(*tensors, case.precision)
        return torch.cuda.max_memory_allocated() - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():  # not Linux: the highest so far, which the tensors themselves hardly raised
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(*tensors, case.precision)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    clear.write_text("5")  # forget the peak so far
    before = _status_bytes(status, "VmRSS")
    run(*tensors, case.precision)
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, field: str) -> int:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{TOKENS:,} tokens x {VOCAB_SIZE:,} vocabulary on {device}, torch {torch.__version__}, {REPETITIONS} repetitions")
    print("  D    prec   plain s  chunked s   time ratio (min-max)     plain MB  chunked MB  ratio   gradient diff   loss diff")
    worst_time = worst_memory = 0.0
    for hidden_size in HIDDEN_SIZES:
        for precision in PRECISIONS:
            result = measure(Case(TOKENS, VOCAB_SIZE, hidden_size, precision), REPETITIONS)
            ratios = result.time_ratios
            ratio = statistics.median(ratios)
            worst_time, worst_memory = max(worst_time, ratio), max(worst_memory, result.memory_ratio)
            print(
                f"  {hidden_size:<4} {precision}  {statistics.median(result.plain_seconds):8.3f}  "
                f"{statistics.median(result.chunked_seconds):9.3f}   {ratio:10.3f} ({min(ratios):.3f}-{max(ratios):.3f})  "
                f"{result.plain_bytes / 1e6:11.0f}  {result.chunked_bytes / 1e6:10.0f}  {result.memory_ratio:.3f}"
                f"   {result.gradient_difference:13.1e}   {result.loss_difference:9.1e}",
                flush=True,
            )
    met = worst_time <= MAX_TIME_RATIO and worst_memory <= MAX_MEMORY_RATIO
    wanted = f"time at most {MAX_TIME_RATIO:g} and memory at most {MAX_MEMORY_RATIO:g} of plain"
    print(f"wanted: {wanted}; {'met' if met else 'NOT MET'}, with {worst_time:.3f} and {worst_memory:.3f} at worst")


if __name__ == "__main__":
    main()
