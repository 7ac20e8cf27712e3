"""PolyGLU against its formula written plainly: time and memory of one block, and of a whole model,
forward and backward.

    python benchmarks/polyglu.py

Plain is the model by its formulas, as the paper has them: four activations stacked into (B, T, F,
4), a softmax over the four for every neuron (and, with the causal pool, every position), their
product summed; attention as a masked softmax of all scores, with keys and values repeated; logits
of all positions at once. Stacked is ours with the plain mixture alone: what the fused mixture is
worth by itself. Compiled is ours under torch.compile, as presets have it for long runs. All sides
run by turns in one process; a ratio above 1 means that ours is faster. Memory: bytes kept for the
backward pass, and the peak that forward and backward add, each side in a process of its own, ours
over plain.

On a GPU the full model (597M parameters, 8 rows of 4,096 tokens, bf16, compiled) is measured as
well: tokens a second, and the share of the chip's bf16 peak.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import in_a_process, now, peak_bytes, sized
from core.contracts import Batch
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.attention import DocumentMask, compute_dtype
from core.models.grouped_query import rotate
from core.models.polychromatic import (
    PolychromaticLM,
    PolychromaticSettings,
    RMSNorm,
    TransformerBlock,
)
from core.models.polyglu_layer import Pass, PolyGLU, RoutingSettings, gumbel
from core.runtime import detect_runtime, keep_freed_memory

VOCAB_SIZE = 2048
WANTED = (
    {"sequence": 1.5, "causal": 2.0}
    if not torch.cuda.is_available()
    else {"sequence": 4.0, "causal": 4.0}
)
"""How many times faster ours is to be."""
MAX_MEMORY_RATIO = 1 / 3
COMPILED = sized(("compiled",), ())  # compiling takes the longest
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 products a second, by what the device's name contains."""
REPETITIONS = sized(5, 1)


@dataclass(frozen=True)
class Case:
    name: str  # "the mixture" (with W_down), "a block" or "a model"
    pool: Literal["causal", "sequence"]
    precision: str = "fp32"
    rows: int = 16
    seq_length: int = 256
    hidden_size: int = 128
    num_layers: int = 1


SIZES = [("the mixture", 1), ("a block", 1), ("a model", 4)]
CASES = [
    Case(name, pool, precision, num_layers=layers)
    for precision in ("fp32", "bf16")
    for name, layers in SIZES
    for pool in ("sequence", "causal")
]
CASES = sized(
    CASES, [Case(name, "causal", rows=2, seq_length=32, hidden_size=64) for name, _ in SIZES[:2]]
)
FULL = Case("a model", "causal", "bf16", rows=8, seq_length=4096, hidden_size=1024, num_layers=28)


def plain_routed(
    self: PolyGLU, gate: Tensor, up: Tensor, f: Tensor, shared: Any, layer: int
) -> Tensor:
    """PolyGLU's mixture by its formula; takes the place of `PolyGLU._routed`."""
    static = self.alpha + gumbel(len(gate), *self.alpha.shape, like=self.alpha)  # (B, F, 4)
    # (B, 1 or T, F, 4)
    weights = torch.softmax((static[:, None] + (self.beta * f)[:, :, None]) / shared.tau, dim=-1)
    acts = [torch.relu(gate), torch.tanh(gate), nn.functional.silu(gate), nn.functional.gelu(gate)]
    mixed = (torch.stack(acts, dim=-1) * weights).sum(-1).to(gate.dtype) * up  # (B, T, F)
    return nn.functional.linear(mixed, self.W_down.weight.to(gate.dtype))


def plain_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.gama


def plain_block(
    self: TransformerBlock, x: Tensor, shared: Any, layer: int
) -> tuple[Tensor, Tensor]:
    """Compute a block by its formulas; takes the place of `TransformerBlock.forward`."""
    gqa, glu, T = self.gqa, self.feed_forward, x.shape[1]
    assert isinstance(glu, PolyGLU)
    h = plain_norm(self.rmsnorm_1, x)
    q, k, v = (W(h).unflatten(-1, (-1, gqa.head_dim)) for W in (gqa.W_q, gqa.W_k, gqa.W_v))
    q, k = (
        rotate(plain_norm(n, y), shared.turn) for n, y in ((gqa.rmsnorm_q, q), (gqa.rmsnorm_k, k))
    )
    groups = q.shape[2] // k.shape[2]
    # (B, H, T, Dh)
    q, k, v = q.transpose(1, 2), *(y.repeat_interleave(groups, 2).transpose(1, 2) for y in (k, v))
    scores = q @ k.transpose(-1, -2) / gqa.head_dim**0.5  # (B, H, T, T)
    hidden_from = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    mixed = (
        torch.softmax(scores.float().masked_fill(hidden_from, float("-inf")), dim=-1).to(v.dtype)
        @ v
    )
    x = x + gqa.W_o(mixed.transpose(1, 2).flatten(2))
    h = plain_norm(self.rmsnorm_2, x)
    with torch.autocast(x.device.type, enabled=False):
        if glu.routing.pool == "sequence":
            f = glu.gate_net(h.float().mean(1, keepdim=True))
        else:
            f = glu.gate_net(h.float().cumsum(1) / torch.arange(1, T + 1, device=x.device)[:, None])
    return x + plain_routed(glu, glu.W_gate(h), glu.W_up(h), f, shared, layer), f


@contextmanager
def as_side(side: str) -> Iterator[None]:
    """ "ours", "compiled", "stacked" or "plain" """
    routed = plain_routed if side in ("stacked", "plain") else PolyGLU._routed
    forward = plain_block if side == "plain" else TransformerBlock.forward
    with (
        mock.patch.object(PolyGLU, "_routed", routed),
        mock.patch.object(TransformerBlock, "forward", forward),
    ):
        yield


def build(case: Case, side: str = "ours") -> tuple[PolychromaticLM, Callable[[], Tensor]]:
    """The model, and one forward and backward pass that returns the loss."""
    device = detect_runtime().device
    heads = max(2, case.hidden_size // 64)
    settings = PolychromaticSettings(
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        seq_length=case.seq_length,
        routing=RoutingSettings(pool=case.pool, tau=0.5),
    )
    torch.manual_seed(0)
    vocab_size = 151_669 if case is FULL else VOCAB_SIZE
    model = PolychromaticLM(settings, vocab_size).to(device).train()
    ids = torch.randint(0, vocab_size, (case.rows, case.seq_length), device=device)
    zeros, positions = (
        torch.zeros_like(ids, dtype=torch.int32),
        torch.arange(case.seq_length, device=device).expand_as(ids),
    )
    batch = Batch(ids, ids.roll(-1, 1), positions, zeros, zeros, packed=False)
    stack = LossStack([CrossEntropy(CrossEntropySettings())])
    wide = (case.rows, case.seq_length, settings.neurons) if case.name == "the mixture" else (0,)
    gate_up = torch.randn(wide, device=device), torch.randn(wide, device=device)

    def run() -> Tensor:
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            if case.name == "a model" and side == "plain":
                hidden = model(batch).hidden
                logits = nn.functional.linear(hidden, model.embeddings.weight).float()  # (B, T, V)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            elif case.name == "a model":
                loss = stack(model(batch), batch, ids.numel(), 0.0, 1)[0]
            else:
                loss = _part(model, batch, case.name, gate_up)
        loss.backward()
        return loss.detach()

    return model, run


def _part(
    model: PolychromaticLM, batch: Batch, name: str, gate_up: tuple[Tensor, Tensor]
) -> Tensor:
    """A scalar that depends on all of the one block's output, or on all of its mixture's."""
    x = model.embeddings(batch.input_ids)
    mask = DocumentMask.of(batch, compute_dtype(x), model.settings.head_dim)
    turn = model.rope(batch.position_ids)
    shared = Pass(mask=mask, turn=turn, position_ids=batch.position_ids, tau=model.tau)
    block = model.model_core[0]
    assert isinstance(block, TransformerBlock) and isinstance(block.feed_forward, PolyGLU)
    if name == "a block":
        return block(x, shared, 0)[0].square().mean()
    gate, up = (t.detach().to(mask.dtype).requires_grad_() for t in gate_up)
    with torch.autocast(x.device.type, enabled=False):
        layer = block.feed_forward
        return layer._routed(gate, up, layer._gates(x, shared, 0), shared, 0).square().mean()


def kept_bytes(case: Case, side: str) -> int:
    """Count what a forward pass keeps for the backward pass, parameters left out."""
    model, run = build(case, side)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with as_side(side), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def peak(case: Case, side: str) -> int:
    _, small = build(
        Case(case.name, case.pool, case.precision, rows=1, seq_length=8, hidden_size=64)
    )
    _, run = build(case, side)
    with as_side(side):
        small()  # threads and libraries are not the formula's
        return peak_bytes(run)


def measure(case: Case, sides: tuple[str, ...]) -> tuple[dict[str, list[float]], float]:
    """Seconds of each side, by turns, and how far our gradient is from the plain one, over its
    length."""
    runs = {side: build(case, side) for side in sides}
    if "compiled" in runs:
        model = runs["compiled"][0]
        (model if case.name == "a model" else model.model_core[0]).compile()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for repetition in range(REPETITIONS + 1):
        for side in sides if repetition % 2 else sides[::-1]:
            with as_side(side):
                began = now()
                runs[side][1]()
                if repetition:  # the first warms up
                    seconds[side].append(now() - began)
    ours, plain = (
        torch.cat([p.grad.flatten() for p in runs[side][0].parameters() if p.grad is not None])
        for side in ("ours", sides[-1])
    )
    return seconds, float((ours - plain).norm() / plain.norm())


def ratios(seconds: dict[str, list[float]], slow: str, fast: str = "ours") -> list[float]:
    return [theirs / ours for theirs, ours in zip(seconds[slow], seconds[fast])]


def spread(seconds: dict[str, list[float]], slow: str, fast: str = "ours") -> str:
    found = ratios(seconds, slow, fast)
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


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
    peak_flops = next(
        (flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None
    )
    share = (
        f"{tokens * (6 * parameters + attention) / peak_flops:.1%} of the chip's bf16 peak"
        if peak_flops
        else "chip not known"
    )
    return (
        f"597M, {FULL.rows} x {FULL.seq_length}, bf16, compiled: {tokens:,.0f} tokens/s, "
        f"{share} (wanted: 40 %)"
    )


def main() -> None:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    keep_freed_memory()  # as main.py does, and for both sides
    print(f"{device}, torch {torch.__version__}, {REPETITIONS} repetitions")
    times = ["plain s", "ours s", "plain / ours", "stacked / ours", "plain / compiled"]
    heads = ["what", "pool", "prec", *times, "kept MB", "ratio", "peak MB", "ratio"]
    print(
        "{:<12} {:<9} {:<5} {:>8} {:>8}  {:<18} {:<18} {:<18} {:>8} {:>6} {:>8} {:>6}  "
        "apart".format(*heads)
    )
    met = True
    for case in CASES:
        sides = (
            ("ours", "stacked")
            if case.name == "the mixture"
            else ("ours", *COMPILED, "stacked", "plain")
        )
        seconds, apart = measure(case, sides)
        plain = sides[-1]
        kept = {side: in_a_process(kept_bytes, case, side) for side in ("ours", plain)}
        peaks = {side: in_a_process(peak, case, side) for side in ("ours", plain)}
        best = max(
            statistics.median(ratios(seconds, plain, side))
            for side in sides
            if side in ("ours", "compiled")
        )
        met &= best >= WANTED[case.pool] and kept["ours"] <= MAX_MEMORY_RATIO * kept[plain]
        print(
            f"{case.name:<12} {case.pool:<9} {case.precision:<5} "
            f"{statistics.median(seconds[plain]):8.3f}"
            f" {statistics.median(seconds['ours']):8.3f}  {spread(seconds, plain):<18} "
            f"{spread(seconds, 'stacked'):<18}"
            f" {spread(seconds, plain, 'compiled') if 'compiled' in sides else '-':<18}"
            f" {kept['ours'] / 1e6:8.1f} {kept['ours'] / kept[plain]:6.3f}"
            f" {peaks['ours'] / 1e6:8.1f} {peaks['ours'] / peaks[plain]:6.3f}  {apart:.1e}",
            flush=True,
        )
    print(
        f"wanted: {WANTED} times faster, at most a third of the memory kept; "
        f"{'met' if met else 'NOT MET'} everywhere"
    )
    if torch.cuda.is_available():
        print(full_model())


if __name__ == "__main__":
    main()
