"""One odd row, page or value costs itself: stray quotation marks, too many fields, long numbers,
markup without an end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from core.data.sources.webpage import page_text
from tests.data.odd import in_order, opened, texts, write_parquet
from tests.data.pdfs import column, pdf_of_lines

GOOD = [f"{i},row {i}" for i in range(1, 2000)]


@pytest.mark.parametrize(
    "lines, expected, notes",
    [
        (
            ["text", "A sentence, with a comma", "another; one"],
            ["A sentence, with a comma", "another; one"],
            [],
        ),
        (
            ["id,text", "0,This is, and so on", "1,whole,", "2,whole"],
            ["whole", "whole"],
            ["skipped 1 row: more fields than columns (the first: a.csv#0)"],
        ),
        (
            ["id,text", r'0,"he said \"hi\", then left"', '1,"a ""b"", c"', r'2,"x\", y"', "3,c"],
            ['a "b", c', "c"],
            [
                "skipped 1 row: a quotation mark out of place (the first: a.csv#0)",
                "skipped 1 row: more fields than columns (the first: a.csv#2)",
            ],
        ),
        (
            ["id,text", '0,"a stray quote begins...', *GOOD],
            [line.partition(",")[2] for line in GOOD],
            ["skipped 1 row: a quotation mark out of place (the first: a.csv#0)"],
        ),
        (
            ["id,text", '0,"a stray quote begins...', *GOOD, '2000,a disk of 5"', '2001,"whole"'],
            [line.partition(",")[2] for line in GOOD] + ['a disk of 5"', "whole"],
            ["skipped 1 row: a quotation mark out of place (the first: a.csv#0)"],
        ),
        (
            ["id,text", '0,"good" or not', '1,"of two', 'lines, ""really"""', "2,c"],
            ['of two\nlines, "really"', "c"],
            ["skipped 1 row: a quotation mark out of place (the first: a.csv#0)"],
        ),
        (["id, text", "0,a �", '1,"b" '], ["a �", "b"], []),
    ],
    ids=[
        "one column",
        "too many",
        "backslashes",
        "stray",
        "two strays",
        "garbage behind",
        "blanks and a real U+FFFD",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_is_odd_in_csv_costs_its_row(
    tmp_path: Path, lines: list[str], expected: list[str], notes: list[str], end: str
) -> None:
    """Whatever ends a line, on an old Mac too; every row is either a document or counted."""
    (tmp_path / "a.csv").write_bytes((end.join(lines) + end).encode())
    source = opened("a.csv", tmp_path)
    assert texts(source) == expected and source.notes == notes


def test_stray_quotation_marks_cost_no_more_than_their_rows(tmp_path: Path) -> None:
    """In every row, or where each row seems to go on in the next: the work grows with the file
    alone."""
    for name, line in (("a", '{},"stray'), ("b", 'x",y,"{}'), ("c", '{},"""stray""')):
        (tmp_path / f"{name}.tsv").write_text(
            "id\ttext\n" + "".join(line.format(i).replace(",", "\t") + "\n" for i in range(20_000))
        )
    (tmp_path / "z.tsv").write_text("id\ttext\n1\tgood\n")
    begin = time.process_time()
    source = opened(".", tmp_path)
    assert texts(source)[-1:] == ["good"] and time.process_time() - begin < 20


def test_long_values_of_a_dictionary_are_measured_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the column, and of a column inside it: as pandas writes categories."""
    import pyarrow as pa

    monkeypatch.setattr("core.data.sources.decode.RECORD_BYTES", 1000)
    values = [f"{i} " + "w" * 400 for i in range(5)] + ["long " * 300]
    column_of_six = pa.array(values * 2 + [None]).dictionary_encode()
    write_parquet(tmp_path / "a.parquet", pa.table({"text": column_of_six}))
    source = opened("a.parquet", tmp_path)
    assert texts(source) == values[:5] * 2
    assert source.notes == [
        "skipped 2 rows: longer than 0 MB (the first: a.parquet#5)",
        'skipped 1 row: "text" is missing or null (the first: a.parquet#12)',
    ]


def test_all_lists_of_rows_in_an_object_are_read(tmp_path: Path) -> None:
    parts = {
        "meta": [{"x": 1}],
        "train": [{"text": f"a {i}"} for i in range(5)],
        "test": [{"text": f"b {i}"} for i in range(6)],
    }
    (tmp_path / "a.json").write_text(json.dumps(parts))
    source = opened("a.json", tmp_path)
    assert (
        texts(source) == [row["text"] for key in ("train", "test") for row in parts[key]]
        and source.notes == []
    )


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_number_of_any_length_costs_no_other_row(tmp_path: Path, kind: str) -> None:
    rows = [
        '{"text": "one"}',
        '{"n": %s, "text": "two"}' % ("9" * 5000),
        '{"text": %s}' % ("9" * 5000),
        '{"text": "three"}',
    ]
    (tmp_path / f"a.{kind}").write_text(
        "[" + ",\n".join(rows) + "]" if kind == "json" else "\n".join(rows)
    )
    source = opened(f"a.{kind}", tmp_path)
    assert texts(source) == ["one", "two", "three"]
    assert source.notes == [
        f'skipped 1 row: "text" is a number, a date or the like, no text (the first: a.{kind}#2)'
    ]


def test_a_replacement_character_that_is_written_is_text(tmp_path: Path) -> None:
    """In any encoding; what is no text in that encoding is counted."""
    (tmp_path / "a.txt").write_text("a real � of three ���\n")
    (tmp_path / "b.txt").write_bytes(
        "\ufeffa real � and ".encode("utf-16-le") + b"\x00\xd8" + " half\n".encode("utf-16-le")
    )
    source = opened(".", tmp_path)
    assert texts(source) == ["a real � of three ���\n", "a real � and � half\n"]
    assert source.notes == ["1 replacement character, for bytes that are no text, in 1 file: b.txt"]


def test_files_without_text_are_named(tmp_path: Path) -> None:
    for name, data in (
        ("a.txt", "good"),
        ("b.txt", ""),
        ("c.json", "[]"),
        ("d.csv", "id,text\n"),
        ("e.jsonl", "\n"),
    ):
        (tmp_path / name).write_text(data)
    (tmp_path / "f.html").write_text("<script>let a = '<p>no</p>'</script>")
    source = opened(".", tmp_path)
    assert texts(source) == ["good"]
    (note,) = source.notes
    what, _, names = note.partition(": ")
    assert what == "skipped 5 files without text" and sorted(names.split(", ")) == [
        "b.txt",
        "c.json",
        "d.csv",
        "e.jsonl",
        "f.html",
    ]


@pytest.mark.parametrize(
    "page, text",
    [
        ("<p>a<object data=x>b<p>c", "ab\n\nc\n"),
        ("<p>a<svg>b<p>c<svg>hidden</svg>d", "ab\n\ncd\n"),
        ("<p>a<svg><object>no</svg>b</object>c", "abc\n"),
        ("<p>a<!-- b<p>c", "a b\n\nc\n"),
        ("<p>a<template>no</template>b<noscript>no</noscript><script>no<p>no", "ab\n"),
        ("<p title=it's>1 < 2 <a href='x>y'>and</a> don&#39;t</p>", "1 < 2 and don't\n"),
    ],
)
def test_what_is_not_closed_hides_nothing(page: str, text: str) -> None:
    assert page_text(page.encode()).text == text


BLANKS = 100_000


@pytest.mark.parametrize(
    "page",
    [
        "<pre>x" + " " * BLANKS + "y",
        "<td></td>" * BLANKS + "x",
        "<a " * BLANKS,
        "<!--" * BLANKS,
        "<!--" * BLANKS + ">",
        '<a b="' * 50_000,
        '<a ">"' * 50_000,
        "<svg>" * 50_000 + "</object>" * 50_000,
        "<script>" * BLANKS,
        "<a " + "= " * BLANKS,
    ],
    ids=[
        "blanks",
        "cells",
        "tags",
        "comments",
        "comments that may end",
        "quotes",
        "brackets",
        "svg",
        "script",
        "equals",
    ],
)
def test_a_page_takes_time_as_it_is_long(page: str) -> None:
    begin = time.process_time()
    page_text(page.encode())
    assert time.process_time() - begin < 5


def test_a_pdf_that_is_cut_or_damaged_inside_is_told(tmp_path: Path) -> None:
    from core.data.sources import build_source
    from core.data.sources.pdf.source import PdfSettings

    pymupdf = pytest.importorskip("pymupdf")
    pages = [
        column(f"page {i} " + "words of a text that goes on " * 30, 50, 60, 80) for i in range(10)
    ]
    with pymupdf.open(stream=pdf_of_lines(pages)) as document:
        good = document.tobytes(garbage=3, deflate=True)
    (tmp_path / "pdfs").mkdir()
    third, harmed = len(good) // 3, bytearray(good)
    harmed[third : third + 100] = bytes(byte ^ 0x55 for byte in good[third : third + 100])
    for name, data in (
        ("cut", good[: len(good) * 7 // 10]),
        ("good", good),
        ("harmed", bytes(harmed)),
    ):
        (tmp_path / "pdfs" / f"{name}.pdf").write_bytes(data)
    told = "used 2 files up to the damage, as far as that could be repaired: "
    for _ in ("read", "out of the cache"):
        source: Any = build_source(PdfSettings(path="pdfs", name="s"), tmp_path, 1)
        source.open()
        found = "".join(document.text for document in in_order(source))
        assert 10 < sum(found.count(f"page {i} ") for i in range(10)) < 30
        (note,) = source.notes
        assert note.startswith(told) and "cut.pdf" in note and "harmed.pdf" in note
