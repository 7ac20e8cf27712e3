"""Remove headers, footers and page numbers, which are found because they repeat. Body text that
repeats stays.

In:    the pages of a document
Out:   the same pages without headers, footers and page numbers
State: none

A line is removed when it stands at the very edge of its page, apart from the text, and either is a
page number or repeats at the same height of nearby pages, with the same words and with numbers that
stay or count the pages. At that height the other pages may have nothing else: a refrain stands
where other pages have other text."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from core.data.sources.pdf.boxes import Box, Page, rows

EDGE = 0.12
"""Share of a page's height, at its top and at its bottom, in which headers and footers stand."""

MAX_ROWS = 3
"""Most rows of a header or footer."""

PAGES = 3
WITHIN = 4
"""A line repeats on PAGES pages, the last at most WITHIN pages after the first: every second page
is enough."""

SHARE = 0.7
"""Share of the pages with something at a height that must have a repeated line there."""

GAP = 0.5
"""Line heights between a header and the text: more than between the lines of one text."""

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
    """Return the pages without headers, footers and page numbers."""
    edges = [(_rows_at(page, top=True), _rows_at(page, top=False)) for page in pages]
    repeated = _repeated(pages, edges)
    # (side, words) of what stood apart from the text on some page: the second pass removes it
    # where it comes close to the text, too
    apart: set[tuple[int, str]] = set()
    gone: set[int] = set()
    for again in (False, True):
        for number, (page, both) in enumerate(zip(pages, edges)):
            for side, outer in enumerate(both):
                removed = _removed(page, number, side, outer, repeated, apart if again else set())
                gone |= {id(box) for box in removed}
                apart |= {(side, _line(box, page, number, side).words) for box in removed}
    out = []
    for page in pages:
        groups = [[box for box in group if id(box) not in gone] for group in page.groups]
        out.append(Page(page.height, [group for group in groups if group]))
    return out


def _rows_at(page: Page, top: bool) -> list[list[Box]]:
    """Return the outermost rows of a page, from its edge inwards, and the row that follows them."""
    boxes = [box for group in page.groups for box in group if box.text.strip()]
    zone = [b for b in boxes if _inside(b, page, top)]
    others = [b for b in boxes if not _inside(b, page, top)]
    outer = [[zone[i] for i in row] for row in rows(zone)]
    if not top:
        outer.reverse()
    if others:  # the text from which a header must stand apart
        outer.append([min(others, key=lambda b: b.y0) if top else max(others, key=lambda b: b.y1)])
    return outer[: MAX_ROWS + 1]


def _inside(box: Box, page: Page, top: bool) -> bool:
    middle = (box.y0 + box.y1) / 2
    return middle < EDGE * page.height if top else middle > (1 - EDGE) * page.height


def _line(box: Box, page: Page, number: int, side: int) -> _Line:
    middle = (box.y0 + box.y1) / 2
    height = round((middle if side == 0 else page.height - middle) / 4)
    words = " ".join(_NUMBER.sub("#", box.text).split())
    numbers = tuple(int(digits[:9]) for digits in _NUMBER.findall(box.text))
    return _Line(number, (side, height), words, numbers)


def _repeated(
    pages: Sequence[Page], edges: list[tuple[list[list[Box]], list[list[Box]]]]
) -> set[tuple[int, int, str]]:
    """Return (page, side, words) of the lines that repeat at their height."""
    lines = [
        _line(box, pages[number], number, side)
        for number, both in enumerate(edges)
        for side, outer in enumerate(both)
        for row in outer
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
    # height -> pages with a repeated line there
    pages_at: dict[tuple[int, int], set[int]] = defaultdict(set)
    repeats: list[_Line] = []
    # where headers are known to stand, two pages are enough: a chapter may be short
    for least in (PAGES, 2):
        known = set(pages_at)
        for same in places.values():
            for i in range(len(same) - least + 1):
                run = same[i : i + least]
                close = run[-1].page - run[0].page <= WITHIN and all(map(_agree, run, run[1:]))
                if close and (least == PAGES or all(line.at in known for line in run)):
                    repeats += run
                    for line in run:
                        pages_at[line.at].add(line.page)
    return {
        (line.page, line.at[0], line.words)
        for line in repeats
        if len(pages_at[line.at]) >= SHARE * len(at_height[line.at])
    }


def _agree(a: _Line, b: _Line) -> bool:
    """Return whether two lines of the same words differ only as headers do: numbers stay, or count
    the pages."""
    return b.page > a.page and all(
        y == x or y - x == b.page - a.page for x, y in zip(a.numbers, b.numbers)
    )


def _is_number(text: str) -> bool:
    return _PAGE_NUMBER.fullmatch(text.replace("#", "1")) is not None


def _removed(
    page: Page,
    number: int,
    side: int,
    outer: list[list[Box]],
    repeated: set[tuple[int, int, str]],
    known: set[tuple[int, str]],
) -> list[Box]:
    """Return the boxes to remove: whole rows, from the edge inwards."""
    gone: list[list[Box]] = []
    for row in outer[:MAX_ROWS]:
        if not all(_inside(box, page, side == 0) for box in row):
            break
        texts = [_line(box, page, number, side).words for box in row]
        is_number = len(row) == 1 and _is_number(texts[0])
        if not is_number and not all((number, side, text) in repeated for text in texts):
            break
        gone.append(row)
    while gone and len(gone) < len(outer):  # the innermost must stand apart from what stays
        last, rest = gone[-1], outer[len(gone)]
        upper, lower = (last, rest) if side == 0 else (rest, last)
        gap = min(box.y0 for box in lower) - max(box.y1 for box in upper)
        if gap >= GAP * min(box.y1 - box.y0 for box in last):
            break
        if all((side, _line(box, page, number, side).words) in known for box in last):
            break
        gone.pop()
    return [box for row in gone for box in row]
