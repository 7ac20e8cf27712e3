"""Boxes of text on a page, and the two groupings that the layout is made of: stretches without a
gap, and rows.

In:    plain numbers
Out:   Box, Page; groups of indices
State: none
"""

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """Text and its position; y grows downwards."""

    x0: float
    y0: float
    x1: float
    y1: float
    text: str  # lines end in "\n"


class Page(NamedTuple):
    """A page: its height, and its lines in the groups that the PDF holds."""

    height: float
    groups: list[list[Box]]


def line_height(block: Box) -> float:
    return max(0.1, (block.y1 - block.y0) / (block.text.strip("\n").count("\n") + 1))


def spans(intervals: Sequence[tuple[float, float]], gap: float) -> list[list[int]]:
    """Group intervals into stretches with more than `gap` between them. Returns the indices of each
    stretch in their given order, the lowest stretch first."""
    order = sorted(range(len(intervals)), key=lambda i: intervals[i])
    out: list[list[int]] = []
    end = 0.0
    for i in order:
        low, high = intervals[i]
        if out and low - end <= gap:
            out[-1].append(i)
            end = max(end, high)
        else:
            out.append([i])
            end = high
    return [sorted(stretch) for stretch in out]


def rows(boxes: Sequence[Box]) -> list[list[int]]:
    """Group boxes into rows: boxes whose middles are close. Returns their indices, rows from the
    top, boxes from the left."""
    order = sorted(range(len(boxes)), key=lambda i: (boxes[i].y0 + boxes[i].y1, boxes[i].x0))
    out: list[list[int]] = []
    for i in order:
        middle = (boxes[i].y0 + boxes[i].y1) / 2
        first = boxes[out[-1][0]] if out else None
        if first is not None and middle - (first.y0 + first.y1) / 2 < 0.4 * (first.y1 - first.y0):
            out[-1].append(i)
        else:
            out.append([i])
    return [sorted(row, key=lambda i: (boxes[i].x0, i)) for row in out]
