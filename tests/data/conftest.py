"""What several tests of the data share: a hub with datasets, and sources of PDFs."""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.data.sources.pdf.source import PdfSettings, PdfSource
from tests.hub import Hub, lines, parquet, rows


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
