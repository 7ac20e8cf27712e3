"""The cache of PDFs: a file is read once, and what is odd about the cache costs only time."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.data.documents import Document
from core.data.sources.pdf import pool as pdf_pool
from core.data.sources.pdf.cache import (
    CACHE,
    EXTRACTOR_VERSION,
    Extraction,
    PdfCache,
    digest_of_file,
)
from core.data.sources.pdf.messages import (
    CRASH,
    GOOD,
    SLOW,
)
from core.data.sources.pdf.source import PdfSettings, PdfSource
from core.errors import SourceUnavailable
from tests.data import pdfs
from tests.data.pdf_source import all_of, paragraph, skipped, words

ROOT = Path(__file__).resolve().parents[2]


# cache --------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were really read, in place of the cache."""
    read: list[str] = []
    real = pdf_pool.Worker.read

    def counting(worker: pdf_pool.Worker, path: Path, limits: pdf_pool.Limits) -> Extraction:
        read.append(path.name)
        return real(worker, path, limits)

    monkeypatch.setattr(pdf_pool.Worker, "read", counting)
    return read


@pytest.mark.slow
def test_the_cache_remembers_what_follows_from_the_file(
    make_source: Callable[..., PdfSource], counted: list[str], tmp_path: Path
) -> None:
    files = {"a.pdf": paragraph("A text."), "b.pdf": b"junk", "slow.pdf": pdfs.endless_forms()}
    first = make_source(files, seconds=0.5)
    documents = all_of(first)
    assert sorted(counted) == ["a.pdf", "b.pdf", "slow.pdf"]
    # slow is remembered while the program runs,
    assert all_of(first) == documents and len(counted) == 3
    (tmp_path / "pdfs" / "renamed.pdf").write_bytes(files["a.pdf"])
    assert [d.text for d in all_of(make_source(seconds=0.5))] == ["A text."] * 2
    # and tried again by the next; the same content under another name is not
    assert counted[3:] == ["slow.pdf"]
    folder = tmp_path / CACHE
    # no lock and nothing half-written is left
    assert sorted(p.suffix for p in folder.iterdir()) == [".gz", ".gz"]
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert all_of(make_source(seconds=0.5))[0].text == "A text." and sorted(counted[4:]) == [
        "a.pdf",
        "b.pdf",
        "slow.pdf",
    ]
    digest = digest_of_file(tmp_path / "pdfs" / "a.pdf")
    assert PdfCache(tmp_path).get(digest) == (GOOD, "A text.", False)  # written anew
    (folder / f"{digest}-{EXTRACTOR_VERSION}.json.gz").write_bytes(b"\x1f\x8b junk")
    assert PdfCache(tmp_path).get(digest) is None


def test_time_and_memory_are_not_cached(tmp_path: Path) -> None:
    cache = PdfCache(tmp_path)
    for kind in (SLOW, CRASH, "too large"):
        cache.put("a" * 40, Extraction(kind, ""))
        assert cache.get("a" * 40) is None


@pytest.mark.parametrize("what", ["a file in its place", "a folder without rights"])
def test_an_unwritable_cache_costs_only_time(
    make_source: Callable[..., PdfSource], tmp_path: Path, what: str
) -> None:
    folder = tmp_path / CACHE
    if what == "a file in its place":
        folder.parent.write_text("")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o500)
    try:
        source = make_source({"a.pdf": paragraph("A text."), "b.pdf": paragraph("B text.")})
        source.open()
        assert (
            sorted(d.text for d in all_of(source))
            == sorted(d.text for d in all_of(source))
            == ["A text.", "B text."]
        )
    finally:
        if folder.is_dir():
            folder.chmod(0o700)


def test_readers_of_the_same_folder_share_the_work(
    make_source: Callable[..., PdfSource], counted: list[str]
) -> None:
    files = {f"{n}.pdf": paragraph(f"Text {n}. " + words(n, 50)) for n in range(8)}
    sources = [make_source(files) for _ in range(3)]
    out: dict[int, list[Document]] = {}

    def read(index: int) -> None:
        out[index] = all_of(sources[index])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert out[0] == out[1] == out[2] and len(out[0]) == 8
    assert sorted(counted) == sorted(files)


@pytest.mark.slow
def test_the_time_of_a_slow_file_is_spent_once(
    make_source: Callable[..., PdfSource], counted: list[str]
) -> None:
    """Ranks want the same file at the same time: those that wait take the word of the one that
    tried."""
    sources = [make_source({"a.pdf": pdfs.endless_forms()}, seconds=1) for _ in range(3)]
    failed: list[str] = []

    def read(source: PdfSource) -> None:
        try:
            all_of(source)
        except SourceUnavailable as error:
            failed.append(str(error))

    threads = [threading.Thread(target=read, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (
        counted == ["a.pdf"]
        and len(failed) == 3
        and all("slow (over 1 s) file: a.pdf" in text for text in failed)
    )


def test_memory_is_limited(make_source: Callable[..., PdfSource]) -> None:
    source = make_source(
        {"a.pdf": pdfs.string_bomb(40), "b.pdf": paragraph("A text.")}, memory=100 << 20
    )
    assert [d.text for d in all_of(source)] == ["A text."]
    assert skipped(source) == {"a.pdf": "too large (over 0.098 GB of memory)"}


def test_a_lock_of_another_process_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    cache, digest = PdfCache(tmp_path), "a" * 40
    with cache.lock(digest, 1):
        begin = time.monotonic()
        with cache.lock(digest, 0.3):
            assert 0.25 < time.monotonic() - begin < 2
    assert list((tmp_path / CACHE).iterdir()) == []
    with (tmp_path / CACHE / f"{digest}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.2, file.close).start()  # as the system does for one that dies
        begin = time.monotonic()
        with cache.lock(digest, 20):
            assert 0.1 < time.monotonic() - begin < 5


def test_paths_may_be_relative_and_names_no_text(
    make_source: Callable[..., PdfSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source({"\udcff.pdf": paragraph("A text.")})
    monkeypatch.chdir(tmp_path)
    source = PdfSource(PdfSettings(), Path("."), 1)
    assert [d.text for d in all_of(source)] == ["A text."]


def test_a_vanished_file_is_missing(make_source: Callable[..., PdfSource], tmp_path: Path) -> None:
    source = make_source({"a.pdf": paragraph("A text."), "b.pdf": paragraph("B text.")})
    source.order(0)
    (tmp_path / "pdfs" / "a.pdf").unlink()
    assert [d.text for d in all_of(source)] == ["B text."]
    assert source.notes == ["skipped 1 missing file: a.pdf"]
