"""PolyGLU against its formula written plainly: time and memory of one block, and of a whole model, forward and backward.

    python benchmarks/polyglu.py

Plain is the formula as the paper has it: four activations stacked into (B, T, F, 4), a softmax over the four for every neuron
(and, with the causal pool, every position), their product summed. Everything else, attention, norms, readout, is the same on
both sides, so the ratio is what the fused mixture is worth. Both sides run by turns in one process; a ratio above 1 means that
ours is faster. Memory: bytes kept for the backward pass, and the peak that forward and backward add, each side in a process
of its own.

On a GPU the full model (597M parameters, 8 rows of 4,096 tokens, bf16, compiled) is measured as well: tokens a second, and the
share of the chip's bf16 peak.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import in_a_process, now, peak_bytes
from core.contracts import Batch
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models import polychromatic
from core.models.polychromatic import PolychromaticLM, PolychromaticSettings, PolyGLU, gumbel
from core.runtime import detect_runtime, keep_freed_memory

VOCAB_SIZE = 2048
WANTED = {"sequence": 1.5, "causal": 2.0} if not torch.cuda.is_available() else {"sequence": 4.0, "causal": 4.0}
"""How many times faster ours is to be."""
MAX_MEMORY_RATIO = 1 / 3
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 products a second, by what the device's name contains."""
REPETITIONS = 5


@dataclass(frozen=True)
class Case:
    name: str  # "the mixture", "a block" or "a model"
    pool: str
    precision: str = "fp32"
    rows: int = 8
    seq_length: int = 256
    hidden_size: int = 256
    num_layers: int = 1


SIZES = [("the mixture", 1), ("a block", 1), ("a model", 4)]
CASES = [
    Case(name, pool, precision, num_layers=layers)
    for precision in ("fp32", "bf16")
    for name, layers in SIZES
    for pool in ("sequence", "causal")
]
FULL = Case("a model", "causal", "bf16", rows=8, seq_length=4096, hidden_size=1024, num_layers=28)


def plain_routed(self: PolyGLU, gate: Tensor, up: Tensor, f: Tensor, tau: Tensor) -> Tensor:
    """PolyGLU's mixture by its formula; takes the place of `PolyGLU._routed`."""
    static = self.alpha + gumbel(len(gate), *self.alpha.shape, like=self.alpha)  # (B, F, 4)
    weights = torch.softmax((static[:, None] + (self.beta * f)[:, :, None]) / tau, dim=-1)  # (B, 1 or T, F, 4)
    acts = [torch.relu(gate), torch.tanh(gate), nn.functional.silu(gate), nn.functional.gelu(gate)]
    mixed = (torch.stack(acts, dim=-1) * weights).sum(-1).to(gate.dtype) * up  # (B, T, F)
    return nn.functional.linear(mixed, self.W_down.weight.to(gate.dtype))


@contextmanager
def as_side(side: str) -> Iterator[None]:
    ours = PolyGLU._routed
    PolyGLU._routed = plain_routed if side == "plain" else ours
    try:
        yield
    finally:
        PolyGLU._routed = ours


def build(case: Case) -> tuple[PolychromaticLM, Callable[[], Tensor]]:
    """The model, and one forward and backward pass that returns the loss."""
    device = detect_runtime().device
    heads = max(2, case.hidden_size // 64)
    settings = PolychromaticSettings(
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        seq_length=case.seq_length,
        routing={"pool": case.pool, "tau": 0.5},
    )
    torch.manual_seed(0)
    vocab_size = 151_669 if case is FULL else VOCAB_SIZE
    model = PolychromaticLM(settings, vocab_size).to(device).train()
    ids = torch.randint(0, vocab_size, (case.rows, case.seq_length), device=device)
    zeros, positions = torch.zeros_like(ids, dtype=torch.int32), torch.arange(case.seq_length, device=device).expand_as(ids)
    batch = Batch(ids, ids.roll(-1, 1), positions, zeros, zeros, packed=False)
    stack = LossStack([CrossEntropy(CrossEntropySettings())])

    def run() -> Tensor:
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            if case.name == "a model":
                loss = stack(model(batch), batch, ids.numel(), 0.0, 1)[0]
            else:
                loss = _part(model, batch, case.name)
        loss.backward()
        return loss.detach()

    return model, run


def _part(model: PolychromaticLM, batch: Batch, name: str) -> Tensor:
    """A scalar that depends on all of the one block's output, or on all of its mixture's."""
    x = model.embeddings(batch.input_ids).detach().requires_grad_()
    mask = polychromatic.DocumentMask.of(batch, polychromatic.compute_dtype(x), model.settings.head_dim)
    shared = polychromatic.Pass(mask, batch.position_ids, model.rope(batch.position_ids), model.tau)
    block = model.model_core[0]
    if name == "a block":
        return block(x, shared, 0)[0].square().mean()
    gate = torch.randn(*x.shape[:2], model.settings.neurons, device=x.device, dtype=mask.dtype).requires_grad_()
    with torch.autocast(x.device.type, enabled=False):
        f = block.polyglu._gates(x, shared, 0)
        return block.polyglu._routed(gate, gate.detach().clone().requires_grad_(), f, model.tau).square().mean()


def kept_bytes(case: Case, side: str) -> int:
    """What a forward pass keeps for the backward pass, parameters left out."""
    model, run = build(case)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with as_side(side), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def peak(case: Case, side: str) -> int:
    _, small = build(Case(case.name, case.pool, case.precision, rows=1, seq_length=8, hidden_size=64))
    _, run = build(case)
    with as_side(side):
        small()  # threads and libraries are not the formula's
        return peak_bytes(run)


def measure(case: Case) -> dict[str, Any]:
    """Seconds of both sides, by turns, and the largest difference of their gradients over the largest gradient."""
    model, run = build(case)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    gradients = {}
    for repetition in range(REPETITIONS + 1):
        for side in ("plain", "ours") if repetition % 2 else ("ours", "plain"):
            with as_side(side):
                began = now()
                run()
                if repetition:  # the first warms up
                    seconds[side].append(now() - began)
                else:
                    gradients[side] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"])]
    apart = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(*gradients.values()))
    return {"seconds": seconds, "ratios": ratios, "apart": apart}


def full_model() -> str:
    """Speed of the 597M model, compiled as the presets have it."""
    model, run = build(FULL)
    model.compile()
    for _ in range(3):
        run()
    began = now()
    for _ in range(REPETITIONS):
        run()
    tokens = REPETITIONS * FULL.rows * FULL.seq_length / (now() - began)
    parameters = sum(p.numel() for p in model.parameters())
    attention = 6 * FULL.num_layers * FULL.seq_length * FULL.hidden_size  # causal: half of 12 L T D
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    share = (
        f"{tokens * (6 * parameters + attention) / peak_flops:.1%} of the chip's bf16 peak" if peak_flops else "chip not known"
    )
    return f"597M, {FULL.rows} x {FULL.seq_length}, bf16, compiled: {tokens:,.0f} tokens/s, {share} (wanted: 40 %)"


def main() -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    keep_freed_memory()  # as main.py does, and for both sides
    print(f"{device}, torch {torch.__version__}, {REPETITIONS} repetitions; ratios are plain / ours, of memory ours / plain")
    heads = (
        "what",
        "pool",
        "prec",
        "plain s",
        "ours s",
        "ratio (min-max)",
        "kept MB",
        "ratio",
        "peak MB",
        "ratio",
        "gradients apart",
    )
    print("{:<12} {:<9} {:<5} {:>8} {:>8}  {:<20} {:>8} {:>6} {:>8} {:>6} {:>16}".format(*heads))
    met = True
    for case in CASES:
        found = measure(case)
        kept = {side: in_a_process(kept_bytes, case, side) for side in ("plain", "ours")}
        peaks = {side: in_a_process(peak, case, side) for side in ("plain", "ours")}
        ratio, kept_ratio = statistics.median(found["ratios"]), kept["ours"] / kept["plain"]
        met &= ratio >= WANTED[case.pool] or case.name == "the mixture"
        plain, ours = (statistics.median(found["seconds"][side]) for side in ("plain", "ours"))
        print(
            f"{case.name:<12} {case.pool:<9} {case.precision:<5} {plain:8.3f} {ours:8.3f}"
            f"  {ratio:.2f} ({min(found['ratios']):.2f}-{max(found['ratios']):.2f})".ljust(60)
            + f"{kept['ours'] / 1e6:8.1f} {kept_ratio:6.3f} {peaks['ours'] / 1e6:8.1f} {peaks['ours'] / peaks['plain']:6.3f}"
            f" {found['apart']:16.1e}",
            flush=True,
        )
    print(f"wanted: block and model at least {WANTED} times faster; {'met' if met else 'NOT MET'}")
    if torch.cuda.is_available():
        print(full_model())


if __name__ == "__main__":
    main()
