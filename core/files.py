"""The one way a file is written, and a way to read one that waits for nothing.

In:    a path and its content
Out:   files that are whole or were never there, whatever ends the process
State: none; what a killed process left half-written is deleted by `sweep`

A file is written beside its place, under a name that nobody can foresee or have put a link at, and
renamed once it is whole."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

BIGGEST = 1 << 28
"""Bytes of the largest file that is read whole. Presets, logs' neighbours and tokenizers are far
smaller."""
PROBE = bytes(1 << 16)
NO_FILE = "it is no file but a folder, a pipe or a device"
# two dots: of a probe, whose target is such a name itself
_ASIDE = re.compile(r"\.{1,2}(?P<of>.+)\.[0-9a-f]{16}\.tmp")


def own_path(path: str, root: Path) -> Path:
    """Resolve a path of a preset: relative to the project, "~" at a user's home. "~name"
    without such a user is a folder."""
    return root / os.path.expanduser(path)


# writing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """An open binary file that becomes `path` when left, and leaves nothing behind when left by an
    error. Raises OSError.

    durable   survives a power cut, too
    """
    aside = aside_name(path)
    flags = (
        os.O_WRONLY
        | os.O_CREAT
        | os.O_EXCL
        | getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_CLOEXEC", 0)
    )
    descriptor = os.open(aside, flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    if durable:
        sync_folder(path.parent)


def write_file(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Replace a file whole; its folder is made where it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable) as file:
        # a lone surrogate is legal in a name, not in UTF-8
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path` when left, in place of an earlier one; left by an error,
    `path` stays as it was, and nothing is left behind. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_folders(path)
    aside, old = aside_name(path), aside_name(path)
    aside.mkdir()
    try:
        yield aside
        if os.path.lexists(path):
            os.rename(path, old)
        try:
            os.rename(aside, path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, path)
            raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sweep_folders(path: Path) -> None:
    """Delete what killed writers of a folder left behind, as far as nobody has been at it for a
    day."""
    for entry in list(os.scandir(path.parent)):
        aside = _ASIDE.fullmatch(entry.name)
        if aside is not None and aside["of"] == path.name[:200] and entry.is_dir():
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= 86_400:
                    shutil.rmtree(entry.path, ignore_errors=True)


def link_file(source: Path, target: Path) -> None:
    """Make `target` another name of `source`; a copy where the file system has no hard links.
    Raises OSError."""
    aside = aside_name(target)
    try:
        os.link(source, aside)
    except OSError:
        with open(source, "rb") as whole, replacing(target, durable=True) as copy:
            shutil.copyfileobj(whole, copy)
        return
    try:
        os.replace(aside, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)  # renaming leaves it where both were the same file already, too


def discard(path: Path) -> None:
    """Delete a file or a folder, if it is there; none stays half there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        aside = aside_name(path)
        os.replace(path, aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut (not every system can)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path, start: str = "", unused_seconds: float = 0.0) -> None:
    """Delete what killed writers left half-written in a folder, of files and folders whose names
    begin with `start`.

    unused_seconds   that they have not been touched for: what another writer is still at work on
                     must stay
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if (aside := _ASIDE.fullmatch(entry.name)) is not None and aside["of"].startswith(
                start
            ):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime < unused_seconds:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)


def probe(path: Path, size: int = 0) -> None:
    """Find out whether a file of `size` bytes may be written and renamed where `path` would be.
    Raises OSError.

    Nothing is left behind: where its folder is yet to be made, the one that it will be made in is
    tried. Room on the disk is another question, see `shutil.disk_usage`.
    """
    folder = standing(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    target = aside_name(folder / path.name)
    try:
        with replacing(target) as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())  # some disks tell only now that they are full
            # where files may not grow so large; takes no room
            os.ftruncate(file.fileno(), max(size, len(PROBE)))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(target)


def standing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))


def free_name(path: Path) -> Path:
    """The path, with a number behind it where something stands there already."""
    number, free = 2, path
    while os.path.lexists(free):
        free, number = path.with_name(f"{path.name}{number}"), number + 1
    return free


def aside_name(path: Path) -> Path:
    """Return a name beside the path that nobody can foresee, for what is not whole yet."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")


# reading ------------------------------------------------------------------------------------------


def check_regular(path: Path) -> None:
    """Raises OSError where there is no file, or something else: opening a pipe or a device may wait
    for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, NO_FILE, str(path))


def check_zip(file: Path | IO[bytes]) -> None:
    """Read every byte of a zip file, as torch writes them. Raises ValueError or BadZipFile."""
    with zipfile.ZipFile(file) as opened:
        if opened.testzip() is not None:
            raise ValueError("a checksum does not match")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, also for one of more than BIGGEST bytes."""
    check_regular(path)
    if os.stat(path).st_size > BIGGEST:
        raise OSError(errno.EFBIG, f"it has more than {BIGGEST >> 20} MB", str(path))
    return path.read_bytes()


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Raises OSError or UnicodeDecodeError."""
    return read_bytes(path).decode(encoding)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError; ValueError whatever else is wrong with it."""
    try:
        return json.loads(read_bytes(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def open_lock(path: Path) -> int:
    """Descriptor of a file to be locked, made where it is missing; never through a link, nothing is
    cut off. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = (
        os.O_RDWR
        | os.O_CREAT
        | getattr(os, "O_CLOEXEC", 0)
        | getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_NONBLOCK", 0)
    )
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, NO_FILE, str(path))
    return descriptor


# what went wrong ----------------------------------------------------------------------------------


def cause(error: OSError, path: Path) -> str:
    """Explain why a file cannot be written, and what to do about it: one or two sentences, the
    first without its end."""
    for part in [*reversed(path.parents), path]:
        if part.is_symlink() and not part.exists():
            return (
                f"{part} is a link to {os.readlink(part)}, which is not there. Make that "
                "folder, or remove the link."
            )
        if part != path and part.exists() and not part.is_dir():
            return f"{part} is no folder. Move it away."
    reason = error.strerror or str(error)
    if error.errno == errno.ELOOP and path.is_symlink():
        return f"{path} is a link. Remove it."
    if reason == NO_FILE or error.errno in (errno.EISDIR, errno.ENXIO):
        return f"{NO_FILE}. Remove it, or move it away."
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return f"{reason}. Free some space there."
    if error.errno == errno.EFBIG:
        return (
            f"{reason}. A limit (ulimit -f), or the file system, allows no file of that size; "
            "raise it, or use another disk."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{reason}. Give this user the right to write there."
    if error.errno == errno.EROFS:
        return f"{reason}. Mount it for writing, or make the folder a link to a disk that is."
    return f"{reason}. Mend that."
