"""A checkpoint in shares: every rank writes its own, and reads what it needs (torch's distributed
checkpoint).

    checkpoints/<lineage>_sharded/current/state.pth       all of it but what is shared out
                                          .metadata       where each part of a tensor stands
                                          __<rank>_0.distcp

`state.pth` is a checkpoint as core/checkpoint/slots.py writes it, with stand-ins that have shape
and dtype for the tensors that are shared out.

In:    the state of a run, of which each rank holds a share
Out:   a folder; a state whose tensors are read when they are used, by any number of ranks
State: none
"""

import io
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh

from core.checkpoint.copying import each_tensor
from core.errors import CheckpointError, first_line
from core.files import check_regular, check_zip, sync_folder
from core.parallel.shards import Stored, host_copy, is_sharded

STATE, INDEX = "state.pth", ".metadata"
CHECKSUMS = "checksums"
"""A key of `state.pth`: the CRC-32 of every other file. A share of another save is no damage that
its own checksums show."""

# writing ------------------------------------------------------------------------------------------


def split(state: dict[str, Any], savers: DeviceMesh) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state with stand-ins for what is shared out, and this rank's share of that, by
    name, copied to the host. One tensor under several names (tied weights) is copied once."""
    shares: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}

    def stand_in(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in seen:
            if is_sharded(tensor):
                shares[name] = host_copy(tensor, savers)
                seen[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            else:
                seen[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return seen[id(tensor)]

    return each_tensor(state, stand_in), shares


def write_shares(
    folder: Path,
    rest: dict[str, Any],
    shares: dict[str, Tensor],
    savers: DeviceMesh,
    failure: str | None,
) -> None:
    """Write a checkpoint, as `split` gave it; every rank must call it, and it returns when all have
    written. Raises what the first rank that failed has met.

    failure   why this rank has nothing to write
    """
    try:
        found = save(
            shares,
            storage_writer=_Writer(folder, failure),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=savers.get_group(),
        )
    except CheckpointException as failed:
        raise next(error for error, _ in failed.failures.values()) from None
    checksums = _gather_checksums(folder, savers)
    if savers.get_rank() == 0:
        _check_sizes(folder, found)
        checksums[INDEX] = _checksum(folder / INDEX)
        with open(folder / STATE, "xb") as file:
            torch.save({**rest, CHECKSUMS: checksums}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)


def _gather_checksums(folder: Path, savers: DeviceMesh) -> dict[str, int]:
    """Return the CRC-32 of every rank's files, each computed where it was written. Raises what the
    first rank that failed has met."""
    mine: dict[str, int] | OSError
    try:
        names = [path.name for path in folder.glob(f"__{savers.get_rank()}_*")]
        mine = {name: _checksum(folder / name) for name in names}
    except OSError as error:
        mine = error
    each: list[Any] = [None] * savers.size()
    dist.all_gather_object(each, mine, savers.get_group())
    if failures := [error for error in each if isinstance(error, OSError)]:
        raise failures[0]
    return {name: checksum for of_rank in each for name, checksum in of_rank.items()}


def _checksum(path: Path) -> int:
    with open(path, "rb") as file:
        return _checksum_of(file)


def _checksum_of(file: BinaryIO) -> int:
    checksum = 0
    while block := file.read(1 << 24):
        checksum = zlib.crc32(block, checksum)
    return checksum


class _Writer(FileSystemWriter):
    """Names the true cause where a write fails: torch wraps it, and the wrapping is all that would
    reach the other ranks."""

    def __init__(self, folder: Path, failure: str | None):
        super().__init__(folder)
        self._failure = failure

    def prepare_local_plan(self, plan: Any) -> Any:
        if self._failure is not None:
            raise RuntimeError(self._failure)
        return super().prepare_local_plan(plan)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _check_sizes(folder: Path, found: index.Metadata) -> None:
    """Raises OSError where rank 0 does not see all that the ranks have written."""
    for name, size in _sizes(found).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise OSError(
                f"{name} of another process is not there: all of them must share this folder"
            )


def _sizes(found: index.Metadata) -> dict[str, int]:
    """Return the files that the shares are in, with their bytes."""
    sizes: dict[str, int] = {}
    for part in found.storage_data.values():
        end = part.offset + part.length
        sizes[part.relative_path] = max(end, sizes.get(part.relative_path, 0))
    return sizes


# reading ------------------------------------------------------------------------------------------


def read_shares(folder: Path, whole: bool) -> Any:
    """Read a checkpoint; its tensors are Stored where they were shared out.

    whole   check every byte
    Raises whatever damage leads to.
    """
    files = _Files(folder)
    with files.create_stream(STATE, "rb") as file:
        if whole:
            check_zip(file)
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    with files.create_stream(INDEX, "rb") as file:
        content = file.read()
    checksums = state.pop(CHECKSUMS)
    _check(INDEX, zlib.crc32(content), checksums)
    found = _Index(io.BytesIO(content)).load()
    stored: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}

    def taken(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in seen:
            fill = _fill(files, name, found)
            seen[id(tensor)] = stored[name] = Stored.of(tensor.shape, tensor.dtype, fill)
        return seen[id(tensor)]

    read = each_tensor(state, taken)
    _check_index(found, stored)
    for name in _sizes(found) if whole else ():
        with files.create_stream(name, "rb") as file:
            _check(name, _checksum_of(file), checksums)
    return read


def _check(name: str, checksum: int, checksums: dict[str, int]) -> None:
    if checksum != checksums.get(name):
        raise ValueError(f"the checksum of {name} does not match {STATE}")


class _Files(FileSystem):
    """The files of a checkpoint, open: they stay what they are when the slots move on, as they may
    in somebody else's lineage."""

    def __init__(self, folder: Path):
        self.folder, self._open = folder, dict[str, int]()
        is_same = False
        while not is_same:  # else it was moved meanwhile
            before = os.stat(folder)
            self.close()
            for path in folder.iterdir():
                if path.is_dir():  # somebody else's: of an editor, a NAS
                    continue
                check_regular(path)
                self._open[path.name] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            is_same = os.path.samestat(before, os.stat(folder))

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        descriptor = self._open.get(os.path.basename(path))
        if descriptor is None:
            raise FileNotFoundError(f"{os.path.basename(path)} is missing")
        with os.fdopen(os.dup(descriptor), mode) as file:
            file.seek(0)
            yield file

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    __del__ = close


_NAMES = {
    *(
        (index.__name__, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata",
            "StorageMeta",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""What torch's index consists of, beside types of numbers."""


class _Index(pickle.Unpickler):
    """Reads torch's index; as everywhere in this program, code in a file is never run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith("pathlib"):  # the folder's name while it was written
            return lambda *parts: None
        raise ValueError(f"{INDEX} asks for {module}.{name}")


class _Reader(FileSystemReader):
    """Reads from a folder whose index has been read."""

    def __init__(self, files: _Files, found: index.Metadata):
        super().__init__(files.folder)
        self.fs, self._found = files, found

    def read_metadata(self, *args: Any, **kwargs: Any) -> index.Metadata:
        return self._found


def _fill(files: _Files, name: str, found: index.Metadata) -> Callable[[Tensor], None]:
    def fill(target: Tensor) -> None:
        try:
            with warnings.catch_warnings():  # that nothing is exchanged is what is wanted
                warnings.simplefilter("ignore", UserWarning)
                load(
                    {name: target},
                    storage_reader=_Reader(files, found),
                    planner=DefaultLoadPlanner(flatten_state_dict=False),
                    no_dist=True,
                )
        except CheckpointException as failed:
            error = next(error for error, _ in failed.failures.values())
            raise CheckpointError(
                f"{files.folder} cannot be read: {first_line(error)}. Mend that, or move it away."
            ) from None

    return fill


def _check_index(found: index.Metadata, stored: dict[str, Tensor]) -> None:
    """Raises ValueError where the index is of other tensors than the state."""
    entries = found.state_dict_metadata
    if entries.keys() != stored.keys():
        raise ValueError(f"{INDEX} and {STATE} name other tensors")
    for name, entry in entries.items():
        if (
            not isinstance(entry, index.TensorStorageMetadata)
            or entry.size != stored[name].shape
            or entry.properties.dtype != stored[name].dtype
        ):
            raise ValueError(f"{INDEX} and {STATE} disagree on {name}")
    if any(os.path.basename(name) != name for name in _sizes(found)):
        raise ValueError(f"{INDEX} names files elsewhere")
