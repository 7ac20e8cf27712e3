"""Whole runs on each kind of data: what a person who only writes presets gets."""

import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from core.data.validation import HoldOut
from tests.project import story, tiny_preset, train_here


def write_chats(folder: Path, count: int = 60, assistant: str = "assistant") -> None:
    chats = []
    for number in range(count):
        said = [("user", f"What happened in {number}?"), (assistant, story(number, 2))]
        said += [("user", "And then?"), (assistant, "Snow.")]
        chats.append({"messages": [{"role": role, "content": content} for role, content in said]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def saved(root: Path) -> dict[str, Any]:
    return torch.load(root / "checkpoints" / "t_current.pth", weights_only=True)


def test_chats_teach_what_the_assistant_says(tmp_path: Path) -> None:
    """A BPE of the preset's own gets the markers as special tokens; fewer tokens are targets than
    are read."""
    write_chats(tmp_path)
    preset = tiny_preset(
        tokenizer={"type": "bpe", "vocab_size": 400},
        data={"sources": [{"type": "chat", "path": "chats.jsonl"}], "packing": "best_fit"},
    )
    events = train_here(preset, tmp_path)
    assert (
        events[-1]["reason"] == "max_steps"
        and len([e for e in events if e["event"] == "step"]) == 5
    )
    assert next(e for e in events if e["event"] == "eval")["cross_entropy"] > 0
    vocabulary = json.loads(saved(tmp_path)["tokenizer"]["json"])["added_tokens"]
    assert {"<|im_start|>", "<|im_end|>"} <= {token["content"] for token in vocabulary}


def test_weights_move_along_their_schedules(tmp_path: Path) -> None:
    """What the log calls the weight is the schedule's value; what is drawn follows it; the next run
    begins it anew."""
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {story(number, 2)}"}) + "\n" for number in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    falling, rising = (
        {"from": x, "to": y, "begin": 0.5, "end": 0.5} for x, y in ((0.95, 0.05), (0.05, 0.95))
    )
    preset = tiny_preset(
        train={"max_steps": 80, "eval_tokens": 0},
        data={
            "sources": [{"type": "text", "path": "a.jsonl"}, {"type": "text", "path": "b.jsonl"}],
            "mix_strategy": "weighted",
            "source_weights": [falling, rising],
        },
    )
    for _ in range(2):
        steps = [
            event["sources"] for event in train_here(preset, tmp_path) if event["event"] == "step"
        ]
    assert len(steps) == 160
    assert [
        round(step["a"]["weight"], 2) for step in (steps[0], steps[79], steps[80], steps[159])
    ] == [0.95, 0.05, 0.95, 0.05]
    read = [step["a"]["documents"] for step in steps]
    other = [step["b"]["documents"] for step in steps]
    for begin, end, of_a in ((0, 35, 0.95), (45, 79, 0.05), (80, 115, 0.95), (125, 159, 0.05)):
        a, b = read[end] - read[begin], other[end] - other[begin]
        assert a / (a + b) == pytest.approx(of_a, abs=0.17), (begin, end, a, b)
    ledger = saved(tmp_path)["progress"]["ledger"]
    assert (
        ledger["a"]["documents"] == read[-1] and ledger["a"]["tokens"] == steps[-1]["a"]["tokens"]
    )
    assert ledger["a"]["epochs"] == steps[-1]["a"]["epochs"] == 1 and ledger["a"]["loss"] > 0


def test_new_files_are_read_and_what_was_held_out_stays_out(tmp_path: Path) -> None:
    """A person drops a file into the folder between two runs."""
    preset = tiny_preset(train={"max_steps": 40})
    train_here(preset, tmp_path)
    before = saved(tmp_path)
    (tmp_path / "texts" / "new.txt").write_text(story(99, 60))
    events = train_here(preset, tmp_path)
    after = saved(tmp_path)
    notes = [event for event in events if event["event"] == "run_start"][-1]["notes"]
    assert any(
        "files of texts have changed" in note and "texts begins again, with all its files" in note
        for note in notes
    ), notes
    assert (
        after["data"]["held_out"] == before["data"]["held_out"]
        and before["data"]["held_out"]["held"]["texts"]
    )
    cursors = [state["data"]["snapshot"]["cursors"]["texts"] for state in (before, after)]
    assert cursors[1]["epoch"] > cursors[0].get("epoch", 0)


def test_short_texts_are_left_out_and_counted_and_short_conversations_are_read(
    tmp_path: Path,
) -> None:
    """Once, however often the source is read over; and so it is with what comes from the token
    cache."""
    texts = [{"text": f"{i} short" if i % 10 else f"{i} {story(i, 2)}"} for i in range(500)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": f"{i}."},
            ]
        }
        for i in range(300)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "chats.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in chats).encode())
    )
    sources = [{"type": "text", "path": "x.jsonl"}, {"type": "chat", "path": "chats.jsonl.gz"}]
    train = {"max_steps": 80, "eval_tokens": 0}
    events = train_here(
        tiny_preset(model={"seq_length": 128}, data={"sources": sources}, train=train), tmp_path
    )
    short = "shorter than data.min_text_length = 50 characters"
    assert [note for note in events[0]["notes"] if "short" in note] == [
        f"x: 450 of 500 texts are {short} and left out"
    ]
    told = [(event["source"], event["reason"]) for event in events if event["event"] == "skipped"]
    assert told[-1] == ("x", f"100 or more texts: {short}") and {source for source, _ in told} == {
        "x"
    }
    ledger = saved(tmp_path)["progress"]["ledger"]
    assert ledger["x"]["epochs"] > 3 and ledger["chats"]["documents"] > 80


def test_every_file_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    """Also those found while training: the note at the start shows five names, the log has them
    all, each once."""
    from tests.data import pdfs

    folder = tmp_path / "pdfs"
    folder.mkdir()
    for number in range(8):
        (folder / f"bad{number}.pdf").write_bytes(b"not a pdf")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "good.pdf").write_bytes(
        pdfs.pdf_of_lines([pdfs.column("A good page of words. " * 60, 50, 60, 90)])
    )
    preset = tiny_preset(
        data={"sources": [{"type": "text", "path": "texts"}, {"type": "pdf"}]},
        train={"max_steps": 30},
    )
    events = train_here(preset, tmp_path)
    skipped = sorted(
        (e["source"], e["file"], e["reason"]) for e in events if e["event"] == "skipped"
    )
    assert skipped == [("pdf", f"bad{number}.pdf", "damaged") for number in range(8)] + [
        ("pdf", "empty.pdf", "empty")
    ]


def test_a_stop_does_not_wait_for_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that no longer answers: Ctrl-C saves what is consumed, at once, and the next start
    goes on from there."""
    from core.data.loader import Loader
    from core.data.sources.text import TextSource
    from core.errors import Interrupted
    from core.signals import StopRequest

    answers, asked = threading.Event(), threading.Event()
    read = TextSource.read

    def stalls(self: Any, unit: Any, start: int) -> Any:
        for number, each in enumerate(read(self, unit, start)):
            if self.name == "slow" and number >= 150:
                asked.set()
                answers.wait(60)
            yield each

    monkeypatch.setattr(TextSource, "read", stalls)
    (tmp_path / "slow.jsonl").write_text(
        "".join(json.dumps({"text": story(n, 3)}) + "\n" for n in range(400))
    )
    preset = tiny_preset(
        train={"max_steps": 1000, "eval_tokens": 0},
        data={
            "sources": [{"type": "text", "path": "slow.jsonl"}],
            "validation_fraction": 1e-6,
            "shuffle": "shards",
        },
    )
    monkeypatch.setattr(StopRequest, "__call__", lambda self: asked.is_set())
    # the two seconds that it waits for the source
    monkeypatch.setattr(Loader.close, "__defaults__", (0.2,))
    # it reads a few hundred documents
    monkeypatch.setattr("core.data.corpus.plan_hold_out", lambda *_: HoldOut(0.0))
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        train_here(preset, tmp_path)
    assert time.monotonic() - begun < 30
    state = saved(tmp_path)
    assert (
        0 < state["progress"]["step"] < 1000
        and state["data"]["rows"] == 4 * state["progress"]["step"]
    )
    answers.set()
