"""`python docs/make_pdf.py`: writes pdfs/primer.pdf, the PDF that the project comes with, from
docs/primer.md.

In:    the primer: headings and paragraphs
Out:   an A4 PDF with bookmarks and page numbers
State: none; the same text and PyMuPDF give the same bytes. tests/test_docs.py fails when the PDF's
       text is not the primer's."""

import html
import io
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXT_PATH, PDF_PATH = ROOT / "docs" / "primer.md", ROOT / "pdfs" / "primer.pdf"
MARGIN = 72
CSS = """
body { font-family: serif; font-size: 11px; line-height: 1.4; }
h1 { font-size: 20px; } h2 { font-size: 14px; margin-top: 16px; }
p { margin-top: 6px; margin-bottom: 6px; }
code { font-family: monospace; font-size: 10px; }
"""


def to_html(text: str) -> str:
    """Convert headings, paragraphs and `code`: all the Markdown that the primer uses."""
    out = []
    for block in text.strip().split("\n\n"):
        marks, _, heading = block.partition(" ")
        is_heading = set(marks) == {"#"}
        tag, words = (f"h{len(marks)}", heading) if is_heading else ("p", " ".join(block.split()))
        parts = html.escape(words, quote=False).split("`")
        parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
        out.append(f"<{tag}>{''.join(parts)}</{tag}>")
    return "\n".join(out)


def make_pdf(text: str) -> bytes:
    """Lay the text out on A4 pages; return the PDF's bytes."""
    import pymupdf

    paper = pymupdf.paper_rect("a4")
    body = pymupdf.Rect(MARGIN, MARGIN, paper.width - MARGIN, paper.height - MARGIN)
    story = pymupdf.Story(to_html(text), user_css=CSS)
    file, bookmarks = io.BytesIO(), []

    def note_heading(position: Any) -> None:
        if position.open_close & 1 and position.heading:
            title = " ".join(position.text.split())
            bookmarks.append([position.heading, title, position.page_number])

    writer, more, number = pymupdf.DocumentWriter(file), True, 0
    while more:
        number += 1
        device = writer.begin_page(paper)
        more, _ = story.place(body)
        story.element_positions(note_heading, {"page_number": number})
        story.draw(device)
        writer.end_page()
    writer.close()
    with pymupdf.open("pdf", file.getvalue()) as document:
        for page in document:
            foot = (paper.width / 2 - 5, paper.height - MARGIN / 2)
            page.insert_text(foot, str(page.number + 1), fontsize=8)
        document.set_metadata({"title": text.partition("\n")[0].lstrip("# ")})
        document.set_toc(bookmarks)
        document.subset_fonts()
        return document.tobytes(garbage=3, deflate=True, use_objstms=1, no_new_id=True)


def main() -> None:
    data = make_pdf(TEXT_PATH.read_text(encoding="utf-8"))
    PDF_PATH.write_bytes(data)
    print(f"written: {PDF_PATH.relative_to(ROOT)}, {len(data):,} bytes")


if __name__ == "__main__":
    main()
