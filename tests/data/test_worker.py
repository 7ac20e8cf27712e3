"""The processes that read: they end with the program, however it ends; and when they end before,
nothing is lost."""

import gc
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data.documents import Document
from core.data.loader import Loader
from core.data.source_size import counter
from core.data.sources.text import TextSource
from core.data.token_cache import CACHE
from core.data.token_pool import TextBatch, TokenPool
from core.data.tokenizer import Tokenizer
from core.data.worker import CLOSE_SECONDS, DataWorker, WorkerDied
from core.errors import ReadingFailed, UserError
from tests.data.corpus import (
    LANES,
    byte_tokenizer,
    make_factory,
    make_loader,
    same,
    start,
    steps,
    write_corpus,
)
from tests.data.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import threading, time
from core.data.worker import ROWS_PER_MESSAGE, DataWorker
rows = list(range(ROWS_PER_MESSAGE))
worker = DataWorker(zip, rows)
worker.begin(rows)
worker.next_row(threading.Event())
print(worker._process.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_ends_with_a_program_that_was_killed() -> None:
    """kill -9 leaves the program no time to end it, and it would wait for its next position for
    ever."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        assert is_running(pid)
        program.kill()
    until = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < until, "it outlived the program"
        time.sleep(0.05)


STARTING = """
import os, signal, threading
from core.data.token_pool import TextBatch, TokenPool
from core.data.worker import ROWS_PER_MESSAGE, DataWorker
from tests.data.corpus import byte_tokenizer
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGHUP, lambda *_: None)
    rows = list(range(ROWS_PER_MESSAGE))
    worker = DataWorker(zip, rows)
    for number in (signal.SIGINT, signal.SIGHUP):
        os.killpg(0, number)
    worker.begin(rows)
    print(worker.next_row(threading.Event()), flush=True)
    worker.close()
    print(worker._process.exitcode, flush=True)
    with TokenPool(byte_tokenizer(), 1) as pool:
        waiting = pool._submit(["text"])
        for number in (signal.SIGINT, signal.SIGHUP):
            os.killpg(0, number)
        print(len(waiting.result()[0]), flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_while_workers_start_ends_none_and_prints_nothing(tmp_path: Path) -> None:
    """A terminal sends it to the whole group; SIGTERM ends a worker as before."""
    (tmp_path / "starting.py").write_text(STARTING)
    run = [sys.executable, str(tmp_path / "starting.py")]
    where: dict[str, Any] = {
        "cwd": ROOT,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
        "start_new_session": True,
    }
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120, **where)
    assert (ended.stdout, ended.stderr) == (f"(0, 0)\n{-signal.SIGTERM}\n5\n", "")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    """As by the out-of-memory killer, once idle and once reading: the same rows come, and it is
    told. One that dies again before a step is made ends the run, with what to do."""
    factory = make_factory(tmp_path, write_corpus(tmp_path, {"a": 300, "b": 200}), "weighted")
    straight = make_loader(factory, start())
    expected = steps(straight, 60)
    loader = make_loader(factory, start(), workers=2)
    found = steps(loader, 10)
    for count in (0, 20):
        found += steps(loader, count)
        os.kill(loader._workers[1]._process.pid, signal.SIGKILL)
        # what was read ahead is not there: the next step needs the process that is gone
        loader._read_anew()
        found += steps(loader, 15)
    assert same(found, expected)
    assert [told.split(";")[0] for told in loader.warnings] == [
        "a data worker was killed (SIGKILL), probably for want of memory"
    ] * 2
    straight.next_step(), loader.next_step()
    assert loader.state()["receipts"] == straight.state()["receipts"]

    kill = DataWorker.begin

    def killed(self: DataWorker, position: Any) -> None:
        self._process.kill()
        kill(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataWorker, "begin", killed)
        loader._read_anew()
        with pytest.raises(
            ReadingFailed, match=r"(?s)was killed \(SIGKILL\).*Start again.*\"workers\": 0"
        ):
            steps(loader, 1)
    state = loader.state()
    loader.close()
    straight.close()
    assert state["rows"] == straight.state()["rows"]


def large_rows(position: Any, lanes: list[int]) -> Any:
    """Rows of which one message is larger than a pipe holds."""
    return iter([bytes(1 << 16)] * 64)


def test_a_worker_killed_within_a_message_is_no_endless_wait() -> None:
    """The rest of the message never comes."""
    worker, stopping = DataWorker(large_rows, [0]), threading.Event()
    worker.begin(start())
    assert worker._queue._reader.poll(60)
    time.sleep(0.5)  # the pipe is full, the message is not whole
    worker._process.kill()
    worker._process.join()

    def read() -> None:
        while True:
            worker.next_row(stopping)

    reading = threading.Thread(target=partial(pytest.raises, WorkerDied, read), daemon=True)
    reading.start()
    reading.join(20)
    assert not reading.is_alive(), "it waits for the rest"
    worker.close()


def die_within_a_message() -> None:
    """Write the beginning of a result, and end as one that is killed there."""
    (results,) = (each for each in gc.get_objects() if isinstance(each, SimpleQueue))
    os.write(results._writer.fileno(), (1000).to_bytes(4, "big") + b"begin")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_tokenizing_process_killed_within_a_message_is_told() -> None:
    with TokenPool(byte_tokenizer(), 1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_submit", lambda texts: pool._executor.submit(die_within_a_message))
        with pytest.raises(UserError, match="tokenizing process died"):
            list(pool.run(iter([TextBatch(["a"], [{}])])))


@pytest.mark.slow
def test_a_frozen_worker_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """SIGSTOP leaves it deaf to SIGTERM; the run has other things to do than to wait for it."""
    loader: Loader = make_loader(
        make_factory(tmp_path, write_corpus(tmp_path, {"a": 300})), start(), workers=1
    )
    steps(loader, 2)
    process = loader._workers[0]._process
    os.kill(process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    loader.close()
    assert time.monotonic() - begun < 3 * CLOSE_SECONDS and not process.is_alive()


@pytest.mark.slow
def test_a_frozen_tokenizing_process_does_not_hold_up_the_end(tmp_path: Path) -> None:
    batches = (TextBatch(["some text"] * 8, [{}] * 8) for _ in range(50))
    stopping = threading.Event()
    with TokenPool(byte_tokenizer(), 1) as pool:
        results = pool.run(batches, stopping.is_set)
        next(results)
        (process,) = pool._executor._processes.values()  # type: ignore[attr-defined]
        os.kill(process.pid, signal.SIGSTOP)
        stopping.set()
        begun = time.monotonic()
        assert len(list(results)) < 49
    assert time.monotonic() - begun < 10
    process.join(5)
    assert not process.is_alive()


def test_an_error_that_nobody_expected_ends_every_rank_with_its_reason(tmp_path: Path) -> None:
    """On one rank only, in the thread that reads: none waits for it, and the position is as it
    was."""
    sections = write_corpus(tmp_path, {"a": 300})

    def job(parallel: Any) -> tuple[str, int]:
        loader = make_loader(make_factory(tmp_path, sections), start(), parallel=parallel)
        if parallel.rank == 1:
            reading = loader._read

            def breaks(stopping: threading.Event) -> Any:
                for number, row in enumerate(reading(stopping)):
                    if number == 12:
                        raise LookupError("an odd thing")
                    yield row

            loader._read = breaks
        count = 0
        with pytest.raises(ReadingFailed) as told:
            while True:
                count += len(steps(loader, 1))
        loader.close()
        return str(told.value), count

    ended = Ranks(2).run(job)
    assert {count for _, count in ended} == {4}
    assert all(
        "LookupError: an odd thing (test_worker.py, line " in told and "Start again" in told
        for told, _ in ended
    )


def test_an_odd_file_or_text_costs_no_more_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it makes a library raise, with the token cache and without it; named with the
    reason, and the rows are those without it."""
    sections = write_corpus(tmp_path, {"a": 60, "b": 60, "c": 60})
    for name in "abc":
        path = tmp_path / f"{name}.jsonl"
        (tmp_path / f"{'a' * (name != 'a')}{name}.jsonl.gz").write_bytes(
            gzip.compress(path.read_bytes())
        )
    section = sections[0].model_copy(update={"path": ["a.jsonl.gz", "a?.jsonl.gz"]})
    read, encode = TextSource.read, Tokenizer.encode_batch

    def odd_read(self: TextSource, unit: Any, at: int) -> Any:
        if unit.label == "ab.jsonl.gz":
            raise RecursionError("too deep")
        return read(self, unit, at)

    def odd_encode(self: Tokenizer, texts: list[str]) -> Any:
        if any(text.startswith("c 7:") for text in texts):
            raise BaseException("a panic of the tokenizer")
        return encode(self, texts)

    monkeypatch.setattr(TextSource, "read", odd_read)
    monkeypatch.setattr(Tokenizer, "encode_batch", odd_encode)
    found = []
    for gigabytes in (0.0, 0.1, 0.1):
        loader = make_loader(
            make_factory(tmp_path, [section], max_epochs=2, cache_gigabytes=gigabytes), start()
        )
        found.append(np.concatenate(steps(loader)))
        assert sorted(loader.skipped) == [
            ("a", "ab.jsonl.gz", "unreadable (RecursionError)"),
            ("a", "ac.jsonl.gz#7", "cannot be tokenized: BaseException: a panic of the tokenizer"),
        ]
        loader.close()
    assert len(found[0]) > 20 * LANES and all(np.array_equal(each, found[0]) for each in found)
    assert list((tmp_path / CACHE).glob("*/*.safetensors"))
    count = counter(byte_tokenizer(), lambda document: True, 1)
    assert count([Document(text, "") for text in ("a", "c 7: x", "bc")]) == 2 + 3
