"""The savings of freezing: NeoBERT's last block and head trained, against all of it, in one run.

    python benchmarks/frozen.py [rows] [seq_length]

The published architecture (28 blocks, 768 wide, 30,522 tokens) with random weights and both heads,
bf16 where native, a fifth of the tokens masked. Each side runs in a process of its own, the sides
taking turns. Prints what a step adds to the weights at its peak (activations, gradients, AdamW),
what of it is kept for the backward pass, and the median seconds of a step."""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import in_a_process, now, peak_bytes, sized
from core.contracts import IGNORE_INDEX, Batch
from core.losses.harmonic import Harmonic, HarmonicSettings
from core.losses.stack import LossStack
from core.models.neobert import NeoBERT, NeoBERTSettings
from core.runtime import detect_runtime
from core.training.freezing import train_only

SIZES: dict[str, Any] = sized(
    {}, {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
)
LAST = sized(27, 1)
SIDES = {
    "everything": None,
    f"block {LAST} and prototypes": [f"transformer_encoder.{LAST}", "dist_head"],
}
REPETITIONS, STEPS = sized((3, 3), (1, 1))
VOCAB_SIZE, MASKED = sized(30_522, 300), 0.2
SHAPE = sized(("2", "512"), ("2", "64"))


def measure(side: str, rows: int, seq_length: int) -> dict[str, float]:
    """GB at the peak, GB kept for the backward pass, median seconds of a step, parameters
    trained."""
    runtime = detect_runtime()
    torch.manual_seed(0)
    dtype, device = runtime.compute_dtype("auto"), runtime.device
    model = NeoBERT(NeoBERTSettings(head="distance", prototypes="decoder", **SIZES), VOCAB_SIZE).to(
        device
    )
    train_only(model, SIDES[side])
    stack = LossStack([Harmonic(HarmonicSettings())])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ids = torch.randint(0, VOCAB_SIZE, (rows, seq_length), device=device)
    labels = torch.where(torch.rand(rows, seq_length, device=device) < MASKED, ids, IGNORE_INDEX)
    positions = torch.arange(seq_length, device=device).expand(rows, seq_length)
    documents, sources = (positions // 512).int(), torch.zeros_like(ids, dtype=torch.int32)
    batch = Batch(ids, labels, positions % 512, documents, sources, packed=True)
    count = int((labels >= 0).sum())
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):  # weights are there anyway
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = stack(model(batch), batch, count, 0.0, 1)
        loss.backward()
        optimizer.step()
        model.after_optimizer_step()
        optimizer.zero_grad()

    peak = peak_bytes(step)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype=dtype),
    ):
        model(batch)
    seconds = []
    for _ in range(STEPS):
        started = now()
        step()
        seconds.append(now() - started)
    return {
        "peak": peak / 2**30,
        "kept": sum(kept.values()) / 2**30,
        "seconds": statistics.median(seconds),
        "trained": sum(p.numel() for p in trained) / 1e6,
    }


def main() -> None:
    rows, seq_length = (int(text) for text in (*sys.argv[1:], *SHAPE[len(sys.argv) - 1 :]))
    print(f"{rows} x {seq_length} tokens")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(REPETITIONS):
        for side in SIDES:
            found[side].append(in_a_process(measure, side, rows, seq_length))
    first = found["everything"]
    for side, runs in found.items():
        about = f"{side:24s} {runs[0]['trained']:6.1f}M trained"
        for name, unit in (("peak", "GB"), ("kept", "GB"), ("seconds", "s")):
            ratios = [own[name] / other[name] for own, other in zip(runs, first)]
            values = statistics.median(run[name] for run in runs)
            about += (
                f"   {name} {values:6.2f} {unit} x {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )
        print(about)


if __name__ == "__main__":
    main()
