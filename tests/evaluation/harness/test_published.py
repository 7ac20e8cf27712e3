"""PolychromaticLM's published evaluation (specification 001): its numbers, where its contract and
the harness's are one.

The published one feeds a text with its last token, which the pool sees. Of an empty context it does
not score the first token, and of a long text not the first of each piece; the harness scores those
too, so here they are asked for as it asks for them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from core.data.tokenizer_build import read_tokenizer
from core.evaluation.harness.scoring import Scorer
from core.evaluation.harness.writing import Writer
from core.generation.engine import TextGenerator
from core.generation.sampling import SamplingParams
from core.models.polychromatic import PolychromaticLM, PolychromaticSettings

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CLOSE = 1e-3


@lru_cache
def published() -> tuple[Any, Any, dict[str, Any], int]:
    """Model, tokenizer, expected numbers, context."""
    expected = json.loads((GOLDEN / "polyglu_eval" / "expected.json").read_text())
    config = expected["config"]
    settings = PolychromaticSettings.model_validate(
        {
            "hidden_size": config["d_model"],
            "intermediate_size": config["d_ff"],
            "num_layers": config["n_layers"],
            "num_heads": config["n_q_heads"],
            "num_kv_heads": config["n_kv_heads"],
            "head_dim": config["head_dim"],
            "seq_length": config["seq_length"],
            "norm_eps": config["eps"],
            "routing": {"pool": "sequence", "tau": expected["tau"], "evaluate": "soft"},
        }
    )
    model = PolychromaticLM(settings, config["vocab_size"]).eval()
    weights = load_file(GOLDEN / "polyglu_eval" / "state_dict.safetensors")
    model.prepare_load(weights, [])
    model.load_state_dict(weights)
    return (
        model,
        read_tokenizer(GOLDEN / "polyglu_sft" / "tokenizer.json"),
        expected,
        config["seq_length"],
    )


@pytest.mark.parametrize("batch_size", [1, 8])
def test_loglikelihoods(batch_size: int) -> None:
    model, tokenizer, expected, context = published()
    pairs = []
    for case in expected["loglikelihood"]:
        before, after = (
            ids.tolist() for ids in tokenizer.encode_batch([case["context"], case["continuation"]])
        )
        pairs.append((before, after) if before else (after[:1], after[1:]))
    found = Scorer(model, context, batch_size).loglikelihoods(pairs)
    assert found == [
        (pytest.approx(value, abs=CLOSE), greedy)
        for value, greedy in (c["result"] for c in expected["loglikelihood"])
    ]


def test_rolling() -> None:
    model, tokenizer, expected, context = published()
    for case in expected["loglikelihood_rolling"]:
        (ids,) = (ids.tolist() for ids in tokenizer.encode_batch([case["text"]]))
        assert len(ids) == case["n_tokens"]
        pieces = [ids[i : i + context] for i in range(0, len(ids), context)]
        found = Scorer(model, context, 4).loglikelihoods(
            [(piece[:1], piece[1:]) for piece in pieces]
        )
        assert sum(value for value, _ in found) == pytest.approx(case["result"], abs=CLOSE)


def test_generation() -> None:
    model, tokenizer, expected, context = published()
    cases = expected["generate_until"]
    asked = [
        (
            c["context"],
            SamplingParams(tuple(c["gen_kwargs"]["until"]), c["gen_kwargs"]["max_gen_toks"]),
        )
        for c in cases
    ]
    assert Writer(TextGenerator(model, tokenizer, context), 4).write(asked) == [
        case["result"] for case in cases
    ]
