"""The text of a web page.

In:    the bytes of an HTML file, in any encoding that it names
Out:   its text: a paragraph, heading, list item or table row a line; without scripts, styles and markup
State: none
"""

import re
from contextlib import suppress
from html.parser import HTMLParser

from core.data.sources.decode import Decoded, decoded

DROPPED = frozenset(("script", "style", "noscript", "template", "svg", "iframe", "object"))
APART = re.compile("article|blockquote|h[1-6r]|ol|p|pre|section|table|title|ul")
"""Tags around which a line is empty."""
LINES = re.compile(
    "address|aside|body|br|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|header|html|li|main|nav|option|tbody|tfoot|thead|tr"
)
"""Tags around which a line ends."""

_CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.IGNORECASE)
_CHARSET_BYTES = 4096


def page_text(data: bytes) -> Decoded:
    """The text of a page, and how it was decoded."""
    found = decoded(data)
    if (found.other or found.replaced) and (match := _CHARSET.search(data[:_CHARSET_BYTES])):
        with suppress(LookupError, ValueError):  # no such encoding, or not this one
            found = Decoded(data.decode(match[1].decode("ascii")))
    reader = _Reader()
    reader.feed(found.text)
    reader.close()
    return found._replace(text=reader.text())


class _Reader(HTMLParser):
    """Collects text and line ends."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._dropped = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._dropped += tag in DROPPED
        self._pre += tag == "pre"
        self._line(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self._line(tag)

    def handle_endtag(self, tag: str) -> None:
        self._dropped = max(0, self._dropped - (tag in DROPPED))
        self._pre = max(0, self._pre - (tag == "pre"))
        if tag in ("td", "th"):
            self._parts.append(" ")
        self._line(tag)

    def handle_data(self, data: str) -> None:
        if self._dropped:
            return
        if not self._pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self._parts[-1:] == [] or self._parts[-1][-1:].isspace() else data
        self._parts.append(data)

    def _line(self, tag: str) -> None:
        if found := APART.fullmatch(tag) or LINES.fullmatch(tag):
            self._parts.append("\n\n" if found.re is APART else "\n")

    def text(self) -> str:
        text = re.sub(r"[^\S\n]+\n", "\n", "".join(self._parts))
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
