"""Texts to tokens by all cores, in the order they came: the same for any number of processes.

In:    batches of texts
Out:   their tokens, each text's followed by the end-of-document token
State: none; two batches per process are under way at most, and one more
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.data.documents import Cursor
from core.data.tokenizer import Tokenizer
from core.data.worker import end_with_parent
from core.errors import UserError
from core.signals import OF_TERMINALS, STOP_SIGNALS, signals_held

POLL_SECONDS, CLOSE_SECONDS = 0.2, 2.0


@dataclass
class TextBatch:
    """Consecutive texts of a source."""

    texts: list[str]
    cursors: list[Cursor]  # where the source stands after each


@dataclass
class TokenBatch:
    """A batch of texts, tokenized."""

    tokens: np.ndarray  # (n,) uint32
    # (texts,) int64: where in `tokens` the text's end is; a text without tokens adds none
    ends: np.ndarray
    cursors: list[Cursor]


def usable_cores() -> int:
    """Return the cores of this process, which may have been given fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TokenPool:
    """Tokenizes in `workers` processes; 0: in a thread of this one, which leaves the threads to the
    tokenizers library."""

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self._tokenizer = tokenizer
        self._ahead = 2 * max(1, workers)
        self._executor: Executor
        if workers:
            # a fork would copy a process that has threads
            context = multiprocessing.get_context("spawn")
            # by the process that multiprocessing keeps for its queues
            with signals_held(OF_TERMINALS):
                self._executor = ProcessPoolExecutor(workers, context, _begin, (tokenizer.state(),))
        else:
            self._executor = ThreadPoolExecutor(1)

    def __enter__(self) -> "TokenPool":
        return self

    def __exit__(self, *_: Any) -> None:
        processes, results = self._processes(), getattr(self._executor, "_result_queue", None)
        self._executor.shutdown(wait=not processes, cancel_futures=True)
        end = time.monotonic() + CLOSE_SECONDS
        for process in processes:  # one that was frozen does not end by itself
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
        if processes and results is not None:  # a thread of the executor may wait for the rest of a
            results._writer.close()  # message, and the program for that thread

    def run(
        self, batches: Iterable[TextBatch], stop: Callable[[], bool] = lambda: False
    ) -> Generator[TokenBatch]:
        """Yield each batch tokenized. What `batches` raises is raised here, after everything that
        came before it. Ends early, between two batches, if `stop` says so while it waits.

        Raises UserError when a process died.
        """
        waiting: deque[tuple[Future, list[Cursor]]] = deque()
        failure: Exception | None = None
        reading = iter(batches)
        try:
            while True:
                try:
                    batch = next(reading, None) if failure is None else None
                except Exception as error:
                    batch, failure = None, error
                if batch is not None:
                    waiting.append((self._submit(batch.texts), batch.cursors))
                if waiting and (batch is None or len(waiting) > self._ahead):
                    future, cursors = waiting.popleft()
                    while not wait([future], POLL_SECONDS).done:
                        if stop():
                            return
                        # killed within a message, a process keeps the executor waiting for its rest
                        if self._has_died() and not wait([future], CLOSE_SECONDS).done:
                            raise BrokenProcessPool
                    tokens, ends = future.result()
                    yield TokenBatch(tokens, ends, cursors)
                elif batch is None:
                    break
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process died, probably for want of memory; everything saved so far "
                "is kept. Set tokenize.workers "
                "to a smaller number (0: no processes) and start again to go on."
            ) from None
        finally:  # whoever has enough does not want the rest
            for future, _ in waiting:
                future.cancel()
        if failure is not None:
            raise failure

    def _processes(self) -> list[Any]:
        return list((getattr(self._executor, "_processes", None) or {}).values())

    def _has_died(self) -> bool:
        return not all(process.is_alive() for process in self._processes())

    def _submit(self, texts: list[str]) -> Future:
        if isinstance(self._executor, ThreadPoolExecutor):
            return self._executor.submit(_encode, self._tokenizer, texts)
        with signals_held(OF_TERMINALS):  # by the processes, which the first of these starts
            return self._executor.submit(_encode_there, texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, ends) of some texts."""
    pieces, ends, total, end = [], [], 0, np.array([tokenizer.eos_id], np.int32)
    for ids in tokenizer.encode_batch(texts):
        if len(ids):
            pieces += [ids, end]
            total += len(ids) + 1
        ends.append(total)
    return np.concatenate(pieces or [end[:0]]).astype(np.uint32), np.array(ends, np.int64)


# in the processes ---------------------------------------------------------------------------------

_own: Tokenizer | None = None
"""The tokenizer of a worker process: made once, used for every batch."""


def _begin(state: dict[str, Any]) -> None:
    """Prepare a process; runs first in each."""
    global _own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # meant for the job, which ends its processes itself
    threading.Thread(target=end_with_parent, daemon=True).start()
    _own = Tokenizer.from_state(state)


def _encode_there(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    assert _own is not None, "the process was not prepared"
    return _encode(_own, texts)
