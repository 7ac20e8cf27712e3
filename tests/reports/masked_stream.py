"""A made-up run of masked tokens for the views: what a distance readout's evaluations hold, or
those of logits."""

import math
from collections.abc import Iterator

PROMPT = "The capital of France is [MASK]."


def run(
    evals: int = 5,
    distances: bool = True,
    decoder: bool = True,
    steps: int = 100,
    run: int = 1,
    **start,
) -> Iterator[dict]:
    """`decoder`: whether the published one is kept beside. `run`: 2 for one that went on where the
    first had ended."""
    begun = (run - 1) * steps
    yield {**start_event(begun, steps, run), **KIND, **start}
    for now in range(1, steps + 1):
        share, step = now / steps, begun + now
        common = {"step": step, "tokens": step * 32_768, "time": 1000.0 + now}
        yield {**step_event(now, share, distances), **common}
        if now * evals // steps != (now - 1) * evals // steps:
            yield from evaluation(share, distances, decoder, common)
    end = {"step": step, "tokens": step * 32_768, "time": 1000.0 + steps}
    yield {"event": "run_end", **end, "reason": "max_steps"}


KIND = {"objective": "masked_tokens", "causal": False}


def start_event(begun: int, steps: int, run: int) -> dict:
    return {
        "event": "run_start",
        "step": begun,
        "tokens": begun * 32_768,
        "time": 1000.0,
        "preset": "Harmonic SFT",
        "lineage": "neobert",
        "run": run,
        "parameters": 245_136_954,
        "world_size": 1,
        "device": "NVIDIA H100",
        "precision": "bf16",
        "budget_tokens": None,
        "run_tokens": 0,
        "run_step": 0,
        "max_steps": steps,
        "compile": "compiled",
    }


def step_event(now: int, share: float, distances: bool) -> dict:
    fall = math.exp(-4 * share)
    return {
        "event": "step",
        "loss": 4 + 5 * fall + 0.1 * math.sin(9 * now),
        "losses": {"harmonic": 4 + 5 * fall},
        "learning_rate": 2e-4 * (1 - share),
        "grad_norm": 0.8,
        "tokens_per_second": 1e4,
        "run_tokens": now * 32_768,
        "run_step": now,
        "memory_mb": 9000.0,
        "skipped": 0,
        **({"scheduled": {"harmonic.h_exp": -12 + 8 * share}} if distances else {}),
    }


def evaluation(share: float, distances: bool, decoder: bool, common: dict) -> Iterator[dict]:
    """An evaluation, a filled blank, and the neighbours of two words."""
    fall = math.exp(-4 * share)
    numbers = {"token_accuracy": 0.55 - 0.5 * fall, "top5_accuracy": 0.75 - 0.6 * fall}
    numbers |= of_distances(share, fall) if distances else of_logits(fall)
    numbers |= of_decoder(share) if decoder else {}
    rest = {"losses": {}, **KIND, "eval_tokens": 100_000, "table_cosine": 0.3}
    yield {"event": "eval", **common, **numbers, **rest}
    yield {"event": "sample", **common, "prompt": PROMPT, "text": "paris 41 %, lyon 12 %"}
    near = {
        "king": [["queen", 0.71], ["prince", 0.69]],
        "[red]\x1b[2J": [["狐\n", None], ["[bold]", -0.004]],
    }
    for word, found in near.items():
        yield {"event": "neighbors", **common, "word": word, "neighbors": found}


def of_distances(share: float, fall: float) -> dict[str, float]:
    nll = {"h12": 5 + 9 * fall, "h4": 7.5 + 2.5 * fall}
    return {
        **{f"nll_{h}": value for h, value in nll.items()},
        **{f"pseudo_perplexity_{h}": math.exp(value - 1) for h, value in nll.items()},
        "prototype_cosine": 0.31 - 0.2 * share,
        "prototype_spread": 0.05 + 0.02 * share,
        "prototype_dimensions": 402 + 180 * share,
        "prototype_drift": 0.12 * share,
    }


def of_logits(fall: float) -> dict[str, float]:
    return {"cross_entropy": 2 + 5 * fall, "pseudo_perplexity": math.exp(1.5 + 3 * fall)}


def of_decoder(share: float) -> dict[str, float]:
    return {
        "decoder_cross_entropy": 1.9 + 0.05 * share,
        "decoder_pseudo_perplexity": 5.1 + 0.4 * share,
        "decoder_accuracy": 0.61 - 0.01 * share,
        "decoder_top5_accuracy": 0.81 - 0.01 * share,
    }
