"""A lineage as a whole: who may write to it, which sources its weights were learned from, and how
it is put aside.

In:    the project's root folder, the lineage's name
Out:   the right to write to it, held until left; remarks; a lineage of another name
State: checkpoints/<lineage>.lock while somebody writes to it
"""

import json
import os
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.file_names import SLOTS, shares_name, slot_name
from core.files import cause, open_lock
from core.preset.base import PresetBase

try:
    import fcntl
except ImportError:  # not a Unix: what stands in the file must do
    fcntl = None  # type: ignore[assignment]

PATIENCE_SECONDS = 1.0
"""How long an owner may take from holding the lock to saying who it is."""


# one owner at a time ------------------------------------------------------------------------------


@contextmanager
def owned(root: Path, lineage: str, job: str) -> Iterator[None]:
    """Be the only process that writes to a lineage. Raises UserError naming the one that does.

    The lock is the system's: gone with its process, however that ends. Where a file system has
    none, the process that the file names decides: one of this machine that still runs is in the
    way; of another machine nobody can tell, so it is not."""
    path = root / "checkpoints" / f"{lineage}.lock"
    fresh = not path.parent.exists()
    descriptor = _locked(path, lineage)
    try:
        owner = {
            "process": os.getpid(),
            "began": _began(os.getpid()),
            "host": socket.gethostname(),
            "since": time.time(),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({**owner, "job": job}).encode(), 0)
        yield
    finally:
        with suppress(OSError):  # while it is held: whoever comes next makes a new one
            os.unlink(path)
            if fresh:
                os.rmdir(path.parent)  # where it is empty: nothing came of this start
        os.close(descriptor)


def _locked(path: Path, lineage: str) -> int:
    """A descriptor of the lock's file, held."""
    while True:
        try:
            descriptor = open_lock(path)
        except OSError as error:
            raise UserError(
                f"the lock {path} cannot be made: {cause(error, path)} Then start again."
            ) from None
        if not _held(descriptor):
            owner = _owner(descriptor)
            os.close(descriptor)
            raise UserError(_refusal(lineage, owner))
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its owner has just ended and taken the file away


def _held(descriptor: int) -> bool:
    """Lock the file; whether nobody else has. fcntl's lock, unlike flock's, is not inherited by
    helpers that outlive a kill."""
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
    owner = _owner(descriptor, patience=0.0)
    process = owner.get("process")
    if type(process) is not int or process <= 0 or owner.get("host") != socket.gethostname():
        return True
    began = _began(process)
    return not began or began != owner.get("began")


def _owner(descriptor: int, patience: float = PATIENCE_SECONDS) -> dict[str, Any]:
    """Read what the file says of its owner; {} where it says nothing."""
    end = time.monotonic() + patience
    while not (text := os.pread(descriptor, 4096, 0)) and time.monotonic() < end:
        time.sleep(0.05)
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _began(process: int) -> str | None:
    """Return when a process began, as the system counts, or None if it does not run: a number that
    goes round comes back with another beginning."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]


def _refusal(lineage: str, owner: dict[str, Any]) -> str:
    since, told = owner.get("since"), "another process"
    if isinstance(since, int | float) and 0 <= since < 1e11:
        facts = (
            owner.get("process"),
            owner.get("host"),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)),
            owner.get("job"),
        )
        told = "process {} on {}, since {} (job {})".format(
            *("".join(filter(str.isprintable, str(f)[:80])) for f in facts)
        )
    return (
        f'the lineage "{lineage}" is in use by {told}. Two at once would overwrite each other\'s '
        "checkpoints. Wait for it, stop "
        'it (Ctrl-C or SIGTERM: it saves first), or give this preset another "lineage".'
    )


# what it was learned from -------------------------------------------------------------------------


def changed_sources(
    saved: Mapping[str, Any], preset: PresetBase, unreachable: Collection[str] = ()
) -> list[str]:
    """Tell how the sources of a checkpoint differ from those of the preset that goes on from it.

    saved         "progress", "preset" and "data" of the checkpoint
    unreachable   sources that cannot be read now either
    """
    before = {
        section["name"]: section
        for section in saved["preset"]["data"].get("sources", [])
        if isinstance(section, dict) and "name" in section
    }
    now = {section.name: section.model_dump(mode="json") for section in preset.data.sources}
    read = set(saved["data"].get("contents", before)) - set(saved["data"]["drops"])
    changes = []
    for name in now.keys() - set(unreachable):
        if name not in before:
            changes.append(f"without {name}, which is new")
        elif name not in read:
            changes.append(f"without {name}, which could not be read then")
        elif others := [
            key for key in now[name] if now[name][key] != before[name].get(key, now[name][key])
        ]:
            changes.append(f"with another {name} ({', '.join(others)} changed)")
    changes += [
        f"with {name}, which the preset no longer names"
        for name in before
        if name in read and name not in now
    ]
    if not changes or not saved["progress"]["step"]:
        return []
    bpe = saved["preset"]["tokenizer"].get("type") == "bpe"
    what = "the weights and the tokenizer" if bpe else "the weights"
    return [
        f"{what} of step {saved['progress']['step']:,} were learned {'; '.join(sorted(changes))}. "
        'To begin anew, choose "start fresh" in the menu, or give the preset another "lineage": '
        "what is there is kept"
    ]


# put aside ----------------------------------------------------------------------------------------


def has_checkpoints(root: Path, lineage: str) -> bool:
    """Return whether a start would go on from something: a run's checkpoints, or those of a
    comparison's trials."""
    folder = root / "checkpoints"
    slots = [folder / name(lineage, slot) for slot in SLOTS for name in (slot_name, shares_name)]
    return (
        any(path.exists() for path in slots)
        or next((folder / lineage).glob(f"*/{slot_name('*')}"), None) is not None
        or next((folder / lineage).glob(f"*/{shares_name('*')}"), None) is not None
    )


def name_aside(root: Path, lineage: str) -> str:
    """Return the name of a lineage that is put aside today."""
    folders, number = (root / "checkpoints", root / "logs"), 2
    name = begun = f"{lineage}.before-{time.strftime('%Y-%m-%d')}"
    while any(
        (folder / name).exists() or next(folder.glob(f"{name}_*"), None) for folder in folders
    ):
        number, name = number + 1, f"{begun}-{number}"
    return name


def put_aside(root: Path, lineage: str) -> str:
    """Rename a lineage, checkpoints and logs, so that the next start of it is fresh; returns its
    new name, which `init_from` takes. Raises UserError where it is in use or cannot be renamed.

    The newest checkpoint goes last but for the log: whatever stops this in between, a start goes on
    from it, or finds none. It is in shares where it is not in a file."""
    checkpoints, logs = root / "checkpoints", root / "logs"
    ours = re.compile(rf"{re.escape(lineage)}(?P<rest>_({'|'.join(SLOTS)})\.pth.*|_sharded|)")
    with owned(root, lineage, "start fresh"):
        name = name_aside(root, lineage)
        found = [
            (path, match["rest"])
            for path in checkpoints.iterdir()
            if (match := ours.fullmatch(path.name)) is not None
        ]
        try:
            last = ["_sharded", slot_name("")]
            for path, rest in sorted(found, key=lambda each: (each[1] in last, each[1] == last[1])):
                os.replace(path, checkpoints / f"{name}{rest}")
            if (logs / lineage).exists():
                os.replace(logs / lineage, logs / name)
        except OSError as error:
            raise UserError(
                f"the lineage {lineage} cannot be put aside: {cause(error, checkpoints / lineage)}"
            ) from None
    return name
