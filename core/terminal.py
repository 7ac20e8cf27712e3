"""The only way to a terminal: text written through it cannot move the cursor, colour, reorder or
hide anything, and writing never fails.

In:    any text: names, keys, data, errors of libraries
Out:   lines on a stream
State: sys.stdout and sys.stderr, after `guard_streams` has replaced them
"""

import io
import os
import re
import select
import sys
import unicodedata
from typing import Any, TextIO

# Colour and cursor sequences (CSI), window titles (OSC, up to bell or ST), and two-character
# escapes.
ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b[@-Z\\-_]?", re.DOTALL
)

PATIENCE_SECONDS = 2.0
"""Time to wait for a reader that is behind before what is written is dropped, where the stream
itself does not wait."""


def clean(text: object) -> str:
    """Return text as one line without control characters: it cannot move the cursor, colour or
    reorder the screen."""
    text = str(text)
    if text.isprintable():  # the usual case; this is called for every name at every redraw
        return text
    without = ESCAPES.sub("", text.replace("\r\n", "\n"))
    cleaned = []
    for character in without:
        if character in "\n\t\r\v\f\x85\u2028\u2029":
            cleaned.append(" ")
        elif unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
            cleaned.append(character)
    return "".join(cleaned)


def clean_lines(text: str) -> str:
    """Clean text, but keep its lines: for text that comes in pieces, where an escape sequence may
    be split between two."""
    characters = [
        c
        for c in text.replace("\t", "    ")
        if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
    ]
    return "".join(characters)


def write_line(stream: TextIO, line: str) -> None:
    """Write cleaned text and flush. Its lines stay lines; characters that the stream's encoding
    lacks become question marks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = "\n".join(clean(each) for each in str(line).split("\n"))
    stream.write(lines.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


def tell(message: object) -> None:
    """Write a message for the person at the terminal to standard error, where there is one."""
    if sys.stderr is not None and not sys.stderr.closed:
        write_line(sys.stderr, str(message))


# streams that may be gone -------------------------------------------------------------------------


class _Unbreakable(io.FileIO):
    """A file that drops what cannot be written: to a closed terminal, a pipe that nobody reads, a
    full disk. The work goes on."""

    patience = PATIENCE_SECONDS

    def write(self, data: Any) -> int:
        try:
            # None: the stream does not wait for its reader, and the reader is behind
            while (written := super().write(data)) is None:
                if not select.select([], [self], [], self.patience)[1]:
                    self.patience = 0.0  # until somebody reads again
                    return memoryview(data).nbytes
            self.patience = PATIENCE_SECONDS
            return written
        except OSError:
            return memoryview(data).nbytes


def never_fails(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream of a descriptor whose writes never raise, even where nobody reads them.

    stream   the one to replace, whose encoding is kept; None where there is none
    """
    try:
        os.fstat(descriptor)
    except OSError:
        # the program was started with it closed: the next file to be opened would get its number,
        # and whatever is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    binary = io.BufferedWriter(_Unbreakable(descriptor, "w", closefd=False))
    if stream is None:
        return io.TextIOWrapper(binary, "utf-8", "replace")
    by_lines = bool(stream.line_buffering or getattr(stream, "write_through", False))
    return io.TextIOWrapper(binary, stream.encoding, stream.errors, line_buffering=by_lines)


def guard_streams() -> None:
    """Make sys.stdout and sys.stderr streams that never fail. Call it before anything is
    printed."""
    sys.stdout, sys.stderr = never_fails(sys.stdout, 1), never_fails(sys.stderr, 2)
