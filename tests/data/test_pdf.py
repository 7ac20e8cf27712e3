"""PDF files: each is read rightly or named with its reason."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.data.documents import Document
from core.data.sources import open_sources
from core.data.sources.pdf.messages import (
    DAMAGED,
    EMPTY,
    ENCRYPTED,
    PAGELESS,
    SCANNED,
)
from core.data.sources.pdf.source import PdfSettings, PdfSource
from core.errors import SourceUnavailable
from tests.data import pdfs
from tests.data.pdf_source import all_of, good_pdf, paragraph, skipped, words, worker_pids


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
    files, texts, expected = two_hundred_files()
    assert len(files) == 200

    monkeypatch.setattr("core.data.sources.pdf.source.CHECK_SECONDS", 2.0)
    source = make_source(files, seconds=4, memory=100 << 20, workers=2)
    begin = time.monotonic()
    source.open()
    assert time.monotonic() - begin < 9
    documents = all_of(source)
    assert time.monotonic() - begin < 60
    first = time.monotonic() - begin
    check_the_two_hundred(source, documents, files, texts, expected)

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


def two_hundred_files() -> tuple[dict[str, bytes], dict[str, str], dict[str, str]]:
    """(content, text of the good ones, kind of the others where it is known) by file name."""
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
    return files, texts, expected


def check_the_two_hundred(
    source: PdfSource,
    documents: list[Document],
    files: dict[str, bytes],
    texts: dict[str, str],
    expected: dict[str, str],
) -> None:
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
    assert any(
        note.startswith("skipped 10 damaged") or "encrypted files: lock" in note
        for note in source.notes
    )
