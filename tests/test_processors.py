"""Short trainings of every model, of all losses and of all heads: bf16 is fp32 within rounding,
also on a lesser processor.

The passes over all sets of instructions, and with poisoned memory, are in .ci/run.
"""

import math
from pathlib import Path

import pytest

from core.heads import HEADS
from core.losses import LOSSES
from core.models import MODELS
from tests.processors import (
    SETS,
    TOLERANCE,
    apart,
    instructions,
    losses_of,
    passed,
    trained_under,
    trainings,
)


def test_everything_is_trained() -> None:
    """Another model, loss or head wants its training here."""
    trained = trainings()
    assert {each.get("model", {}).get("type", "simple_lm") for each in trained.values()} == set(
        MODELS
    ) - {"hub"}
    kinds = {
        loss["type"]
        for each in trained.values()
        for loss in each.get("losses", [{"type": "cross_entropy"}])
    }
    assert kinds == set(LOSSES)
    assert {key for each in trained.values() for key in each.get("auxiliary", {})} >= {
        f"enable_{name}" for name in HEADS
    }


@pytest.mark.parametrize("name", trainings())
def test_bf16_is_fp32_within_rounding(name: str, tmp_path: Path) -> None:
    fp32, bf16 = (
        losses_of(trainings()[name], precision, tmp_path / precision)
        for precision in ("fp32", "bf16")
    )
    assert apart(fp32, bf16) < TOLERANCE["bf16"]
    assert fp32 != bf16  # or it was not bf16


def test_what_is_apart_is_told() -> None:
    assert apart({"a": [2.0, 1.0]}, {"a": [2.0, 1.1]}) == pytest.approx(0.1)
    assert (
        apart({"a": [2.0]}, {"a": [math.nan]}) == apart({"a": [math.nan]}, {"a": [2.0]}) == math.inf
    )
    with pytest.raises(ValueError):
        apart({"a": [2.0, 1.0]}, {"a": [2.0]})


def test_what_is_not_tried_is_not_passed() -> None:
    assert passed(["NOT TRIED: this processor lacks amx_tile", "passed; fp32 within 1e-06"])
    assert not passed(["NOT TRIED: this processor lacks amx_tile"]) and not passed([])
    assert not passed(["passed; fp32 within 1e-06", "FAILED: tests; fp32 within 1e-06"])


@pytest.mark.slow
def test_the_least_processor_trains_alike() -> None:
    least = SETS[-1]
    if least.flag not in instructions():
        pytest.skip(f"this processor lacks {least.flag}")
    here, there = trained_under({}), trained_under(least.environment)
    has_more = any(each.flag in instructions() for each in SETS[:-1])
    assert (here != there) == has_more  # the environment was heard
    far = {name: apart(here[name], there[name]) for name in here}
    assert not {
        name: share for name, share in far.items() if not share <= TOLERANCE[name.split(", ")[-1]]
    }
