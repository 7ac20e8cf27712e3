"""PolychromaticLM inside the program: what a run tells of its routing, that it resumes to the same
bits, what the menu shows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.launch import ROOT
from core.preset.decode import decode_preset, read_preset
from core.preview import training_lines
from core.registry import Preset
from core.runtime import detect_runtime
from core.ui.plain import NOT_CAUSAL, describe
from core.ui.run_state import RunState
from tests.project import TINY_SIZES, tiny_preset
from tests.training.runs import events, finish, session, weights

MODEL = {"type": "polychromatic", "seq_length": 32, **TINY_SIZES}


def routed(root: Path, steps: int, routing: dict | None = None, **train: Any) -> Any:
    return session(
        root, model={**MODEL, "routing": routing or {}}, train={"max_steps": steps, **train}
    )


def test_steps_tell_of_temperature_and_routing(tmp_path: Path) -> None:
    """tau is 1 at the first update and 0.1 at the last; entropies are at most ln 4, the static one
    there at the start."""
    finish(routed(tmp_path, 4))
    told = [event["model"] for event in events(tmp_path, "step")]
    assert [each["tau"] for each in told] == pytest.approx([1.0, 0.7, 0.4, 0.1], abs=1e-6)
    assert told[0]["routing_entropy/mean"] == pytest.approx(1.386294, abs=1e-5)
    names = {
        "tau",
        "routing_entropy/mean",
        "dynamic_routing_entropy/mean",
        *(f"dynamic_routing_entropy/layer_{i}" for i in (0, 1)),
    }
    assert all(
        set(each) == names and each["dynamic_routing_entropy/mean"] <= 1.3863 for each in told
    )


@pytest.mark.parametrize("pool", ["causal", "sequence"])
def test_resuming_equals_not_stopping_noise_included(pool: str, tmp_path: Path) -> None:
    whole = routed(tmp_path / "whole", 6, {"pool": pool}, checkpoint_every_steps=3)
    finish(whole)
    halves = routed(tmp_path / "halves", 6, {"pool": pool})
    halves.trainer.should_stop = lambda: halves.trainer.progress.step == 3
    assert finish(halves) == "interrupted"
    halves = routed(tmp_path / "halves", 6, {"pool": pool})
    assert halves.trainer.progress.step == 3
    finish(halves)
    expected, found = weights(whole), weights(halves)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(("pool", "causal"), [("causal", True), ("sequence", False)])
def test_a_model_that_sees_the_future_says_so_wherever_its_numbers_are_shown(
    pool: str, causal: bool, tmp_path: Path
) -> None:
    built = routed(tmp_path, 2, {"pool": pool}, eval_tokens=200)
    finish(built)
    evaluation = events(tmp_path, "eval")[-1]
    start = {"event": "run_start", **built.start_event}
    assert (start["causal"], evaluation["causal"]) == (causal, causal)
    screen = RunState(start)
    for event in (events(tmp_path, "step")[-1], evaluation):
        screen.update(event)
    shown = screen.draw(100, 40, evaluation["time"]).plain
    lines = [line for event in (start, evaluation) for line in describe(event, {})]
    assert (
        shown.count(NOT_CAUSAL) == sum(NOT_CAUSAL in line for line in lines) == (0 if causal else 2)
    )
    assert "route entropy" in shown and "layer_0" not in shown


def test_the_menu_tells_which_cards_the_full_size_fits() -> None:
    preset = read_preset(ROOT / "configs" / "21_polychromatic_600m_causal.json", Preset)
    lines = training_lines(preset, detect_runtime(), ROOT)
    assert lines[0] == "597M parameters, 100,000,000 tokens, 100 runs in steps of 524,288"
    assert lines[-1].startswith(
        "micro-batches that fit a card in bf16: 2 rows on 24 GB, 12 rows on 80 GB, 24 rows on 141 "
        "GB"
    )
    small = decode_preset(tiny_preset(model=MODEL), Preset, "t", "t")
    assert not any("fit a card" in line for line in training_lines(small, detect_runtime(), ROOT))


def test_checkpointing_leaves_room_for_more_rows() -> None:
    settings = read_preset(ROOT / "configs" / "20_polychromatic_600m.json", Preset).model
    kept = settings.model_copy(update={"activation_checkpointing": True}).activation_bytes(
        bf16=True
    )
    assert kept < settings.activation_bytes(bf16=True) / 5 and settings.activation_bytes(
        False
    ) > settings.activation_bytes(True)
