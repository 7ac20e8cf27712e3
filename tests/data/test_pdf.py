"""PDF files: each is read rightly or named with its reason, and none, however hostile, hangs or
ends a run."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.data.documents import Document
from core.data.sources import open_sources
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
    DAMAGED,
    EMPTY,
    ENCRYPTED,
    GOOD,
    PAGELESS,
    SCANNED,
    SLOW,
)
from core.data.sources.pdf.source import PdfSettings, PdfSource
from core.errors import SourceUnavailable
from tests.data import pdfs

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
    "kilo",
    "lima",
    "mike",
)


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


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


def all_of(source: PdfSource, cursor: dict | None = None) -> list[Document]:
    return list(source.stream(cursor or {}))


def skipped(source: PdfSource) -> dict[str, str]:
    """{file: kind} of all that were skipped; the notes show only the first few names."""
    return {name: kind for kind, names in source.skips.files.items() for name in names}


def paragraph(text: str, y: float = 70) -> bytes:
    return pdfs.pdf_of_lines([pdfs.column(text, 50, y, 95)])


def worker_pids(source: PdfSource) -> list[int]:
    return [w.process.pid for w in source._pool.workers() if w.process is not None]


def children_of(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def test_bad_pdfs_are_skipped_and_named(
    make_source: Callable[..., PdfSource], capfd: pytest.CaptureFixture
) -> None:
    good = pdfs.pdf_of_lines(
        [pdfs.column(f"Page {n}. " + words(n, 500) + ".", 50, 70, 95) for n in range(3)]
    )
    source = make_source(
        {
            "good.pdf": good,
            "locked.pdf": pdfs.locked(good, "x"),
            "open.pdf": pdfs.locked(paragraph("No password is needed for this."), ""),
            "scan.pdf": pdfs.scanned_pdf(),
            "junk.pdf": b"%PDF-1.7 but no more",
            "zero.pdf": b"",
            "none.pdf": pdfs.no_pages(),
        }
    )
    source.open()
    told = {
        "skipped 1 encrypted file: locked.pdf",
        "skipped 1 textless (scanned?) file: scan.pdf",
        "skipped 1 damaged file: junk.pdf",
        "skipped 1 empty file: zero.pdf",
        "skipped 1 pageless file: none.pdf",
    }
    assert set(source.notes) == told
    documents = all_of(source)
    texts = [d.text for d in documents if d.key.startswith("good")]
    assert (
        len(texts) >= 2
        and all(len(text) <= 5750 for text in texts)
        and texts[-1].rstrip().endswith(".")
    )
    assert [d.text for d in documents if d.key.startswith("open")] == [
        "No password is needed for this."
    ]
    assert set(source.notes) == told  # said once, however often they are met
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("make", [True, False])
def test_no_pdfs_says_where_to_put_them(
    make_source: Callable[..., PdfSource], tmp_path: Path, make: bool
) -> None:
    if make:
        (tmp_path / "pdfs").mkdir()
    _, failed = open_sources([make_source()])
    assert str(tmp_path / "pdfs") in failed["pdf"] and "put PDF files there" in failed["pdf"]


def test_what_is_left_out_is_not_read(tmp_path: Path) -> None:
    """So the default presets take a person's own PDFs, and not the program's guide; without any, it
    is as if there were none."""
    (tmp_path / "pdfs").mkdir()
    (tmp_path / "pdfs" / "guide.pdf").write_bytes(
        pdfs.pdf_of_lines([pdfs.column("The guide of the program.", 72, 72, 60)])
    )
    source = PdfSource(PdfSettings(leave_out=["guide.pdf"]), tmp_path, 1)
    _, failed = open_sources([source])
    assert "holds no PDF but guide.pdf; put PDF files there" in failed["pdf"]
    (tmp_path / "pdfs" / "mine.pdf").write_bytes(
        pdfs.pdf_of_lines([pdfs.column("A text of my own.", 72, 72, 60)])
    )
    opened, _ = open_sources([source])
    assert [d.key for d in all_of(opened[0])] == ["mine.pdf#0"] and source.notes == []
    source._pool.close()


def test_only_bad_pdfs_fail_with_their_reasons(make_source: Callable[..., PdfSource]) -> None:
    source = make_source({"a.pdf": b"", "b.pdf": b"junk"})
    with pytest.raises(SourceUnavailable, match="no text in any of its 2 files") as error:
        source.open()
    assert "1 empty file: a.pdf" in str(error.value) and "1 damaged file: b.pdf" in str(error.value)


@pytest.mark.slow
def test_hostile_files_first_do_not_eat_up_the_opening(
    make_source: Callable[..., PdfSource],
) -> None:
    source = make_source(
        {f"h{i}.pdf": pdfs.endless_forms(31 + i) for i in range(8)} | {"z.pdf": paragraph("a text")}
    )
    order = source.order(0)
    # the good one comes last
    source.order = lambda epoch: sorted(order, key=lambda unit: unit.label)
    begin = time.monotonic()
    source.open()
    assert time.monotonic() - begin < 9
    assert source.notes == []  # slow at opening is not condemned


@pytest.mark.slow
def test_only_slow_files_say_so(
    make_source: Callable[..., PdfSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.data.sources.pdf.source.OPEN_SECONDS", 1.5)
    with pytest.raises(SourceUnavailable, match=r"no text within 1\.5 s in any of its 1 files"):
        make_source({"h.pdf": pdfs.endless_forms()}).open()


GOOD_KINDS = 6


def good_pdf(number: int) -> tuple[bytes, str]:
    """A readable file and its exact text."""
    body = f"Start{number} " + words(number, 60 + number % 40) + f" end{number}."
    kind = number % GOOD_KINDS
    if kind == 0:
        return paragraph(body), body
    if kind == 1:  # two columns written line by line across both, a title above, a footnote below
        left, right = body, f"Right{number} " + words(number + 1, 60) + " stop."
        pairs = [pdfs.column(left, 50, 150, 45), pdfs.column(right, 320, 150, 45)]
        mixed = [
            line
            for i in range(max(map(len, pairs)))
            for column in pairs
            for line in column[i : i + 1]
        ]
        title, note = (
            "A title that stands over both of the columns of this page",
            f"1 Footnote {number}",
        )
        page = [(60.0, 60.0, f"14|{title}"), *mixed, (50.0, 700.0, f"6|{note}")]
        return pdfs.pdf_of_lines([page]), "\n\n".join([title, left, right, note])
    if kind == 2:  # headers, footers, and a paragraph over all pages
        parts = [
            f"Start{number} {words(number, 40)} and so it",
            f"goes on with {words(number + 1, 40)} and",
            f"{words(number + 2, 40)}.",
        ]
        pages = [
            [
                (50.0, 30.0, f"Book {number}"),
                (500.0, 30.0, str(7 + n)),
                *pdfs.column(part, 50, 70, 95),
                (280.0, 820.0, f"- {n + 1} -"),
            ]
            for n, part in enumerate(parts)
        ]
        return pdfs.pdf_of_lines(pages), " ".join(parts)
    if kind == 3:  # a word cut at every line's end
        cut = [
            (50.0, 70.0 + 11 * i, f"{words(i, 10)} exam-" if i == 0 else f"ple {words(i, 9)} exam-")
            for i in range(8)
        ]
        whole = "".join(text.removesuffix("-") for _, _, text in cut) + f"ple {number}."
        return pdfs.pdf_of_lines([[*cut, (50.0, 158.0, f"ple {number}.")]]), whole
    if kind == 4:
        texts = [f"Col{c} of {number} {words(number + c, 40)}." for c in range(3)]
        return pdfs.pdf_of_lines(
            [[line for c in range(3) for line in pdfs.column(texts[c], 40 + 180 * c, 100, 28)]]
        ), "\n\n".join(texts)
    cells = [[f"cell {number} {r}{c}" for c in range(3)] for r in range(5)]
    table = [(60.0 + 140 * c, 200.0 + 12 * r, cells[r][c]) for r in range(5) for c in range(3)]
    page = [*pdfs.column(body, 50, 70, 95), *table]
    return pdfs.pdf_of_lines([page]), body + "\n\n" + "\n".join("\t".join(row) for row in cells)


HOSTILE = {  # what MuPDF 1.28 makes of each
    "forms.pdf": (lambda: pdfs.endless_forms(), "slow"),  # never ends
    "operators.pdf": (lambda: pdfs.bomb(b"q Q ", 300), "slow"),  # about 25 ms per MB
    # about 6 times its size
    "letters.pdf": (lambda: pdfs.bomb(b"BT /F 9 Tf 50 700 Td (abc) Tj ET ", 60), "too large"),
    "string.pdf": (lambda: pdfs.string_bomb(40), "too large"),
    "contents.pdf": (lambda: pdfs.many_contents(), "too large"),
    "self.pdf": (pdfs.self_drawing_form, SCANNED),  # MuPDF sees the rest itself
    "cycle.pdf": (pdfs.page_tree_cycle, DAMAGED),
    "count.pdf": (pdfs.page_count_lie, DAMAGED),
    "deep.pdf": (pdfs.deep_page_tree, SCANNED),
    "chain.pdf": (pdfs.drawn_by_chain, DAMAGED),
}


@pytest.mark.slow
def test_the_folder_of_two_hundred(
    make_source: Callable[..., PdfSource],
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Good, damaged, encrypted, empty, scanned, huge and hostile files: each read rightly or named
    with its reason, in time."""
    files: dict[str, bytes] = {name: make() for name, (make, _) in HOSTILE.items()}
    expected = {name: kind for name, (_, kind) in HOSTILE.items()}
    texts: dict[str, str] = {}
    for n in range(140):
        files[f"good{n}.pdf"], texts[f"good{n}.pdf"] = good_pdf(n)
    huge = [pdfs.column(f"Leaf {n} of it. {words(n, 30)}.", 50, 70, 95) for n in range(1500)]
    files["huge.pdf"] = pdfs.pdf_of_lines(huge)
    texts["huge.pdf"] = "\n\n".join(" ".join(text for *_, text in page) for page in huge)
    rng = random.Random(0)
    base = good_pdf(2)[0]
    secret = pdfs.locked(base, "secret")
    for n in range(8):
        files[f"junk{n}.pdf"], expected[f"junk{n}.pdf"] = rng.randbytes(500 + n), DAMAGED
        files[f"cut{n}.pdf"], expected[f"cut{n}.pdf"] = base[: 20 + 8 * n], DAMAGED
        files[f"scan{n}.pdf"], expected[f"scan{n}.pdf"] = pdfs.scanned_pdf(n + 1), SCANNED
        files[f"lock{n}.pdf"], expected[f"lock{n}.pdf"] = secret + b"\n" * n, ENCRYPTED
    for n in range(4):
        files[f"empty{n}.pdf"], expected[f"empty{n}.pdf"] = b"", EMPTY
        files[f"none{n}.pdf"], expected[f"none{n}.pdf"] = pdfs.no_pages() + b"\n" * n, PAGELESS
    for n in range(9):  # readable in part or not at all
        flipped = bytearray(good_pdf(n)[0])
        for place in rng.sample(range(len(flipped)), 10 * (n + 1)):
            flipped[place] ^= 1 << rng.randrange(8)
        files[f"flipped{n}.pdf"] = bytes(flipped)
    assert len(files) == 200

    monkeypatch.setattr("core.data.sources.pdf.source.CHECK_SECONDS", 2.0)
    source = make_source(files, seconds=4, memory=100 << 20, workers=2)
    begin = time.monotonic()
    source.open()
    assert time.monotonic() - begin < 9
    documents = all_of(source)
    assert time.monotonic() - begin < 60
    first = time.monotonic() - begin

    got: dict[str, str] = {}
    for document in documents:
        name = document.key.split("#")[0]
        got[name] = got.get(name, "") + document.text
    assert {name: got.get(name) for name in texts} == texts
    told = skipped(source)
    kinds = {name: told.get(name, "").split(" (over")[0] for name in expected}
    # a machine at its limits may need all the time to fill the memory
    for name in ("letters.pdf", "string.pdf", "contents.pdf"):
        kinds[name] = kinds[name].replace("slow", "too large")
    assert kinds == expected
    assert set(got) | set(told) == set(files) and not set(got) & set(told)
    units = [unit.label for unit in source.order(0)]
    # in the epoch's order, whatever was read ahead
    assert [name for name in units if name in got] == list(got)
    assert (
        sum(
            note.startswith("skipped 10 damaged") or "encrypted files: lock" in note
            for note in source.notes
        )
        >= 1
    )

    begin = time.monotonic()
    assert all_of(source) == documents
    assert time.monotonic() - begin < min(2.0, first / 4)
    again = make_source()
    again._given_up = dict(source._given_up)  # only these are not in the cache
    cursors = []
    stream = source.stream({})
    for _ in documents:
        cursors.append(stream.cursor())
        next(stream)
    for cut in random.Random(1).sample(range(len(documents)), 12):
        cursor = json.loads(json.dumps(cursors[cut]))
        assert all_of(again, cursor) == documents[cut:]
    assert worker_pids(again) == []
    assert capfd.readouterr() == ("", "")


# workers ------------------------------------------------------------------------------------------


@pytest.mark.slow
@linux
@pytest.mark.parametrize("who", ["worker", "fork"])
def test_a_killed_worker_is_replaced_and_its_file_tried_again(
    make_source: Callable[..., PdfSource], who: str
) -> None:
    source = make_source({"a.pdf": pdfs.text_then_bomb("Hello to you", b"q Q ", 15)})
    out: list[Document] = []
    reading = threading.Thread(target=lambda: out.extend(all_of(source)))
    reading.start()
    until(lambda: any(children_of(pid) for pid in worker_pids(source)))
    (pid,) = worker_pids(source)
    (child,) = children_of(pid)
    os.kill(pid if who == "worker" else child, signal.SIGKILL)
    reading.join(30)
    assert [d.text for d in out] == ["Hello to you"]
    assert source.notes == [] and not alive(child)
    assert (worker_pids(source) == [pid]) == (who == "fork")


@pytest.mark.slow
@linux
def test_a_file_that_always_kills_its_reader_is_named(
    make_source: Callable[..., PdfSource],
) -> None:
    source = make_source({"a.pdf": pdfs.endless_forms(), "b.pdf": paragraph("A text.")})
    ended = threading.Event()

    def killer() -> None:
        while not ended.is_set():
            for pid in worker_pids(source):
                for child in children_of(pid):
                    if time.time() - Path(f"/proc/{child}").stat().st_ctime > 0.3:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.05)

    threading.Thread(target=killer, daemon=True).start()
    try:
        assert [d.text for d in all_of(source)] == ["A text."]
    finally:
        ended.set()
    assert skipped(source) == {"a.pdf": "crashing (their reader does not survive them)"}


@pytest.mark.slow
def test_a_worker_that_does_not_keep_the_limit_is_killed(
    make_source: Callable[..., PdfSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    # its own limit is a minute: it would still be reading
    monkeypatch.setattr(pdf_pool, "LATE_SECONDS", -59.0)
    source = make_source({"a.pdf": pdfs.endless_forms()})
    with pytest.raises(SourceUnavailable, match=r"slow \(over 60 s\) file: a\.pdf"):
        all_of(source)


@linux
def test_workers_ignore_ctrl_c_hold_no_torch_and_go_with_their_source(
    make_source: Callable[..., PdfSource],
) -> None:
    source = make_source({"a.pdf": paragraph("A text.")})
    assert len(all_of(source)) == 1
    (pid,) = worker_pids(source)
    os.kill(pid, signal.SIGINT)
    (Path(source._folder) / "b.pdf").write_bytes(paragraph("Another."))
    source._units = None
    assert len(all_of(source)) == 2 and pid in worker_pids(source)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "mupdf" in maps and "torch" not in maps
    pids = worker_pids(source)
    source._pool.close()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # no zombie is left


@pytest.mark.slow
@linux
def test_workers_end_when_idle_or_forgotten(
    make_source: Callable[..., PdfSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pdf_pool, "IDLE_SECONDS", 0.2)
    source = make_source({"a.pdf": paragraph("A text.")})
    assert len(all_of(source)) == 1
    until(lambda: not source._pool.workers())
    monkeypatch.setattr(pdf_pool, "IDLE_SECONDS", 60.0)
    (tmp_path / "pdfs" / "a.pdf").write_bytes(paragraph("Another text."))
    forgotten = PdfSource(PdfSettings(), tmp_path, 1)
    assert len(all_of(forgotten)) == 1
    pids = worker_pids(forgotten)
    del forgotten
    gc.collect()
    until(lambda: not any(alive(pid) for pid in pids))


SCRIPT = """
import os, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
from core.errors import SourceUnavailable
from core.data.sources.pdf.source import PdfSettings, PdfSource
source = PdfSource(PdfSettings(), Path(sys.argv[1]), 1)
def read():
    with suppress(SourceUnavailable):  # at the end of the program
        list(source.stream({}))
threading.Thread(target=read, daemon=True).start()
while not [w for w in source._pool.workers() if w.process is not None
           and Path(f"/proc/{w.process.pid}/task/{w.process.pid}/children").read_text()]:
    time.sleep(0.01)
pid = source._pool.workers()[0].process.pid
print(pid, Path(f"/proc/{pid}/task/{pid}/children").read_text(), flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("how", ["ended", "killed"])
def test_workers_die_with_the_program(tmp_path: Path, how: str) -> None:
    """In the middle of a file that never ends, too; and an end is quick and silent."""
    (tmp_path / "pdfs").mkdir()
    (tmp_path / "pdfs" / "a.pdf").write_bytes(pdfs.endless_forms())
    run = [sys.executable, "-X", "dev", "-c", SCRIPT, str(tmp_path), how]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, capture_output=True, text=True, timeout=30, env=env)
    assert done.returncode == (0 if how == "ended" else -signal.SIGKILL) and done.stderr == ""
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(alive(pid) for pid in pids), 3)


def test_without_pymupdf_the_package_is_named(
    make_source: Callable[..., PdfSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pymupdf.py").write_text("raise ModuleNotFoundError('No module named pymupdf')")
    (tmp_path / "core").symlink_to(ROOT / "core")
    monkeypatch.setattr(pdf_pool, "ROOT", tmp_path)
    with pytest.raises(SourceUnavailable, match="pip install pymupdf"):
        make_source({"a.pdf": paragraph("A text.")}).open()


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
