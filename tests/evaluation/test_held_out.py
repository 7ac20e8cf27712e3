"""What evaluation says: its numbers equal their definitions, for any batch size and on any number
of ranks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.data.packing import Row
from core.data.reader import collate
from core.evaluation.held_out import Evaluator, HeldOut
from core.heads.stack import HeadStack
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from core.parallel.single import Single
from core.runtime import detect_runtime
from core.training.machine import Machine
from tests.data.corpus import make_factory, start, write_corpus
from tests.data.ranks import Ranks
from tests.heads.setup import heads_for


def small_model() -> SimpleLM:
    torch.manual_seed(3)
    model = SimpleLM(
        SimpleLMSettings(hidden_size=32, num_layers=1, num_heads=2, seq_length=32), 257
    )
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from uniform, so that rows differ in loss
    return model


def held_rows(folder: Path) -> list[Row]:
    """The packed rows of a small corpus, with the bytes of text in each."""
    factory = make_factory(
        folder, write_corpus(folder, {"a": 9, "b": 6}, low=3, high=90), max_epochs=1
    )
    rows = [row for row, _ in zip(factory(start(), [0, 1, 2]), range(40)) if row.segments]
    for row in rows:  # of the byte tokenizer every token is a byte, but the end of a document
        row.num_bytes = int(((row.labels >= 0) & (row.labels != factory.tokenizer.eos_id)).sum())
    return rows


def evaluator(
    rows: list[Row], batch_rows: int, parallel: Any = None, heads: HeadStack | None = None
) -> Evaluator:
    stack = LossStack([CrossEntropy(CrossEntropySettings())])
    machine = Machine(detect_runtime(), parallel or Single(), torch.float32)
    return Evaluator(
        machine, HeldOut(lambda: rows, sources=("a", "b")), stack, batch_rows, heads, seed=1
    )


def by_hand(rows: list[Row], model: SimpleLM, source: int | None = None) -> dict[str, float]:
    """The numbers of an evaluation, or of one source in it, from their definitions, row by row, in
    float64."""
    nats, count, correct, num_bytes = 0.0, 0, 0, 0
    for row in rows:
        batch = collate([row], packed=True)
        with torch.no_grad():
            output = model.eval()(batch)
            scores = output.readout(output.hidden)[0].double()
        for t in np.flatnonzero((row.labels >= 0) & (source is None or row.source_ids == source)):
            target = int(row.labels[t])
            nats -= torch.log_softmax(scores[t], 0)[target].item()
            correct += int(scores[t].argmax()) == target
            # of the byte tokenizer every token is a byte, but the end of a document
            num_bytes += target != 0
            count += 1
    return {
        "cross_entropy": nats / count,
        "perplexity": math.exp(nats / count),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "token_accuracy": correct / count,
        "eval_tokens": count,
    }


def test_evaluation_equals_its_definitions(tmp_path: Path) -> None:
    """Perplexity is the exponential of the token-weighted mean, never a mean of exponentials; bits
    per byte by hand."""
    model, held = small_model(), held_rows(tmp_path)
    expected = by_hand(held, model)
    found = evaluator(held, 4).run(model, 0.0)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found["losses"] == pytest.approx({"cross_entropy": expected["cross_entropy"]}, rel=1e-5)
    assert found["perplexity"] == math.exp(found["cross_entropy"])
    for number, name in enumerate(("a", "b")):
        assert found["sources"][name]["loss"] == pytest.approx(
            by_hand(held, model, number)["cross_entropy"], rel=1e-5
        )
    assert found["sources"]["a"] != found["sources"]["b"]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    exact = ("losses", "sources", "objective")
    for name, each in expected["sources"].items():
        assert found["sources"][name] == pytest.approx(each, rel=1e-5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["objective"] == expected["objective"]
    numbers = {key: value for key, value in found.items() if key not in exact}
    assert numbers == pytest.approx(
        {key: value for key, value in expected.items() if key not in exact}, rel=1e-6
    )


def test_evaluation_is_the_same_for_any_batch_size(tmp_path: Path) -> None:
    model, held = small_model(), held_rows(tmp_path)
    found = [evaluator(held, rows).run(model, 0.0) for rows in (1, 3, 7, 100)]
    for other in found[1:]:
        assert_same(other, found[0])


def test_evaluation_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    """Each rank measures its rows, all get the same numbers; three ranks too, one of them perhaps
    with fewer rows."""
    held, models = held_rows(tmp_path), [small_model() for _ in range(3)]
    alone = evaluator(held, 4).run(small_model(), 0.0)

    def job(parallel: Any) -> dict[str, Any]:
        return evaluator(held, 4, parallel).run(models[parallel.rank], 0.0)

    for world_size in (2, 3):
        for found in Ranks(world_size).run(job):
            assert_same(found, alone)


def test_evaluating_twice_gives_the_same_bits_and_changes_nothing(tmp_path: Path) -> None:
    """The model comes back in training mode, without gradients, with its weights; dropout was
    off."""
    model = small_model().train()
    model.dropout.p = 0.5
    before = {name: p.clone() for name, p in model.state_dict().items()}
    measured = evaluator(held_rows(tmp_path), 4)
    assert measured.run(model, 0.0) == measured.run(model, 0.0)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_nothing_held_out_is_no_evaluation(tmp_path: Path) -> None:
    assert evaluator(held_rows(tmp_path)[:0], 4).run(small_model(), 0.0) is None


def test_heads_are_measured_on_held_out_rows(tmp_path: Path) -> None:
    """At places of their own, the same for any batch and any number of ranks; with what else a head
    measures beside its loss."""
    held, model = held_rows(tmp_path), small_model()
    heads = heads_for(32, 257, enable_policy=True, enable_value=True)
    heads["value"].measure = lambda seen, places, valid: {"place": places[:, 0].float()}
    found = evaluator(held, 4, heads=heads).run(model, 0.0)["heads"]
    assert list(found) == ["policy", "value", "value.place"]
    assert found["value"] > 0
    assert 0 < found["value.place"] < 31
    assert "heads" not in evaluator(held, 4).run(model, 0.0)
    assert evaluator(held, 100, heads=heads).run(model, 0.0)["heads"] == pytest.approx(
        found, rel=1e-5
    )
    models = [small_model() for _ in range(3)]  # not in the threads, which share random numbers
    for other in Ranks(3).run(
        lambda ranks: evaluator(held, 4, ranks, heads).run(models[ranks.rank], 0.0)["heads"]
    ):
        assert other == pytest.approx(found, rel=1e-5)
