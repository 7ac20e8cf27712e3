"""Tokens on disk: a folder of chunks and a manifest (specification 001, "Data Format").

    data/tokens/wikipedia/manifest.json  chunk_00000.bin  chunk_00001.bin ...

A chunk is raw little-endian uint32, `chunk_size` tokens, fewer in the last. Every document is
followed by the end-of-document token. A chunk is cut where it is full: a document may begin in one
and end in the next.

In:    tokens of whole documents (ChunkWriter), or a folder (ChunkReader)
Out:   the folder; documents, or plain tokens in any order of chunks
State: the manifest, which never records a token that is not safely on the disk: whoever was killed
goes on from it"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from core.files import check_regular, read_json, sweep, write_file

FORMAT = 1
"""Increased when the layout changes in a way that older code cannot read."""

MANIFEST = "manifest.json"
TOKEN = np.dtype("<u4")
BLOCK = 1 << 20
"""Tokens looked at together when reading: 4 MB."""

CHECKED_BYTES = 2 << 30
"""Chunks up to this size are compared with their checksum before their first token is used. SHA-256
reads 0.4 to 2 GB/s: the default 400 MB cost 0.2 to 1 s per 100M tokens, which train for minutes at
best. Far larger ones would hold up the first step."""


class BadChunks(Exception):
    """A folder that is not what its manifest says; the message says what to do."""


class DamagedChunk(Exception):
    """A chunk whose content is not what was written."""


@dataclass
class TokenChunk:
    """One file."""

    file: str
    tokens: int
    documents: int | None = None  # that end in it
    sha256: str | None = None  # once it is full


@dataclass
class Manifest:
    """The content of manifest.json. Everything beyond the first six keys is left out by
    specification 001's own program."""

    dataset_id: str
    config: str | None
    total_tokens: int
    num_chunks: int
    chunk_size: int
    eos_token_id: int
    format: int = FORMAT
    dtype: str = "uint32"
    complete: bool = True  # whether the source was read to its end, or as far as was asked for
    documents: int | None = None
    vocab_size: int | None = None
    # of the tokens' names: the same for every version of the tokenizers library
    vocabulary_sha256: str | None = None
    tokenizer_sha256: str | None = None  # of the whole tokenizer, as the library writes it
    chunks: list[TokenChunk] = field(default_factory=list)
    writer: dict[str, Any] = field(default_factory=dict)  # what the tokenize job needs to go on

    def save(self, folder: Path) -> None:
        """Written aside, flushed, renamed. Raises OSError; the manifest before is whole then."""
        write_file(folder / MANIFEST, json.dumps(asdict(self), indent=2) + "\n", durable=True)


def chunk_name(index: int) -> str:
    return f"chunk_{index:05d}.bin"


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest. Raises BadChunks where there is none, or none that can be used. One
    of specification 001 lists no files: they are added."""
    path = folder / MANIFEST
    try:
        found = read_json(path)
        manifest = _made(Manifest, found)
        manifest.chunks = [_made(TokenChunk, chunk) for chunk in manifest.chunks]
    except FileNotFoundError:
        raise BadChunks(f"{folder} holds no {MANIFEST}") from None
    except OSError as error:
        raise BadChunks(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise BadChunks(
            f"{path} is no manifest of token chunks ({str(error)[:100]}); tokenize anew"
        ) from None
    if manifest.format > FORMAT:
        raise BadChunks(
            f"{path} has format {manifest.format}, this program reads up to {FORMAT}: update the "
            "program"
        )
    if manifest.dtype != "uint32":
        raise BadChunks(
            f"{path} says dtype {manifest.dtype}; only uint32 can be read: convert the chunks, or "
            "tokenize anew"
        )
    if "chunks" not in found:
        for index in range(manifest.num_chunks):
            size = _size(folder / chunk_name(index))
            if size % TOKEN.itemsize:
                raise BadChunks(
                    f"{folder / chunk_name(index)} has {size:,} bytes, which is no whole number "
                    "of uint32 tokens: "
                    "it was cut off or is not a token chunk; copy it again, or tokenize anew"
                )
            manifest.chunks.append(TokenChunk(chunk_name(index), size // TOKEN.itemsize))
    return manifest


def _made(kind: type, found: Any) -> Any:
    """Make a dataclass from JSON, without unknown keys. Raises TypeError for a key that is missing
    or of another type."""
    if not isinstance(found, dict):
        raise TypeError(f"{json.dumps(found)[:40]} is no object")
    types = get_type_hints(kind)
    for each in fields(kind):
        if each.name not in found:
            if each.default is MISSING and each.default_factory is MISSING:
                raise TypeError(f'"{each.name}" is missing')
            continue
        value, wanted = found[each.name], types[each.name]
        allowed = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
        if type(value) not in [get_origin(one) or one for one in allowed] or (
            type(value) is int and value < 0
        ):
            raise TypeError(f'"{each.name}" is {json.dumps(value)[:40]}')
    return kind(**{key: value for key, value in found.items() if key in types})


class ChunkReader:
    """A folder of chunks, read."""

    def __init__(self, folder: Path):
        """Raises BadChunks unless every chunk is there and as long as it must be."""
        self.folder, self.manifest = folder, read_manifest(folder)
        self._checked: set[int] = set()
        last = len(self.manifest.chunks) - 1
        for index, chunk in enumerate(self.manifest.chunks):
            size, wanted = _size(folder / chunk.file), chunk.tokens * TOKEN.itemsize
            # may be ahead of what is recorded
            growing = index == last and not self.manifest.complete
            if size < wanted or (size > wanted and not growing):
                raise BadChunks(
                    f"{folder / chunk.file} has {size:,} bytes, the manifest says {wanted:,}: "
                    "copy it again, or delete the "
                    "folder and tokenize anew"
                )

    @property
    def notes(self) -> list[str]:
        """Remarks on this folder, for the screen."""
        notes, manifest = [], self.manifest
        there = sum(chunk.tokens for chunk in manifest.chunks)
        if not manifest.complete:
            notes.append(
                f"its tokenization was not finished ({there:,} tokens so far); run it again to go "
                "on"
            )
        elif there != manifest.total_tokens:
            notes.append(
                f"its manifest says {manifest.total_tokens:,} tokens, its chunks hold {there:,}; "
                "all of these are read"
            )
        return notes

    def consecutive(self, order: Iterable[int], start: int = 0) -> Iterator[np.ndarray]:
        """Yield the tokens as they are stored, chunk after chunk in the given order, from token
        `start` on: (n,) uint32, n <= BLOCK.

        This is how specification 001's program reads. Raises OSError or DamagedChunk.
        """
        for index in order:
            tokens = self._tokens(index) if start < self.manifest.chunks[index].tokens else ()
            for begin in range(start, len(tokens), BLOCK):
                yield tokens[begin : begin + BLOCK]  # type: ignore[misc]
            start = max(0, start - self.manifest.chunks[index].tokens)

    def documents(self, index: int, start: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (position after it, position of its first token, ids (n,) int32) of each document
        that *begins* in a chunk.

        One that runs over the chunk's end is read on in the next, by name; there, the piece up to
        the first end is passed over: each document is read once and whole, in any order of chunks.
        Positions are tokens from the chunk's start; those that end at `start` or before, and those
        without tokens, are left out. Raises OSError or DamagedChunk."""
        size, end = self.manifest.chunks[index].tokens, self.manifest.eos_token_id
        begin = self._begin(index, start)
        if begin >= size:
            return
        at, pieces = begin, []
        for block in self._on_from(index, begin):
            if self.manifest.vocab_size is not None and block.max() >= self.manifest.vocab_size:
                raise DamagedChunk
            low = 0
            for high in np.flatnonzero(block == end).tolist():
                pieces.append(block[low:high])
                if (ids := _joined(pieces)) and at + high + 1 > start:
                    yield at + high + 1, begin, ids[0]
                low, pieces = high + 1, []
                begin = at + low
                if begin >= size:
                    return
            pieces.append(block[low:])
            at += len(block)
        # the chunks were cut off, or end without a last end
        if (ids := _joined(pieces)) and at > start:
            yield at, begin, ids[0]

    def _on_from(self, index: int, start: int) -> Iterator[np.ndarray]:
        """Yield a chunk from `start` on, and those that follow it by name, as far as they can be
        read."""
        yield from self.consecutive([index], start)
        for following in range(index + 1, len(self.manifest.chunks)):
            try:
                self._tokens(following)
            except (OSError, DamagedChunk):
                return  # told when its own turn comes; a document ends here
            yield from self.consecutive([following])

    def _begin(self, index: int, start: int) -> int:
        """Return where the document that contains `start` begins, or the first of the chunk."""
        tokens = self._map(index)
        for high in range(min(start, len(tokens)), 0, -BLOCK):
            low = max(0, high - BLOCK)
            if len(ends := np.flatnonzero(tokens[low:high] == self.manifest.eos_token_id)):
                return low + int(ends[-1]) + 1
        return self._first_begin(index)

    def _first_begin(self, index: int) -> int:
        """Return where the first document of a chunk begins: behind the rest of the one before, if
        that runs into it."""
        if index == 0 or (self._map(index - 1)[-1:] == self.manifest.eos_token_id).all():
            return 0
        at = 0
        for block in self.consecutive([index]):
            if len(ends := np.flatnonzero(block == self.manifest.eos_token_id)):
                return at + int(ends[0]) + 1
            at += len(block)
        return at

    def _tokens(self, index: int) -> np.ndarray:
        """Return a chunk, (n,) uint32; compare it with its checksum when it is first used."""
        chunk = self.manifest.chunks[index]
        if (
            index not in self._checked
            and chunk.sha256 is not None
            and chunk.tokens * TOKEN.itemsize <= CHECKED_BYTES
        ):
            with (self.folder / chunk.file).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != chunk.sha256:
                    raise DamagedChunk
        self._checked.add(index)
        return self._map(index)

    def _map(self, index: int) -> np.ndarray:
        chunk = self.manifest.chunks[index]
        if chunk.tokens == 0:
            return np.empty(0, TOKEN)
        return np.memmap(self.folder / chunk.file, TOKEN, "r", shape=(chunk.tokens,))


class ChunkWriter:
    """Appends to a folder, from what its manifest records on. One process at a time: raises
    BadChunks for a second."""

    def __init__(self, folder: Path, manifest: Manifest):
        """Raises OSError; BadChunks where the disk holds less than the manifest records."""
        self.folder, self.manifest = folder, manifest
        # with what is not yet saved
        self.tokens, self.documents = manifest.total_tokens, manifest.documents or 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._file: int | None = None  # descriptor of the chunk that is not yet full
        self._hash = hashlib.sha256()
        sweep(folder)
        try:
            for path in folder.glob("chunk_*.bin"):  # begun after the manifest was last saved
                if path.name not in {chunk.file for chunk in manifest.chunks}:
                    path.unlink()
            if manifest.chunks and manifest.chunks[-1].tokens < manifest.chunk_size:
                self._open(manifest.chunks[-1])
        except BaseException:
            self.close()
            raise

    def add(self, tokens: np.ndarray) -> None:
        """Append whole documents, each with its end: (n,) integers. Raises OSError; what was saved
        is safe then."""
        tokens = np.ascontiguousarray(tokens, dtype=TOKEN)
        self.tokens += len(tokens)
        self.documents += int(np.count_nonzero(tokens == self.manifest.eos_token_id))
        while len(tokens):
            if self._file is None:
                chunk = TokenChunk(chunk_name(len(self.manifest.chunks)), 0, 0)
                self.manifest.chunks.append(chunk)
                self._open(chunk)
            chunk = self.manifest.chunks[-1]
            piece, tokens = np.split(tokens, [self.manifest.chunk_size - chunk.tokens])
            left = piece.data.cast("B")
            self._hash.update(left)
            while left:  # a disk that is getting full takes a part
                left = left[os.write(self._file, left) :]  # type: ignore[arg-type]
            chunk.tokens += len(piece)
            chunk.documents += int(np.count_nonzero(piece == self.manifest.eos_token_id))  # type: ignore[operator]
            if chunk.tokens == self.manifest.chunk_size:
                self._finish()

    def save(self, complete: bool = False, **writer: Any) -> None:
        """Make all that was added safe, and record it together with `writer`. Raises OSError; what
        was saved before stays so."""
        manifest = self.manifest
        if complete and self._file is not None:
            manifest.chunks[-1].sha256 = self._hash.hexdigest()
        if self._file is not None:
            os.fsync(self._file)
        manifest.complete = complete
        manifest.num_chunks = len(manifest.chunks)
        manifest.total_tokens, manifest.documents = self.tokens, self.documents
        manifest.writer |= writer
        manifest.save(self.folder)

    def close(self) -> None:
        """Let go of the files; nothing is recorded."""
        for descriptor in (self._file, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._file = self._lock = None

    def _open(self, chunk: TokenChunk) -> None:
        """Open a chunk behind what is recorded of it: anything after that was not yet saved, and
        comes again."""
        path, recorded = self.folder / chunk.file, chunk.tokens * TOKEN.itemsize
        chunk.sha256, self._hash = None, hashlib.sha256()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if (size := os.fstat(self._file).st_size) < recorded:
            raise BadChunks(
                f"{path} has {size:,} bytes, {recorded:,} were written: delete {self.folder} and "
                "start again"
            )
        os.ftruncate(self._file, recorded)
        while block := os.read(self._file, 1 << 22):
            self._hash.update(block)

    def _finish(self) -> None:
        assert self._file is not None
        os.fsync(self._file)
        os.close(self._file)
        self._file = None
        self.manifest.chunks[-1].sha256 = self._hash.hexdigest()


def _joined(pieces: list[np.ndarray]) -> list[np.ndarray]:
    """Join pieces into one array of int32 in a list; an empty list if they hold no token."""
    ids = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, TOKEN)])
    return [ids.astype(np.int32)] if len(ids) else []


def _size(path: Path) -> int:
    try:
        check_regular(path)
        return path.stat().st_size
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise BadChunks(f"{path}: {error.strerror}; copy it again, or tokenize anew") from None
        raise BadChunks(
            f"{path} is missing, but the manifest lists it: copy it again, or tokenize anew"
        ) from None


def _lock(folder: Path) -> int | None:
    """Lock a folder; return a descriptor that keeps other writers out while it is open, None where
    the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BadChunks(
            f"another process is writing to {folder}; wait for it, or stop it"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
