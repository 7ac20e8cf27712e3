"""Fixtures that several tests of the data share: small constants, a hub with datasets, PDFs."""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.data import pipeline
from core.data import token_cache as cache
from core.data.sources import SOURCES, text
from core.data.sources.pdf.source import PdfSettings, PdfSource
from core.data.sources.shards import ShardSource
from core.data.sources.tokens import TokensSource
from tests.data.resume_setup import write_data
from tests.hub import Hub, lines, parquet, rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Every stretch that something is read, cut, cached or shuffled in is a few documents long."""
    monkeypatch.setattr(pipeline, "SNAPSHOT_EVERY", 5)
    monkeypatch.setattr(pipeline, "READ_AHEAD", 4)
    monkeypatch.setattr(cache, "BLOCK", 7)
    monkeypatch.setattr(cache, "FREE_BYTES", 0)
    monkeypatch.setattr(cache, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(text, "LOW", 40)
    monkeypatch.setattr(text, "HIGH", 80)
    monkeypatch.setattr(f"{SOURCES['pdf'][1].__module__}.LOW", 60)
    monkeypatch.setattr(f"{SOURCES['pdf'][1].__module__}.HIGH", 120)
    monkeypatch.setattr(ShardSource, "window", 6)
    monkeypatch.setattr(TokensSource, "window", 200)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(root / "library"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def hub():
    import zstandard

    sizes = [20, 33, 7, 15]
    card = (
        b"---\nconfigs:\n- config_name: big\n  data_files: big/*.jsonl\n- config_name: "
        b"small\n  data_files: small/*.jsonl\n---\n"
    )
    with Hub() as hub:
        hub.add_dataset(
            "me/parquet",
            {
                f"data/train-{k}.parquet": parquet(rows(k, n), row_group_size=6)
                for k, n in enumerate(sizes)
            },
        )
        hub.add_dataset(
            "me/gzip",
            {
                f"en/train.{k}.json.gz": gzip.compress(lines(rows(k, n)))
                for k, n in enumerate(sizes)
            },
        )
        hub.add_dataset(
            "me/zstd",
            {
                f"train/{k}.jsonl.zst": zstandard.compress(lines(rows(k, n)))
                for k, n in enumerate(sizes)
            },
        )
        hub.add_dataset(
            "me/configs",
            {
                "README.md": card,
                "big/0.jsonl": lines(rows(0, 3)),
                "small/0.jsonl": lines(rows(1, 3)),
            },
        )
        hub.add_dataset(
            "me/script",
            {"script.py": b"import datasets", "data/train.parquet": parquet(rows(0, 3))},
        )
        hub.add_dataset("me/gated", {"data/train.parquet": parquet(rows(0, 3))}, gated=True)
        hub.tokens |= {"hf_withoutAccess1234": set(), "hf_withAccess12345678": {"me/gated"}}
        hub.add_dataset(
            "me/qa",
            {"train.jsonl": lines([{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)])},
        )
        yield hub


# files --------------------------------------------------------------------------------------------


@pytest.fixture
def make_source(tmp_path: Path) -> Iterator[Callable[..., PdfSource]]:
    made: list[PdfSource] = []

    def make(
        files: dict[str, bytes] | None = None,
        seconds: float = 60,
        memory: int = 1 << 30,
        workers: int = 1,
    ) -> PdfSource:
        for name, data in (files or {}).items():
            (tmp_path / "pdfs").mkdir(exist_ok=True)
            (tmp_path / "pdfs" / name).write_bytes(data)
        source = PdfSource(PdfSettings(file_seconds=seconds), tmp_path, 1)
        source.MEMORY = memory
        source._pool._shared.size = workers  # one starts faster than several
        made.append(source)
        return source

    yield make
    for source in made:
        source._pool.close()
