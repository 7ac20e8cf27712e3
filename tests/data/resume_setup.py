"""Data of every kind in small files, and plans of interrupted runs, for all test_resume files."""

import gzip
import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data import token_cache as cache
from core.data.mixing import MixSettings
from core.data.sources import SOURCES
from core.data.sources.chat import ChatSettings
from core.data.sources.hf import HfSettings
from core.data.sources.text import PythonStdlibSettings, TextSettings
from core.data.sources.tokens import TokensSettings
from core.data.token_files import ChunkWriter, Manifest
from core.schedules import Piece
from tests.data.corpus import (
    LANES,
    History,
    Stretch,
    byte_tokenizer,
    write_corpus,
)

HORIZON = 4000  # tokens: most of a reference run
FALLING = [
    Piece(start=0.9, shape="constant", end=0.4),
    Piece(start=0.9, to=0.1, begin=0.4, end=0.6),
]
RISING = [Piece(start=0.1, shape="constant", end=0.4), Piece(start=0.1, to=0.9, begin=0.4, end=0.6)]

STRATEGIES = ["round_robin", "sequential", "weighted", "annealed"]
PACKINGS = ["documents", "best_fit", "padding"]

KINDS: dict[str, Any] = {
    "txt": TextSettings(path="texts", name="it"),
    "jsonl": TextSettings(path="rows/*.jsonl", name="it"),
    "jsonl.gz": TextSettings(path="rows/*.gz", name="it"),
    "jsonl.zst": TextSettings(path="rows/*.zst", name="it"),
    "parquet": TextSettings(path="rows/*.parquet", name="it"),
    "python_stdlib": PythonStdlibSettings(name="it"),
    "pdf": SOURCES["pdf"][0](name="it"),
    "chat": ChatSettings(path="chat/*.jsonl.gz", name="it"),
    "chat dataset": ChatSettings(dataset="./chat_dataset", name="it"),
    "tokens": TokensSettings(path="tokens", name="it"),
    "hf": HfSettings(dataset="./dataset", name="it"),
}
CACHED = ["jsonl.gz", "jsonl.zst", "chat"]


def mix_of(strategy: str, sources: int = 2, max_epochs: int | None = None) -> MixSettings:
    """annealed: shares of tokens that a schedule turns around within the run."""
    if strategy == "annealed":
        weights = tuple(RISING if i % 2 else FALLING for i in range(sources))
        return MixSettings("weighted", weights, 1, max_epochs, "tokens", HORIZON, (0.9,) * sources)
    return MixSettings(strategy, tuple(1.0 + i for i in range(sources)), 1, max_epochs)


class Texts:
    """Made-up texts, no two of them alike."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)

    def text(self, name: str, most: int = 90) -> str:
        words = [
            "abcdefghij"[: self.draw.randint(1, 10)] for _ in range(self.draw.randint(1, most // 5))
        ]
        return f"{name}: {' '.join(words)}."

    def rows(self, name: str, size: int) -> list[dict]:
        return [{"text": self.text(f"{name} {i}"), "id": i} for i in range(size)]

    def chats(self, name: str, size: int) -> list[dict]:
        return [{"messages": self.messages(f"{name} {i}")} for i in range(size)]

    def messages(self, name: str) -> list[dict]:
        turns = (
            ("assistant", self.text(name, 60)),
            ("user", "so?"),
            ("assistant", self.text("so", 20)),
        )
        return [{"role": role, "content": content} for role, content in turns]


def write_data(root: Path, count: int = 9) -> None:
    """A few files of every kind, `count` documents in the smallest; no two documents are alike."""
    made = Texts(3)
    for folder in ("texts", "rows", "library/deep", "pdfs", "chat", "dataset", "chat_dataset"):
        (root / folder).mkdir(parents=True)
    for i in range(3):
        write_files(root, made, i, count + 4 * i)
    write_pdfs(root / "pdfs", [[made.text(f"pdf {i} {k}") for k in range(6)] for i in range(3)])
    write_tokens(root / "tokens", [made.text(f"tokens {i}") for i in range(3 * count)])
    write_corpus(root, {"other": 17}, low=5, high=90)


def write_files(root: Path, made: Texts, i: int, size: int) -> None:
    """One file of every kind but PDFs and tokens, the i-th, of `size` documents."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    def lines(rows: list[dict]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    paragraphs = "\n\n".join(made.text(f"text {i} {k}") for k in range(size))
    (root / f"texts/{i}.{('txt', 'md', 'py')[i]}").write_text(paragraphs)
    code = "\n".join(f"# {made.text(f'code {i} {k}')}" for k in range(size))
    (root / f"library/{'deep/' * (i == 1)}{i}.py").write_text(code)
    rows = root / f"rows/{i}.jsonl"
    rows.write_bytes(lines(made.rows(f"jsonl {i}", size)))
    zipped = gzip.compress(lines(made.rows(f"gz {i}", size)))
    rows.with_suffix(".jsonl.gz").write_bytes(zipped)
    zipped = zstandard.compress(lines(made.rows(f"zst {i}", size)))
    rows.with_suffix(".jsonl.zst").write_bytes(zipped)
    chats = gzip.compress(lines(made.chats(f"chat {i}", size)))
    (root / f"chat/{i}.jsonl.gz").write_bytes(chats)
    for folder, found in (
        ("rows", made.rows(f"parquet {i}", size)),
        ("dataset", made.rows(f"hf {i}", size)),
        ("chat_dataset", made.chats(f"hf {i}", size)),
    ):
        table, path = pyarrow.Table.from_pylist(found), root / folder / f"train-{i}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=5)


def write_pdfs(folder: Path, files: list[list[str]]) -> None:
    pymupdf = pytest.importorskip("pymupdf")
    for i, paragraphs in enumerate(files):
        with pymupdf.open() as document:
            document.new_page().insert_textbox(
                (50, 50, 550, 780), "\n\n".join(paragraphs), fontsize=9
            )
            document.save(folder / f"{i}.pdf")


def write_tokens(folder: Path, texts: list[str], chunk_size: int = 300) -> None:
    tokenizer = byte_tokenizer()
    manifest = Manifest(
        "test", None, 0, 0, chunk_size, tokenizer.eos_id, complete=False, documents=0
    )
    writer = ChunkWriter(folder, manifest)
    for ids in tokenizer.encode_batch(texts):
        writer.add(np.append(ids, tokenizer.eos_id))
    writer.save(complete=True)
    writer.close()


def random_plan(
    draw: random.Random,
    rows: int,
    segments: int,
    workers: tuple[int, ...] = (0,),
    sizes: Sequence[int] = (LANES, LANES, 2 * LANES, 6, 12, 18),
) -> list[Stretch]:
    """Segments that come to `rows` rows; ranks, workers and rows a step by chance."""
    plan: list[Stretch] = []
    while rows:
        ranks = draw.choice([1, 2, 2, 3])
        step = draw.choice(sizes)
        steps = draw.randint(0, max(1, 2 * rows // (step * segments)))
        if len(plan) >= segments or steps * step > rows:
            step, steps = LANES, rows // LANES
        plan.append(Stretch(steps, ranks, draw.choice(workers), step))
        rows -= step * steps
    return plan


MOSTLY_SLOW = [
    pytest.param(packing, marks=[pytest.mark.slow] * (packing != "best_fit"))
    for packing in PACKINGS
]
"""The packing that can go wrong in most ways, and, when there is time, all of them."""

EVERY_COMBINATION = [
    pytest.param(
        kind,
        strategy,
        packing,
        marks=[pytest.mark.slow] * (packing != "best_fit" or (i + j) % 2 == 1),
    )
    for (i, kind), (j, strategy), packing in product(
        enumerate(KINDS), enumerate(STRATEGIES), PACKINGS
    )
]
"""Two of the strategies for every kind, and, when there is time, all of them."""


def damage(folder: Path, draw: random.Random) -> int:
    """Flip bits in, shorten, empty, fill with noise and delete the files of the token cache; how
    many there were."""
    files = sorted((folder / cache.CACHE).glob("*/*.safetensors"))
    for path in files:
        try:
            data = bytearray(path.read_bytes() or b"?")
        except FileNotFoundError:  # another rank's thread is at it, too
            continue
        match draw.randrange(6):
            case 0:
                path.unlink(missing_ok=True)
            case 1:
                path.write_bytes(b"")
            case 2:
                path.write_bytes(data[: draw.randrange(len(data))])
            case 3:
                for _ in range(draw.choice([1, 1, 100])):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
            case 4:
                path.write_bytes(draw.randbytes(len(data)))
    return len(files)


def joined(parts: list[History]) -> History:
    rows = {n: row for part in parts for n, row in part.rows.items()}
    documents, epochs = (
        [sum(column) for column in zip(*counts)]
        for counts in zip(*((p.documents, p.epochs) for p in parts if p.documents))
    )
    return History(
        rows, documents, epochs, parts[-1].states, set().union(*(part.dropped for part in parts))
    )
