"""Layout of PDFs: plain boxes to the text a person reads, without PyMuPDF."""

import random
from collections.abc import Callable

import pytest

from core.data.sources.pdf.boxes import Box, Page, rows, spans
from core.data.sources.pdf.headers_footers import remove_headers_footers
from core.data.sources.pdf.layout import (
    clean_block,
    document_text,
    join_paragraphs,
    page_flow,
    reading_order,
)


def lines_of(text: str, x: float, y: float, width: float = 200, step: float = 12) -> list[Box]:
    """The lines of a text as boxes 10 high, one below the other."""
    return [
        Box(x, y + i * step, x + width, y + i * step + 10, line)
        for i, line in enumerate(text.split("\n"))
    ]


def block(text: str, x: float, y: float, width: float = 200, size: float = 10) -> Box:
    return Box(x, y, x + width, y + size * (text.count("\n") + 1), text)


def order_of(*blocks: Box) -> list[str]:
    return [b.text.split()[0] for b in reading_order(blocks)]


PROSE = "these are words of a line of some length\n" * 5


def test_pdf_lines_become_paragraphs() -> None:
    assert clean_block(
        "An exam-\nple of a long line that was bro-\nken by the page and goes on here\n"
    ) == ("An example of a long line that was broken by the page and goes on here")
    assert clean_block(
        "A heading\nfollowed by a much longer line of ordinary text here\nand its end."
    ) == ("A heading\nfollowed by a much longer line of ordinary text here and its end.")
    assert (
        clean_block("state of the art in the year Mid-\nNovember")
        == "state of the art in the year Mid- November"
    )
    assert clean_block("soft\xadhy\xad\nphens stay out") == "soft\xadhyphens stay out"
    assert clean_block("e\ufb03cient \ufb01sh\x00") == "efficient fish"


def test_a_hyphen_of_the_word_itself_stays() -> None:
    known = frozenset({"well-known"})
    assert (
        clean_block("this was a well-\nknown and unex-\npected thing", known)
        == "this was a well-known and unexpected thing"
    )


def test_lists_and_tables_keep_their_breaks() -> None:
    text = (
        "• the first point, which is quite long\n• the second point, as long as it is\nand "
        "goes on\n• third"
    )
    assert (
        clean_block(text)
        == "• the first point, which is quite long\n• the second point, as long as it is and goes "
        "on\n• third"
    )
    assert clean_block("a name\t12\nanother\t13") == "a name\t12\nanother\t13"


def test_stretches_and_rows() -> None:
    assert spans([(0, 10), (50, 60), (9, 20), (20, 30)], 0) == [[0, 2, 3], [1]]
    assert spans([(0, 10), (12, 20)], 3) == [[0, 1]]
    boxes = [Box(50, 0, 60, 10, "b"), Box(0, 1, 9, 11, "a"), Box(0, 12, 9, 22, "c")]
    assert rows(boxes) == [[1, 0], [2]]


@pytest.mark.parametrize("count", [2, 3])
def test_columns_are_read_one_after_the_other(count: int) -> None:
    width = 500 / count - 15
    page = [
        block("Title over all of the page", 40, 20, 500),
        block("Abstract " + PROSE, 60, 60, 460),
    ]
    expected = ["Title", "Abstract"]
    for c in range(count):
        for p in range(3):
            page.append(block(f"c{c}p{p} " + PROSE, 40 + c * 500 / count, 150 + p * 80, width))
            expected.append(f"c{c}p{p}")
    page.append(block("Footer over all of the page", 40, 700, 500))
    for seed in range(5):
        random.Random(seed).shuffle(page)
        assert order_of(*page) == [*expected, "Footer"]


def test_columns_of_unequal_height_and_a_heading_between() -> None:
    above = [
        block("l1 " + PROSE, 40, 100),
        block("r1 " + PROSE, 300, 100),
        block("r2 " + PROSE, 300, 170),
    ]
    below = [block("l3 " + PROSE, 40, 340), block("r3 " + PROSE, 300, 335)]
    heading = block("Heading that runs over both of the columns", 100, 300, 350)
    assert order_of(*below, heading, *above) == ["l1", "r1", "r2", "Heading", "l3", "r3"]


def test_tables_are_read_row_by_row() -> None:
    cells = [block(f"{r}{c}", 50 + 100 * c, 100 + 14 * r, 30) for c in range(3) for r in range(4)]
    assert order_of(*cells) == [f"{r}{c}" for r in range(4) for c in range(3)]
    date = [
        block("date at right", 400, 50, 100),
        block("address at left", 50, 90, 100),
        block("Dear " + PROSE, 50, 150, 450),
    ]
    assert order_of(*reversed(date)) == ["date", "address", "Dear"]


def test_columns_in_one_block_are_taken_apart() -> None:
    left = lines_of("\n".join(f"left line number {i} of this column" for i in range(4)), 50, 100)
    right = lines_of("\n".join(f"right line number {i} of this column" for i in range(4)), 300, 100)
    group = [line for pair in zip(left, right) for line in pair]
    flow = page_flow(Page(800, [group]))
    assert [piece.text.split()[0] for piece in flow] == ["left", "right"]
    assert flow[0].text.endswith("left line number 3 of this column")


def test_paragraphs_go_on_over_columns_pages_and_footnotes() -> None:
    def page(*texts: str) -> Page:
        groups = [lines_of(texts[0], 40, 100), lines_of(texts[1], 300, 100)]
        note = [Box(40, 700, 300, 706, f"1 a footnote of {texts[0][:5]}")]
        return Page(800, [*groups, note])

    one = page(
        "First words that go on in the next col-\numn begin here and",
        "reach over its end, to the con-",
    )
    two = page("tinued end. Next to come", "are the last words.")
    assert document_text([one, two]) == (
        "First words that go on in the next column begin here and reach over its end, to the "
        "continued end. Next to come "
        "are the last words.\n\n1 a footnote of First\n\n1 a footnote of tinue"
    )
    long = (
        "This is a line of text that is long enough to be no heading and that ends before the "
        "name of somebody who is"
    )
    after = "Smith, and he has more to say about all of that than anybody else."
    assert (
        len(
            join_paragraphs(
                [
                    *page_flow(Page(800, [lines_of(long, 40, 100)])),
                    *page_flow(Page(800, [lines_of(after, 40, 90)])),
                ]
            )
        )
        == 1
    )
    assert (
        len(
            join_paragraphs(
                page_flow(Page(800, [lines_of("A heading", 40, 100), lines_of(after, 40, 130)]))
            )
        )
        == 2
    )


def book(
    count: int,
    header: Callable[[int], str],
    footer: Callable[[int], str],
    body: Callable[[int], str],
) -> list[Page]:
    return [
        Page(
            800,
            [
                group
                for group in (
                    lines_of(header(n), 50, 30),
                    lines_of(body(n), 50, 110),
                    lines_of(footer(n), 280, 770),
                )
                if group[0].text
            ],
        )
        for n in range(1, count + 1)
    ]


def kept(pages: list[Page]) -> list[str]:
    return [
        " ".join(box.text for group in page.groups for box in group)
        for page in remove_headers_footers(pages)
    ]


def test_headers_and_footers_are_dropped() -> None:
    pages = book(
        7,
        lambda n: f"A Title {n}" if n % 2 else "An Author",
        lambda n: f"- {n} -",
        lambda n: f"body {n}\n" + PROSE,
    )
    assert kept(pages) == [" ".join(f"body {n}\n{PROSE}".split("\n")) for n in range(1, 8)]
    chapters = book(
        9,
        lambda n: f"Chapter {(n - 1) // 3 + 1}   {n + 40}",
        lambda n: "Draft of 3 May 2024",
        lambda n: f"body {n}",
    )
    assert kept(chapters) == [f"body {n}" for n in range(1, 10)]


def test_a_short_chapter_loses_its_header_too() -> None:
    titles = ["One", "One", "One", "", "Two", "Two", "", "Three", "Three", "Three"]
    pages = book(
        10,
        lambda n: f"Chapter {titles[n - 1]} {n}" if titles[n - 1] else "",
        lambda n: "",
        lambda n: f"body {n}",
    )
    assert kept(pages) == [f"body {n}" for n in range(1, 11)]


def test_two_pages_lose_only_their_numbers() -> None:
    pages = book(2, lambda n: "A Title", lambda n: f"Page {n} of 2", lambda n: f"body {n}")
    assert kept(pages) == ["A Title body 1", "A Title body 2"]


def test_body_text_that_comes_back_stays() -> None:
    """A refrain in the text, a first line that some pages share, numbers that do not count pages, a
    number in the text."""
    refrain = book(
        6,
        lambda n: "",
        lambda n: "",
        lambda n: f"verse {n}\nand a refrain, and a refrain\nverse {n} again\n42",
    )
    assert all("and a refrain" in text and text.endswith("42") for text in kept(refrain))
    top = [
        Page(
            800,
            [
                lines_of(
                    f"{'Refrain, refrain' if n in (1, 2, 3) else f'Other line {n * n}'}\nverse "
                    f"{n}\nmore",
                    50,
                    40,
                )
            ],
        )
        for n in range(1, 9)
    ]
    assert kept(top) == [" ".join(page.groups[0][i].text for i in range(3)) for page in top]
    table = book(
        5, lambda n: f"item {n * 7}", lambda n: f"{n * 3.5} {n * 11}", lambda n: f"body {n}"
    )
    assert [text.split(" body")[0] for text in kept(table)] == [
        f"item {n * 7}" for n in range(1, 6)
    ]
    assert all(str(n * 11) in text for n, text in enumerate(kept(table), 1))
