"""Extract the text of a web page.

In:    the bytes of an HTML file, in any encoding that it names
Out:   its text, with a line for each paragraph, heading, list item or table row; no scripts, styles
       or markup
State: none
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from html import unescape

from core.data.sources.decode import Decoded, decoded

DROPPED = frozenset(("noscript", "template", "svg", "iframe", "object"))
"""Tags whose content is no text. A tag that is not closed hides nothing."""
RAW = {tag: re.compile(f"</{tag}(?=[\\s/>])", re.IGNORECASE) for tag in ("script", "style")}
"""Tags whose content is no markup either, until they are closed or the page ends."""
APART = re.compile("article|blockquote|h[1-6r]|ol|p|pre|section|table|title|ul")
"""Tags with an empty line before and after."""
LINES = re.compile(
    "address|aside|body|br|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|header|html|li|main|nav|option|tbody|tfoot|thead|tr"
)
"""Tags with a line break before and after."""

_NAME = re.compile(r"</?([A-Za-z][^\s/>]*+)")
_TAG_END = re.compile(r"""[^>=]*+(?:=\s*+(?:"[^"]*+"|'[^']*+')?+[^>=]*+)*+>""")
"""The rest of a tag; a bracket in a quoted attribute does not end it."""
_TRIES = 10
"""Tags of a page that may lack such an end. After so many, the first bracket ends each tag, so that
the work stays linear in the length of the page."""
_CHARSET = re.compile(
    rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.IGNORECASE
)
_CHARSET_BYTES = 4096


def page_text(data: bytes) -> Decoded:
    """Return the text of a page, and how it was decoded."""
    result = decoded(data)
    if (result.other or result.replaced) and (match := _CHARSET.search(data[:_CHARSET_BYTES])):
        with suppress(LookupError, ValueError):  # no such encoding, or not this one
            result = Decoded(data.decode(match[1].decode("ascii")))
    page = _Page()
    for tag, closing, text in _tokens(result.text):
        if tag:
            page.tag(tag, closing)
        else:
            page.data(unescape(text))
    return result._replace(text=page.text())


def _tokens(page: str) -> Iterator[tuple[str, bool, str]]:
    """Yield (tag, whether it closes, its markup) or ("", False, text), in order. Looks at each
    character a few times at most."""
    at, tries = 0, _TRIES
    last, last_comment = page.rfind(">"), page.rfind("-->")
    while 0 <= (mark := page.find("<", at)) < last:
        if mark > at:
            yield "", False, page[at:mark]
        name = _NAME.match(page, mark)
        if not (name or page[mark + 1] in "!?/"):
            at = mark + 1
            yield "", False, "<"
            continue
        if page.startswith("<!--", mark):  # a comment that does not end hides nothing
            at = page.index("-->", mark + 2) + 3 if mark + 2 <= last_comment else mark + 4
            continue
        if not name:
            at = page.index(">", mark) + 1
            continue
        end = _TAG_END.match(page, name.end()) if tries else None
        tries -= end is None and tries > 0
        at = end.end() if end else page.index(">", name.end()) + 1
        tag, closing, whole = name[1].lower(), page[mark + 1] == "/", page[mark:at]
        yield tag, closing, whole
        if tag in RAW and not closing and not whole.endswith("/>"):
            close = RAW[tag].search(page, at)
            at = close.start() if close else len(page)
    if at < len(page):
        yield "", False, page[at:]


class _Page:
    """Collects text and line ends."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        # (which tag, parts before it) of tags that are not closed
        self._begun: dict[str, list[tuple[int, int]]] = {tag: [] for tag in DROPPED}
        self._tags = 0
        self._pre = 0

    def tag(self, tag: str, closing: bool) -> None:
        self._tags += 1
        if tag in DROPPED:
            self._drop(tag) if closing else self._begun[tag].append((self._tags, len(self._parts)))
        if tag == "pre":
            self._pre = max(0, self._pre + (-1 if closing else 1))
        if closing and tag in ("td", "th"):
            self._parts.append(" ")
        if APART.fullmatch(tag):
            self._parts.append("\n\n")
        elif LINES.fullmatch(tag):
            self._parts.append("\n")

    def _drop(self, tag: str) -> None:
        """Drop everything since the last opening of a tag."""
        if self._begun[tag]:
            begin = self._begun[tag].pop()
            del self._parts[begin[1] :]
            for inner in self._begun.values():
                while inner and inner[-1] > begin:
                    inner.pop()

    def data(self, data: str) -> None:
        if not self._pre:
            data = re.sub(r"\s+", " ", data)
            if not self._parts or self._parts[-1][-1:].isspace():
                data = data.lstrip()
        self._parts.append(data)

    def text(self) -> str:
        text = "\n".join(line.rstrip() for line in "".join(self._parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
