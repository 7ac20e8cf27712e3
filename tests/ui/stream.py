"""A made-up run for the views: every kind of event, with the nastiest text a model or a source name
can hold."""

import math
import random
from collections.abc import Iterator

NASTY = " there [bold]was[/bold] [/] \x1b[31mred\x1b[2J\x1b]0;title\x07\r\n\x9b5A\u202e end 狐狸🦊 "


def run(
    steps: int = 200, seconds_per_step: float = 0.5, budget: int = 100_000_000, **start
) -> Iterator[dict]:
    chance, time = random.Random(0), 1000.0
    yield {**start_event(steps, budget), "time": time, **start}
    for step in range(1, steps + 1):
        time += seconds_per_step
        tokens = budget * step // steps
        loss = 3 + 6 * math.exp(-8 * step / steps) + chance.gauss(0, 0.05)
        common = {"step": step, "tokens": tokens, "time": time}
        yield {
            **step_event(step, tokens, loss, chance),
            **common,
            "learning_rate": 6e-4 * (1 - step / steps),
        }
        if step % (steps // 10) == 0:
            time += 30.0
            yield from between_steps(loss, {**common, "time": time})
    yield {"event": "run_end", "step": steps, "tokens": tokens, "time": time, "reason": "budget"}


def start_event(steps: int, budget: int) -> dict:
    return {
        "event": "run_start",
        "step": 0,
        "tokens": 0,
        "preset": "Best general",
        "lineage": "lm",
        "run": 2,
        "resumed_from": "checkpoints/lm_current.pth",
        "parameters": 12_345_678,
        "world_size": 8,
        "device": "NVIDIA H200",
        "precision": "bf16",
        "budget_tokens": budget,
        "run_tokens": 0,
        "max_steps": None,
        "run_step": 0,
        "tokens_per_step": budget // steps,
        "compile": "not compiled: too short",
        "sources": ["wikipedia", "pdfs"],
        "notes": ["a note"],
        "log": "logs/lm/metrics.jsonl",
    }


def step_event(step: int, tokens: int, loss: float, chance: random.Random) -> dict:
    return {
        "event": "step",
        "loss": loss if step % 17 else None,
        "losses": {"cross_entropy": loss, "policy": 0.02},
        "grad_norm": abs(chance.gauss(0.8, 0.2)),
        "tokens_per_second": 1.234e6,
        "sources": {
            "wikipedia": {"loss": loss, "weight": 0.8, "tokens": tokens * 0.8},
            "[red]" + "x" * 200: {"loss": None, "weight": 0.1, "tokens": tokens * 0.2},
            **{f"source {i}": {"loss": 2.0, "weight": 0.1, "tokens": 0} for i in range(12)},
        },
        "skipped": step // 100,
        "run_tokens": tokens,
        "run_step": step,
        "memory_mb": 12345.6,
    }


def between_steps(loss: float, common: dict) -> Iterator[dict]:
    """An evaluation with its samples, and what else is told between steps."""
    yield {
        "event": "eval",
        **common,
        "cross_entropy": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 3,
        "token_accuracy": 0.3,
        "losses": {"cross_entropy": loss},
        "eval_tokens": 500_000,
        "seconds": 30.0,
    }
    yield {"event": "sample", **common, "prompt": "Once upon a time", "text": NASTY * 3}
    yield {"event": "sample", **common, "prompt": "def main(", "text": "y" * 10_000}
    path = "checkpoints/lm_current.pth"
    yield {"event": "checkpoint", **common, "path": path, "seconds": 1.0}
    yield {"event": "warning", **common, "message": "source [red]" + NASTY}
    of_sources = {
        "wikipedia": {"loss": 3.1, "weight": 0.4, "factor": 0.5},
        NASTY: {"loss": None, "weight": 0.6, "factor": 3.0},
    }
    yield {"event": "reweighted", **common, "sources": of_sources}
