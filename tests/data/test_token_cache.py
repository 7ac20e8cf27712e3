"""The token cache: the same documents with it, without it, and after anything that can happen to
its files."""

import gzip
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data import token_cache as cache
from core.data.documents import Document, Encoded
from core.data.encoding import encode
from core.data.sources.text import TextSettings, TextSource
from core.data.token_cache import BLOCK, CACHE, CachedSource, TokenCache, packed, unpacked
from tests.data.corpus import byte_tokenizer

SHARDS = 3


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Compressed files, which cannot be sought in; some rows without text; one exactly two blocks
    long."""
    draw = random.Random(0)
    for shard, count in enumerate((700, 2 * BLOCK, 5)):
        rows = [
            {"text": f"{shard} {i} " + "x" * draw.randint(0, 40)}
            if draw.random() < 0.9
            else {"text": None}
            for i in range(count)
        ]
        (tmp_path / f"{shard}.jsonl.gz").write_bytes(
            gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        )
    return tmp_path


def plain(folder: Path) -> TextSource:
    return TextSource(TextSettings(path="*.jsonl.gz", name="s"), folder, 1)


def cached(folder: Path, limit: int = 1 << 30) -> CachedSource:
    return CachedSource(plain(folder), TokenCache(folder, limit), byte_tokenizer())


def read(source: Any, cursor: dict | None = None) -> list[tuple]:
    stream = source.stream(cursor or {})
    tokenizer = byte_tokenizer()
    return [
        (d.key, d.digest, encode(tokenizer, [d])[0].ids.tolist(), stream.cursor()) for d in stream
    ]


def blocks(folder: Path) -> list[Path]:
    return sorted((folder / CACHE).glob("*/*.safetensors"))


def test_documents_and_cursors_are_the_sources_own(corpus: Path) -> None:
    """While the cache grows, once it is there, and after it was deleted, from the beginning and
    from any cursor."""
    expected = read(plain(corpus))
    assert read(cached(corpus)) == expected == read(cached(corpus))
    assert len(blocks(corpus)) == 3 + 2 + 1
    for at in (0, 250, 255, 256, 700, len(expected) - 2):
        assert read(cached(corpus), expected[at][3]) == expected[at + 1 :]
    shutil.rmtree(corpus / ".cache")
    for at in (len(expected) - 2, 300):
        assert read(cached(corpus), expected[at][3]) == expected[at + 1 :]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "text"])
def test_a_damaged_block_is_made_again(harm: str, corpus: Path) -> None:
    expected = read(cached(corpus))
    for number, path in enumerate(blocks(corpus)):
        data = bytearray(path.read_bytes())
        if harm == "flip":
            data[(number * 7919) % len(data)] ^= 0x20
        path.write_bytes(
            {
                "flip": bytes(data),
                "cut": bytes(data[: len(data) // 2]),
                "empty": b"",
                "text": b"not a block",
            }[harm]
        )
    assert read(cached(corpus)) == expected


@pytest.mark.parametrize("where", ["packed", "unpacked"])
def test_no_fault_of_the_cache_looks_like_one_of_the_file(
    where: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy's reader of .npz once raised SystemError in one of several threads (CPython 106905):
    a rank left out a file that the others read."""

    def fails(*_: Any) -> Any:
        raise SystemError("AST constructor recursion depth mismatch")

    source = cached(corpus)
    expected, skipped = read(source), source.skipped()
    if where == "packed":
        shutil.rmtree(corpus / ".cache")
    monkeypatch.setattr(cache, where, fails)
    source = cached(corpus)
    assert read(source) == expected and source.skipped() == skipped


def test_no_flipped_bit_changes_a_token(corpus: Path) -> None:
    """Wherever it is: the block is as it was, or not taken."""
    read(cached(corpus))
    data = blocks(corpus)[0].read_bytes()
    whole = unpacked(data)
    for at in random.Random(1).sample(range(len(data)), 300):
        broken = bytearray(data)
        broken[at] ^= 1 << (at % 8)
        try:
            found = unpacked(bytes(broken))
        except ValueError:
            continue
        assert [(p, d.key, d.digest, d.encoded.ids.tolist()) for p, d in found[0]] == [
            (p, d.key, d.digest, d.encoded.ids.tolist()) for p, d in whole[0]
        ]


def test_several_readers_make_each_block_once(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks and workers read the same stream side by side: what one has made, the others find."""
    made: list[tuple] = []
    make = cache._BlockMaker.make

    def counted(self: Any, number: int) -> Any:
        made.append((self._shard.label, number))
        return make(self, number)

    monkeypatch.setattr(cache._BlockMaker, "make", counted)
    expected = read(plain(corpus))
    results: list[list] = [[] for _ in range(4)]

    def reader(place: int) -> None:
        results[place] = read(cached(corpus))

    threads = [threading.Thread(target=reader, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == expected for result in results)
    assert len(made) == len(set(made)) == len(blocks(corpus))


def test_a_reader_that_died_holds_up_nobody(corpus: Path) -> None:
    """A process killed while it made a block leaves a lock that the system frees, and perhaps half
    a file."""
    expected = read(cached(corpus))
    folder = blocks(corpus)[0].parent
    for path in blocks(corpus):
        path.unlink()
    (folder / "00000000.123.tmp").write_bytes(b"half")
    assert read(cached(corpus)) == expected


def test_the_size_has_a_limit(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used longest ago goes; the documents stay the same."""
    monkeypatch.setattr(cache, "TIDY_EVERY", 1)
    expected = read(plain(corpus))
    limit = 60_000
    assert read(cached(corpus, limit)) == expected
    sizes = [path.stat().st_size for path in (corpus / CACHE).glob("*/*")]
    assert 0 < sum(sizes) <= limit and len(sizes) < 6


@pytest.mark.parametrize("reason", ["read-only", "a file in its place", "a full disk"])
def test_a_cache_that_cannot_be_written_costs_only_time(
    reason: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(plain(corpus))
    if reason == "read-only":
        (corpus / CACHE).mkdir(parents=True)

        def refuse(*_: Any) -> None:
            raise PermissionError("read-only file system")

        # root may write anywhere: the mode of a folder would not stop it
        monkeypatch.setattr(os, "replace", refuse)
    elif reason == "a full disk":
        monkeypatch.setattr(cache, "FREE_BYTES", 1 << 60)
    else:
        (corpus / ".cache").write_text("")
    assert read(cached(corpus)) == expected and blocks(corpus) == []


def test_a_changed_file_is_read_anew(corpus: Path) -> None:
    read(cached(corpus))
    (corpus / "2.jsonl.gz").write_bytes(gzip.compress(b'{"text": "other"}\n'))
    assert read(cached(corpus)) == read(plain(corpus))


def test_another_reader_reads_anew(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older program made of the same files is not taken."""
    monkeypatch.setattr("core.data.sources.text.READER", 1)
    monkeypatch.setattr(
        TextSource, "document", lambda self, values, key: Document("as it was read before", key)
    )
    read(cached(corpus))
    monkeypatch.undo()
    assert read(cached(corpus)) == read(plain(corpus))


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_a_block_comes_back_as_it_was(vocabulary: int) -> None:
    """Masks, empty documents and wide ids included."""
    draw = np.random.default_rng(0)
    some: Callable[[int], np.ndarray] = lambda n: draw.integers(0, vocabulary, n).astype(np.int32)  # noqa: E731
    documents = [
        Document("", "a#0", encoded=Encoded(some(5), None, 2**64 - 1, 9)),
        Document("", "b ü#1", encoded=Encoded(some(0), None, 0, 1)),
        Document("", "c#7", encoded=Encoded(some(3), np.array([True, False, True]), 5, 4)),
    ]
    (block, last) = unpacked(
        packed([(1, documents[0]), (2, documents[1]), (8, documents[2])], True)
    )
    assert last and [position for position, _ in block] == [1, 2, 8]
    for (_, found), document in zip(block, documents):
        assert (found.key, found.digest, found.encoded.size) == (
            document.key,
            document.digest,
            document.encoded.size,
        )
        assert (
            np.array_equal(found.encoded.ids, document.encoded.ids)
            and found.encoded.ids.dtype == np.int32
        )
    assert (
        block[2][1].encoded.learned.tolist() == [True, False, True]
        and block[0][1].encoded.learned.all()
    )
    assert unpacked(packed([], False)) == ([], False)


def test_bytes_of_the_text_are_kept(corpus: Path) -> None:
    """What bits per byte divide by comes from the cache as from the text; a document that never had
    a text has none."""
    expected = [len(document.text.encode()) for document in plain(corpus).stream({})]
    for _ in range(2):
        assert [
            d.encoded.num_bytes for d in cached(corpus).stream({}) if d.encoded is not None
        ] == expected
    block = [(1, Document("", "k", encoded=Encoded(np.array([5], np.int32), None, 7, 0)))]
    ((_, document),), _ = unpacked(packed(block, True))
    assert document.encoded is not None and document.encoded.num_bytes is None


def test_blocks_of_another_version_are_made_again(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older program encoded or kept otherwise is never read as this one's."""
    expected, before = read(cached(corpus)), len(blocks(corpus))
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert read(cached(corpus)) == expected and len(blocks(corpus)) == 2 * before
