"""A local cache of tokenized documents: makes streams seekable, and reads and tokenizes each
document once per machine.

    shard ──► blocks of 256 positions ──► .cache/tokens/<address>/<block>.safetensors

    address: a hash of shard and tokenizer

In:    a source whose shards have an address (shards.py), and a tokenizer
Out:   the same source; its documents come as tokens, from the cache where it has them
State: the files. Any of them may vanish or be damaged at any time: it is made again, and only time
       is lost
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from core.data.documents import Document, Encoded, Source
from core.data.encoding import encode, encode_each
from core.data.sources.shards import ShardSource, ShardView
from core.data.tokenizer import Tokenizer
from core.files import check_regular, open_lock, write_file

CACHE = ".cache/tokens"
VERSION = 3
"""Part of every address: raised when the same text and tokenizer give other tokens, or a block
holds other things."""
BLOCK = 256  # positions of a shard (rows, lines) in one file
GRACE_SECONDS = 0.5
"""How long the others leave the next block to whoever made the one before, as only they need not
seek."""
POLL_SECONDS = 0.01
FREE_BYTES = 4 << 30
"""Room on the disk that is left to others: checkpoints come first."""
TIDY_EVERY = 64  # blocks written between looks at the total size
CHECKSUM_BYTES = 16
NAMES = ("utf-8", "surrogatepass")  # of files: any bytes but a zero

Block = list[tuple[int, Document]]  # (position after it, document)


class TokenCache:
    """The cache files of one project. It raises nothing: what cannot be kept is made again."""

    def __init__(self, root: Path, limit_bytes: int):
        self.folder, self.limit_bytes = root / CACHE, limit_bytes
        self._written = 0

    def get(self, address: str, number: int) -> tuple[Block, bool] | None:
        """Return a block and whether it is the shard's last; None when it is missing or damaged."""
        path = self._path(address, number)
        try:
            check_regular(path)
            found = unpacked(path.read_bytes())
            os.utime(path)  # what was used last is deleted last
        except FileNotFoundError:
            return None
        except Exception:  # a fault of the cache must not look like one of the shard
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return found

    def put(self, address: str, number: int, block: Block, last: bool) -> None:
        path = self._path(address, number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < FREE_BYTES:
                return
            write_file(path, packed(block, last))
        except Exception:
            return
        self._written += 1
        if (self._written - 1) % TIDY_EVERY == 0:
            self._tidy()

    @contextmanager
    def only_one(self, address: str) -> Iterator[bool]:
        """Lock a shard; yield whether nobody else is making a block of it. The lock is freed when
        the process dies."""
        path = self.folder / f"{address[:32]}.lock"
        try:
            import fcntl

            file = os.fdopen(open_lock(path), "r+b")
        except (ImportError, OSError):  # no locks here: at worst the work is done twice
            yield True
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass
            yield True

    def _path(self, address: str, number: int) -> Path:
        return self.folder / address / f"{number:08d}.safetensors"

    def _tidy(self) -> None:
        """Delete the blocks used longest ago until nine tenths of the limit are left."""
        files = []
        for path in self.folder.glob("*/*"):
            try:
                stat = path.stat()
            except OSError:
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self.limit_bytes:
            return
        for _, size, path in sorted(files):
            if total <= 0.9 * self.limit_bytes:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size


def cached_sources(
    sources: list[Source], root: Path, gigabytes: float, tokenizer: Tokenizer
) -> list[Source]:
    """Put the token cache before each source; 0 gigabytes: return the sources as they are."""
    if gigabytes <= 0:
        return sources
    cache = TokenCache(root, int(gigabytes * 1e9))
    return [
        CachedSource(source, cache, tokenizer) if isinstance(source, ShardSource) else source
        for source in sources
    ]


class CachedSource(ShardView):
    """A source seen through the cache."""

    _source: ShardSource

    def __init__(self, source: ShardSource, cache: TokenCache, tokenizer: Tokenizer):
        super().__init__(source)
        self._cache, self._tokenizer = cache, tokenizer
        self._fingerprint = tokenizer.fingerprint()

    def read(self, shard: Any, start: int) -> Iterator[tuple[int, Document]]:
        """Yield (position after it, document), as the source would."""
        content = self._source.address(shard)
        if content is None:
            yield from self._source.read(shard, start)
            return
        facts = f"{content}\n{self._fingerprint}\n{BLOCK}\n{VERSION}"
        address = hashlib.blake2b(facts.encode(*NAMES), digest_size=20).hexdigest()
        maker = _BlockMaker(self._source, shard, self._tokenizer)
        number, last, first = start // BLOCK, False, True
        while not last:
            patient = not first and not maker.stands_at(number)
            block, last, failure = self._block(
                address, number, maker, GRACE_SECONDS if patient else 0.0
            )
            for position, document in block:
                if position > start:
                    yield position, document
            if failure is not None:
                raise failure
            number, first = number + 1, False

    def _block(
        self, address: str, number: int, maker: "_BlockMaker", patience: float
    ) -> tuple[Block, bool, Exception | None]:
        """Return a block from the cache, from another process that is making it, or made here;
        whether it is the last; and the error that broke it off."""
        end = time.monotonic() + patience
        while True:
            if (found := self._cache.get(address, number)) is not None:
                return *found, None
            if time.monotonic() >= end:
                with self._cache.only_one(address) as alone:
                    if alone and (found := self._cache.get(address, number)) is not None:
                        return *found, None
                    if alone:
                        block, last, failure = maker.make(number)
                        if failure is None and all(
                            document.encoded is not None for _, document in block
                        ):
                            self._cache.put(address, number, block, last)
                        return block, last, failure
            time.sleep(POLL_SECONDS)


class _BlockMaker:
    """Reads one shard and tokenizes it block by block; goes on from the block before where it
    can."""

    def __init__(self, source: ShardSource, shard: Any, tokenizer: Tokenizer):
        self._source, self._shard, self._tokenizer = source, shard, tokenizer
        self._documents: Iterator[tuple[int, Document]] | None = None
        self._next = -1  # the block that `_documents` goes on with
        self._held: tuple[int, Document] | None = None  # read, but of a later block

    def stands_at(self, number: int) -> bool:
        return self._documents is not None and self._next == number

    def make(self, number: int) -> tuple[Block, bool, Exception | None]:
        """Return the block, whether it is the last, and the error that ended it too soon."""
        begin, end = number * BLOCK, (number + 1) * BLOCK
        found: Block = []
        item = failure = None
        try:
            if (
                self._documents is None
                or self._next > number
                or (self._next < number and self._source.seeks(self._shard))
            ):
                self._documents, self._held = self._source.read(self._shard, begin), None
            while (item := self._held or next(self._documents, None)) is not None and item[
                0
            ] <= end:
                self._held = None
                if item[0] > begin:
                    found.append(item)
            self._held, self._next = item, number + 1
        except Exception as error:
            # the source knows what to do about it, once the documents before it are read
            failure, self._documents = error, None
        return self._encoded(found), item is None and failure is None, failure

    def _encoded(self, found: Block) -> Block:
        """Tokenize documents; one that the tokenizer cannot encode stays as it is, and its reader
        meets the error."""
        try:
            encoded = encode_each(
                partial(encode, self._tokenizer), [document for _, document in found]
            )
        except BaseException:  # of all of them; a tokenizer that panics raises what is no Exception
            return found
        return [
            (at, Document("", d.key, encoded=tokens) if isinstance(tokens, Encoded) else d)
            for (at, d), tokens in zip(found, encoded)
        ]


def packed(block: Block, last: bool) -> bytes:
    """Write a block as the content of a file, with ids of 16 bits where they fit."""
    tokens = [document.encoded for _, document in block if document.encoded is not None]
    ids = np.concatenate([t.ids for t in tokens]) if tokens else np.zeros(0, dtype=np.int32)
    masked = any(t.learned is not None for t in tokens)
    learned = (
        [t.learned if t.learned is not None else np.ones(len(t.ids), dtype=bool) for t in tokens]
        if masked
        else []
    )
    num_bytes = [-1 if t.num_bytes is None else t.num_bytes for t in tokens]
    keys = "\0".join(document.key for _, document in block).encode(*NAMES)
    content = save(
        {
            "ids": ids.astype(np.uint16 if not len(ids) or ids.max() < 1 << 16 else np.uint32),
            "ends": np.cumsum([len(t.ids) for t in tokens], dtype=np.int64),
            "positions": np.array([position for position, _ in block], dtype=np.int64),
            "digests": np.array([t.digest for t in tokens], dtype=np.uint64),
            "sizes": np.array([t.size for t in tokens], dtype=np.int64),
            "num_bytes": np.array(num_bytes, dtype=np.int64),
            "learned": np.concatenate(learned) if learned else np.zeros(0, dtype=bool),
            "keys": np.frombuffer(keys, dtype=np.uint8),
            "last": np.array(last),
        }
    )
    return checksum(content) + content


def unpacked(data: bytes) -> tuple[Block, bool]:
    """Read what `packed` wrote. Raises ValueError if a bit of it has changed: safetensors alone
    would not notice."""
    begun, content = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
    if begun != checksum(content):
        raise ValueError("damaged")
    fields = load(content)
    ids, learned, ends = fields["ids"].astype(np.int32), fields["learned"], fields["ends"].tolist()
    keys = fields["keys"].tobytes().decode(*NAMES).split("\0")
    block: Block = []
    begin = 0
    for i, end in enumerate(ends):
        mask = learned[begin:end] if len(learned) else None
        num_bytes = int(fields["num_bytes"][i])
        tokens = Encoded(
            ids=ids[begin:end],
            learned=mask,
            digest=int(fields["digests"][i]),
            size=int(fields["sizes"][i]),
            num_bytes=None if num_bytes < 0 else num_bytes,
        )
        block.append((int(fields["positions"][i]), Document("", keys[i], encoded=tokens)))
        begin = end
    return block, bool(fields["last"])


def checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()
