"""Checkpoints in shares: slots of two forms, and everything that reads a lineage. One process here,
which has all shares; tests/parallel/test_shares.py has several."""

import errno
import os
import pickle
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from core.checkpoint.lineage import has_checkpoints, put_aside
from core.checkpoint.shares import CHECKSUM, INDEX, STATE
from core.checkpoint.slots import CheckpointStore, label
from core.checkpoint.weights import newest_weights, preview_weights, read_weights
from core.errors import UserError
from core.launch import _files_of
from core.parallel.shards import Stored, full
from core.preset.decode import decode_preset
from core.preview import resume_lines
from core.registry import Preset
from core.runtime import detect_runtime
from core.trained import load_trained
from tests.project import Project, differences, merged, tiny_preset, train_here
from tests.training.runs import finish, session

SHARED: dict[str, Any] = {
    "train": {"engine": "fsdp", "checkpoint_every_steps": 2, "max_steps": 5},
    "model": {"tie_embeddings": True},
    "auxiliary": {"enable_value": True},
}


def whole(state: Any) -> dict[str, Any]:
    """The state with every tensor read."""
    found = {part: {n: full(t) for n, t in state[part].items()} for part in ("model", "heads")}
    optimizer = {
        name: {key: full(value) for key, value in entry.items()}
        for name, entry in state["optimizer"].items()
    }
    return {**state, **found, "optimizer": optimizer}


def store(root: Path) -> CheckpointStore:
    return CheckpointStore(root / "checkpoints", "t")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lineage with the same step in both forms: in shares `current`, in one file `prev`; and step
    4 in shares."""
    root = tmp_path_factory.mktemp("made")
    built = session(root, **SHARED)
    finish(built)
    built.trainer.progress.evaluation_due = True  # as in the file
    built.trainer.saver.save(whole=False)
    built.trainer.store.wait()
    assert built.trainer.store.outcome() == (store(root).shares[0], pytest.approx(0, abs=60), "")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


def forms(root: Path) -> list[str]:
    """The slots that are there."""
    both = (*store(root).slots, *store(root).shares)
    return sorted(label(path) for path in both if path.exists())


def test_both_forms_hold_the_same(root: Path) -> None:
    assert forms(root) == ["t_prev.pth", "t_sharded/current", "t_sharded/prev2"]
    state, path, notes = store(root).load()
    assert path == store(root).shares[0] and notes == []
    assert state is not None and isinstance(state["model"]["layers.0.linear1.weight"], Stored)
    assert differences(Project(root).checkpoint("prev"), whole(state)) == []
    tied = [name for name in ("embedding.weight", "lm_head.weight") if name in state["model"]]
    assert len({id(state["model"][name]) for name in tied}) == 1


def test_torch_itself_reads_them(root: Path, tmp_path: Path) -> None:
    """Nothing but torch is needed to make one file of them."""
    dcp_to_torch_save(store(root).shares[0], tmp_path / "w.pt")
    found = torch.load(tmp_path / "w.pt", weights_only=True)
    for name, tensor in Project(root).checkpoint("prev")["model"].items():
        if f"model.{name}" in found:  # a tied tensor is there once
            assert torch.equal(found[f"model.{name}"], tensor)
    assert "model.layers.0.linear1.weight" in found


# a slot has one form ------------------------------------------------------------------------------


def step_of(root: Path, slot: int = 0) -> int:
    state = store(root).load(skip=slot)[0]
    assert state is not None
    return state["progress"]["step"]


def test_slots_of_both_forms_rotate_as_one(root: Path) -> None:
    """Whatever follows what: three slots, never one twice."""
    preset = merged(SHARED, {"train": {"max_steps": 7, "checkpoint_every_steps": None}})
    built = session(root, **preset)
    saver, progress, ready = built.trainer.saver, built.trainer.progress, store(root)
    kinds = [False, True, True, False, False, False, True, False, True]
    assert progress.step == 5
    for number, one_file in enumerate(kinds):
        progress.step = progress.tokens = 10 + number
        saver.save(whole=one_file)
        built.trainer.store.wait()
        assert (ready.shares[0].exists(), ready.slots[0].exists()) == (not one_file, one_file)
        assert len(forms(root)) == 3, forms(root)
        steps = [step_of(root, slot) for slot in range(3)]
        assert steps == sorted(steps, reverse=True) and steps[0] == 10 + number
    built.log.close()
    built.trainer.loader.close()


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("kill_at", range(12))
def test_a_kill_in_the_midst_of_moving_loses_only_that_save(
    kill_at: int, one_file: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each rename and each deletion, one after the other; a real process, killed."""
    if os.fork() == 0:
        left = [kill_at]

        def counted(real: Any) -> Any:
            def call(*arguments: Any, **how: Any) -> Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real(*arguments, **how)

            return call

        for name in ("replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
        ready = store(root)
        if one_file:
            state = Project(root).checkpoint("prev")
            state["progress"]["step"] = state["rng"]["step"] = 6
            ready._put_file(state)
        else:
            aside = ready.shares[0].with_name(f".current.{'0' * 16}.tmp")
            shutil.copytree(ready.shares[0], aside)
            state = torch.load(aside / STATE, weights_only=True)
            state["progress"]["step"] = state["rng"]["step"] = 6
            torch.save(state, aside / STATE)
            ready._take_in(aside)
        os._exit(0)
    _, status = os.wait()
    ready = store(root)
    assert ready.prepare() == []
    state, _, notes = ready.load()
    assert state is not None and notes == []
    assert state["progress"]["step"] in ((5, 6) if status else (6,))
    assert len(forms(root)) >= 2 + (status == 0), forms(root)
    assert not list((root / "checkpoints").rglob("*.tmp"))
    assert not list((root / "checkpoints").rglob("*.damaged*"))


def test_of_two_forms_of_a_slot_the_later_step_counts(root: Path) -> None:
    """An older version of this program, or a hand, has left a file beside."""
    older = Project(root).checkpoint("prev")
    older["progress"]["step"] = older["rng"]["step"] = 3
    older["optimizer"] = {}
    torch.save(older, store(root).slots[0])
    assert step_of(root) == 5
    older["progress"]["step"] = older["rng"]["step"] = 9
    torch.save(older, store(root).slots[0])
    assert step_of(root) == 9


def test_the_name_that_mirrors_the_newest_goes_where_that_is_in_shares(root: Path) -> None:
    ready = CheckpointStore(root / "checkpoints", "t", "simple_lm_trained.pth")
    mirror = root / "checkpoints" / "simple_lm_trained.pth"
    ready.save(Project(root).checkpoint("prev"))
    ready.wait()
    assert mirror.samefile(ready.slots[0])
    aside = ready.shares[0].with_name("aside")
    shutil.copytree(ready.shares[1], aside)
    ready._take_in(aside)
    assert not mirror.exists() and ready.shares[0].is_dir() and not ready.slots[0].exists()


# damage -------------------------------------------------------------------------------------------


def first_share(folder: Path) -> Path:
    return sorted(folder.glob("*.distcp"))[0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def flip_a_weight(folder: Path) -> None:
    """In the middle of the numbers of a tensor: torch itself reads on over it."""
    path = first_share(folder)
    data = bytearray(path.read_bytes())
    state = store(folder.parent.parent.parent).load(read_only=True)[0]
    assert state is not None
    value = full(state["model"]["layers.0.linear1.weight"]).numpy().tobytes()
    data[data.index(value) + 16] ^= 1
    path.write_bytes(data)


def forged_index(folder: Path) -> None:
    (folder / INDEX).write_bytes(pickle.dumps(Trap()))
    state = torch.load(folder / STATE, weights_only=True)
    state[CHECKSUM] = zlib.crc32((folder / INDEX).read_bytes())
    torch.save(state, folder / STATE)


class Trap:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


def another_index(folder: Path) -> None:
    shutil.copy(folder.parent / "prev2" / INDEX, folder / INDEX)


DAMAGES = {
    "a share is gone": lambda folder: first_share(folder).unlink(),
    "a share is cut off": lambda folder: os.truncate(first_share(folder), 5000),
    "a bit of a weight": flip_a_weight,
    "the index is gone": lambda folder: (folder / INDEX).unlink(),
    "the index is cut off": lambda folder: os.truncate(folder / INDEX, 100),
    "a bit of the index": lambda folder: flip(folder / INDEX),
    "an index with code": forged_index,
    "another save's index": another_index,
    "the state is gone": lambda folder: (folder / STATE).unlink(),
    "the state is cut off": lambda folder: os.truncate(folder / STATE, 1000),
    "a pipe as share": lambda folder: (
        first_share(folder).unlink(),
        os.mkfifo(folder / "__0_0.distcp"),
    ),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shares_are_set_aside_and_an_older_slot_taken(
    damage: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told, and never deleted; and a start goes on from the older slot."""
    monkeypatch.chdir(root)
    DAMAGES[damage](store(root).shares[0])
    weights = newest_weights("t", root)
    assert weights.where == "t_prev.pth" and len(weights.notes) == 1
    state, path, notes = store(root).load()
    assert state is not None and path == store(root).slots[1]
    assert notes[0].startswith("t_sharded/current is damaged (") and len(notes) == 1
    assert "it is now t_sharded/current.damaged, and an older slot is taken" in notes[0]
    assert (root / "checkpoints" / "t_sharded" / "current.damaged").is_dir()
    assert not (root / "sprung").exists()


def test_what_may_not_be_read_is_not_damaged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, *how: Any) -> int:
        if str(path).endswith(".distcp"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *how)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"t_sharded.current cannot be read: .*Permission denied"):
        store(root).load()
    assert store(root).shares[0].is_dir()


def test_a_file_where_the_folder_should_be_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "t_sharded").write_text("in the way")
    assert CheckpointStore(tmp_path, "t").prepare() == [
        "t_sharded is no folder; it is now t_sharded.damaged"
    ]
    assert (tmp_path / "t_sharded.damaged").read_text() == "in the way"


def test_what_a_killed_save_left_is_swept(root: Path) -> None:
    left = root / "checkpoints" / "t_sharded" / ".current.0123456789abcdef.tmp"
    shutil.copytree(store(root).shares[0], left)
    assert store(root).prepare() == [] and not left.exists()
    assert len(forms(root)) == 3


# who reads a lineage ------------------------------------------------------------------------------


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


def test_weights_that_are_not_finite_are_told(made: Path, tmp_path: Path) -> None:
    built = session(tmp_path, **SHARED)
    with torch.no_grad():
        next(iter(built.trainer.model.parameters())).to_local()[0] = float("nan")
    built.trainer.progress.step = built.trainer.progress.tokens = 1
    built.trainer.saver.save(whole=False)
    built.trainer.store.wait()
    built.log.close()
    notes = session(tmp_path, **SHARED).notes
    assert [note for note in notes if "not finite in t_*.pth" in note], notes


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
