"""The screen of a program on a terminal, as lines of text: for captures of the real screen, and for
the tests that hold them true.

In:    a command, the size of the terminal, keys to press
Out:   the lines on the screen, and the exit code
State: none
"""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pexpect

OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
TOKEN = re.compile(
    r"\x1b\[([?>]?)([\d;]*)[ ]?([@-~])"
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][0-9A-B]|\x1b.|[^\x1b]",
    re.DOTALL,
)


class Screen:
    """A terminal of a fixed size that knows the control sequences which rich and prompt_toolkit
    write; colours are dropped."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        self.cells = [[" "] * columns for _ in range(rows)]
        self.row = self.column = 0
        self._beneath = (self.cells, 0, 0)

    def show(self, written: str) -> None:
        for found in TOKEN.finditer(written):
            if found[3]:
                if not found[1]:
                    self._control(found[3], [int(number or 0) for number in found[2].split(";")])
                elif found[2] == "1049":
                    self._other_screen(entered=found[3] == "h")
            elif not found[0].startswith("\x1b"):
                self._write(found[0])

    def lines(self) -> list[str]:
        """Return what is on the screen, without blank lines at its end."""
        return "\n".join("".join(line).rstrip() for line in self.cells).rstrip().split("\n")

    def _write(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character == "\n":
            self._next_line()
        elif character.isprintable():
            if self.column == self.columns:
                self.column = 0
                self._next_line()
            self.cells[self.row][self.column] = character
            self.column += 1

    def _next_line(self) -> None:
        self.row += 1
        if self.row == self.rows:
            self.row -= 1
            self.cells = [*self.cells[1:], [" "] * self.columns]

    def _control(self, final: str, numbers: list[int]) -> None:
        count = max(1, numbers[0])
        if final in "AB":
            self.row = min(self.rows - 1, max(0, self.row + (count if final == "B" else -count)))
        elif final in "CD":
            self.column = min(
                self.columns - 1, max(0, self.column + (count if final == "C" else -count))
            )
        elif final == "G":
            self.column = count - 1
        elif final in "Hf":
            self.row, self.column = count - 1, max([1, *numbers[1:2]]) - 1
        elif final == "K":
            begin, end = [(self.column, self.columns), (0, self.column + 1), (0, self.columns)][
                numbers[0]
            ]
            self.cells[self.row][begin:end] = [" "] * (end - begin)
        elif final == "J" and numbers[0] == 0:
            self._control("K", [0])
            self._erase(self.row + 1, self.rows)
        elif final == "J":
            self._erase(0, self.rows)

    def _other_screen(self, entered: bool) -> None:
        """A full-screen program begins on an empty screen, and leaves what was there before
        untouched."""
        if entered:
            self._beneath = (self.cells, self.row, self.column)
            self.cells = [[" "] * self.columns for _ in range(self.rows)]
        else:
            self.cells, self.row, self.column = self._beneath

    def _erase(self, begin: int, end: int) -> None:
        for row in range(begin, end):
            self.cells[row] = [" "] * self.columns


def show(
    command: str,
    folder: Path,
    rows: int = 24,
    columns: int = 100,
    keys: list[tuple[str, str]] | None = None,
    limit: float = 3600,
) -> tuple[list[str], int | None]:
    """(what is on the screen at the end, exit code) of a shell command, run without a network.

    keys   what to wait for on the screen, and what to press then: ("starts fresh", "\\r"). Pressing
           "" looks at the screen as it is then and ends the program; the exit code is None.
    """
    left_out = {"COLUMNS", "LINES", "WORLD_SIZE", "RANK", "LOCAL_RANK"}
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment |= {**OFFLINE, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "PATH": path}
    size, written = (rows, columns), ""
    child = pexpect.spawn(
        "/bin/sh",
        ["-c", command],
        cwd=folder,
        env=environment,
        dimensions=size,
        encoding="utf-8",
        timeout=limit,
    )
    screen = Screen(rows, columns)
    try:
        for awaited, pressed in keys or []:
            child.expect_exact(awaited)
            written += child.before + child.after
            if not pressed:
                written += _what_comes(child)
                screen.show(written)
                return screen.lines(), None
            child.send(pressed)
        child.expect(pexpect.EOF)
        written += child.before
        child.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the shell, and what it has started
        child.close()
    screen.show(written)
    return screen.lines(), child.exitstatus


def _what_comes(child: pexpect.spawn) -> str:
    """The rest of a picture that is being drawn: whatever comes until half a second passes in
    silence."""
    found = ""
    while True:
        try:
            found += child.read_nonblocking(65536, timeout=0.5)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return found
