"""Files of every kind for the tests of odd ones: how they are packed, written and read."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.data.documents import Document
from core.data.sources import build_source
from core.data.sources.text import TextSettings

STORIES = [
    f"story {i}: the río of year {i} met a captain — and nobody wrote it down." for i in range(12)
]


def pack_zst(data: bytes, **how: Any) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    how = {"write_checksum": True, **how}  # as the program `zstd` does
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(**how)
    ).compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": pack_zst,
}


def opened(path: Any, root: Path, **how: Any) -> Any:
    source = build_source(TextSettings(path=path, name="s", **how), root, 1)
    source.open()
    return source


def texts(source: Any) -> list[str]:
    return [document.text for document in in_order(source)]


def in_order(source: Any) -> list[Document]:
    """All documents, in the order of files and places in them."""
    found = [document for unit in source.shards() for _, document in quietly(source, unit)]
    assert sorted(d.key for d in found) == sorted(d.key for d in source.stream({})), (
        "an epoch has other documents"
    )
    return found


def quietly(source: Any, unit: Any) -> Any:
    try:
        yield from source.read(unit, 0)
    except Exception as error:
        source.recover(unit, error, 9)


def rows_as(kind: str, rows: list[dict]) -> bytes:
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    mark = "\t" if kind == ".tsv" else ","
    quoted = [
        mark.join('"{}"'.format(str(v).replace('"', '""')) for v in row.values()) for row in rows
    ]
    return ("\n".join([mark.join(rows[0]), *quoted]) + "\n").encode()


def write_parquet(path: Path, table: Any, **how: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(
        table if isinstance(table, pyarrow.Table) else pyarrow.Table.from_pylist(table), path, **how
    )


# damage -------------------------------------------------------------------------------------------


def lines_of(count: int) -> bytes:
    draw = random.Random(1)
    return b"".join(
        json.dumps({"text": f"{i} " + draw.randbytes(40).hex()}).encode() + b"\n"
        for i in range(count)
    )
