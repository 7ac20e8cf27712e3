"""Trials with made-up logs, written through the metrics log itself."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.comparison.results import Comparison, collect
from core.comparison.trials import Trial
from core.metrics.log import MetricsLog

PRESET = {
    "name": "p",
    "lineage": "p",
    "model": {"type": "simple_lm", "hidden_size": 64},
    "tokenizer": {"type": "byte"},
    "train": {"seed": 0, "learning_rate": 0.001, "eval_tokens": 1000},
    "losses": [{"type": "cross_entropy", "weight": 1.0}],
    "data": {"sources": [{"type": "text", "path": "./a"}]},
}
NASTY = '<script>alert("x")</script> `*_|$\\alpha$ & \x1b[31m --> ```'


def preset(seed: int, **sections: Any) -> dict[str, Any]:
    return {**PRESET, "train": {**PRESET["train"], "seed": seed}, **sections}


def write_log(
    folder: Path,
    final: float,
    *,
    steps: int = 40,
    evals: int = 4,
    extra: Mapping[str, Any] | None = None,
    speed: float = 1000.0,
    memory: float = 500.0,
    skipped: int = 0,
    receipt: str | None = "r",
    text: str = "a tree",
    start: Mapping[str, Any] | None = None,
) -> None:
    """A run whose cross-entropy falls to `final`; `extra` goes into every evaluation, `start` into
    its beginning."""
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.emit("run_start", step=0, tokens=0, parameters=1234, device="CPU", **dict(start or {}))
        for step in range(1, steps + 1):
            at = {"step": step, "tokens": 100 * step}
            loss = final + 2 * math.exp(-5 * step / steps) - 2 * math.exp(-5)
            log.emit(
                "step",
                **at,
                loss=2 * loss,
                losses={"cross_entropy": loss},
                tokens_per_second=speed,
                skipped=skipped,
                memory_mb=memory,
            )
            if step % (steps // evals) == 0:
                log.emit(
                    "eval",
                    **at,
                    **{
                        "cross_entropy": loss,
                        "perplexity": math.exp(loss),
                        "bits_per_byte": loss / 3,
                        "token_accuracy": 0.5 - loss / 20,
                        "eval_tokens": 1000,
                        "seconds": 1.0,
                    }
                    | dict(extra or {}),
                )
                log.emit("sample", **at, prompt="Once", text=f"{text} {step}")
        log.emit("run_end", step=steps, tokens=100 * steps, reason="budget", receipt=receipt)


def trials(folder: Path, finals: Mapping[str, Mapping[int, float]], **log: Any) -> list[Trial]:
    """Finished trials: {variant: {seed: final cross-entropy}}."""
    out = []
    for variant, by_seed in finals.items():
        for seed, final in by_seed.items():
            own = folder / f"trial{len(out)}-{seed}"
            write_log(own, final, **log)
            out.append(Trial(variant, seed, preset(seed), own, "finished"))
    return out


def compared(trials: list[Trial], **options: Any) -> Comparison:
    return collect(trials, **{"name": "a comparison", "description": "of variants", **options})
