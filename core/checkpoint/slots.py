"""Three rotating slots per lineage that survive a kill at any instant, a full disk and a damaged
file.

    checkpoints/<lineage>_current.pth   _prev.pth   _prev2.pth      a checkpoint in one file
    checkpoints/<lineage>_sharded/current/   prev/   prev2/         one in shares, see shares.py

Each slot has one of the two forms. A new checkpoint is written aside, flushed to the disk, and only
then the slots move: prev to prev2, current to prev, new to current. Training goes on as soon as the
tensors are copied; the writing happens in a thread.

In:    a dict of tensors and plain values
Out:   the newest slot that can be read
State: the files
"""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from core.checkpoint.copying import copied
from core.checkpoint.state import CheckpointState, NewestState, problem_of
from core.errors import CheckpointError, first_line
from core.file_names import SLOTS, shares_name, slot_name
from core.files import (
    aside_name,
    cause,
    check_regular,
    check_zip,
    discard,
    free_name,
    link_file,
    probe,
    replacing,
    standing,
    sweep,
    sync_folder,
)
from core.parallel.protocol import Parallel
from core.parallel.ranks import on_rank_zero

if TYPE_CHECKING:  # models read checkpoints, and can be imported without presets
    from torch.distributed.device_mesh import DeviceMesh

    from core.preset.base import PresetBase

FORMAT = 1
"""Increased when a checkpoint's layout changes in a way that older code cannot read."""


class Damaged(Exception):
    """A file that is no whole checkpoint; says why."""


def read_checkpoint(path: Path, mmap: bool = False, whole: bool = True) -> CheckpointState:
    """Read a checkpoint that a CheckpointStore wrote, a file or a folder, and check it.

    mmap    of a file leave tensors on the disk until they are used
    whole   check every byte
    Raises Damaged, or CheckpointError where this program may not or cannot read it.
    """
    try:
        if path.is_dir() and path.suffix != ".pth":
            from core.checkpoint.shares import read_shares  # slow to import

            state = read_shares(path, whole)
        else:
            check_regular(path)
            if whole:
                check_zip(path)  # torch itself reads on over flipped bits
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever reading a damaged file may raise
        lacking = path.is_dir() and isinstance(error, FileNotFoundError)
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno not in (None, errno.EINVAL) and not lacking
        ):
            raise CheckpointError(
                f"{path} cannot be read: {error}. Mend that, or move the file away."
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Damaged(reason[:120]) from None
    if isinstance(state, dict) and type(state.get("format")) is int and state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, this program reads up to {FORMAT}. Update the "
            "program, "
            "or set another lineage in the preset."
        )
    if (problem := problem_of(state)) is not None:
        raise Damaged(problem[:120])
    return state


MIRRORS = {"lm": "simple_lm_trained.pth"}
"""Lineages whose newest checkpoint has another name as well (specification 003)."""


class LoadedSlot(NamedTuple):
    """A slot that was read; without state and path where no slot can be read."""

    state: CheckpointState | None
    path: Path | None
    notes: list[str]  # what a person should know of the slots


class CheckpointStore:
    """The slots of one lineage. Rank 0 saves, or all of them together."""

    def __init__(self, folder: Path, lineage: str, mirror: str | None = None):
        """`lineage`: may be a path below the folder. `mirror`: another file name that always holds
        what `current` holds."""
        self.folder, self.lineage = folder, lineage
        self.slots = [folder / slot_name(lineage, slot) for slot in SLOTS]
        self.shares = [folder / shares_name(lineage, slot) for slot in SLOTS]
        self._mirror = folder / mirror if mirror else None
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Path | None, float, str] | None = None

    # reading --------------------------------------------------------------------------------------

    def load(self, skip: int = 0, read_only: bool = False, settled: bool = False) -> LoadedSlot:
        """Load the newest readable slot.

        skip        how many of the newest slots to leave out
        read_only   for a lineage that somebody else trains: nothing is renamed, and tensors stay on
                    the disk until they are used
        settled     leave out one that was saved amid bad steps, too; only the newest can be

        A damaged slot is renamed to `*.damaged`, never deleted. Raises CheckpointError when a slot
        exists but this program may not or cannot read it: starting afresh would overwrite
        somebody's work."""
        notes: list[str] = []
        for slot in range(skip + (settled and self._amid_bad_steps()), len(SLOTS)):
            for path in self._forms(slot):
                try:
                    return LoadedSlot(read_checkpoint(path, mmap=read_only), path, notes)
                except Damaged as reason:
                    note = f"{label(path)} is damaged ({reason})"
                if not read_only:
                    note += f"; it is now {label(_set_aside(path))}"
                notes.append(f"{note}, and an older slot is taken")
        return LoadedSlot(None, None, notes)

    def peek(self) -> NewestState | None:
        """Progress, preset and place in the data of the newest slot, without its tensors; None when
        there is none to read."""
        for path in (path for slot in range(len(SLOTS)) for path in self._forms(slot)):
            try:
                state = read_checkpoint(path, mmap=True, whole=False)
            except (Damaged, CheckpointError):
                # a preview judges no slot: loading it for real will say what is wrong
                continue
            return {
                "path": path,
                "progress": state["progress"],
                "preset": state["preset"],
                "data": state["data"],
            }
        return None

    def _forms(self, slot: int) -> list[Path]:
        """Return where a slot is: nowhere, or at one path. At two, the later step first, only where
        a kill, an older version or a hand left both."""
        forms = [path for path in (self.slots[slot], self.shares[slot]) if path.exists()]
        return sorted(forms, key=_step_of, reverse=True) if len(forms) > 1 else forms

    def _amid_bad_steps(self) -> bool:
        """Return whether the updates before the newest checkpoint were skipped as not finite."""
        newest = next(iter(self._forms(0)), None)
        return newest is not None and _progress_of(newest).get("bad_in_a_row", 0) > 0

    # writing --------------------------------------------------------------------------------------

    def prepare(self) -> list[str]:
        """Find out before the first step what would keep the last one from being saved; returns
        remarks.

        Only for who owns the lineage: what a killed run left half-written is deleted. Raises
        CheckpointError."""
        current = self.slots[0]
        try:
            probe(current)
            paths = [*self.slots, *([self._mirror] if self._mirror is not None else [])]
            for path in paths:
                sweep(path.parent, path.name)
            # as earlier versions called it
            current.with_name(f"{current.name}.tmp").unlink(missing_ok=True)
            odd = [path for path in paths if path.exists() and not path.is_file()]
            notes = [f"{path.name} is no file; it is now {_set_aside(path).name}" for path in odd]
            folders = (self.shares[0].parent, *self.shares)
            for path in folders:
                if path.is_symlink():
                    path.stat()  # one that leads nowhere hides checkpoints
            sweep(self.shares[0].parent)
            return notes + [
                f"{label(path)} is no folder; it is now {label(_set_aside(path))}"
                for path in folders
                if path.exists() and not path.is_dir()
            ]
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to {current.parent}: {cause(error, current)}"
            ) from None

    def check_room(self, size: int) -> None:
        """Raises CheckpointError where the disk has no room for the slots of a run whose
        checkpoints have so many bytes."""
        current = self.slots[0]
        try:
            probe(current, size)
            free = shutil.disk_usage(standing(current.parent)).free
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint of {size / 1e6:,.1f} MB cannot be written to {current.parent}: "
                f"{cause(error, current)}"
            ) from None
        shares = (path for folder in self.shares if folder.is_dir() for path in folder.iterdir())
        there = sum(path.stat().st_size for path in (*self.slots, *shares) if path.exists())
        files = len(self.slots) + 1  # one more is being written while the slots are full
        if free + there < files * size:
            raise CheckpointError(
                f"{current.parent} has {free / 1e6:,.1f} MB free, and this run needs "
                f"{(files * size - there) / 1e6:,.1f} MB: "
                f"{len(self.slots)} checkpoints of {size / 1e6:,.1f} MB and the one being "
                "written, less what is there already. "
                "Free some space, or make the folder a link to one on a larger disk."
            )

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` and write it in the background; `outcome()` tells how it went."""
        self.wait()
        try:
            copy = copied(state)
            self._begin(self.slots[0], lambda: self._put_file(copy))
        except Exception as error:
            # no memory for a copy, or for a thread: told as a failed write is
            self._outcome = (None, 0.0, f"{first_line(error)}.")

    def save_shares(self, state: dict[str, Any], savers: "DeviceMesh", parallel: Parallel) -> None:
        """Copy this rank's share of `state` and write it in the background; every rank must call
        it. Rank 0 moves the slots on once all have written.

        savers   the ranks, on their hosts
        """
        from core.checkpoint.shares import split, write_shares  # slow to import

        self.wait()
        aside = self.folder / parallel.broadcast(
            aside_name(self.shares[0]).relative_to(self.folder).as_posix()
        )
        try:
            rest, shares = split(state, savers)
            failure = None
        except Exception as error:  # no memory for a copy: the others learn of it
            rest, shares, failure = {}, {}, first_line(error)

        def put() -> None:
            try:
                write_shares(aside, rest, shares, savers, failure)
                if savers.get_rank() == 0:
                    self._take_in(aside)
            except BaseException:
                if savers.get_rank() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                raise

        try:
            self._begin(self.shares[0], put)
        except RuntimeError:  # no memory for a thread: the others wait for this rank
            self._write(self.shares[0], put)

    def _begin(self, path: Path, put: Callable[[], None]) -> None:
        """Write in the background what will be at `path`."""
        thread = threading.Thread(target=self._write, args=(path, put), name="checkpoint-writer")
        thread.start()
        self._thread = thread

    def wait(self) -> None:
        """Wait until a write in progress is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keep_newest(self) -> None:
        """Delete the older slots, where the newest is there: of a run that is over, they are no
        longer needed."""
        self.wait()
        if self._forms(0):
            for path in (*self.slots[1:], *self.shares[1:]):
                discard(path)
            with contextlib.suppress(OSError):  # where it is empty
                self.shares[0].parent.rmdir()

    def outcome(self) -> tuple[Path | None, float, str] | None:
        """(file, seconds, "") of a finished save, or (None, seconds, reason) of a failed one; None:
        nothing new. Told once.

        (file, seconds, reason): it is saved, and only its other name, the mirror, could not be
        made."""
        if self._thread is not None and self._thread.is_alive():
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _write(self, path: Path, put: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            put()
        except Exception as error:
            # whatever it is, a save that failed must be told: nobody sees this thread die
            # torch wraps a failed write
            true = error.__context__ if isinstance(error.__context__, OSError) else error
            told = cause(true, path) if isinstance(true, OSError) else f"{first_line(true)}."
            self._outcome = (None, time.monotonic() - started, told.splitlines()[0])
            return
        told = self._reflect() if path == self.slots[0] else ""
        self._outcome = (path, time.monotonic() - started, told)

    def _put_file(self, state: dict[str, Any]) -> None:
        """Write a checkpoint in one file."""
        self.slots[0].parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.slots[0], durable=True) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            # one of the same step in shares is replaced where it is: no older one is lost
            if _step_of(self.shares[0]) != state["progress"]["step"]:
                self._rotate()
        with contextlib.suppress(OSError):  # of two forms the later step counts
            discard(self.shares[0])

    def _take_in(self, aside: Path) -> None:
        """Make a folder that all ranks have written to the newest slot."""
        self._rotate()
        discard(self.shares[0])
        os.replace(aside, self.shares[0])
        sync_folder(self.shares[0].parent)
        with contextlib.suppress(OSError):
            discard(self.slots[0])
            if self._mirror is not None:  # no name for weights that are no longer the newest
                discard(self._mirror)

    def _reflect(self) -> str:
        """Make the mirror the newest slot's other name; returns why that failed, if it did."""
        if self._mirror is None:
            return ""
        try:
            link_file(self.slots[0], self._mirror)
        except Exception as error:  # the checkpoint is there, whatever this is
            told = (
                cause(error, self._mirror)
                if isinstance(error, OSError)
                else f"{first_line(error)}."
            )
            return f"{self._mirror.name} does not hold what {self.slots[0].name} does: {told}"
        sync_folder(self._mirror.parent)
        return ""

    def _rotate(self) -> None:
        """Move the slots on, once the new checkpoint is safe on the disk. One that was saved amid
        bad steps is replaced where it is: its weights may be at fault, and those before it are what
        a roll-back needs."""
        if self._amid_bad_steps():
            return
        for slot in reversed(range(len(SLOTS) - 1)):
            for path, *stale in filter(None, [self._forms(slot)]):
                is_file = path == self.slots[slot]
                same, other = (self.slots, self.shares) if is_file else (self.shares, self.slots)
                for each in (*stale, other[slot + 1], *([] if is_file else [same[slot + 1]])):
                    discard(each)
                os.replace(path, same[slot + 1])


def _set_aside(path: Path) -> Path:
    """Rename a slot that cannot be used; returns its new path."""
    aside = free_name(path.with_name(path.name + ".damaged"))
    os.replace(path, aside)
    return aside


def label(path: Path) -> str:
    """Return what people are told a checkpoint is called: a file's name, or a folder's with that of
    its lineage."""
    folder = path.parent.name
    return f"{folder}/{path.name}" if folder.endswith("_sharded") else path.name


def _progress_of(path: Path) -> Mapping[str, Any]:
    """Return the progress of a checkpoint; nothing where it cannot be read."""
    try:
        return read_checkpoint(path, mmap=True, whole=False)["progress"]
    except (Damaged, CheckpointError):
        return {}


def _step_of(path: Path) -> int:
    return _progress_of(path).get("step", -1)


def store_of(preset: "PresetBase", root: Path) -> CheckpointStore:
    """Return the slots of a preset's lineage."""
    return CheckpointStore(root / "checkpoints", preset.lineage, MIRRORS.get(preset.lineage))


def load_slot(
    store: CheckpointStore, parallel: Parallel, skip: int = 0, settled: bool = False
) -> LoadedSlot:
    """Load a slot on every rank; rank 0 alone judges slots and moves damaged ones aside."""
    state: CheckpointState | None = None

    def judge() -> tuple[Path | None, list[str]]:
        nonlocal state
        state, path, notes = store.load(skip, settled=settled)
        return path, notes

    path, notes = on_rank_zero(parallel, judge)
    if path is not None and state is None:
        state = read_checkpoint(path, whole=False)  # rank 0 has checked every byte
    return LoadedSlot(state, path, notes)
