"""A person who types and a model that answers: a prompt line on a terminal, one line after the
other from a pipe.

In:    standard input, the console; pieces of answers
Out:   lines that were typed; answers, as they are made
State: whether the last line on the screen is finished
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from core.errors import UserError
from core.terminal import write_line
from core.ui import text

PROMPT = "> "


class TalkView:
    """The view of the generate job."""

    def __init__(self, console: TextIO):
        self._console = console
        self._amid_line = False
        given = sys.stdin if sys.stdin is not None and not sys.stdin.closed else None
        self._given = given
        self.interactive = bool(given is not None and given.isatty())
        """Whether somebody types at a terminal."""
        if self.interactive:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401  # `input` then edits its line, and knows the lines before

    def tell(self, line: str) -> None:
        """A line of the program's own."""
        self.end_line()
        write_line(self._console, text.clean(line))

    def ask(self) -> str | None:
        """What is typed next; None when nothing more comes (Ctrl-D)."""
        self.end_line()
        try:
            return input(PROMPT)
        except EOFError:
            self._console.write("\n")
            return None
        except UnicodeDecodeError:
            self.tell("that is no text in this terminal's encoding")
            return ""

    def given(self) -> Iterator[str]:
        """The lines of a pipe that are not empty, each shown as if it were typed. Raises UserError
        for what is no text."""
        while self._given is not None:
            try:
                line = self._given.readline()
            except UnicodeDecodeError:
                raise UserError(
                    f"standard input holds a line that is not text in {self._given.encoding}"
                ) from None
            if not line:
                return
            if line.strip():
                line = line.rstrip("\r\n")
                self.echo(line)
                yield line

    def echo(self, line: str) -> None:
        """A prompt nobody typed here."""
        self.tell(f"{PROMPT}{line}")

    def show(self, piece: str) -> None:
        """A piece of an answer, at once. What a terminal would obey is left out."""
        piece = text.clean_lines(piece)
        if piece:
            encoding = getattr(self._console, "encoding", None) or "utf-8"
            self._console.write(piece.encode(encoding, "replace").decode(encoding))
            self._console.flush()
            self._amid_line = not piece.endswith("\n")

    def interrupted(self, line: str) -> None:
        """A line after Ctrl-C, which the terminal has written somewhere itself."""
        self._amid_line = True
        self.tell(line)

    def end_line(self) -> None:
        """Whatever comes next begins a line."""
        if self._amid_line:
            self._console.write("\n")
            self._console.flush()
            self._amid_line = False
