"""Fitting a checkpoint to a model: what may differ is reported, what may not is refused."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from core.checkpoint.fitting import load_model
from core.checkpoint.slots import FORMAT, CheckpointStore
from core.errors import CheckpointError
from tests.checkpoint.test_slots import save
from tests.project import tiny_preset, train_here


def test_what_does_not_fit_is_refused_by_name_and_nothing_changes() -> None:
    """Every difference is named: shape, missing, unknown; the model keeps its weights."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: p.clone() for name, p in module.state_dict().items()}
    saved = {name: p + 1 for name, p in before.items() if name != "1.bias"} | {
        "2.weight": torch.zeros(1)
    }
    saved["0.weight"] = torch.zeros(5, 3)
    with pytest.raises(CheckpointError) as caught:
        load_model(module, saved, "t_current.pth")
    for told in (
        "0.weight is (5, 3) there, (4, 3) here",
        "1.bias is missing there",
        "2.weight is unknown here",
        "t_current.pth",
    ):
        assert told in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


def test_names_that_may_differ_are_reported() -> None:
    """Auxiliary heads added or removed: the rest is loaded, and each difference is told."""
    module = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    saved = {name: p + 1 for name, p in module.state_dict().items() if name.startswith("trunk")}
    saved["old.weight"] = torch.zeros(1)
    remarks = load_model(
        module, dict(saved), "x", may_differ=lambda name: name.startswith(("head", "old"))
    )
    assert remarks == [
        "head.bias is new: starts untrained",
        "head.weight is new: starts untrained",
        "old.weight was left out",
    ]
    assert torch.equal(module["trunk"].weight, saved["trunk.weight"])


def test_another_model_in_the_same_lineage_is_refused(tmp_path: Path) -> None:
    """Before anything is written: the checkpoint and the log stay as they were, bit for bit."""
    train_here(tiny_preset(lineage="shared"), tmp_path)
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".txt"
    }
    with pytest.raises(
        CheckpointError,
        match=r'do not fit.*\n.*there.*here[\s\S]*"lineage"[\s\S]*Nothing was overwritten',
    ):
        train_here(tiny_preset(lineage="shared", model={"hidden_size": 48}), tmp_path, "other")
    after = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".txt"
    }
    assert after == before


def test_longer_rows_extend_the_position_table(tmp_path: Path) -> None:
    """The run goes on from the weights, its old positions kept, and says what it did; everything
    loads as weights only."""
    train_here(tiny_preset(lineage="shared"), tmp_path)
    path = tmp_path / "checkpoints" / "shared_current.pth"
    old = torch.load(path, weights_only=True)
    longer = tiny_preset(lineage="shared", model={"seq_length": 48}, train={"learning_rate": 1e-12})
    events = train_here(longer, tmp_path, "other")
    new = torch.load(path, weights_only=True)
    assert new["model"]["pos_embedding.weight"].shape == (48, 32) and new["progress"]["step"] == 10
    torch.testing.assert_close(
        new["model"]["pos_embedding.weight"][:32], old["model"]["pos_embedding.weight"]
    )
    notes = [event["notes"] for event in events if event["event"] == "run_start"][-1]
    assert "the position table grows from 32 to 48 rows" in notes
    assert any(
        note.startswith("optimizer state starts afresh for 1 parameters: pos_embedding.weight")
        for note in notes
    )


def test_the_checkpoint_holds_what_the_interface_says(tmp_path: Path) -> None:
    """Read with torch.load(path, weights_only=True): a dict with at least these keys."""
    train_here(tiny_preset(train={"max_steps": 2}), tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "t_current.pth", weights_only=True)
    assert {
        "format",
        "model",
        "heads",
        "optimizer",
        "progress",
        "rng",
        "data",
        "tokenizer",
        "preset",
    } <= set(state)
    assert {"step", "tokens", "run"} <= set(state["progress"]) and state["progress"]["step"] == 2
    assert state["preset"]["name"] == "t" and state["format"] == FORMAT


def test_random_bytes_never_load(tmp_path: Path) -> None:
    """One byte changed anywhere in the tensors' half of the file is noticed."""
    places = random.Random(3)
    store = CheckpointStore(tmp_path, "t")
    save(store, 1, size=50_000)
    whole = store.slots[0].read_bytes()
    for _ in range(30):
        data = bytearray(whole)
        data[places.randrange(2000, len(data) - 2000)] ^= places.randrange(1, 256)
        store.slots[0].write_bytes(data)
        state, _, notes = store.load()
        assert state is None and len(notes) == 1
