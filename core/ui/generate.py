"""The view of the generate job: a prompt line on a terminal, one line after the other from a pipe.

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


class GenerateView:
    """Reads prompts from standard input and shows answers."""

    def __init__(self, console: TextIO):
        self._console = console
        self._amid_line = False
        self._stdin = sys.stdin if sys.stdin is not None and not sys.stdin.closed else None
        self.interactive = self._stdin is not None and self._stdin.isatty()
        """Whether a user types at a terminal."""
        if self.interactive:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401  # `input` then edits its line, and knows the lines before

    def tell(self, line: str) -> None:
        """Show a line of the program's own."""
        self.end_line()
        write_line(self._console, text.clean(line))

    def ask(self) -> str | None:
        """Return the next line that is typed; None when nothing more comes (Ctrl-D)."""
        self.end_line()
        try:
            return input(PROMPT)
        except EOFError:
            self._console.write("\n")
            return None
        except UnicodeDecodeError:
            self.tell("that is no text in this terminal's encoding")
            return ""

    def piped_lines(self) -> Iterator[str]:
        """Yield the lines of a pipe that are not empty, each shown as if it were typed. Raises
        UserError for what is no text."""
        while self._stdin is not None:
            try:
                line = self._stdin.readline()
            except UnicodeDecodeError:
                raise UserError(
                    f"standard input holds a line that is not text in {self._stdin.encoding}"
                ) from None
            if not line:
                return
            if line.strip():
                line = line.rstrip("\r\n")
                self.echo(line)
                yield line

    def echo(self, line: str) -> None:
        """Show a prompt that was not typed here."""
        self.tell(f"{PROMPT}{line}")

    def show(self, piece: str) -> None:
        """Show a piece of an answer at once, without control characters."""
        piece = text.clean_lines(piece)
        if piece:
            encoding = getattr(self._console, "encoding", None) or "utf-8"
            self._console.write(piece.encode(encoding, "replace").decode(encoding))
            self._console.flush()
            self._amid_line = not piece.endswith("\n")

    def interrupted(self, line: str) -> None:
        """Show a line after Ctrl-C, which the terminal has echoed somewhere itself."""
        self._amid_line = True
        self.tell(line)

    def end_line(self) -> None:
        """Finish the line on the screen, if one was begun."""
        if self._amid_line:
            self._console.write("\n")
            self._console.flush()
            self._amid_line = False
