"""Three rolling slots per lineage that survive a kill at any instant, a full disk and a damaged file.

    checkpoints/<lineage>_current.pth   _prev.pth   _prev2.pth

A new checkpoint is written aside, flushed to the disk, and only then the slots move: prev to prev2, current to prev, new to
current. Training goes on as soon as the tensors are copied; the writing happens in a thread.

In:    a dict of tensors and plain values
Out:   the newest slot that can be read
State: the files
"""

import contextlib
import errno
import os
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError, first_line

FORMAT = 1
"""Raised when a checkpoint's layout changes in a way that older code cannot read."""


class Damaged(Exception):
    """A file that is no whole checkpoint; says why."""


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The state in a file that a CheckpointStore wrote, every byte of it checked.

    mmap   leave tensors on the disk until they are used
    Raises Damaged, or CheckpointError where this program may not or cannot read it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch itself reads on over flipped bits
                raise ValueError("a checksum does not match")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(state, dict) or "model" not in state:
            raise ValueError("it holds no model")
    except Exception as error:  # whatever reading a damaged file may raise
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise CheckpointError(f"{path} cannot be read: {error}. Mend that, or move the file away.") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Damaged(reason[:120]) from None
    if state.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, this program reads up to {FORMAT}. Update the program, "
            "or set another lineage in the preset."
        )
    return state


class CheckpointStore:
    """The slots of one lineage. Only rank 0 saves."""

    def __init__(self, folder: Path, lineage: str, mirror: str | None = None):
        """`lineage`: may be a path below the folder. `mirror`: another file name that always holds what `current` holds."""
        self.folder, self.lineage = folder, lineage
        self.slots = [folder / f"{lineage}_{slot}.pth" for slot in ("current", "prev", "prev2")]
        self._mirror = folder / mirror if mirror else None
        self._aside = folder / f"{lineage}_current.pth.tmp"
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Path | None, float, str] | None = None

    # reading ---------------------------------------------------------------------------------------------------------

    def load(self, skip: int = 0, read_only: bool = False) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
        """(state, its file, remarks) of the newest readable slot; (None, None, remarks) when there is none.

        skip        how many of the newest slots to leave out
        read_only   for a lineage that somebody else trains: nothing is renamed, and tensors stay on the disk until they are used

        A damaged slot is renamed to `*.damaged`, never deleted. Raises CheckpointError when a slot exists but this program
        may not or cannot read it: starting afresh would overwrite somebody's work.
        """
        notes = []
        for path in self.slots[skip:]:
            if not path.exists():
                continue
            try:
                return read_checkpoint(path, mmap=read_only), path, notes
            except Damaged as reason:
                told = f"{path.name} is damaged ({reason})"
            if not read_only:
                aside = _free_name(path.with_name(path.name + ".damaged"))
                os.replace(path, aside)
                told += f"; it is now {aside.name}"
            notes.append(f"{told}, and an older slot is taken")
        return None, None, notes

    def peek(self) -> dict[str, Any] | None:
        """Progress and preset of the newest slot, without reading its tensors; None when there is none to read."""
        for path in self.slots:
            if path.exists():
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    return {"path": path, "progress": state["progress"], "preset": state["preset"]}
                except Exception:  # a preview never judges a slot: loading it for real will say what is wrong
                    continue
        return None

    # writing ---------------------------------------------------------------------------------------------------------

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` and write it in the background; `outcome()` tells how it went."""
        self.wait()
        try:
            thread = threading.Thread(target=self._write, args=(_copy(state),), name="checkpoint-writer")
            thread.start()
        except Exception as error:  # no memory for a copy, or for a thread: told as a failed write is
            self._outcome = (None, 0.0, first_line(error))
        else:
            self._thread = thread

    def wait(self) -> None:
        """Until a write in progress is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keep_newest(self) -> None:
        """Delete the older slots, where the newest is there: of a run that is over, they are no longer needed."""
        self.wait()
        if self.slots[0].exists():
            for path in self.slots[1:]:
                path.unlink(missing_ok=True)

    def outcome(self) -> tuple[Path | None, float, str] | None:
        """(file, seconds, "") of a finished save, or (None, seconds, reason) of a failed one; None: nothing new. Told once."""
        if self._thread is not None and self._thread.is_alive():
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _write(self, state: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            self._aside.parent.mkdir(parents=True, exist_ok=True)
            with open(self._aside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            self._rotate()
        except Exception as error:  # whatever it is, a save that failed must be told: nobody sees this thread die
            cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch wraps a failed write
            self._outcome = (None, time.monotonic() - started, first_line(cause))
            with contextlib.suppress(OSError):
                self._aside.unlink(missing_ok=True)
            return
        self._outcome = (self.slots[0], time.monotonic() - started, "")

    def _rotate(self) -> None:
        current, prev, prev2 = self.slots
        if prev.exists():
            os.replace(prev, prev2)
        if current.exists():
            os.replace(current, prev)
        os.replace(self._aside, current)
        if self._mirror is not None:
            _link(current, self._mirror)
        _sync_folder(current.parent)


def _link(source: Path, target: Path) -> None:
    """`target` becomes another name of `source`; a copy where the file system has no hard links."""
    aside = target.with_name(target.name + ".tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        import shutil

        shutil.copyfile(source, aside)
    os.replace(aside, target)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut (not every platform can)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _free_name(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}{number}"), number + 1
    return free


def _copy(value: Any) -> Any:
    """A deep copy with every tensor on the CPU. One tensor under several names (tied weights) is copied once."""
    seen: dict[int, torch.Tensor] = {}

    def copy(v: Any) -> Any:
        if isinstance(v, torch.Tensor):
            if id(v) not in seen:
                seen[id(v)] = v.detach().to("cpu", copy=True)
            return seen[id(v)]
        if isinstance(v, dict):
            return {key: copy(item) for key, item in v.items()}
        if isinstance(v, list | tuple):
            return [copy(item) for item in v]
        return v

    return copy(value)


LINEAGE_OF_ITS_OWN = 'Give the preset a "lineage" of its own, or its model the settings it was trained with.'


def load_model(
    module: torch.nn.Module,
    saved: dict[str, torch.Tensor],
    where: str,
    may_differ: Callable[[str], bool] = lambda name: False,
    advice: str = LINEAGE_OF_ITS_OWN,
) -> list[str]:
    """Load weights by name and shape; returns remarks.

    may_differ   names that may be missing on either side
    advice       what to do where they do not fit
    Raises CheckpointError naming everything that does not fit; nothing is changed then.
    """
    own = module.state_dict()
    filled = {(tensor.data_ptr(), tensor.shape) for name, tensor in own.items() if name in saved}
    missing = [n for n in sorted(own.keys() - saved.keys()) if (own[n].data_ptr(), own[n].shape) not in filled]  # tied: kept once
    unknown = sorted(saved.keys() - own.keys())
    wrong = [
        f"{name} is {tuple(saved[name].shape)} there, {tuple(own[name].shape)} here"
        for name in sorted(own.keys() & saved.keys())
        if own[name].shape != saved[name].shape
    ]
    problems = wrong
    problems += [f"{name} is missing there" for name in missing if not may_differ(name)]
    problems += [f"{name} is unknown here" for name in unknown if not may_differ(name)]
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"the weights in {where} do not fit this preset's model:\n  "
            + "\n  ".join(problems[:8])
            + more
            + f"\n{advice} Nothing was overwritten."
        )
    module.load_state_dict(saved, strict=False)
    return [f"{name} is new: starts untrained" for name in missing] + [f"{name} was left out" for name in unknown]
