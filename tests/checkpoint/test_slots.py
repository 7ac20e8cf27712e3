"""Checkpoints: three slots that survive a kill at any instant, a full disk and a damaged file;
nobody's work is overwritten."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.checkpoint.copying import copied, stored_bytes
from core.checkpoint.slots import FORMAT, CheckpointStore
from core.errors import CheckpointError
from tests.project import ROOT

KILLS = 30


def state_of(number: int, size: int = 1000) -> dict[str, Any]:
    """A state that tells whether all of it is of one save."""
    weights = {
        "a": torch.full((size,), float(number)),
        "b": torch.full((7, 3), number, dtype=torch.int64),
    }
    counts = dict.fromkeys(
        ("step", "tokens", "run_step", "run_tokens", "horizon_step", "horizon_tokens"), number
    )
    data = {
        "rows": number,
        "lanes": {"0": [1, [[0, 5]]]},
        "snapshot": None,
        "drops": {},
        "renewals": [],
        "receipts": {},
    }
    return {
        "format": FORMAT,
        "model": weights,
        "heads": {},
        "optimizer": {},
        "progress": {**counts, "run": 1, "horizon_runs": 0, "finished": False, "skipped": 0},
        "rng": {"seed": 1, "step": number},
        "data": {**data, "receipt": "", "fingerprint": ""},
        "tokenizer": {"json": '{"model": {}}', "eos_id": 0},
        "preset": {"name": "p", "model": {}, "tokenizer": {}, "train": {}, "data": {}},
    }


def number_of(state: dict[str, Any]) -> int:
    """The save a state comes from; it must come from one alone."""
    number = state["progress"]["step"]
    assert (state["model"]["a"] == number).all() and (state["model"]["b"] == number).all()
    return number


def save(store: CheckpointStore, number: int, size: int = 1000) -> tuple:
    store.save(state_of(number, size))
    store.wait()
    outcome = store.outcome()
    assert outcome is not None
    return outcome


def slots(store: CheckpointStore) -> list[int]:
    """What is in the slots that exist, newest first."""
    return [number_of(torch.load(path, weights_only=True)) for path in store.slots if path.exists()]


# rotation -----------------------------------------------------------------------------------------


def test_three_slots_rotate(tmp_path: Path) -> None:
    """current, prev, prev2, as the specification names them; nothing else is left in the folder."""
    store = CheckpointStore(tmp_path / "checkpoints", "mine")
    assert store.load() == (None, None, []) and store.peek() is None
    for number in range(1, 6):
        path, seconds, failed = save(store, number)
        assert (path, failed) == (tmp_path / "checkpoints" / "mine_current.pth", "") and seconds > 0
        assert slots(store) == list(range(number, 0, -1))[:3]
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "mine_current.pth",
        "mine_prev.pth",
        "mine_prev2.pth",
    ]
    state, path, notes = store.load()
    assert number_of(state) == 5 and path == store.slots[0] and notes == []
    assert store.peek()["progress"]["step"] == 5
    assert store.outcome() is None, "an outcome is told once"


def test_lineages_do_not_touch_each_other(tmp_path: Path) -> None:
    one, other = CheckpointStore(tmp_path, "one"), CheckpointStore(tmp_path, "one_b")
    save(one, 1)
    save(other, 2)
    save(other, 3)
    assert slots(one) == [1] and slots(other) == [3, 2]


def test_the_mirror_always_holds_what_current_holds(tmp_path: Path) -> None:
    """simple_lm_trained.pth of lineage lm: another name of the same file, which costs no room."""
    store = CheckpointStore(tmp_path, "lm", "simple_lm_trained.pth")
    for number in (1, 2):
        save(store, number)
        mirror = tmp_path / "simple_lm_trained.pth"
        assert number_of(torch.load(mirror, weights_only=True)) == number
        assert mirror.samefile(tmp_path / "lm_current.pth")
    assert slots(store) == [2, 1] and len(list(tmp_path.iterdir())) == 3


def test_without_hard_links_the_mirror_is_acopied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have none."""

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = CheckpointStore(tmp_path, "lm", "simple_lm_trained.pth")
    save(store, 1)
    save(store, 2)
    assert number_of(torch.load(tmp_path / "simple_lm_trained.pth", weights_only=True)) == 2


def test_a_tensor_of_several_names_is_copied_and_written_once(tmp_path: Path) -> None:
    """Tied weights, as `state_dict` gives them: an object for each name. The room that is asked for
    is the room it takes."""
    model = nn.ModuleDict(
        {"table": nn.Embedding(300, 50), "readout": nn.Linear(50, 300, bias=False)}
    )
    model["readout"].weight = model["table"].weight
    copy = copied({"model": model.state_dict(), "other": [model["table"].weight[:7]]})
    assert copy["model"]["table.weight"] is copy["model"]["readout.weight"] and copy["other"][
        0
    ].shape == (7, 50)
    assert stored_bytes(model) == 300 * 50 * 4
    store = CheckpointStore(tmp_path, "t")
    store.save({**state_of(1), "model": model.state_dict()})
    store.wait()
    assert stored_bytes(model) < store.slots[0].stat().st_size < 1.3 * stored_bytes(model)


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """What is saved is what was there at the call, whatever happens to the tensors afterwards; tied
    ones are stored once."""
    store = CheckpointStore(tmp_path, "t")
    weight = torch.zeros(300_000)
    moments = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.zeros(300_000),
        "exp_avg_sq": torch.ones(300_000),
    }
    store.save(
        {
            **state_of(3),
            "model": {"a": weight, "tied": weight},
            "optimizer": {"a": moments},
            "more": (0.9, 0.95),
        }
    )
    weight.fill_(1.0)
    store.wait()
    state = store.load()[0]
    assert (state["model"]["a"] == 0).all() and state["model"]["a"].data_ptr() == state["model"][
        "tied"
    ].data_ptr()
    assert store.slots[0].stat().st_size < 3_700_000
    assert state["optimizer"]["a"]["step"] == 3 and state["more"] == [0.9, 0.95]


# damage -------------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    path.write_bytes(b"not a checkpoint at all\n" * 100)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def no_model(path: Path) -> None:
    torch.save([1, 2, 3], path)


def foreign_code(path: Path) -> None:
    torch.save({"model": {}, "trap": Trap()}, path)


class Trap:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize(
    "damage", [cut_short, empty, overwrite, flip_a_bit, no_model, foreign_code]
)
def test_a_damaged_slot_is_set_aside_and_an_older_one_taken(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never deleted, and the run says so. torch reads on over flipped bits; and code inside a
    checkpoint never runs."""
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore(tmp_path, "t")
    for number in (1, 2, 3):
        save(store, number, size=100_000)
    damage(store.slots[0])
    broken = store.slots[0].read_bytes()
    assert (store.peek() or {"progress": {"step": 2}})["progress"]["step"] in (2, 3)
    state, path, notes = store.load()
    assert number_of(state) == 2 and path == store.slots[1]
    assert (
        len(notes) == 1
        and notes[0].startswith("t_current.pth is damaged (")
        and "t_current.pth.damaged" in notes[0]
    )
    assert (tmp_path / "t_current.pth.damaged").read_bytes() == broken and not store.slots[
        0
    ].exists()
    assert not (tmp_path / "sprung").exists()
    save(store, 4)
    assert slots(store) == [4, 2]


def test_every_damaged_slot_is_kept(tmp_path: Path) -> None:
    """All three slots, and again: no damaged file takes another's name; nothing readable means a
    fresh start, told."""
    store = CheckpointStore(tmp_path, "t")
    for number in (1, 2, 3):
        save(store, number)
    for path in store.slots:
        cut_short(path)
    state, path, notes = store.load()
    assert (state, path, len(notes)) == (None, None, 3)
    save(store, 9)
    empty(store.slots[0])
    store.load()
    assert len(list(tmp_path.glob("*.damaged*"))) == 4


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    """An older program must not take it for damaged, nor start afresh over it."""
    store = CheckpointStore(tmp_path, "t")
    torch.save(state_of(1) | {"format": FORMAT + 1}, tmp_path / "t_current.pth")
    with pytest.raises(
        CheckpointError, match=f"has format {FORMAT + 1}, this program reads up to {FORMAT}"
    ):
        store.load()
    assert [p.name for p in tmp_path.iterdir()] == ["t_current.pth"]


# kills and full disks -----------------------------------------------------------------------------

SAVE_FOR_EVER = """
import os, sys
from pathlib import Path
from core.checkpoint.slots import CheckpointStore
from tests.checkpoint.test_slots import save, number_of
import torch
torch.set_num_threads(1)
folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
import random, signal, time
delays = random.Random(seed)
store = CheckpointStore(folder, "lm", "simple_lm_trained.pth")
written = 0
for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        number = written
        while True:
            number += 1
            save(CheckpointStore(folder, "lm", "simple_lm_trained.pth"), number, size=200_000)
            os.write(writer, number.to_bytes(4, "big"))
    os.close(writer)
    began = time.monotonic()
    told = os.read(reader, 4)
    time.sleep(delays.uniform(0.0, 2 * (time.monotonic() - began)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told += os.read(reader, 1 << 20)
    os.close(reader)
    done = int.from_bytes(told[-4:], "big")
    state, path, notes = store.load()
    assert notes == [], f"kill {kill}: {notes}"
    found = number_of(state)
    # the save after the last one that was told may be in place as well
    assert found in (done, done + 1), f"kill {kill}: save {done} was done, save {found} is there"
    written = found
print(written)
"""


def run_script(code: str, *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_kill_at_any_moment_leaves_a_loadable_slot(tmp_path: Path) -> None:
    """kill -9 while saving, again and again: always whole, undamaged, and never older than the last
    finished save."""
    saves = int(run_script(SAVE_FOR_EVER, str(tmp_path), str(KILLS), "1").stdout)
    assert saves > KILLS


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    """Every state in which the rotation can be left: an older or a newer save is found, and the
    next save goes on."""
    for gone in ({0}, {1}, {0, 1}, {0, 2}):
        store = CheckpointStore(tmp_path / str(gone), "t")
        for number in (1, 2, 3):
            save(store, number)
        for slot in gone:
            store.slots[slot].unlink()
        left = slots(store)
        halves = [
            store.folder / name
            for name in (".t_current.pth.0123456789abcdef.tmp", "t_current.pth.tmp")
        ]
        for half in halves:  # as this version and those before it would leave one
            half.write_bytes(b"half a file")
        store.prepare()
        assert number_of(store.load()[0]) == left[0]
        save(store, 4)
        assert (
            slots(store)[0] == 4
            and slots(store)[1] == left[0]
            and not any(half.exists() for half in halves)
        )


def test_a_write_that_fails_leaves_the_older_slots(tmp_path: Path) -> None:
    """The reason is told, nothing half-written stays, and the next save works."""
    store, before = CheckpointStore(tmp_path, "t"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in (1, 2):
        save(store, number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        path, _, reason = save(store, 3, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path is None and "File too large" in reason, (path, reason)
    assert slots(store) == [2, 1], slots(store)
    assert sorted(p.name for p in store.folder.iterdir()) == ["t_current.pth", "t_prev.pth"]
    save(store, 4, size=100_000)
    assert slots(store) == [4, 2, 1]


def test_a_full_disk_leaves_the_older_slots(tmp_path: Path) -> None:
    """The same on a file system that is really full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        store = CheckpointStore(disk, "t")
        save(store, 1)
        save(store, 2)
        path, _, reason = save(store, 3, size=1_000_000)
        assert path is None and "No space left on device" in reason
        assert slots(store) == [2, 1] and len(list(disk.iterdir())) == 2
        assert save(store, 4)[0] == store.slots[0] and slots(store) == [4, 2, 1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# fitting a model ----------------------------------------------------------------------------------
