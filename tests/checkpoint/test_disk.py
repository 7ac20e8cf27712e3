"""What would keep a run from saving is found before its first step, and told by its real cause; and
how every file is written."""

import errno
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.slots import CheckpointStore
from core.environment import read_dotenv
from core.errors import CheckpointError, PresetError, UserError
from core.files import cause, link_file, probe, read_json, replacing, sweep, write_file
from core.preset.decode import read_preset
from core.registry import Preset
from core.reports.run_card import read_card
from tests.project import tiny_preset, train_here


def mounted(folder: Path, options: str) -> Path:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, with the options of `mount`."""
    yield lambda options: mounted(tmp_path / "disk", options)
    subprocess.run(["umount", str(tmp_path / "disk")], capture_output=True)


def refused(root: Path, **changes: Any) -> str:
    """Why a run does not start; it must not have trained a step."""
    with pytest.raises(UserError) as caught:
        train_here(tiny_preset(**changes), root)
    log = root / "logs" / "t" / "metrics.jsonl"
    assert not log.is_file() or '"event": "step"' not in log.read_text()
    return str(caught.value)


@pytest.mark.parametrize("place", ["checkpoints", "logs"])
def test_a_file_or_a_dangling_link_in_place_of_a_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / place).symlink_to("gone")
    told = refused(tmp_path)
    assert (
        f"{tmp_path / place} is a link to gone, which is not there. Make that folder, or remove "
        "the link." in told
    )
    (tmp_path / place).unlink()
    (tmp_path / place).write_text("in the way")
    told = refused(tmp_path)
    assert f"{tmp_path / place} is no folder. Move it away." in told and "space" not in told
    assert (tmp_path / place).read_text() == "in the way"


@pytest.mark.parametrize("place", ["checkpoints", "logs"])
def test_a_disk_that_is_read_only_or_full(
    place: str, disk: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = disk("size=300k")
    (tmp_path / place).symlink_to(folder)
    (folder / "filling").write_bytes(bytes(300_000 // 4096 * 4096))
    told = refused(tmp_path)
    assert "No space left on device. Free some space there." in told
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    told = refused(tmp_path)
    assert "Read-only file system. Mount it for writing" in told and "space" not in told


def test_room_for_all_slots_is_needed_before_the_first_step(
    disk: Callable[[str], Path], tmp_path: Path
) -> None:
    """Room for one checkpoint but not for three and the one being written; enough once older slots
    are there to be replaced."""
    (tmp_path / "checkpoints").symlink_to(disk("size=1m"))
    told = refused(tmp_path)
    assert (
        "1.0 MB free, and this run needs 1.7 MB: 3 checkpoints of 0.4 MB and the one being written"
        in told
    ), told
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_size_of_a_checkpoint_is_known_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For AdamW and for Muon, with heads: within a few hundredths of the file."""
    for name, changes in (("adamw", {}), ("muon", {"optimizer": "muon"})):
        sizes: list[int] = []
        monkeypatch.setattr(
            CheckpointStore, "check_room", lambda store, size, sizes=sizes: sizes.append(size)
        )
        preset = tiny_preset(
            train=changes, model={"hidden_size": 128}, auxiliary={"enable_value": True}
        )
        train_here(preset, tmp_path / name)
        written = (tmp_path / name / "checkpoints" / "t_current.pth").stat().st_size
        assert 0.95 * written < sizes[0] <= written, name


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"a checkpoint of 0\.4 MB cannot be written .*File too large\. A limit \(ulimit "
            r"-f\)",
        ):
            train_here(tiny_preset(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "checkpoints").exists()


def test_the_cause_is_the_cause(tmp_path: Path) -> None:
    """What to do follows from it: space is freed only where space is what lacks."""
    advice = {
        code: cause(OSError(code, os.strerror(code)), tmp_path / "f")
        for code in (errno.EACCES, errno.EPERM, errno.EIO)
    }
    assert all("space" not in told for told in advice.values())
    assert (
        "right to write"
        in advice[errno.EACCES]
        == advice[errno.EPERM].replace("Operation not permitted", "Permission denied")
    )
    assert "space" in cause(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path / "f")


# how a file is written ----------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_file(path, "first")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    write_file(path, b"second", durable=True)
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask(), "as open() would make it"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_written_through_a_link_that_somebody_has_laid(tmp_path: Path) -> None:
    """Neither at the file's own name nor under any name that could be foreseen."""
    victim, path = tmp_path / "victim", tmp_path / "out" / "run.json"
    victim.write_text("precious")
    path.parent.mkdir()
    for name in ("run.json", "run.json.tmp", f"run.json.{os.getpid()}.tmp"):
        (path.parent / name).symlink_to(victim)
    write_file(path, "mine")
    assert victim.read_text() == "precious" and path.read_text() == "mine" and not path.is_symlink()


def test_a_whole_run_writes_through_no_link(tmp_path: Path) -> None:
    """Links at every name that the program used to write to aside."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    logs, checkpoints = tmp_path / "root" / "logs" / "t", tmp_path / "root" / "checkpoints"
    names = [
        logs / f"{n}.tmp"
        for n in ("run.json", "preset.json", "loss.png", f"loss.png.{os.getpid()}")
    ]
    for link in [*names, checkpoints / "t_current.pth.tmp", checkpoints / "t.lock.tmp"]:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(victim)
    train_here(tiny_preset(), tmp_path / "root")
    assert (
        victim.read_text() == "precious"
        and (checkpoints / "t_current.pth").stat().st_size > 100_000
    )


def test_many_writers_of_one_file_leave_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    threads = [
        threading.Thread(target=write_file, args=(path, bytes([65 + i]) * 300_000))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert len(content) == 300_000 and len(set(content)) == 1 and list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    """Of the files asked for; not what is another's, not what somebody may still be writing."""
    halves = {
        name: tmp_path / f".{name}.0123456789abcdef.tmp"
        for name in ("t_current.pth", "t2_current.pth")
    }
    kept = [
        tmp_path / name
        for name in ("t_current.pth", ".t_current.pth.tmp", "t_current.pth.0123456789abcdef.tmp")
    ]
    for path in (*halves.values(), *kept):
        path.write_text("x")
    sweep(tmp_path, "t_current.pth", unused_seconds=3600)
    assert all(path.exists() for path in halves.values())
    sweep(tmp_path, "t_current.pth")
    assert [path.exists() for path in (*halves.values(), *kept)] == [False, True, True, True, True]
    sweep(tmp_path / "gone")


def test_what_is_left_beside_a_checkpoint_is_swept(tmp_path: Path) -> None:
    """Also of its mirror, a name that keeps a whole checkpoint, and of the file that was written to
    try the disk."""
    number = "0123456789abcdef"
    left = [
        f".lm_current.pth.{number}.tmp",
        f"..lm_current.pth.{number}.tmp.{number}.tmp",
        f".simple_lm_trained.pth.{number}.tmp",
    ]
    for name in [*left, f".other_current.pth.{number}.tmp"]:
        (tmp_path / name).write_text("x")
    assert CheckpointStore(tmp_path, "lm", "simple_lm_trained.pth").prepare() == []
    assert [path.name for path in tmp_path.iterdir()] == [f".other_current.pth.{number}.tmp"]


def test_a_name_that_cannot_be_given_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        link_file(tmp_path / "one", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "one"]


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    probe(tmp_path / "new" / "er" / "file", size=1 << 40)  # takes no room
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_another_name(tmp_path: Path) -> None:
    for content in ("a", "b"):
        write_file(tmp_path / "one", content)
        for _ in range(2):  # the second time both are the same file already
            link_file(tmp_path / "one", tmp_path / "two")
        assert (tmp_path / "two").samefile(tmp_path / "one") and len(list(tmp_path.iterdir())) == 2


# what is no file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stand_in",
    [
        os.mkfifo,
        Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
    ],
)
def test_what_is_no_file_is_told_and_hangs_nobody(
    stand_in: Callable[[Path], None], tmp_path: Path
) -> None:
    """A pipe, a folder, a device, a link in a circle, where a preset, `.env` or a run card should
    be."""
    for name in ("t.json", ".env", "run.json"):
        stand_in(tmp_path / name)
    with pytest.raises(PresetError, match="cannot be read"):
        read_preset(tmp_path / "t.json", Preset)
    told = read_dotenv(tmp_path / ".env")
    # a folder is a virtual environment
    assert told == [] if (tmp_path / ".env").is_dir() else "cannot be read (" in told[0]
    assert read_card(tmp_path) == {}


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"5", b"\xff", b"\0" * 100, b"[" * 100_000, b'{"a": 1e400', b"null"]
)
def test_a_run_card_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert read_card(tmp_path) == {}


def test_a_file_without_end_is_not_read_whole(tmp_path: Path) -> None:
    """A sparse file of a terabyte: refused, not read until the memory is full."""
    with open(tmp_path / "t.json", "wb") as file:
        os.ftruncate(file.fileno(), 1 << 40)
    with pytest.raises(OSError, match="more than 256 MB"):
        read_json(tmp_path / "t.json")


def test_a_checkpoint_that_fails_half_way_is_told_by_its_cause(tmp_path: Path) -> None:
    """The folder was taken away in mid-run, and a file stands there."""
    store = CheckpointStore(tmp_path / "checkpoints", "t")
    store.prepare()
    (tmp_path / "checkpoints").write_text("in the way")
    store.save({"model": {"a": torch.zeros(3)}})
    store.wait()
    outcome = store.outcome()
    assert (
        outcome is not None
        and outcome[0] is None
        and outcome[2] == f"{tmp_path / 'checkpoints'} is no folder. Move it away."
    )
