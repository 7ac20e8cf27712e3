"""The numbers on other processors: what this one can do is taken away from it step by step, and
everything must come out alike.

    python -m tests.processors

For each set of instructions: the tests of the goldens, losses and models, and short trainings of
every model, of all losses and of all heads, in fp32 and bf16, whose losses must be those of the
processor as it is, to the tolerances below. Names each set that this processor lacks: what is not
tried is not passed. Ends with 1 where anything failed, or nothing could be tried."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Set:
    """Instructions that torch's own kernels, oneDNN's and MKL's are held to."""

    name: str
    flag: str  # what /proc/cpuinfo calls them
    onednn: str
    torch: str

    @property
    def environment(self) -> dict[str, str]:
        mkl = {"avx2": "AVX2", "avx512": "AVX512"}[self.torch]
        return {
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.torch,
            "MKL_ENABLE_INSTRUCTIONS": mkl,
        }


SETS = (
    Set("AMX", "amx_tile", "AVX512_CORE_AMX", "avx512"),
    Set("AVX512 with bf16", "avx512_bf16", "AVX512_CORE_BF16", "avx512"),
    Set("AVX512", "avx512bw", "AVX512_CORE", "avx512"),
    Set("AVX2", "avx2", "AVX2", "avx2"),
)
NUMBERS = ["tests/losses", "tests/heads/test_goldens.py", "tests/models", "-m", "not slow"]
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}
"""How far a training's losses may lie from another's, as a share: sums in another order, grown over
the steps; and roundings to the 8 binary digits of bf16."""
FEW = {"max_steps": 4, "eval_tokens": 0}
MASKED = {
    "model": {"type": "neobert", "head": "distance", "keep_decoder": True, "intermediate_size": 64}
}
LOSSES: list[dict[str, Any]] = [
    {"type": kind} for kind in ("cross_entropy", "cosine", "sharpness", "z_loss")
]
LOSSES += [{"type": "cosine", "name": "few", "topk": 9}]
TRAININGS: dict[str, dict[str, Any]] = {
    "simple_lm": {},
    "gpt2": {"model": {"type": "gpt2"}},
    "polychromatic": {
        "model": {
            "type": "polychromatic",
            "num_kv_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
        }
    },
    "qwen3": {"model": {"type": "qwen3", "head_dim": 16, "intermediate_size": 64}},
    "neobert": MASKED
    | {"tokenizer": {"type": "bpe", "vocab_size": 301}, "losses": [{"type": "harmonic"}]},
    "losses": {"losses": LOSSES},
    "long rows": {
        "model": {"seq_length": 600},
        "data": {"packing": "documents"},
        "train": {"per_gpu_batch_size": 1},
    },
}
"""What is trained, all with vocabularies that are no multiple of 64."""


def trainings() -> dict[str, dict[str, Any]]:
    """Every model, all losses, and each head that can be on by itself or with those it needs."""
    from core.heads import HEADS

    heads = {f"enable_{name}": True for name in HEADS} | {"memory_tokens_after": 3}
    return TRAININGS | {"heads": {"auxiliary": heads}}


def losses_of(changes: dict[str, Any], precision: str, root: Path) -> dict[str, list[float]]:
    """{loss: its value at each step} of a short training."""
    from tests.project import merged, tiny_preset, train_here

    preset = merged(merged(tiny_preset(), {"train": {**FEW, "precision": precision}}), changes)
    steps = [event for event in train_here(preset, root) if event["event"] == "step"]
    assert len(steps) == FEW["max_steps"] and steps[-1]["skipped"] == 0, steps
    return {name: [step["losses"][name] for step in steps] for name in steps[0]["losses"]}


def apart(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """The largest difference of two trainings' losses, as a share of the loss, or of 0.1 where that
    is more; NaN is inf."""
    pairs = [pair for name in a for pair in zip(a[name], b[name], strict=True)]
    shares = [abs(x - y) / max(abs(x), 0.1) for x, y in pairs]
    return max(share if share == share else float("inf") for share in shares)


def train_all() -> dict[str, dict[str, list[float]]]:
    """{"training, precision": losses} on this processor as the environment leaves it."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in trainings().items():
            for precision in TOLERANCE:
                found[f"{name}, {precision}"] = losses_of(
                    changes, precision, Path(folder) / f"{name} {precision}"
                )
    return found


def trained_under(environment: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    """`train_all` in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(
        [sys.executable, "-m", "tests.processors", "train"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    return json.loads(run.stdout.splitlines()[-1])


def instructions() -> set[str]:
    """What this processor has, as Linux tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(
        next((line for line in lines if line.startswith("flags")), "flags:").split(":")[1].split()
    )


def passed(verdicts: Iterable[str]) -> bool:
    """Whether something was tried, and nothing of it failed."""
    tried = [verdict for verdict in verdicts if not verdict.startswith("NOT TRIED")]
    return bool(tried) and all(verdict.startswith("passed") for verdict in tried)


def main() -> int:
    has, verdicts, as_it_is = instructions(), {}, trained_under({})
    for each in SETS:
        if each.flag not in has:
            verdicts[each.name] = f"NOT TRIED: this processor lacks {each.flag}"
            continue
        variables = " ".join(f"{key}={value}" for key, value in each.environment.items())
        print(f"-- {each.name}: {variables}", flush=True)
        env = {**os.environ, **each.environment}
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "2", *NUMBERS], cwd=ROOT, env=env
        ).returncode
        found = trained_under(each.environment)
        far = {name: apart(as_it_is[name], found[name]) for name in as_it_is}
        worst = {
            kind: max(share for name, share in far.items() if name.endswith(kind))
            for kind in TOLERANCE
        }
        bad = [name for name, share in far.items() if not share <= TOLERANCE[name.split(", ")[-1]]]
        told = ", ".join(
            f"{kind} within {share:.1e} of {TOLERANCE[kind]:g}" for kind, share in worst.items()
        )
        failed = [*(["tests"] if tests else []), *bad]
        verdicts[each.name] = (
            f"FAILED: {', '.join(failed)}; {told}" if failed else f"passed; {told}"
        )
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    return int(not passed(verdicts.values()))


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        print(json.dumps(train_all()))
    else:
        sys.exit(main())
