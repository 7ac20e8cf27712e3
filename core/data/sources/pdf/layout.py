"""Put the boxes of text on a document's pages together as paragraphs, in reading order.

In:    pages of boxes (x0, y0, x1, y1, text), y growing downwards; a box is one line, in the groups
       that the PDF holds
Out:   text: headers, footers and page numbers dropped, columns one after the other, cut words and
       paragraphs joined
State: none; nothing here knows of PyMuPDF, and the same boxes give the same text

    pages ─► remove_headers_footers ─► blocks ─► reading_order ─► clean_block ─► joined paragraphs
       headers_footers.py └─ a recursive XY-cut over blocks; notes below a page's text come after
                            it
"""

import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from core.data.sources.pdf.boxes import Box, Page, line_height, rows, spans
from core.data.sources.pdf.headers_footers import remove_headers_footers

CELL_GAP = 2.0
"""Gap, in line heights, from which two pieces of one row are cells of a table; justified text has
narrower gaps."""

GUTTER = 0.6
"""Smallest gap between two columns, in line heights: several spaces wide, narrower than any printed
gutter."""

PROSE_LINE = 20
"""Mean characters of a line from which text side by side is columns; below, it is a table."""

NOTE_SIZE = 0.9
"""Lines below a page's text are footnotes if they are smaller than this share of its lines."""

MAX_BLOCKS = 2000
"""Most blocks of a page that are put in order: with more, it is a drawing, not a page of text."""

FULL_PARAGRAPH = 100
"""Characters from which a block that ends in mid-sentence at a column's end is no heading or
caption."""


class Flow(NamedTuple):
    """A block in reading order."""

    text: str
    turns: bool  # it begins a column or page
    note: bool  # a footnote


def document_text(pages: Sequence[Page]) -> str:
    """Return the text of a document, with an empty line between paragraphs."""
    pages = remove_headers_footers(pages)
    compounds = _compounds(box.text for page in pages for group in page.groups for box in group)
    flow = [piece for page in pages for piece in page_flow(page, compounds)]
    return "\n\n".join(join_paragraphs(flow, compounds))


def page_flow(page: Page, compounds: frozenset[str] = frozenset()) -> list[Flow]:
    """Return the blocks of one page in reading order, its footnotes last."""
    blocks = [block for group in page.groups for block in split_group(group)]
    if len(blocks) > MAX_BLOCKS:
        ordered, notes = blocks, list[Box]()
    else:
        body, notes = _notes_apart(blocks)
        ordered, notes = reading_order(body), reading_order(notes)
    out: list[Flow] = []
    above = float("inf")
    for block, note in [*((b, False) for b in ordered), *((b, True) for b in notes)]:
        if text := clean_block(block.text, compounds):
            out.append(Flow(text, block.y0 < above and not note, note))
            above = block.y0
    return out


def split_group(lines: Sequence[Box]) -> list[Box]:
    """Return the lines of one group as blocks: one block, or one per column where a PDF was written
    line by line across its columns."""
    lines = [line for line in lines if line.text.strip()]
    if not lines:
        return []
    columns = _columns(lines)
    if (
        len(columns) > 1
        and all(len(c) >= 3 and _mean_length(c) >= PROSE_LINE for c in columns)
        and _side_by_side(columns)
    ):
        return [_block(column) for column in columns]
    return [_block(lines)]


def reading_order(blocks: Sequence[Box]) -> list[Box]:
    """Return blocks in reading order by a recursive XY-cut: bands from top to bottom, and columns
    from the left inside each band.

    Neighbouring bands that share a gutter are joined, so that paragraphs that happen to end at the
    same height do not cut columns apart."""
    if len(blocks) < 2:
        return list(blocks)
    bands = [
        [blocks[i] for i in indices] for indices in spans([_core(block) for block in blocks], 0.0)
    ]
    out: list[Box] = []
    for band in _merged(bands):
        columns = _columns(band)
        if len(columns) == 1 or (len(columns) > 1 and _is_table(columns)):
            out += [band[i] for row in rows(band) for i in row]
        else:
            for column in columns:
                out += reading_order(column)
    return out


def join_paragraphs(flow: Sequence[Flow], compounds: frozenset[str] = frozenset()) -> list[str]:
    """Return the paragraphs. A paragraph that was cut by the end of a page or column is joined
    again, even with notes between its parts."""
    out: list[str] = []
    last = -1  # the last paragraph that is no note
    for text, turns, note in flow:
        if not note and last >= 0 and _goes_on(out[last], text, turns):
            out[last] = _joined(out[last], text, compounds)
            continue
        out.append(text)
        if not note:
            last = len(out) - 1
    return out


# blocks -------------------------------------------------------------------------------------------


def _block(lines: Sequence[Box]) -> Box:
    """Join lines in one box of text: pieces of a row with a space between them, cells of a table
    with a tab."""
    texts = []
    for row in rows(lines):
        text, end = "", 0.0
        for line in (lines[i] for i in row):
            is_cell = line.x0 - end > CELL_GAP * (line.y1 - line.y0)
            separator = "" if not text else "\t" if is_cell else " "
            text = f"{text}{separator}{line.text.strip()}"
            end = line.x1
        texts.append(text)
    return Box(
        min(b.x0 for b in lines),
        min(b.y0 for b in lines),
        max(b.x1 for b in lines),
        max(b.y1 for b in lines),
        "\n".join(texts),
    )


def _core(block: Box) -> tuple[float, float]:
    """Return a block's top and bottom without the room for accents and descenders, in which
    separate lines overlap."""
    edge = 0.15 * line_height(block)
    return block.y0 + edge, block.y1 - edge


def _columns(blocks: Sequence[Box]) -> list[list[Box]]:
    gutter = GUTTER * median(line_height(block) for block in blocks)
    return [
        [blocks[i] for i in indices] for indices in spans([(b.x0, b.x1) for b in blocks], gutter)
    ]


def _mean_length(blocks: Sequence[Box]) -> float:
    lines = [line for block in blocks for line in block.text.split("\n")]
    return sum(map(len, lines)) / len(lines)


def _side_by_side(columns: list[list[Box]]) -> bool:
    """Return whether columns stand next to each other, and not one below the other."""
    top = max(min(b.y0 for b in column) for column in columns)
    return top < min(max(b.y1 for b in column) for column in columns)


def _is_table(columns: list[list[Box]]) -> bool:
    """Return whether blocks side by side are a table: at least one column consists of short single
    lines, each beside something."""
    for index, column in enumerate(columns):
        others = [b for i, c in enumerate(columns) if i != index for b in c]
        if len(column) > 1 and all("\n" not in b.text and len(b.text) < PROSE_LINE for b in column):
            beside = [b for b in column if any(o.y0 < (b.y0 + b.y1) / 2 < o.y1 for o in others)]
            if len(beside) >= 0.7 * len(column):
                return True
    return False


def _merged(bands: list[list[Box]]) -> list[list[Box]]:
    """Join bands where the same gutter runs through all of them."""
    out: list[list[Box]] = []
    for band in bands:
        if out and _share_gutter(out[-1], band):
            out[-1] = [*out[-1], *band]
        else:
            out.append(band)
    return out


def _share_gutter(above: list[Box], band: list[Box]) -> bool:
    before, here, both = _columns(above), _columns(band), _columns([*above, *band])
    most = max(len(before), len(here))
    starts_column = len(before) > 1 or sum(b.text.count("\n") + 1 for b in above) >= 3
    is_table = len(here) > 1 and _is_table(here)
    return most > 1 and len(both) >= most and starts_column and not is_table


def _notes_apart(blocks: list[Box]) -> tuple[list[Box], list[Box]]:
    """Return (body, footnotes). Footnotes are smaller than the text and have no text of full size
    below them in their column."""
    if not blocks:
        return [], []
    sizes = sorted((line_height(b), len(b.text)) for b in blocks)
    half, seen, usual = sum(n for _, n in sizes) / 2, 0, sizes[-1][0]
    for size, length in sizes:
        seen += length
        if seen >= half:
            usual = size
            break
    small = [line_height(b) < NOTE_SIZE * usual for b in blocks]
    lowest = max((b.y1 for b, s in zip(blocks, small) if not s), default=0.0)
    notes = []
    for block, is_small in zip(blocks, small):
        below = (
            o.y1 for o, s in zip(blocks, small) if not s and o.x0 < block.x1 and block.x0 < o.x1
        )
        if (
            is_small
            and block.y0 > 0.5 * lowest
            and block.y0 >= max(below, default=0.0) - 0.3 * usual
        ):
            notes.append(block)
    apart = set(map(id, notes))
    return [b for b in blocks if id(b) not in apart], notes


# text ---------------------------------------------------------------------------------------------

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_ITEM = re.compile(r"([•▪■◦‣·○●*]|\(?\d{1,3}[.)]|\(?[a-z][.)]|[-–—])\s")
_COMPOUND = re.compile(r"[^\W\d_]+(?:[-\u2010][^\W\d_]+)+")
_LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
)
_BREAK_BELOW = 0.6
"""A line shorter than this share of its block's longest line was ended on purpose (list, verse,
heading): its break stays."""


def clean_block(text: str, compounds: frozenset[str] = frozenset()) -> str:
    """Return one block of a page as a paragraph: join words that are cut at line ends, and lines
    that the page broke.

    >>> clean_block("The quick brown fox is jum-\\nping over a very lazy dog that\\nsleeps.\\n")
    'The quick brown fox is jumping over a very lazy dog that sleeps.'
    """
    cells = [
        line.split("\t") for line in _UNPRINTABLE.sub("", text).translate(_LIGATURES).split("\n")
    ]
    lines = ["\t".join(words for cell in row if (words := " ".join(cell.split()))) for row in cells]
    lines = [line for line in lines if line]
    longest = max(map(len, lines), default=0)
    items = sum(_ITEM.match(line) is not None for line in lines)
    out, kept_break = "", True
    for line in lines:
        new = kept_break or "\t" in line or (items > 1 and _ITEM.match(line) is not None)
        out = (
            f"{out}\n{line}"
            if out and new and not _word_is_cut(out, line)
            else _joined(out, line, compounds)
        )
        kept_break = len(line) < _BREAK_BELOW * longest or "\t" in line
    return out


def _compounds(lines: Iterable[str]) -> frozenset[str]:
    """Return the words that the document writes with a hyphen in mid-line: their hyphen stays at
    the end of a line."""
    return frozenset(
        word.lower().replace("\u2010", "-") for line in lines for word in _COMPOUND.findall(line)
    )


def _word_is_cut(before: str, after: str) -> bool:
    """Return whether the hyphen at a line's end only cuts a word."""
    return before.endswith("\xad") or (
        before[-1:] in ("-", "\u2010") and before[-2:-1].isalpha() and after[:1].islower()
    )


def _joined(before: str, after: str, compounds: frozenset[str]) -> str:
    """Join two lines, and the two parts of a word that was cut."""
    if not _word_is_cut(before, after):
        return f"{before} {after}".lstrip()
    if compounds and not before.endswith("\xad"):
        first, second = re.search(r"[^\W\d_]+.$", before), re.match(r"[^\W\d_]+", after)
        if first and second and f"{first[0][:-1]}-{second[0]}".lower() in compounds:
            return before + after
    return before[:-1] + after


def _goes_on(before: str, after: str, turns: bool) -> bool:
    """Return whether a paragraph was cut by the end of a page or column."""
    if "\t" in before.rsplit("\n", 1)[-1] or "\t" in after.split("\n", 1)[0] or _ITEM.match(after):
        return False
    open_end = before[-1].isalnum() or before[-1] in ",;-\u2010\xad"
    if after[:1].islower():
        return open_end
    # a name may begin the next column as well
    names = turns and after[:1].isupper() and len(after) >= FULL_PARAGRAPH // 2
    return names and open_end and len(before.rsplit("\n", 1)[-1]) >= FULL_PARAGRAPH
