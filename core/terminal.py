"""The one way to a terminal: what is written there cannot move the cursor, colour, reorder or hide
anything, and never fails.

In:    texts of anybody: names, keys, data, errors of libraries
Out:   lines on a stream
State: sys.stdout and sys.stderr, once `guard_streams` has put others in their place
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
"""How long a reader may be behind before what is written is lost to it, where the stream itself
does not wait."""


def clean(text: object) -> str:
    """Text that cannot move the cursor, colour or reorder the screen: one line, without control
    characters."""
    text = str(text)
    if text.isprintable():  # the usual case, and this is called for every name in every picture
        return text
    without = ESCAPES.sub("", text.replace("\r\n", "\n"))
    kept = []
    for character in without:
        if character in "\n\t\r\v\f\x85\u2028\u2029":
            kept.append(" ")
        elif unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
            kept.append(character)
    return "".join(kept)


def clean_lines(text: str) -> str:
    """As `clean`, but lines stay lines: for text that comes in pieces, of which an escape sequence
    may be in two."""
    kept = [
        c
        for c in text.replace("\t", "    ")
        if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
    ]
    return "".join(kept)


def write_line(stream: TextIO, line: str) -> None:
    """At once, cleaned, and with a question mark for what the stream's encoding lacks. Lines in it
    stay lines."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = "\n".join(clean(each) for each in str(line).split("\n"))
    stream.write(lines.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


def tell(message: object) -> None:
    """Something a person should know, beside what a job writes: on standard error, where there is
    one."""
    if sys.stderr is not None and not sys.stderr.closed:
        write_line(sys.stderr, str(message))


# streams that may be gone -------------------------------------------------------------------------


class _Unbreakable(io.FileIO):
    """A closed terminal, a pipe that nobody reads, a full disk: what cannot be shown is lost, the
    work is not."""

    patience = PATIENCE_SECONDS

    def write(self, data: Any) -> int:
        try:
            # a stream that does not wait for its reader, and one that is behind
            while (written := super().write(data)) is None:
                if not select.select([], [self], [], self.patience)[1]:
                    self.patience = 0.0  # until somebody reads again
                    return memoryview(data).nbytes
            self.patience = PATIENCE_SECONDS
            return written
        except OSError:
            return memoryview(data).nbytes


def never_fails(stream: TextIO | None, descriptor: int) -> TextIO:
    """The stream of that descriptor, none of whose writes raises for want of somebody to read
    it."""
    try:
        os.fstat(descriptor)
    except OSError:
        # started with it closed: the next file to be opened would get its number, and what is
        # printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    binary = io.BufferedWriter(_Unbreakable(descriptor, "w", closefd=False))
    if stream is None:
        return io.TextIOWrapper(binary, "utf-8", "replace")
    by_lines = bool(stream.line_buffering or getattr(stream, "write_through", False))
    return io.TextIOWrapper(binary, stream.encoding, stream.errors, line_buffering=by_lines)


def guard_streams() -> None:
    """Call it before anything is printed."""
    sys.stdout, sys.stderr = never_fails(sys.stdout, 1), never_fails(sys.stderr, 2)
