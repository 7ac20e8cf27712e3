"""Checkpoints in shares: slots of two forms, and everything that reads a lineage. One process here,
which has all shares; tests/parallel/test_shares.py has several."""

import errno
import os
import pickle
import shutil
import signal
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from core.checkpoint import shares
from core.checkpoint.shares import CHECKSUMS, INDEX, STATE
from core.checkpoint.slots import CheckpointStore
from core.checkpoint.weights import newest_weights
from core.errors import UserError
from core.parallel.shards import Stored, full
from tests.checkpoint.shares import SHARED, forms, step_of, store, whole
from tests.project import Project, differences, merged
from tests.training.runs import session


@pytest.fixture
def root(in_shares: Path) -> Path:
    return in_shares


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


def test_a_file_of_the_same_step_takes_the_place_of_shares(root: Path) -> None:
    """As at the end of a run: none of the older ones is lost."""
    ready = store(root)
    before = [step_of(root, slot) for slot in range(3)]
    same = Project(root).checkpoint("prev")
    same["progress"]["step"] = same["rng"]["step"] = before[0]
    ready.save(same)
    ready.wait()
    assert ready.slots[0].is_file() and not ready.shares[0].exists()
    assert [step_of(root, slot) for slot in range(3)] == before


def kill_at_call(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is killed at its n-th rename or deletion."""
    left = [number]

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **how: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*arguments, **how)

        return call

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def save_step_six(root: Path, one_file: bool) -> None:
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


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("kill_at", range(18))
def test_a_kill_in_the_midst_of_moving_loses_only_that_save(
    kill_at: int, one_file: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each rename and each deletion, one after the other; a real process, killed."""
    if os.fork() == 0:
        try:
            kill_at_call(kill_at, monkeypatch)
            save_step_six(root, one_file)
        except BaseException:
            os._exit(9)
        os._exit(0)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) or status == 0, "it failed"
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
    later = Project(root).checkpoint("prev")
    later["progress"]["step"] = later["rng"]["step"] = 6
    ready.save(later)
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
    state[CHECKSUMS][INDEX] = zlib.crc32((folder / INDEX).read_bytes())
    torch.save(state, folder / STATE)


class Trap:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


def flip_what_is_not_of_a_tensor(folder: Path) -> None:
    """The share's own checksums do not cover it, as they do not tell a share of another save."""
    data = bytearray(first_share(folder).read_bytes())
    data[10] ^= 1  # a time in the first header
    first_share(folder).write_bytes(data)


def another_index(folder: Path) -> None:
    shutil.copy(folder.parent / "prev2" / INDEX, folder / INDEX)


DAMAGES = {
    "a share is gone": lambda folder: first_share(folder).unlink(),
    "a share is another": flip_what_is_not_of_a_tensor,
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


def test_shares_that_another_machine_kept_are_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `checkpoints/` is not the one that rank 0 sees: nothing is moved."""
    real = shares.save

    def elsewhere(*arguments: Any, **how: Any) -> Any:
        found = real(*arguments, **how)
        first_share(how["storage_writer"].path).unlink()
        return found

    monkeypatch.setattr(shares, "save", elsewhere)
    built = session(root, **SHARED)
    built.trainer.saver.save(whole=False)
    built.trainer.store.wait()
    outcome = built.trainer.store.outcome()
    built.log.close()
    assert outcome is not None and outcome[0] is None
    assert "__0_0.distcp of another process is not there: all of them must share" in outcome[2]
    assert forms(root) == ["t_prev.pth", "t_sharded/current", "t_sharded/prev2"]
    assert not list((root / "checkpoints" / "t_sharded").glob(".*"))
