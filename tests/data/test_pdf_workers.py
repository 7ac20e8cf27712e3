"""The processes that read PDFs: no file, however hostile, hangs or ends a run."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.data.documents import Document
from core.data.sources.pdf import pool as pdf_pool
from core.data.sources.pdf.source import PdfSettings, PdfSource
from core.errors import SourceUnavailable
from tests.data import pdfs
from tests.data.pdf_source import (
    alive,
    all_of,
    children_of,
    linux,
    paragraph,
    skipped,
    until,
    worker_pids,
)

ROOT = Path(__file__).resolve().parents[2]


# workers ------------------------------------------------------------------------------------------


@pytest.mark.slow
@linux
@pytest.mark.parametrize("who", ["worker", "fork"])
def test_a_killed_worker_is_replaced_and_its_file_tried_again(
    make_source: Callable[..., PdfSource], who: str
) -> None:
    source = make_source({"a.pdf": pdfs.text_then_bomb("Hello to you", b"q Q ", 15)})
    out: list[Document] = []
    reading = threading.Thread(target=lambda: out.extend(all_of(source)))
    reading.start()
    until(lambda: any(children_of(pid) for pid in worker_pids(source)))
    (pid,) = worker_pids(source)
    (child,) = children_of(pid)
    os.kill(pid if who == "worker" else child, signal.SIGKILL)
    reading.join(30)
    assert [d.text for d in out] == ["Hello to you"]
    assert source.notes == [] and not alive(child)
    assert (worker_pids(source) == [pid]) == (who == "fork")


@pytest.mark.slow
@linux
def test_a_file_that_always_kills_its_reader_is_named(
    make_source: Callable[..., PdfSource],
) -> None:
    source = make_source({"a.pdf": pdfs.endless_forms(), "b.pdf": paragraph("A text.")})
    ended = threading.Event()

    def killer() -> None:
        while not ended.is_set():
            for pid in worker_pids(source):
                for child in children_of(pid):
                    if time.time() - Path(f"/proc/{child}").stat().st_ctime > 0.3:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.05)

    threading.Thread(target=killer, daemon=True).start()
    try:
        assert [d.text for d in all_of(source)] == ["A text."]
    finally:
        ended.set()
    assert skipped(source) == {"a.pdf": "crashing (their reader does not survive them)"}


@pytest.mark.slow
def test_a_worker_that_does_not_keep_the_limit_is_killed(
    make_source: Callable[..., PdfSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    # its own limit is a minute: it would still be reading
    monkeypatch.setattr(pdf_pool, "LATE_SECONDS", -59.0)
    source = make_source({"a.pdf": pdfs.endless_forms()})
    with pytest.raises(SourceUnavailable, match=r"slow \(over 60 s\) file: a\.pdf"):
        all_of(source)


@linux
def test_workers_ignore_ctrl_c_hold_no_torch_and_go_with_their_source(
    make_source: Callable[..., PdfSource],
) -> None:
    source = make_source({"a.pdf": paragraph("A text.")})
    assert len(all_of(source)) == 1
    (pid,) = worker_pids(source)
    os.kill(pid, signal.SIGINT)
    (Path(source._folder) / "b.pdf").write_bytes(paragraph("Another."))
    source._units = None
    assert len(all_of(source)) == 2 and pid in worker_pids(source)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "mupdf" in maps and "torch" not in maps
    pids = worker_pids(source)
    source._pool.close()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # no zombie is left


@pytest.mark.slow
@linux
def test_workers_end_when_idle_or_forgotten(
    make_source: Callable[..., PdfSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pdf_pool, "IDLE_SECONDS", 0.2)
    source = make_source({"a.pdf": paragraph("A text.")})
    assert len(all_of(source)) == 1
    until(lambda: not source._pool.workers())
    monkeypatch.setattr(pdf_pool, "IDLE_SECONDS", 60.0)
    (tmp_path / "pdfs" / "a.pdf").write_bytes(paragraph("Another text."))
    forgotten = PdfSource(PdfSettings(), tmp_path, 1)
    assert len(all_of(forgotten)) == 1
    pids = worker_pids(forgotten)
    del forgotten
    gc.collect()
    until(lambda: not any(alive(pid) for pid in pids))


SCRIPT = """
import os, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
from core.errors import SourceUnavailable
from core.data.sources.pdf.source import PdfSettings, PdfSource
source = PdfSource(PdfSettings(), Path(sys.argv[1]), 1)
def read():
    with suppress(SourceUnavailable):  # at the end of the program
        list(source.stream({}))
threading.Thread(target=read, daemon=True).start()
while not [w for w in source._pool.workers() if w.process is not None
           and Path(f"/proc/{w.process.pid}/task/{w.process.pid}/children").read_text()]:
    time.sleep(0.01)
pid = source._pool.workers()[0].process.pid
print(pid, Path(f"/proc/{pid}/task/{pid}/children").read_text(), flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("how", ["ended", "killed"])
def test_workers_die_with_the_program(tmp_path: Path, how: str) -> None:
    """In the middle of a file that never ends, too; and an end is quick and silent."""
    (tmp_path / "pdfs").mkdir()
    (tmp_path / "pdfs" / "a.pdf").write_bytes(pdfs.endless_forms())
    run = [sys.executable, "-X", "dev", "-c", SCRIPT, str(tmp_path), how]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, capture_output=True, text=True, timeout=30, env=env)
    assert done.returncode == (0 if how == "ended" else -signal.SIGKILL) and done.stderr == ""
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(alive(pid) for pid in pids), 3)


def test_without_pymupdf_the_package_is_named(
    make_source: Callable[..., PdfSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pymupdf.py").write_text("raise ModuleNotFoundError('No module named pymupdf')")
    (tmp_path / "core").symlink_to(ROOT / "core")
    monkeypatch.setattr(pdf_pool, "ROOT", tmp_path)
    with pytest.raises(SourceUnavailable, match="pip install pymupdf"):
        make_source({"a.pdf": paragraph("A text.")}).open()
