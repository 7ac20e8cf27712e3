"""The menu's preview of a preset: sizes, speeds, logs that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core import preview
from core.preset.decode import decode_preset
from core.registry import Preset
from core.reports.run_card import RunCard, read_card
from core.runtime import Runtime
from core.training.memory import size_of
from tests.project import ROOT, tiny_preset

CPU = Runtime(torch.device("cpu"), 0, 0, 1)


def decoded(**changes: Any) -> Any:
    return decode_preset(tiny_preset(**changes), Preset, "t", "t")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty project."""
    return tmp_path


@pytest.mark.parametrize(
    "card", ["[]", "3", "{", "null", '{"preset": []}', "NaN", "[" * 5000, "\xff"]
)
def test_no_log_of_one_preset_spoils_its_preview(card: str, root: Path) -> None:
    preset = decoded()
    (root / "logs" / "t").mkdir(parents=True)
    (root / "logs" / "t" / "run.json").write_bytes(card.encode("latin-1"))
    lines = preview.preview_lines(preset, CPU, root)
    assert lines[0].endswith("steps of 128") and lines[-1] == "starts fresh"


def test_a_speed_of_nothing_and_slots_that_lack_everything(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known is told; what cannot be told costs its own line."""
    preset = decoded()
    facts = {
        "preset": preset.name,
        "device": CPU.device_name,
        "world_size": 1,
        "tokens_per_step": 128,
        "tokens_per_second": 0,
    }
    (root / "logs" / "t").mkdir(parents=True)
    (root / "logs" / "t" / "run.json").write_text(json.dumps(facts))
    assert preview.preview_lines(preset, CPU, root)[-1] == "starts fresh"
    (root / "checkpoints").mkdir()
    torch.save(
        {"progress": {"step": 3}, "preset": {}, "model": {}}, root / "checkpoints" / "t_current.pth"
    )
    assert "parameters" in preview.preview_lines(preset, CPU, root)[0]
    monkeypatch.setattr(preview, "resume_lines", lambda preset, root: 1 // 0)
    assert preview.preview_lines(preset, CPU, root)[-1].startswith(
        "cannot tell more: ZeroDivisionError"
    )


def test_small_models_are_counted_and_a_preset_without_words_shows_none() -> None:
    preset = decoded()
    assert preview.preset_card("t", preset, CPU, ROOT).description == "short", (
        "nothing stands behind it"
    )
    assert (
        preview.preset_card(
            "t", preset.model_copy(update={"description": "Tiny."}), CPU, ROOT
        ).description
        == "short · Tiny."
    )
    model = size_of(preset, preview.known_vocab_size(preset.tokenizer, ROOT))
    assert preview.training_lines(preset, CPU, ROOT)[0].startswith(
        f"{model.parameters / 1000:.1f}k parameters, "
    )


def test_the_card_keeps_what_the_last_whole_run_took(tmp_path: Path) -> None:
    """Through runs that stop before their end, and those that went on from a checkpoint; not on
    another device."""
    facts = {"preset": "t", "device": "CPU", "world_size": 1}

    def run(reason: str, seconds: float, first: int = 0, **changes: Any) -> Any:
        card = RunCard(tmp_path, {}, 0.0, tmp_path)
        card.update(
            {
                "event": "run_start",
                "time": 100.0,
                "step": first,
                "tokens": 0,
                "run_step": first,
                **facts,
                **changes,
            }
        )
        step = {"step": first + 1, "tokens": 640, "time": 101.0}
        card.update({"event": "step", **step, "run_tokens": 640, "tokens_per_second": 64.0})
        card.update({"event": "run_end", **step, "reason": reason, "time": 100.0 + seconds})
        return read_card(tmp_path).get("whole_run")

    whole = {"seconds": 246.0, "tokens": 640}
    assert run("interrupted", 5.0) is None
    assert run("max_steps", 246.0) == whole
    assert run("interrupted", 5.0) == run("max_steps", 5.0, first=3) == whole
    assert run("interrupted", 5.0, device="GPU") is None
