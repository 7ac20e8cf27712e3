"""Read PDFs in other processes: as many at a time as there are workers, each within its limits, and
through the cache.

In:    paths
Out:   a future Extraction for each
State: threads, each with a worker process of its own from the first file on that is not in the
cache; both end when idle

A thread per worker keeps the exchange with it simple: one request, one answer. A worker that dies
is replaced, and its file tried once more. A worker that does not answer in time is killed from
here, in case it cannot end the reading itself."""

import os
import subprocess
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from core.data.sources.pdf.cache import Extraction, PdfCache, digest_of_file
from core.data.sources.pdf.messages import CRASH, EMPTY, SLOW, TRANSIENT, receive, send
from core.errors import SourceUnavailable

ROOT = Path(__file__).resolve().parents[4]

MAX_WORKERS = 4
IDLE_SECONDS = 20.0
START_SECONDS = 60.0
LATE_SECONDS = 10.0
"""Seconds beyond a file's limit after which its worker is killed: workers keep the limit
themselves, if they can."""


@dataclass(frozen=True)
class Limits:
    """The time and memory that reading one file may take."""

    seconds: float
    memory: int  # bytes
    peek: bool = False  # only check whether there is text


class Worker:
    """A process that reads PDFs, started when it is first needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        # another thread may close it, and must not miss a process that is just starting
        self._lock = threading.Lock()
        self._closed = False

    def read(self, path: Path, limits: Limits) -> Extraction:
        """Return the result of one file; a reading that died is tried once more. Raises OSError,
        SourceUnavailable."""
        message = {
            "path": os.path.abspath(path),
            "seconds": limits.seconds,
            "memory": limits.memory,
            "peek": limits.peek,
        }
        for _ in range(2):
            reply = self._exchange(message, limits.seconds + LATE_SECONDS)
            if (
                reply is None
                or not isinstance(reply.get("kind"), str)
                or not isinstance(reply.get("text"), str)
            ):
                self.stop()
            elif "errno" in reply:
                raise OSError(reply["errno"], os.strerror(reply["errno"] or 0), str(path))
            elif reply["kind"] != CRASH:
                return Extraction(reply["kind"], reply["text"], reply.get("damaged") is True)
        return Extraction(CRASH, "")

    def stop(self) -> None:
        """End the process, and whatever it is reading."""
        with self._lock:  # until it is gone: a second caller finds it gone
            process, self.process = self.process, None
            if process is not None:
                process.kill()
                process.wait()
                for pipe in filter(None, (process.stdin, process.stdout)):
                    with suppress(OSError):  # whatever was still to be written has no reader
                        pipe.close()

    def close(self) -> None:
        """End the process for good, from any thread; the thread that waits for it finds it dead."""
        with self._lock:
            self._closed = True
            if self.process is not None:
                self.process.kill()

    def _exchange(self, message: dict, seconds: float) -> dict | None:
        """Return the answer; None where there was none. A worker that is silent for too long counts
        as a slow file."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        late = threading.Event()

        def end_it() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end_it)
        timer.daemon = True
        timer.start()
        try:
            send(process.stdin, message)
            reply = receive(process.stdout)
        except (OSError, ValueError):
            reply = None
        finally:
            timer.cancel()
        if reply is None and late.is_set():
            self.stop()
            return {"kind": SLOW, "text": ""}
        return reply

    def _running(self) -> subprocess.Popen:
        if self.process is not None:
            return self.process
        # one thread for numpy, which PyMuPDF loads: a pool of threads would hinder a fork
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "core.data.sources.pdf.worker"]
        with self._lock:
            if self._closed:
                raise SourceUnavailable("it was closed")
            try:
                self.process = process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd=ROOT,
                    env=env,
                    process_group=0,
                )
            except OSError as error:
                raise SourceUnavailable(
                    f"the process that reads PDFs cannot be started: {error}"
                ) from None
        timer = threading.Timer(START_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        assert process.stdout is not None, "it is a pipe"
        greeting = receive(process.stdout)
        timer.cancel()
        if greeting is None or not greeting.get("ready"):
            self.stop()
            greeting = greeting or {"missing": "it ended at once"}
            raise SourceUnavailable(
                "the package pymupdf is missing: pip install pymupdf"
                if greeting.get("absent")
                else f"the process that reads PDFs cannot be started: {greeting.get('missing')}"
            )
        return process


def read_file(worker: Worker, cache: PdfCache, path: Path, limits: Limits) -> Extraction:
    """Return the result of one file, from the cache if it is there. Raises OSError,
    SourceUnavailable."""
    before = path.stat()
    if before.st_size == 0:
        return Extraction(EMPTY, "")
    digest = digest_of_file(path)
    if (known := cache.get(digest)) is not None:
        return known
    if limits.peek:
        return worker.read(path, limits)
    with cache.lock(digest, limits.seconds + LATE_SECONDS) as lock:
        if (known := cache.get(digest)) is not None:
            return known
        # another process has just tried in vain: its time is not spent again
        if (kind := lock.message()) in TRANSIENT:
            return Extraction(kind, "")
        extraction = worker.read(path, limits)
        if extraction.kind in TRANSIENT:
            lock.leave(extraction.kind)
        after = path.stat()
        # else the digest may be of another text
        if (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
            cache.put(digest, extraction)
        return extraction


class Pool:
    """Threads that read files one after the other. Files that are needed now go before those that
    are read ahead."""

    def __init__(self, cache: PdfCache, size: int = 0):
        self._shared = _Shared(cache, size or min(MAX_WORKERS, os.cpu_count() or 1))
        # at the latest when Python ends; threads hold the shared part and not the pool, so that the
        # pool can be collected before
        self.close = weakref.finalize(self, self._shared.close)

    @property
    def size(self) -> int:
        return self._shared.size

    def workers(self) -> list[Worker]:
        return list(self._shared.workers)

    def submit(self, path: Path, limits: Limits, first: bool = False) -> "Future[Extraction]":
        return self._shared.submit(path, limits, first)

    def prioritize(self, future: "Future[Extraction]") -> None:
        """Move a file that was to be read ahead before the others."""
        self._shared.prioritize(future)


class _Shared:
    def __init__(self, cache: PdfCache, size: int):
        self.cache, self.size = cache, size
        self.workers: list[Worker] = []  # one per living thread
        self._jobs: deque[tuple[Future, Path, Limits]] = deque()
        self._ready = threading.Condition()
        self._idle = 0
        self._closed = False

    def submit(self, path: Path, limits: Limits, first: bool) -> Future:
        future: Future = Future()
        with self._ready:
            if self._closed:
                raise SourceUnavailable("it was closed")
            (self._jobs.appendleft if first else self._jobs.append)((future, path, limits))
            if len(self._jobs) > self._idle and len(self.workers) < self.size:
                worker = Worker()
                self.workers.append(worker)
                threading.Thread(
                    target=self._work, args=(worker,), name="pdf-reader", daemon=True
                ).start()
            self._ready.notify()
        return future

    def prioritize(self, future: Future) -> None:
        with self._ready:
            for job in self._jobs:
                if job[0] is future:
                    self._jobs.remove(job)
                    self._jobs.appendleft(job)
                    break

    def close(self) -> None:
        with self._ready:
            self._closed = True
            jobs, self._jobs = list(self._jobs), deque()
            workers = list(self.workers)
            self._ready.notify_all()
        for worker in workers:
            worker.close()
        for future, *_ in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(SourceUnavailable("it was closed"))
        for worker in workers:
            worker.stop()

    def _work(self, worker: Worker) -> None:
        try:
            while (job := self._next(worker)) is not None:
                future, path, limits = job
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    extraction = read_file(worker, self.cache, path, limits)
                except BaseException as error:  # passed on to whoever waits for the file
                    future.set_exception(error)
                else:
                    future.set_result(extraction)
                del job, future
        finally:
            worker.stop()

    def _next(self, worker: Worker) -> tuple[Future, Path, Limits] | None:
        """Return the next file; None after IDLE_SECONDS without one, when this thread ends."""
        with self._ready:
            self._idle += 1
            self._ready.wait_for(lambda: self._jobs or self._closed, IDLE_SECONDS)
            self._idle -= 1
            if self._jobs and not self._closed:
                return self._jobs.popleft()
            self.workers.remove(worker)
            return None
