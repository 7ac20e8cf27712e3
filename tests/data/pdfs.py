"""Makes the PDFs of the tests: good ones of every layout, broken ones, and ones that mean harm.

In:    text, or nothing
Out:   bytes of PDF files
State: none; the same call gives the same text (PyMuPDF puts a fresh id into a file)
"""

import zlib
from collections.abc import Sequence

A4 = (595.0, 842.0)
LEADING = 1.25

Line = tuple[float, float, str]  # x and baseline of a line of text


def pdf_of_lines(pages: Sequence[Sequence[Line]], size: float = 9) -> bytes:
    """Lines of Latin text at exact places: what a layout is made of. A line may begin with its own
    size: "6|a footnote"."""
    objects = [CATALOG, b"", b"", b"", FONT]
    kids = []
    for lines in pages:
        body = []
        for x, y, text in lines:
            own, bar, rest = text.partition("|")
            points, text = (own, rest) if bar and own.isdigit() else (size, text)
            shown = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
            body.append(f"BT /F {points} Tf {x:.2f} {A4[1] - y:.2f} Td ({shown}) Tj ET")
        kids.append(len(objects) + 1)
        objects += [PAGE.replace(b"4 0 R", b"%d 0 R" % (len(objects) + 2)) % FONT_5]
        objects += [stream("\n".join(body).encode("latin-1"), filters=1)]
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (
        b" ".join(b"%d 0 R" % kid for kid in kids),
        len(kids),
    )
    objects[2] = objects[3] = b"null"
    return raw_pdf(objects)


def locked(data: bytes, user: str, owner: str = "owner") -> bytes:
    """The same file encrypted; with an empty user password anybody can read it."""
    import pymupdf

    with pymupdf.open(stream=data, filetype="pdf") as document:
        return document.tobytes(
            encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw=user, owner_pw=owner
        )


def column(text: str, x: float, y: float, width: int, size: float = 9) -> list[Line]:
    """A paragraph broken into lines of at most `width` characters, from (x, y) down."""
    lines: list[str] = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [(x, y + i * size * LEADING, line) for i, line in enumerate(lines)]


def scanned_pdf(pages: int = 1) -> bytes:
    """Pages that are only an image."""
    import pymupdf

    document = pymupdf.open()
    for _ in range(pages):
        pixels = pymupdf.Pixmap(pymupdf.csRGB, (0, 0, 40, 40))
        pixels.clear_with(120)
        document.new_page().insert_image((50, 50, 300, 300), pixmap=pixels)
    return document.tobytes()


def raw_pdf(objects: Sequence[bytes], root: int = 1) -> bytes:
    """A file of these objects, the first of which is number 1: whatever a library would refuse to
    write."""
    out, offsets = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Size %d /Root %d 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        root,
        start,
    )
    return bytes(out)


def stream(data: bytes, entries: bytes = b"", filters: int = 0) -> bytes:
    """A stream object, compressed `filters` times over."""
    for _ in range(filters):
        data = zlib.compress(data, 9)
    names = b"/Filter [" + b"/FlateDecode " * filters + b"]" if filters else b""
    return b"<< /Length %d %s %s >>\nstream\n" % (len(data), names, entries) + data + b"\nendstream"


CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"
PAGES = b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"
FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
PAGE = (
    b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R /Resources << %s >> >>"
)
FONT_5 = b"/Font << /F 5 0 R >>"


def no_pages() -> bytes:
    return raw_pdf([CATALOG, b"<< /Type /Pages /Kids [] /Count 0 >>"])


def endless_forms(fan_out: int = 30, depth: int = 14) -> bytes:
    """Forms that draw forms: each calls the next `fan_out` times, so fan_out ** depth drawings,
    with no cycle to be found."""
    forms = []
    for level in range(depth):
        here, below = 6 + level, 7 + level
        resources = b"/Resources << %s /XObject << /X %d 0 R >> >>" % (
            FONT_5,
            below if level < depth - 1 else here,
        )
        body = b"/X Do " * fan_out if level < depth - 1 else b"BT /F 9 Tf 50 700 Td (x) Tj ET"
        forms.append(
            stream(body, b"/Type /XObject /Subtype /Form /BBox [0 0 595 842] " + resources)
        )
    page = PAGE % (FONT_5 + b" /XObject << /X 6 0 R >>")
    return raw_pdf([CATALOG, PAGES, page, stream(b"/X Do"), FONT, *forms])


def self_drawing_form() -> bytes:
    """A form that draws itself: MuPDF sees this one."""
    resources = b"/Resources << /XObject << /X 6 0 R >> >>"
    form = stream(b"/X Do /X Do", b"/Type /XObject /Subtype /Form /BBox [0 0 595 842] " + resources)
    return raw_pdf(
        [
            CATALOG,
            PAGES,
            PAGE % (FONT_5 + b" /XObject << /X 6 0 R >>"),
            stream(b"/X Do"),
            FONT,
            form,
        ]
    )


def page_tree_cycle() -> bytes:
    tree = b"<< /Type /Pages /Kids [2 0 R 3 0 R] /Count 2000000 /Parent 2 0 R >>"
    return raw_pdf([CATALOG, tree, PAGE % FONT_5, stream(b""), FONT])


def page_count_lie(count: int = 2_000_000_000) -> bytes:
    tree = b"<< /Type /Pages /Kids [3 0 R] /Count %d >>" % count
    return raw_pdf([CATALOG, tree, PAGE % FONT_5, stream(b""), FONT])


def bomb(operators: bytes, megabytes: int) -> bytes:
    """A page of `megabytes` of operators, compressed so often that the file is small."""
    unit = (operators * (1 + 65536 // len(operators)))[: 65536 // len(operators) * len(operators)]
    packer = zlib.compressobj(9)
    once = b"".join(packer.compress(unit) for _ in range(megabytes * 16)) + packer.flush()
    page = stream(zlib.compress(once, 9), b"/Filter [/FlateDecode /FlateDecode]")
    return raw_pdf([CATALOG, PAGES, PAGE % FONT_5, page, FONT])


def drawn_by_chain(length: int = 3000) -> bytes:
    """Forms inside forms inside forms: MuPDF gives up on the page, in good order."""
    forms = []
    for i in range(length):
        inner = b"/Resources << /XObject << /X %d 0 R >> >>" % (7 + i if i < length - 1 else 6 + i)
        forms.append(
            stream(b"/X Do", b"/Type /XObject /Subtype /Form /BBox [0 0 595 842] " + inner)
        )
    return raw_pdf(
        [
            CATALOG,
            PAGES,
            PAGE % (FONT_5 + b" /XObject << /X 6 0 R >>"),
            stream(b"/X Do"),
            FONT,
            *forms,
        ]
    )


def deep_page_tree(depth: int = 3000) -> bytes:
    inner = [
        b"<< /Type /Pages /Kids [%d 0 R] /Count 1 /Parent %d 0 R >>" % (i + 3, i + 1)
        for i in range(depth)
    ]
    return raw_pdf(
        [CATALOG, *inner, b"<< /Type /Page /Parent %d 0 R /MediaBox [0 0 9 9] >>" % (depth + 1)]
    )


def many_contents(count: int = 300_000) -> bytes:
    """A page whose content is the same stream over and over: MuPDF holds something for each."""
    page = PAGE.replace(b"4 0 R", b"[" + b"4 0 R " * count + b"]") % FONT_5
    return raw_pdf([CATALOG, PAGES, page, stream(b"q Q " * 1000, filters=1), FONT])


def string_bomb(megabytes: int) -> bytes:
    """One string of so many letters to be shown."""
    packer = zlib.compressobj(9)
    data = packer.compress(b"BT /F 9 Tf (")
    data += b"".join(packer.compress(b"a" * 65536) for _ in range(megabytes * 16))
    data += packer.compress(b") Tj ET") + packer.flush()
    page = stream(zlib.compress(data, 9), b"/Filter [/FlateDecode /FlateDecode]")
    return raw_pdf([CATALOG, PAGES, PAGE % FONT_5, page, FONT])


def text_then_bomb(text: str, operators: bytes, megabytes: int) -> bytes:
    """A page of text, and one that takes its time."""
    bombed = bomb(operators, megabytes)
    start = bombed.index(b"4 0 obj\n") + 8
    heavy = bombed[start : bombed.index(b"\nendobj", start)]
    tree = b"<< /Type /Pages /Kids [3 0 R 6 0 R] /Count 2 >>"
    shown = stream(f"BT /F 9 Tf 50 700 Td ({text}) Tj ET".encode("latin-1"))
    second = PAGE.replace(b"4 0 R", b"7 0 R") % FONT_5
    return raw_pdf([CATALOG, tree, PAGE % FONT_5, shown, FONT, second, heavy])
