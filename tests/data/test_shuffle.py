"""Shuffling: every document once an epoch, in another order each, and a place is all that a resume
needs."""

import errno
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.data.documents import Document
from core.data.shuffle import ShuffledSource
from core.data.sources.files import Unit
from core.data.sources.skips import Damaged
from core.data.sources.text import TextSettings, TextSource
from core.data.token_cache import CachedSource, TokenCache
from tests.data.corpus import byte_tokenizer


class Small(TextSource):
    window = 16


def write_files(folder: Path) -> list[str]:
    """Files of lines, some without text; the texts."""
    texts = []
    draw = random.Random(0)
    for file, count in (("a", 100), ("b", 16), ("c", 5), ("d", 0), ("e", 48)):
        lines: list[dict[str, Any]] = [
            {"text": f"{file} {i}"} if draw.random() < 0.8 else {"text": None} for i in range(count)
        ]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        texts += [line["text"] for line in lines if line["text"]]
    return texts


def shuffled(folder: Path, seed: int = 1) -> ShuffledSource:
    return ShuffledSource(Small(TextSettings(path="*.jsonl", name="s"), folder, seed), seed)


def test_an_epoch_is_a_permutation_and_none_is_like_another(tmp_path: Path) -> None:
    texts = write_files(tmp_path)
    epochs = [[d.text for d in shuffled(tmp_path).stream({"epoch": e})] for e in range(3)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [d.text for d in shuffled(tmp_path, seed=2).stream({})] != epochs[0]
    plain = [d.text for d in Small(TextSettings(path="*.jsonl", name="s"), tmp_path, 1).stream({})]
    assert epochs[0] != plain and sum(a == b for a, b in zip(epochs[0], plain)) < len(plain) / 3
    # inside a window only: a document of file "a" stays within 16 lines of its place
    order = [int(text.split()[1]) for text in epochs[0] if text.startswith("a ")]
    assert [number // 16 for number in order] == sorted(number // 16 for number in order)


def test_every_place_is_enough_to_go_on(tmp_path: Path) -> None:
    """From each cursor, through JSON, the rest of the epoch comes as it would have, and so do the
    cursors."""
    write_files(tmp_path)
    stream = shuffled(tmp_path).stream({})
    found = [(document, stream.cursor()) for document in stream]
    for done in range(len(found) + 1):
        cursor = json.loads(json.dumps(found[done - 1][1])) if done else {}
        again = shuffled(tmp_path).stream(cursor)
        assert [(document, again.cursor()) for document in again] == found[done:]


def test_the_cache_changes_nothing(tmp_path: Path) -> None:
    write_files(tmp_path)

    class Slow(Small):
        def address(self, unit: Unit) -> str:
            return str(unit.path)

    plain = shuffled(tmp_path).stream({})
    found = [(d.key, d.digest, plain.cursor()) for d in plain]
    for _ in range(2):  # made, then read
        slow = Slow(TextSettings(path="*.jsonl", name="s"), tmp_path, 1)
        source = CachedSource(slow, TokenCache(tmp_path, 1 << 30), byte_tokenizer())
        cached = ShuffledSource(source, 1).stream({})
        assert [(d.key, d.digest, cached.cursor()) for d in cached] == found


@pytest.mark.parametrize("broken_for", [2, None])
def test_a_broken_read_loses_nothing_before_it(broken_for: int | None, tmp_path: Path) -> None:
    """What can be tried again leaves no trace in the order; what cannot costs only what lies behind
    it."""
    texts = write_files(tmp_path)
    whole = [d.text for d in shuffled(tmp_path).stream({})]
    tries = []

    class Breaks(Small):
        def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
            for position, document in super().read(unit, start):
                if (
                    unit.label == "a.jsonl"
                    and position > 40
                    and (broken_for is None or len(tries) < broken_for)
                ):
                    tries.append(position)
                    raise Damaged("damaged")
                yield position, document

        def recover(self, unit: Unit, error: Exception, failures: int) -> bool:
            return (broken_for is not None and unit.label == "a.jsonl") or super().recover(
                unit, error, failures
            )

    source = Breaks(TextSettings(path="*.jsonl", name="s"), tmp_path, 1)
    stream = ShuffledSource(source, 1).stream({})
    found, cursors = [], []
    for document in stream:
        found.append(document.text)
        cursors.append(stream.cursor())
    assert tries
    if broken_for is not None:
        assert found == whole
        return
    lost = {text for text in texts if text.startswith("a ") and int(text.split()[1]) >= 40}
    assert (
        sorted(found) == sorted(set(texts) - lost)
        and "skipped 1 damaged file: a.jsonl" in source.notes
    )
    for done in range(0, len(found), 7):
        again = ShuffledSource(
            Breaks(TextSettings(path="*.jsonl", name="s"), tmp_path, 1), 1
        ).stream(cursors[done])
        assert [d.text for d in again] == found[done + 1 :]


@pytest.mark.parametrize("lasting", [False, True])
def test_what_is_no_damage_is_tried_once_more(lasting: bool, tmp_path: Path) -> None:
    """A network drive that stumbles must not cost a file, nor one rank a file that others read."""
    texts = write_files(tmp_path)
    failures: list[int] = []

    class Stumbles(Small):
        def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
            for position, document in super().read(unit, start):
                if (
                    unit.label == "a.jsonl"
                    and position > 40
                    and (lasting or position not in failures)
                ):
                    failures.append(position)
                    raise OSError(errno.EIO, "Input/output error")
                yield position, document

    source = Stumbles(TextSettings(path="*.jsonl", name="s"), tmp_path, 1)
    found = sorted(document.text for document in source.stream({}))
    if not lasting:
        assert found == sorted(texts) and len(failures) > 20 and left_out(source) == []
        return
    lost = {text for text in texts if text.startswith("a ") and int(text.split()[1]) >= 40}
    assert found == sorted(set(texts) - lost) and failures == [41, 41]
    assert left_out(source) == [("a.jsonl", "unreadable")]


def left_out(source: Small) -> list[tuple[str, str]]:
    return [(label, why) for label, why in source.skipped() if label == "a.jsonl"]
