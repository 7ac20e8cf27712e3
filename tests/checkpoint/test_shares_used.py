"""Who reads a lineage whose newest checkpoint is in shares: starts, jobs, the menu, roll-backs."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.lineage import has_checkpoints, put_aside
from core.checkpoint.shares import STATE
from core.checkpoint.weights import newest_weights, preview_weights, read_weights
from core.errors import UserError
from core.launch import _files_of
from core.parallel.shards import full
from core.preset.decode import decode_preset
from core.preview import resume_lines
from core.registry import Preset
from core.runtime import detect_runtime
from core.trained import load_trained
from core.training.recovery import BAD_STEPS
from tests.checkpoint.shares import SHARED, forms, step_of, store
from tests.project import Project, merged, tiny_preset, train_here
from tests.training.runs import finish, poison, session, warnings_of


@pytest.fixture
def root(in_shares: Path) -> Path:
    return in_shares


def decoded(**changes: Any) -> Any:
    return decode_preset(tiny_preset(**merged(SHARED, changes)), Preset, "t", "t")


def test_a_model_speaks_from_shares(root: Path) -> None:
    """As from one file; named as lineage, or by its path."""
    trained = load_trained(decoded(), root, detect_runtime())
    assert (trained.where, trained.step) == ("t_sharded/current", 5)
    for name, tensor in Project(root).checkpoint("prev")["model"].items():
        assert torch.equal(trained.model.state_dict()[name], tensor), name
    assert trained.heads() is not None
    path = "checkpoints/t_sharded/current"
    assert preview_weights("t", root) == "t_sharded/current, step 5"
    assert preview_weights(path, root) == f"{path}, step 5"
    by_path = load_trained(decoded(init_from=path), root, detect_runtime())
    assert torch.equal(by_path.model.lm_head.weight, trained.model.lm_head.weight)
    with pytest.raises(UserError, match="There are checkpoints of t"):
        newest_weights("other", root)


def test_a_reader_keeps_what_it_found_while_the_slots_move_on(root: Path) -> None:
    """Somebody else's training replaces them, again and again."""
    weights = newest_weights("t", root)
    before = Project(root).checkpoint("prev")
    for folder in store(root).shares:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "texts", store(root).shares[0])
    name = "layers.0.linear1.weight"
    assert torch.equal(full(weights.model[name]), before["model"][name])


def test_read_by_a_start_that_has_another_model(root: Path) -> None:
    """The table of positions grows; heads are switched off; other sizes are refused by name."""
    built = session(
        root,
        **merged(
            SHARED,
            {"model": {"seq_length": 48}, "auxiliary": None}
            | {"auxiliary": {"enable_value": False}},
        ),
    )
    assert any("grows from 32 to 48" in note for note in built.notes), built.notes
    assert any("value of the checkpoint is off" in note for note in built.notes)
    built.log.close()
    for changes in ({"hidden_size": 64}, {"num_layers": 3}):
        with pytest.raises(UserError, match="do not fit this preset's model") as caught:
            session(root, **merged(SHARED, {"model": changes}))
        assert "num_layers" not in changes or "layers.2.linear1.weight is missing" in str(
            caught.value
        )
    assert len(forms(root)) == 3


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    built = session(tmp_path, **SHARED)
    with torch.no_grad():
        next(iter(built.trainer.model.parameters())).to_local()[0] = float("nan")
    built.trainer.progress.step = built.trainer.progress.tokens = 1
    built.trainer.saver.save(whole=False)
    built.trainer.store.wait()
    built.log.close()
    notes = session(tmp_path, **SHARED).notes
    assert [note for note in notes if "not finite in t_sharded/current" in note], notes


def test_a_run_does_not_hold_on_to_what_it_began_with(root: Path) -> None:
    """Its files are closed, so that the disk has their room again when the slots move on."""
    built = session(root, **merged(SHARED, {"train": {"max_steps": 9}}))
    gc.collect()
    files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [file for file in files if "t_sharded" in file]
    assert finish(built) == "max_steps" and step_of(root) == 14


@pytest.mark.skips_updates
def test_a_roll_back_reads_shares(tmp_path: Path) -> None:
    built = session(tmp_path, **merged(SHARED, {"train": {"max_steps": 20}}))
    poison(built, lambda step: 7 <= step <= 7 + BAD_STEPS)
    finish(built)
    told = [each for each in warnings_of(tmp_path) if "weights are back" in each]
    assert len(told) == 1 and "weights are back at t_sharded/current, step 6" in told[0]


def test_the_menu_and_start_fresh_know_shares(root: Path) -> None:
    preset = decoded(train={"max_steps": 9})
    assert "from step 5 in t_sharded/current" in resume_lines(preset, root)[-1]
    assert has_checkpoints(root, "t")
    store(root).slots[1].unlink()
    assert has_checkpoints(root, "t")
    before = {p.name for p in (root / "checkpoints" / "t_sharded").iterdir()}
    name = put_aside(root, "t")
    assert not has_checkpoints(root, "t") and has_checkpoints(root, name)
    assert {p.name for p in (root / "checkpoints" / f"{name}_sharded").iterdir()} == before
    assert newest_weights(name, root).step == 5
    assert {event["step"] for event in train_here(tiny_preset(), root)} >= {1, 2, 3, 4, 5}


@pytest.fixture
def killed_in_renaming(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    moved: list[str] = []

    def replace(source: Any, target: Any) -> None:
        moved.append(Path(source).name)

    monkeypatch.setattr("core.checkpoint.lineage.os.replace", replace)
    yield moved


@pytest.mark.parametrize(("newest", "slot"), [("shares", 0), ("file", 1)])
def test_the_newest_is_put_aside_last(
    newest: str, slot: int, root: Path, killed_in_renaming: list[str]
) -> None:
    if newest == "file":
        shutil.copy(store(root).slots[1], store(root).slots[0])
        shutil.rmtree(store(root).shares[0])
    put_aside(root, "t")
    last = {"shares": "t_sharded", "file": "t_current.pth"}[newest]
    checkpoints = [name for name in killed_in_renaming if name != "t"]
    assert checkpoints[-1] == last and len(checkpoints) > slot + 1


def test_a_start_that_left_shares_is_no_refusal(root: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("core.launch.ROOT", root)
    assert store(root).shares[0] / STATE in _files_of(decoded())


def test_the_room_that_shares_take_is_counted(root: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(root)._replace(free=0)
    monkeypatch.setattr("core.checkpoint.slots.shutil.disk_usage", lambda _: usage)
    there = sum(p.stat().st_size for p in (root / "checkpoints").rglob("*") if p.is_file())
    store(root).check_room(there // 4)
    with pytest.raises(UserError, match="less what is there already"):
        store(root).check_room(there // 3)


def test_a_finished_trial_keeps_its_newest_only(root: Path) -> None:
    newest = Project(root).checkpoint("prev")
    store(root).keep_newest()
    assert forms(root) == ["t_sharded/current"]
    assert read_weights(store(root).shares[0], "w").step == 5
    shutil.rmtree(store(root).shares[0])
    ready = store(root)
    ready.save(newest)
    ready.keep_newest()
    assert forms(root) == ["t_current.pth"]
    assert not (root / "checkpoints" / "t_sharded").exists()
