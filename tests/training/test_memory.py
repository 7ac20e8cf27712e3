"""Sizes of models, and what no memory holds, before anything is made."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import UserError
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import Runtime
from core.training.memory import Size, check_memory, size_of
from tests.project import merged, tiny_preset, train_here

CPU = Runtime(torch.device("cpu"), 0, 0, 1)


def decoded(**changes: Any) -> Any:
    return decode_preset(tiny_preset(**changes), Preset, "t", "t")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model": {"hidden_size": 131_072, "num_layers": 40, "num_heads": 1_024}},
            "weights and what trains them",
        ),
        (
            {"model": {"type": "polychromatic", "hidden_size": 131_072, "num_layers": 900}},
            "weights and what trains them",
        ),
        (
            {
                "model": {
                    "type": "gpt2",
                    "hidden_size": 98_304,
                    "num_layers": 1_000,
                    "num_heads": 512,
                }
            },
            "weights and what trains them",
        ),
        (
            {"model": {"seq_length": 64}, "train": {"per_gpu_batch_size": 1_000_000}},
            "a pass of 1,000,000 rows",
        ),
        (
            {
                "train": {
                    "per_gpu_batch_size": 1_000_000,
                    "accumulation_steps": 10_000,
                    "runs": 1_000_000,
                }
            },
            "the 10,000,000,000 rows of a step",
        ),
    ],
)
def test_what_no_memory_holds_is_refused_with_its_bytes(
    changes: dict, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built or read."""
    monkeypatch.setattr(Runtime, "memory_bytes", lambda self: 1 << 34)
    preset = merged(tiny_preset(), changes)
    if "type" in changes.get("model", {}):
        preset["model"] = changes["model"]
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=rf"{told} take [\d,]+ bytes of memory or more, and .* has 17,179,869,184\. Set ",
    ):
        check_memory(decode_preset(preset, Preset, "t", "t"), 257, CPU)
    assert time.monotonic() - began < 30
    check_memory(decoded(), 257, CPU)


def test_sizes_are_counted_without_touching_what_is_random() -> None:
    """The menu counts in a thread of its own, while the chosen preset may begin to draw its
    weights."""
    before = torch.random.get_rng_state()
    assert size_of(decoded(), 257)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_machine_has_memory() -> None:
    assert 1 << 28 < CPU.memory_bytes() < 1 << 50


def test_a_model_that_no_memory_holds_stops_before_anything_is_read(tmp_path: Path) -> None:
    """Not as an error of the allocator, and not after minutes of reading."""
    model = {"type": "polychromatic", "hidden_size": 131_072, "num_layers": 1_000, "seq_length": 32}
    with pytest.raises(
        UserError, match=r"[\d,]+ weights and what trains them take [\d,]+ bytes of memory or more"
    ):
        train_here({**tiny_preset(), "model": model}, tmp_path)
    assert not (tmp_path / "logs" / "t" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("device", "engine", "ranks", "gigabytes"),
    [
        ("cpu", "auto", 1, 16),
        ("cpu", "ddp", 4, 64),
        ("cpu", "fsdp", 4, 32),  # shares, which come to 16, and 4 times the weights
        ("cuda", "ddp", 4, 16),
        ("cuda", "fsdp", 4, 8),
        ("cuda", "auto", 4, 8),
    ],
)
def test_ranks_need_what_their_engine_keeps(
    device: str, engine: str, ranks: int, gigabytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2^30 parameters: weights of 4 GiB, with gradients and AdamW's state 16."""
    size = Size(parameters=1 << 30, trained=1 << 30, share_with_graph=1.0)
    monkeypatch.setattr("core.training.memory.size_of", lambda *_: size)
    monkeypatch.setattr(Runtime, "device_name", "it")
    runtime = Runtime(torch.device(device), 0, 0, ranks, ranks)
    preset = decoded(train={"engine": engine})
    for spare, refused in ((1, False), (-1, True)):
        monkeypatch.setattr(Runtime, "memory_bytes", lambda _, s=spare: (gigabytes << 30) + s)
        with pytest.raises(UserError, match="weights") if refused else nullcontext():
            check_memory(preset, 257, runtime)
