"""Good PDFs with their exact text, and a look at the processes that read them."""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.data.documents import Document
from core.data.sources.pdf.source import PdfSource
from tests.data import pdfs

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
