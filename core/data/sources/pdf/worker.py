"""The process that reads PDFs: `python -m core.data.sources.pdf.worker`. Training goes on, whatever
a file does to this process.

In:    requests on stdin (messages.py), one at a time: {"path", "seconds", "memory", "peek"}
Out:   on stdout {"ready"} or {"missing"} at the start, then {"kind", "text"} for each request, and
       {"damaged"}
State: none; PyMuPDF is loaded once, and each file is read by a fork of this process of its own

The fork may take `seconds` of time and `memory` bytes more than it has at its start; then it is
killed. It also ends with this process, and this process ends when stdin does. Where there is no
fork, files are read in this process, and the parent kills it."""

import ctypes
import gc
import importlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from core.data.sources.pdf.boxes import Box, Page
from core.data.sources.pdf.layout import document_text
from core.data.sources.pdf.messages import (
    CRASH,
    DAMAGED,
    EMPTY,
    ENCRYPTED,
    GOOD,
    LARGE,
    PAGELESS,
    SCANNED,
    SLOW,
    receive,
    send,
)

# TEXT_PRESERVE_WHITESPACE | TEXT_CLIP: no images, ligatures as letters, nothing from outside the
# page
_FLAGS = 2 | 64
_TEXT = 0  # the kind of a block; 1 is an image
_NO_MEMORY = re.compile(r"alloc.*failed|out of memory|bad_alloc")
_LOST = re.compile(r"repairing|zlib error|cannot load object|not a stream|broken object")
"""MuPDF's warnings about a file from which something may be missing."""
_GRACE = 5  # seconds beyond the limit after which a fork ends itself


class Unreadable(Exception):
    """A file that gives no text. Its text is the kind of file (messages.py)."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever MuPDF prints must not get among the replies
    # it would load onnxruntime, which takes a second and has threads
    sys.modules["pymupdf.layout"] = None  # type: ignore[assignment]  # Python's way to hide one
    try:
        pymupdf = importlib.import_module("pymupdf")
        _warm_up(pymupdf)
    except Exception as error:
        # a broken installation fails in many ways; the parent tells the user
        send(
            replies,
            {
                "missing": f"{type(error).__name__}: {error}",
                "absent": isinstance(error, ModuleNotFoundError),
            },
        )
        return
    pymupdf.TOOLS.mupdf_display_errors(False)
    pymupdf.TOOLS.mupdf_display_warnings(False)
    send(replies, {"ready": True})
    while (request := receive(requests)) is not None:
        if hasattr(os, "fork"):
            reply = in_fork(request)
        else:
            reply = extract(request["path"], request["peek"])
        send(replies, reply)


def _warm_up(pymupdf: Any) -> None:
    """Read a made-up page, so that everything that the first reading sets up is there in every
    fork."""
    document = pymupdf.open()
    document.new_page().insert_text((72, 72), "some text")
    with pymupdf.open(stream=document.tobytes(), filetype="pdf") as written:
        document_text(list(_pages(written)))
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all that it looks at


def in_fork(request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to one request from a process of its own. Ends this process when the parent
    is gone."""
    out, into = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            # whoever waits for the end of this process must not wait for the fork
            for low, high in ((0, 1), (3, into), (into + 1, 256)):
                os.closerange(low, high)
            _limit_self(request["seconds"], request["memory"], parent)
            with os.fdopen(into, "wb") as stream:
                send(stream, extract(request["path"], request["peek"]))
        finally:
            os._exit(0)
    os.close(into)
    end, chunks = time.monotonic() + request["seconds"], []
    try:
        while True:
            ready, _, _ = select.select([out, 0], [], [], max(0.0, end - time.monotonic()))
            # the parent sends no second request before the first is answered: so it is gone
            if 0 in ready:
                os.kill(child, signal.SIGKILL)
                os._exit(0)
            if not ready:
                return {"kind": SLOW, "text": ""}
            if not (data := os.read(out, 1 << 20)):
                break
            chunks.append(data)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(out)
    data = b"".join(chunks)
    try:
        return json.loads(data[4:])
    except ValueError:  # it died before it could answer
        return {"kind": CRASH, "text": ""}


def _limit_self(seconds: float, memory: int, parent: int) -> None:
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(0)
        with open("/proc/self/statm") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        limit, hard = own + memory, resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def extract(path: str, peek: bool) -> dict[str, Any]:
    """Return the text of a file as a reply; with `peek`, only whether it holds text at all, which
    takes no longer for a long file."""
    try:
        if peek:
            return {"kind": GOOD, "text": _has_text(path)}
        text, damaged = _text(path)
        return {"kind": GOOD, "text": text, "damaged": damaged}
    except Unreadable as unreadable:
        return {"kind": str(unreadable), "text": ""}
    except MemoryError:
        return {"kind": LARGE, "text": ""}
    except OSError as error:
        return {"kind": "unreadable", "text": "", "errno": error.errno}
    except RecursionError:
        return {"kind": DAMAGED, "text": ""}


def _text(path: str) -> tuple[str, bool]:
    """Return the text, and whether some of the file may be missing from it."""
    tools = importlib.import_module("pymupdf").TOOLS
    tools.reset_mupdf_warnings()
    with _open(path) as document:
        pages = list(_pages(document))
        damaged = (
            document.is_repaired
            or len(pages) < document.page_count
            or bool(_LOST.search(tools.mupdf_warnings()))
        )
        text = document_text(pages)
    if not text.strip():
        raise Unreadable(SCANNED)
    return text, damaged


def _has_text(path: str) -> str:
    with _open(path) as document:
        for page in _pages(document):
            if any(box.text.strip() for group in page.groups for box in group):
                return "yes"
    raise Unreadable(SCANNED)


def _open(path: str) -> Any:
    """Open a PDF. Raises Unreadable; OSError where the file cannot be read."""
    pymupdf = importlib.import_module("pymupdf")
    with open(path, "rb") as file:  # separates files that may not be read from broken ones
        if not file.read(1):
            raise Unreadable(EMPTY)
    try:
        if path.isprintable():
            document = pymupdf.open(path, filetype="pdf")
        else:  # MuPDF cannot open a name that is no text
            with open(path, "rb") as file:
                document = pymupdf.open(stream=file.read(), filetype="pdf")
        locked, pages, repaired = document.needs_pass, document.page_count, document.is_repaired
    except Exception as error:
        # FileDataError, MuPDF's own errors, and PyMuPDF's about unexpected answers
        _raise_memory(error)
        raise Unreadable(DAMAGED) from None
    if locked:
        raise Unreadable(ENCRYPTED)
    if pages == 0:
        raise Unreadable(DAMAGED if repaired else PAGELESS)
    return document


def _pages(document: Any) -> Iterator[Page]:
    """Yield the boxes of every page that can be read; a broken page does not cost the rest. Raises
    Unreadable when none can be read."""
    failed = 0
    for number in range(document.page_count):
        try:
            page = document[number]
            blocks = page.get_text("dict", flags=_FLAGS)["blocks"]
            height = page.rect.height
        except Exception as error:  # as above
            _raise_memory(error)
            failed += 1
            continue
        groups = [
            [_box(line) for line in block["lines"]] for block in blocks if block["type"] == _TEXT
        ]
        yield Page(height, groups)
    if failed == document.page_count:
        raise Unreadable(DAMAGED)


def _box(line: dict[str, Any]) -> Box:
    x0, y0, x1, y1 = line["bbox"]
    return Box(x0, y0, x1, y1, text="".join(span["text"] for span in line["spans"]))


def _raise_memory(error: Exception) -> None:
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        raise MemoryError from None


if __name__ == "__main__":
    main()
