"""Standard output and error that may be gone: a terminal that was closed, a pipe that nobody reads, a disk that is full.

In:    the process's streams
Out:   streams in their place whose writes never fail: what cannot be shown is lost, the work is not
State: sys.stdout and sys.stderr
"""

import io
import os
import sys
from typing import Any, TextIO


class _Screen(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def never_fails(stream: TextIO | None, descriptor: int) -> TextIO:
    """The stream of that descriptor, none of whose writes raises for want of somebody to read it."""
    try:
        os.fstat(descriptor)
    except OSError:  # started with it closed: the next file to be opened would get its number, and what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    binary = io.BufferedWriter(_Screen(descriptor, "w", closefd=False))
    if stream is None:
        return io.TextIOWrapper(binary, "utf-8", "replace")
    by_lines = stream.line_buffering or getattr(stream, "write_through", False)
    return io.TextIOWrapper(binary, stream.encoding, stream.errors, line_buffering=by_lines)


def guard_streams() -> None:
    """Call it before anything is printed."""
    sys.stdout, sys.stderr = never_fails(sys.stdout, 1), never_fails(sys.stderr, 2)
