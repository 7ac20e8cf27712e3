"""`python docs/make_pdf.py`: writes pdfs/zeroarg_guide.pdf from docs/guide.md.

In:    the guide: headings, paragraphs, lists, tables, fenced code
Out:   an A4 PDF with bookmarks; tables become lists, because MuPDF's layout cuts wide ones off
State: none; the same guide and PyMuPDF give the same bytes. tests/test_docs.py fails when the PDF's
text is not the guide's."""

import html
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE_PATH, PDF_PATH = ROOT / "docs" / "guide.md", ROOT / "pdfs" / "zeroarg_guide.pdf"
MARGIN = 54
CSS = """
body { font-family: sans-serif; font-size: 10px; line-height: 1.35; }
h1 { font-size: 20px; } h2 { font-size: 15px; margin-top: 18px; } h3, h4 { font-size: 11.5px; margin-top: 12px; }
p { margin-top: 5px; margin-bottom: 5px; } li { margin-top: 2px; margin-bottom: 2px; }
code { font-family: monospace; font-size: 9px; }
pre { font-family: monospace; font-size: 7.6px; background-color: #f0f0f0; margin-top: 5px; margin-bottom: 8px; }
"""


def inline(text: str) -> str:
    """Code, bold and links of a line; a link keeps its words only."""
    out = []
    for part in re.split(r"(`[^`]+`)", text):
        if part.startswith("`") and part.endswith("`") and len(part) > 2:
            out.append(f"<code>{html.escape(part[1:-1], quote=False)}</code>")
            continue
        part = html.escape(part.replace("\\|", "|"), quote=False)
        out.append(re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", part))
    joined = re.sub(r"\[(<code>[^<]*</code>)\]\([^)]*\)", r"\1", "".join(out))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", joined)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def table(lines: list[str]) -> str:
    """A list: the first cell, then the others; in the reference, whose cells may be empty, they are
    named."""
    head, rows = cells(lines[0]), [cells(line) for line in lines[2:]]
    items = []
    for first, *others in rows:
        if head == ["Key", "Value", "Default", "Meaning"]:
            value, default, meaning = others
            said = {"": "", "needed": ", needed"}.get(default, f", default {default}")
            others = [f"{value}{said}. {meaning}"]
        items.append(
            f"<li><b>{inline(first)}</b>: "
            f"{'; '.join(inline(other) for other in others if other)}</li>"
        )
    return f"<ul>{''.join(items)}</ul>"


def to_html(guide: str) -> str:
    """The part of Markdown that the guide uses."""
    out, lines, at = [], guide.split("\n"), 0

    def take(belongs) -> list[str]:
        nonlocal at
        taken = []
        while at < len(lines) and belongs(lines[at]):
            taken.append(lines[at])
            at += 1
        return taken

    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            at += 1
            code = take(lambda text: not text.startswith("```"))
            at += 1
            out.append(f"<pre>{html.escape(chr(10).join(code), quote=False)}</pre>")
        elif heading := re.fullmatch(r"(#+) (.*)", line):
            at += 1
            level = len(heading[1])
            out.append(f"<h{level}>{inline(heading[2])}</h{level}>")
        elif line.startswith("|"):
            out.append(table(take(lambda text: text.startswith("|"))))
        elif line.startswith("- "):
            items = "\n".join(take(lambda text: text.startswith(("- ", "  "))))[2:].split("\n- ")
            out.append(
                "<ul>"
                + "".join(f"<li>{inline(' '.join(item.split()))}</li>" for item in items)
                + "</ul>"
            )
        elif not line.strip() or line.startswith("<!--"):
            at += 1
        else:
            paragraph = take(
                lambda text: text.strip() and not text.startswith(("```", "#", "|", "- ", "<!--"))
            )
            out.append(f"<p>{inline(' '.join(paragraph))}</p>")
    return "\n".join(out)


def letters(text: str) -> str:
    """Text without white space and bullets: what must be the same in the guide and in the PDF,
    wherever lines are broken."""
    return "".join(text.replace("\u2022", "").split())


def guide_letters(guide: str) -> str:
    return letters(html.unescape(re.sub(r"<[^>]+>", "", to_html(guide))))


def pdf_letters(data: bytes) -> str:
    """What can be read in the pages, without page numbers."""
    import pymupdf

    with pymupdf.open("pdf", data) as document:
        body = pymupdf.Rect(0, 0, document[0].rect.width, document[0].rect.height - MARGIN)
        return letters("".join(page.get_text(clip=body, flags=0) for page in document))


def make_pdf(guide: str) -> bytes:
    import pymupdf

    paper = pymupdf.paper_rect("a4")
    body = pymupdf.Rect(MARGIN, MARGIN, paper.width - MARGIN, paper.height - MARGIN)
    story = pymupdf.Story(to_html(guide), user_css=CSS)
    file, bookmarks = io.BytesIO(), []

    def note_heading(position) -> None:
        if position.open_close & 1 and 1 <= position.heading <= 3:
            bookmarks.append(
                [position.heading, " ".join(position.text.split()), position.page_number]
            )

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
            page.insert_text(
                (paper.width / 2 - 5, paper.height - 28), str(page.number + 1), fontsize=8
            )
        document.set_metadata({"title": "zeroarg: the user guide"})
        document.set_toc(bookmarks)
        return document.tobytes(garbage=3, deflate=True, use_objstms=1, no_new_id=True)


def main() -> None:
    PDF_PATH.parent.mkdir(exist_ok=True)
    data = make_pdf(GUIDE_PATH.read_text(encoding="utf-8"))
    PDF_PATH.write_bytes(data)
    print(f"written: {PDF_PATH.relative_to(ROOT)}, {len(data):,} bytes")


if __name__ == "__main__":
    main()
