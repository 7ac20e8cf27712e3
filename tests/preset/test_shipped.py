"""The presets in configs/: each decodes, and each that trains takes two steps."""

import re
from pathlib import Path
from typing import Any

import pytest

from core.comparison.trials import plan
from core.preset.decode import decode_preset, read_preset
from core.preset.merge import preset_json
from core.registry import Preset
from tests.project import ROOT, TINY_SIZES, train_here

CONFIGS = [
    path for path in sorted((ROOT / "configs").glob("*.json")) if path.name != "preset.schema.json"
]


def test_there_are_presets() -> None:
    assert {"00_best_general", "01_best_qa", "90_quick_test"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_preset_decodes(path: Path) -> None:
    """And says in one line what it is for."""
    preset = read_preset(path, Preset)
    assert preset.description and "\n" not in preset.description


def shrunk(preset: Any, models: Path) -> dict:
    """The preset at a size that takes two steps in a second, on local text, everything else as it
    is. A model of the Hub becomes a tiny one in `models`, published weights random ones, and
    whichever block is trained the last of two."""
    small = preset_json(preset)
    if small["model"]["type"] == "hub":
        from transformers import GPT2Config

        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64).save_pretrained(
            models
        )
        small["model"] |= {"name": str(models), "pretrained": False}
    if small["model"]["type"] == "neobert":
        small["model"]["name"] = None
    if small["train"]["trainable"]:
        small["train"]["trainable"] = [
            re.sub(r"\d+", "1", pattern) for pattern in small["train"]["trainable"]
        ]
    small["model"] |= {key: value for key, value in TINY_SIZES.items() if key in small["model"]} | {
        "seq_length": 32
    }
    small["tokenizer"] = {"type": "byte"}
    small["train"] |= {
        "per_gpu_batch_size": 2,
        "accumulation_steps": 2,
        "max_steps": 2,
        "runs": 1,
        "eval_tokens": 100,
    }
    small["train"] |= {"compile": "never"}
    # its evaluations hide a thousand tokens one by one, so many rows at once
    if small["model"]["type"] == "neobert":
        small["train"]["per_gpu_batch_size"] = 16
    names = [source["name"] for source in small["data"]["sources"]]
    small["data"]["sources"] = [{"type": "text", "path": "texts", "name": name} for name in names]
    small["data"] |= {"lanes": 4, "workers": 0}
    small["auxiliary"]["memory_tokens_after"] = 8
    small["generate"] |= {"max_tokens": 3}
    small["logging"] = {}
    return small


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_preset_that_trains_takes_two_steps(path: Path, tmp_path: Path) -> None:
    """Shrunk, on local text: it builds, trains, evaluates and saves. Of a comparison, every
    variant."""
    preset = read_preset(path, Preset)
    if preset.job not in ("train", "compare"):
        pytest.skip("does not train")
    if preset.init_from is not None:  # what another shipped preset trains
        origin = read_preset(path.with_stem(preset.init_from), Preset)
        train_here(shrunk(origin, tmp_path / "model"), tmp_path, origin.lineage)
    runs = (
        [preset]
        if preset.job == "train"
        else [variant_preset(preset, i) for i in range(len(preset.variants))]
    )
    for run in runs:
        events = train_here(shrunk(run, tmp_path / "model"), tmp_path, run.lineage)
        assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]
        assert events[-1]["event"] == "run_end" and events[-1]["reason"] == "max_steps"
        *_, measured = [event for event in events if event["event"] == "eval"]
        of_logits = {
            "cross_entropy",
            "max_probability",
            "entropy",
            "embedding_cosine",
            "table_cosine",
        }
        assert (
            {"nll_h12", "nll_h4"} if measured["losses"].keys() == {"harmonic"} else of_logits
        ) <= set(measured)
        assert set(measured["losses"]) == {loss.name or loss.type for loss in run.losses}
        assert (tmp_path / "checkpoints" / f"{run.lineage}_current.pth").exists()


def variant_preset(preset: Any, number: int) -> Any:
    """What the first seed's trial of a variant trains, under a name of its own."""
    trial = plan(preset, Path())[number]
    return decode_preset(
        trial.preset | {"lineage": f"{preset.lineage}-{number}"}, Preset, trial.variant, "v"
    )
