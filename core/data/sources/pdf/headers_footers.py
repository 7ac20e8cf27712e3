"""Headers, footers and page numbers: found because they come back, and dropped. Body text that
comes back is not.

In:    the pages of a document
Out:   the same pages without them
State: none

A line goes when it stands at the very edge of its page, apart from the text, and either is a page
number or was seen at the same height of pages close by, with the same words and with numbers that
stay or count the pages. At that height nothing else may stand on the other pages: a refrain stands
where other pages have other text."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from core.data.sources.pdf.boxes import Box, Page, rows

EDGE = 0.12
"""The share of a page's height, at its top and at its bottom, in which headers and footers
stand."""

MAX_ROWS = 3
"""Rows of a header or footer."""

PAGES = 3
WITHIN = 4
"""So many pages with the same line, the last of them at most so many after the first: every second
page is enough."""

SHARE = 0.7
"""Of the pages with something at that height, how many must have a line that comes back."""

GAP = 0.5
"""Line heights between a header and the text: more than between lines of one text."""

_PAGE_NUMBER = re.compile(
    r"(?i)[-–—|\s]*((page|p\.|seite|s\.)\s*)?(\d{1,4}|[ivxlc]{1,7})(\s*(/|of|von)\s*\d{1,4})?[-–—|\s]*"
)
_NUMBER = re.compile(r"\d+")
_LETTER = re.compile(r"[^\W\d_]")


class _Line(NamedTuple):
    page: int
    at: tuple[int, int]  # (0 top or 1 bottom, height in steps of a few points)
    words: str  # digits normalised
    numbers: tuple[int, ...]


def remove_headers_footers(pages: Sequence[Page]) -> list[Page]:
    edges = [(_rows_at(page, top=True), _rows_at(page, top=False)) for page in pages]
    repeated = _repeated(pages, edges)
    apart: set[tuple[int, str]] = (
        set()
    )  # (side, words) of what stood apart somewhere: it goes where the text comes close to it, too
    gone: set[int] = set()
    for again in (False, True):
        for number, (page, both) in enumerate(zip(pages, edges)):
            for side, found in enumerate(both):
                peeled = _peeled(page, number, side, found, repeated, apart if again else set())
                gone |= {id(box) for box in peeled}
                apart |= {(side, _line(box, page, number, side).words) for box in peeled}
    out = [
        Page(page.height, [[box for box in group if id(box) not in gone] for group in page.groups])
        for page in pages
    ]
    return [Page(page.height, [group for group in page.groups if group]) for page in out]


def _rows_at(page: Page, top: bool) -> list[list[Box]]:
    """The outermost rows of a page, from its edge inwards, and the one that follows them."""
    boxes = [box for group in page.groups for box in group if box.text.strip()]
    zone = [b for b in boxes if _inside(b, page, top)]
    others = [b for b in boxes if not _inside(b, page, top)]
    found = [[zone[i] for i in row] for row in rows(zone)]
    if not top:
        found.reverse()
    if others:  # what a header must stand apart from
        found.append([min(others, key=lambda b: b.y0) if top else max(others, key=lambda b: b.y1)])
    return found[: MAX_ROWS + 1]


def _inside(box: Box, page: Page, top: bool) -> bool:
    middle = (box.y0 + box.y1) / 2
    return middle < EDGE * page.height if top else middle > (1 - EDGE) * page.height


def _line(box: Box, page: Page, number: int, side: int) -> _Line:
    middle = (box.y0 + box.y1) / 2
    height = round((middle if side == 0 else page.height - middle) / 4)
    words = " ".join(_NUMBER.sub("#", box.text).split())
    return _Line(
        number, (side, height), words, tuple(int(n[:9]) for n in _NUMBER.findall(box.text))
    )


def _repeated(
    pages: Sequence[Page], edges: list[tuple[list[list[Box]], list[list[Box]]]]
) -> set[tuple[int, int, str]]:
    """(page, side, words) of the lines that come back at their height."""
    lines = [
        _line(box, pages[number], number, side)
        for number, both in enumerate(edges)
        for side, found in enumerate(both)
        for row in found
        for box in row
        if _inside(box, pages[number], side == 0)
    ]
    places: dict[tuple, list[_Line]] = defaultdict(list)
    at_height: dict[tuple[int, int], set[int]] = defaultdict(set)
    for line in lines:
        at_height[line.at].add(line.page)
        if _LETTER.search(line.words) or _is_number(line.words):
            # a line on the border of two steps belongs to both
            for step in {line.at[1] // 2, (line.at[1] + 1) // 2}:
                places[line.at[0], step, line.words].append(line)
    back: dict[tuple[int, int], set[int]] = defaultdict(set)
    found: list[_Line] = []
    # where headers were found to stand, two are enough: a chapter may be short
    for least in (PAGES, 2):
        known = set(back)
        for same in places.values():
            for i in range(len(same) - least + 1):
                run = same[i : i + least]
                close = run[-1].page - run[0].page <= WITHIN and all(map(_agree, run, run[1:]))
                if close and (least == PAGES or all(line.at in known for line in run)):
                    found += run
                    for line in run:
                        back[line.at].add(line.page)
    return {
        (line.page, line.at[0], line.words)
        for line in found
        if len(back[line.at]) >= SHARE * len(at_height[line.at])
    }


def _agree(a: _Line, b: _Line) -> bool:
    """Whether two lines of the same words differ only as headers do: numbers stay, or go on by one
    per page."""
    return b.page > a.page and all(
        y == x or y - x == b.page - a.page for x, y in zip(a.numbers, b.numbers)
    )


def _is_number(text: str) -> bool:
    return _PAGE_NUMBER.fullmatch(text.replace("#", "1")) is not None


def _peeled(
    page: Page,
    number: int,
    side: int,
    found: list[list[Box]],
    repeated: set[tuple[int, int, str]],
    known: set[tuple[int, str]],
) -> list[Box]:
    """The boxes that go, from the edge inwards as far as all of a row does."""
    gone: list[list[Box]] = []
    for row in found[:MAX_ROWS]:
        words = [_line(box, page, number, side).words for box in row]
        if not all(_inside(box, page, side == 0) for box in row):
            break
        if not all(
            (number, side, own) in repeated or (len(row) == 1 and _is_number(own)) for own in words
        ):
            break
        gone.append(row)
    while gone and len(gone) < len(found):  # the innermost must stand apart from what stays
        last, rest = gone[-1], found[len(gone)]
        gap = (
            min(b.y0 for b in rest) - max(b.y1 for b in last)
            if side == 0
            else min(b.y0 for b in last) - max(b.y1 for b in rest)
        )
        if gap >= GAP * min(b.y1 - b.y0 for b in last):
            break
        if all((side, _line(box, page, number, side).words) in known for box in last):
            break
        gone.pop()
    return [box for row in gone for box in row]
