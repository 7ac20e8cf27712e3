"""PDF files of a folder: the text of their pages as paragraphs, cut at sentence ends.

In:    a folder (looked through to any depth), read with PyMuPDF (AGPL)
Out:   documents of 3000 to 5000 characters; damaged, encrypted and scanned files are skipped and named
State: none of its own (files.py); a file's text is held only while that file is being read
"""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from core.data.documents import Document, split_text
from core.data.sources.files import Damaged, FileSource, Unit, need
from core.errors import SourceUnavailable
from core.preset import Settings

LOW, HIGH = 3000, 5000
"""Characters of a document."""

CHECKED_AT_OPEN = 200
CHECK_SECONDS = 4.0
"""Files looked into before training starts, and for how long; the others are when their turn comes."""

SCANNED = "textless (scanned?)"

_MUPDF = threading.Lock()  # MuPDF is not thread-safe, and sources are opened side by side


class PdfSettings(Settings):
    type: Literal["pdf"] = "pdf"
    """PDF files of a folder."""
    path: str = "./pdfs"
    """The folder, relative to the project; looked through to any depth."""
    name: str = "pdf"
    """Name in logs and weights."""


class PdfSource(FileSource):
    """The PDF files under a folder."""

    def __init__(self, settings: PdfSettings, root: Path, seed: int):
        super().__init__(settings.name, seed)
        self._folder = root / Path(settings.path).expanduser()

    def list_units(self) -> list[Unit]:
        if self._folder.is_file():
            return [Unit(self._folder, self._folder.name)]
        paths = [p for p in self._folder.rglob("*") if p.suffix.lower() == ".pdf" and p.is_file()]
        if not paths:
            state = "holds no PDF" if self._folder.is_dir() else "does not exist"
            raise SourceUnavailable(f"the folder {self._folder} {state}; put PDF files there")
        units = [Unit(path, path.relative_to(self._folder).as_posix()) for path in paths]
        return sorted(units, key=lambda unit: unit.label)

    def open(self) -> None:
        super().open()
        end = time.monotonic() + CHECK_SECONDS
        for unit in (self._units or [])[:CHECKED_AT_OPEN]:
            if time.monotonic() > end:
                break
            try:
                with _MUPDF, self._document(unit) as document:
                    next(text_blocks(document))
            except StopIteration:
                self.skip(unit, SCANNED)
            except Damaged as error:
                self.skip(unit, error.kind)
            except OSError:
                self.skip(unit, "unreadable")

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        with _MUPDF, self._document(unit) as document:
            text = extract_text(document)
        if not text:
            raise Damaged(SCANNED)
        for index, piece in enumerate(split_text(text, LOW, HIGH)):
            if index >= start:
                yield index + 1, Document(piece, f"{unit.key}#{index}")

    def _document(self, unit: Unit) -> Any:
        """The open PDF. Raises Damaged; OSError where the file cannot be read."""
        pymupdf = need("pymupdf", "pymupdf")
        pymupdf.TOOLS.mupdf_display_errors(False)  # its complaints about a file are ours to tell, once, in the notes
        pymupdf.TOOLS.mupdf_display_warnings(False)
        with unit.path.open("rb"):  # tells a file that may not be read from one that is broken
            pass
        try:
            document = pymupdf.open(unit.path, filetype="pdf")
        except RuntimeError:  # FileDataError, EmptyFileError and MuPDF's own errors
            raise Damaged("damaged") from None
        if document.needs_pass:
            document.close()
            raise Damaged("encrypted")
        if document.page_count == 0:
            document.close()
            raise Damaged("damaged")
        return document


def extract_text(document: Any) -> str:
    """The text of an open PDF as paragraphs with an empty line between them. The same file gives the same text."""
    paragraphs: list[str] = []
    for block in text_blocks(document):
        if paragraphs and _goes_on(paragraphs[-1], block):
            paragraphs[-1] = _joined(paragraphs[-1], block)
        else:
            paragraphs.append(block)
    return "\n\n".join(paragraphs)


def text_blocks(document: Any) -> Iterator[str]:
    """The cleaned text blocks of all pages, without page numbers. Raises Damaged when no page can be read."""
    failed = 0
    for number in range(document.page_count):
        try:
            blocks = document[number].get_text("blocks", flags=_FLAGS)
        except RuntimeError:  # one broken page does not cost the rest of the file
            failed += 1
            continue
        for *_, text, _number, kind in blocks:
            if kind == _TEXT and (clean := clean_block(text)) and not _PAGE_NUMBER.fullmatch(clean):
                yield clean
    if failed == document.page_count:
        raise Damaged("damaged")


_TEXT = 0  # the kind of a block; 1 is an image
_FLAGS = 2 | 64  # TEXT_PRESERVE_WHITESPACE | TEXT_MEDIABOX_CLIP: no images, and ligatures as letters
_PAGE_NUMBER = re.compile(r"(?i)[-–—\s]*(page\s+)?\d{1,4}(\s*(/|of)\s*\d{1,4})?[-–—\s]*")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_BREAK_BELOW = 0.6
"""A line shorter than this share of its block's longest was ended on purpose (list, verse, heading): its break stays."""


def clean_block(text: str) -> str:
    """One block of a page as a paragraph: words cut at line ends joined, lines run together where the page broke them.

    >>> clean_block("The quick brown fox is jum-\\nping over a very lazy dog that\\nsleeps.\\n")
    'The quick brown fox is jumping over a very lazy dog that sleeps.'
    """
    lines = [" ".join(line.split()) for line in _UNPRINTABLE.sub("", text).split("\n")]
    lines = [line for line in lines if line]
    longest = max(map(len, lines), default=0)
    out, kept_break = "", True
    for line in lines:
        out = f"{out}\n{line}" if out and kept_break and not _word_is_cut(out, line) else _joined(out, line)
        kept_break = len(line) < _BREAK_BELOW * longest
    return out


def _word_is_cut(before: str, after: str) -> bool:
    """Whether a hyphen at a line's end only cuts a word there."""
    return before.endswith("\xad") or (before[-1:] in ("-", "\u2010") and before[-2:-1].isalpha() and after[:1].islower())


def _joined(before: str, after: str) -> str:
    """Two lines run together; a word that was cut becomes one again."""
    return before[:-1] + after if _word_is_cut(before, after) else f"{before} {after}".lstrip()


def _goes_on(before: str, after: str) -> bool:
    """Whether a paragraph was cut by a page or column end."""
    return after[:1].islower() and (before[-1].isalnum() or before[-1] in ",;-\u2010\xad")
