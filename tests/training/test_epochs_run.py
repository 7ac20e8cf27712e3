"""Runs that end by `max_epochs`: their schedules and what they tell of their progress end where
they do."""

import io
import itertools
import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from core.data import source_size
from core.data.corpus import open_corpus
from core.data.documents import Document
from core.data.source_size import counter, tokens_of_pass
from core.data.sources import build_source
from core.data.sources.text import TextSettings
from core.errors import UserError
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.preview import time_remark
from core.registry import Preset
from core.runtime import detect_runtime
from core.ui.plain import PlainLines
from core.ui.progress import RunProgress
from tests.data.corpus import byte_tokenizer
from tests.data.ranks import Ranks
from tests.hub import Hub, lines, parquet
from tests.project import Project, differences, merged, story, tiny_preset, train_here

WSD = {"type": "wsd", "warmup": 0.1, "decay": 0.2, "floor": 0.0}
EPOCHS = tiny_preset(
    train={
        "max_steps": None,
        "max_epochs": 2,
        "schedule": WSD,
        "eval_tokens": 0,
        "per_gpu_batch_size": 16,
    }
)


def rows(count: int) -> list[dict[str, str]]:
    """Documents of very unequal lengths."""
    sizes = random.Random(3)
    return [
        {"text": story(n, 4)[: int(min(250, 10 + sizes.expovariate(0.015)))]} for n in range(count)
    ]


def assert_spans_the_run(events: list[dict], within: float = 0.03) -> None:
    """The learning rate rises to its peak in the first tenth and falls to nothing in the last fifth
    of what was read."""
    steps = [event for event in events if event["event"] == "step"]
    begin = [event for event in events if event["event"] == "run_start"][-1]
    total, rates = steps[-1]["run_tokens"], [step["learning_rate"] for step in steps]
    peak = next(step["run_tokens"] for step in steps if step["learning_rate"] == max(rates)) / total
    assert begin["end_tokens"] == pytest.approx(total, rel=within)
    assert 0.05 < peak < 0.15 and rates[-1] < 0.2 * max(rates)
    backwards = zip(steps[::-1], rates[::-1])
    falls = next(step["run_tokens"] for step, rate in backwards if rate == max(rates)) / total
    assert 0.75 < falls < 0.85


@pytest.fixture
def hub() -> Any:
    with Hub() as hub:
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "part"])
def test_schedules_of_hub_sources_end_where_epochs_do(kind: str, hub: Hub, tmp_path: Path) -> None:
    """Of thousands of rows, all counted; and of files that say how many they hold, of which only a
    part is counted. Killed and started again, the run keeps what it decided, and ends in the same
    weights."""
    parts = [rows(1500)[i::4] for i in range(4)]
    files = {
        f"data/train-{i}.{'jsonl' if kind == 'jsonl' else 'parquet'}": part
        for i, part in enumerate(parts)
    }
    hub.add_dataset(
        "me/stories",
        {
            n: lines(p) if kind == "jsonl" else parquet(p, row_group_size=200)
            for n, p in files.items()
        },
    )
    source = {"type": "hf", "dataset": "me/stories", "name": "stories"}
    preset = merged(
        EPOCHS,
        {
            "data": {"sources": [source]},
            "train": {"checkpoint_every_steps": 20, "per_gpu_batch_size": 64},
        },
    )
    names = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "NO_PROXY")
    found = []
    for kills in (0, 1) if kind == "part" else (0,):
        project = Project.make(tmp_path / str(kills), {"t": preset})
        if kind == "part":
            with (project.folder / "core" / "data" / "source_size.py").open("a") as file:
                file.write("\ntokens_of_pass.__defaults__ = (30_000, None)\n")
        env = {
            name: value for name, value in hub.env(project.folder / "hf").items() if name in names
        }
        for _ in range(kills):
            project.run_until(
                "t", lambda project=project: project.num_steps() > 30, signal.SIGKILL, **env
            )
            assert 30 < project.num_steps() < len(found[0].steps())
        result = project.run("t", **env)
        assert result.code == 0 and "finished: max_epochs reached" in result.out, result.text
        assert_spans_the_run(project.events(), 0.06 if kind == "part" else 0.02)
        found.append(project)
    assert differences(found[0].checkpoint(), found[-1].checkpoint()) == []
    epoch_tokens = found[0].checkpoint()["data"]["epoch_tokens"]
    assert epoch_tokens * 2 == found[0].events("run_start")[0]["end_tokens"]


def test_schedules_and_progress_end_where_epochs_do(tmp_path: Path) -> None:
    """What is shown says so at once: part done, tokens in all, the time that is left, and what a
    run took in the menu."""
    events = train_here(EPOCHS, tmp_path)
    assert events[-1]["event"] == "run_end" and events[-1]["reason"] == "max_epochs"
    assert_spans_the_run(events)
    out = io.StringIO()
    plain, progress = PlainLines(out, step_seconds=0.0), RunProgress(events[0])
    fractions = []
    for event in events:
        if event["event"] == "run_start":
            progress = RunProgress(event)
        plain.update(event)
        progress.update(event)
        fractions.append(progress.fraction)
    steps = [event for event in events if event["event"] == "step"]
    middle = next(
        i for i, e in enumerate(events) if e["event"] == "step" and e["step"] == len(steps) // 2
    )
    assert fractions[middle] == pytest.approx(0.5, abs=0.03)
    assert max(fractions[:-1]) < 1.0
    assert fractions[-1] == 1.0
    assert "100.0 %" not in out.getvalue().split("finished")[0]
    card = json.loads((tmp_path / "logs" / "t" / "run.json").read_text())
    whole, end = card["whole_run"], card["end_tokens"]
    assert whole == {
        "seconds": pytest.approx(events[-1]["time"] - events[0]["time"], abs=0.1),
        "tokens": steps[-1]["run_tokens"],
    }
    slow = whole | {"seconds": 540}
    # evaluations and all, of which the speed of a step knows nothing
    for known, changes, told in (
        (
            {"tokens_per_second": end / 300, "whole_run": None},
            {},
            "; a run would take about 5 min here",
        ),
        (
            {"tokens_per_second": end / 300, "whole_run": slow},
            {},
            "; a run took about 9 min here",
        ),
        (
            {"whole_run": slow},
            {"max_steps": len(steps) // 3},
            "; a run would take about 3 min here",
        ),
    ):
        (tmp_path / "logs" / "t" / "run.json").write_text(json.dumps(card | known))
        preset = decode_preset(merged(EPOCHS, {"train": changes}), Preset, "t", "t")
        assert time_remark(preset, detect_runtime(), tmp_path) == told


def test_a_source_without_weight_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for number in range(40, 140):
        (tmp_path / "more" / f"{number}.txt").write_text(story(number))
    sources = [{"type": "text", "path": "texts"}, {"type": "text", "path": "more"}]
    weighted = {
        "data": {"sources": sources, "mix_strategy": "weighted", "source_weights": [1.0, 0.0]}
    }
    assert_spans_the_run(train_here(merged(EPOCHS, weighted), tmp_path))


def test_a_source_that_has_ended_has_no_weight(tmp_path: Path) -> None:
    """After two passes over a few documents all the others come from where there are many."""
    for name, count in (("few", 30), ("many", 1200)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": story(n, 2)}) + "\n" for n in range(count))
        )
    sources = [{"type": "text", "path": f"{name}.jsonl", "name": name} for name in ("few", "many")]
    events = train_here(merged(EPOCHS, {"data": {"sources": sources}}), tmp_path)
    assert events[0]["eval_every_tokens"] == 10_000_000 and events[0]["compile_from_step"] is None
    assert re.search(r"multiplying takes about \d s of the run", events[0]["compile"])
    steps = [
        {name: each["weight"] for name, each in event["sources"].items()}
        for event in events
        if event["event"] == "step"
    ]
    assert steps[0] == {"few": 0.5, "many": 0.5} and steps[-1] == {"few": 0.0, "many": 1.0}


class Rows:
    """A source whose shards say how many documents they hold, or do not."""

    name, size_is_positions = "rows", True

    def __init__(self, sizes: list[int], told: bool = True, finite: bool = False):
        self.sizes, self.told, self.finite, self.read = sizes, told, finite, 0

    def order(self, epoch: int) -> list[int]:
        return list(range(len(self.sizes)))

    def size(self, shard: int) -> int | None:
        return self.sizes[shard] if self.told else None

    def stream(self, cursor: dict) -> "Rows":
        self.read = 0
        return self

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> Document:
        if self.read == sum(self.sizes):
            raise StopIteration
        self.read += 1
        return Document("x" * (10 + self.read * 37 % 50), f"#{self.read}")

    def cursor(self) -> dict[str, int]:
        ends = [*itertools.accumulate(self.sizes)]
        unit = next((i for i, end in enumerate(ends) if self.read <= end), len(ends))
        return {"epoch": 0, "unit": unit, "piece": self.read - ([0, *ends])[unit]}


def test_a_pass_is_counted_or_told_from_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counter(byte_tokenizer(), lambda document: True, 1)
    small, large, untold = Rows([900, 300, 800]), Rows([1500] * 40), Rows([1500] * 40, told=False)
    exact = sum(len(document.text) + 1 for document in small.stream({}))
    assert tokens_of_pass(small, count, 10**9) == exact
    assert tokens_of_pass(small, count, 5000) == 5000  # type: ignore
    exact = sum(len(document.text) + 1 for document in large.stream({}))
    found = tokens_of_pass(large, count, 10**9, counted=80_000)  # type: ignore
    assert found == pytest.approx(exact, rel=0.01) and large.read < 4000
    monkeypatch.setattr(source_size, "UNKNOWN_TOKENS", 90_000)
    assert tokens_of_pass(untold, count, 10**9, counted=80_000) is None and untold.read < 4000  # type: ignore
    untold.finite = True
    assert tokens_of_pass(untold, count, 10**9, counted=80_000) == exact  # type: ignore


def test_a_part_is_set_against_the_files_it_is_of(tmp_path: Path) -> None:
    """Wherever in a file the counting ends: what was counted of it is not set against the files
    before it alone."""
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.jsonl").write_bytes(
            lines([{"text": "x" * 199} for _ in range(300)])
        )
    source = build_source(TextSettings(path="texts", name="texts"), tmp_path, 1)
    count = counter(byte_tokenizer(), lambda document: True, 1)
    for counted in (1_000, 61_000, 119_000, 121_000, 300_000):
        assert tokens_of_pass(source, count, 10**9, counted=counted) == pytest.approx(
            20 * 300 * 200, rel=0.001
        ), counted


# sources that are read over and over --------------------------------------------------------------


def told_epochs(folder: Path, tokens: int, **data: Any) -> dict[str, int]:
    """{source: passes} of which a run of so many tokens warns."""
    preset = decode_preset(tiny_preset(data=data), Preset, "t", "t")
    corpus = open_corpus(preset, folder, Single())
    told = [
        message.split(" times:")[0].split(" would be read about ")
        for message in corpus.repetition_warnings(byte_tokenizer(), tokens)
    ]
    return {name: int(epochs.replace(",", "")) for name, epochs in told}


def test_a_source_that_is_read_over_and_over_is_told(tmp_path: Path) -> None:
    """With the number of passes, from its size and share; by documents, by tokens, and read in
    turn."""
    for name, count, sentences in (("few", 10, 20), ("many", 400, 4)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": story(n, sentences)}) + "\n" for n in range(count))
        )
    few, many = (
        {"type": "text", "path": f"{name}.jsonl", "name": name} for name in ("few", "many")
    )
    held = {
        name: sum(len(json.loads(line)["text"]) + 1 for line in (tmp_path / f"{name}.jsonl").open())
        for name in ("few", "many")
    }
    held["few"] *= 0.9  # one of ten is held out
    how = {
        "sources": [few, many],
        "mix_strategy": "weighted",
        "source_weights": [0.5, 0.5],
        "weights_of": "tokens",
    }
    tokens = 600_000
    assert told_epochs(tmp_path, tokens, **how) == {
        "few": pytest.approx(tokens / 2 / held["few"], rel=0.1)
    }
    documents = {**how, "weights_of": "documents"}  # those of "few" are five times as long
    assert told_epochs(tmp_path, tokens, **documents) == {
        "few": pytest.approx(tokens * 5 / 6 / held["few"], rel=0.1)
    }
    alone = {"sources": [few], "validation_fraction": 0.1}
    assert told_epochs(tmp_path, 1_000_000, **alone) == {
        "few": pytest.approx(1_000_000 / held["few"], rel=0.1)
    }
    assert told_epochs(tmp_path, round(9 * held["few"]), **alone) == {}
    in_turn = {"sources": [few, many], "mix_strategy": "sequential"}
    whole = sum(held.values())
    expected = pytest.approx(3_000_000 / whole, rel=0.1)
    assert told_epochs(tmp_path, 3_000_000, **in_turn) == {"few": expected, "many": expected}


def test_what_is_advised_works(tmp_path: Path) -> None:
    """A smaller share, where there are others and by what gives shares."""
    few, many = (
        {"type": "text", "path": f"{name}.jsonl", "name": name} for name in ("few", "many")
    )
    for name, count in (("few", 10), ("many", 400)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": story(n, 4)}) + "\n" for n in range(count))
        )
    weighted = {"mix_strategy": "weighted", "source_weights": [0.5, 0.5]}
    for sources, how, advice in (
        (
            [few, many],
            {},
            'give it a smaller share ("mix_strategy": "weighted", with source_weights), add text',
        ),
        ([few, many], weighted, "give it a smaller share in data.source_weights, add text"),
        ([few, many], {"mix_strategy": "sequential"}, "but the text itself: add text"),
        ([few], {}, "but the text itself: add text"),
    ):
        preset = decode_preset(tiny_preset(data={"sources": sources, **how}), Preset, "t", "t")
        told = open_corpus(preset, tmp_path, Single()).repetition_warnings(
            byte_tokenizer(), 5_000_000
        )
        assert told and all(advice in message for message in told)


def test_it_is_told_before_a_run_begins(tmp_path: Path) -> None:
    """Shortened runs, too; not of one whose epochs the preset has limited."""
    data = {"sources": [{"type": "text", "path": "texts/story0[0-2].txt", "name": "few"}]}
    for name, limits in (
        ("long", {}),
        ("short", {"per_gpu_batch_size": 64}),
        ("epochs", {"max_epochs": 30}),
    ):
        train = {"max_steps": 3, "per_gpu_batch_size": 512, "eval_tokens": 0, **limits}
        train_here(tiny_preset(train=train, data=data), tmp_path / name)
    for name, count in (("long", 1), ("short", 0), ("epochs", 0)):
        events = Project(tmp_path / name).events()
        told = [
            i
            for i, e in enumerate(events)
            if e["event"] == "warning" and "would be read about" in e["message"]
        ]
        assert len(told) == count
        assert all(
            i < next(k for k, e in enumerate(events) if e["event"] == "run_start") for i in told
        )


# ranks that see other files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "story07.txt").unlink(), "it lacks texts/story07.txt"),
        (lambda folder: (folder / "zz.txt").write_text("One more."), "it has besides texts/zz.txt"),
        (
            lambda folder: (folder / "story07.txt").write_text("Cut."),
            "it has with another size texts/story07.txt",
        ),
        (
            lambda folder: (folder / "story07.txt").write_text(story(7).upper()),
            "the same files hold other text",
        ),
    ],
)
def test_ranks_that_see_other_files_are_refused(change: Any, told: str, tmp_path: Path) -> None:
    """Told on every rank, with the difference; each rank's own machine has the folder at the same
    place."""
    from core.data.agreement import agreed_contents

    for rank in range(3):
        (tmp_path / str(rank) / "texts").mkdir(parents=True)
        for number in range(12):
            (tmp_path / str(rank) / "texts" / f"story{number:02}.txt").write_text(story(number))
    preset = decode_preset(tiny_preset(), Preset, "t", "t")

    def job(parallel: Any) -> str | dict:
        corpus = open_corpus(preset, tmp_path / str(parallel.rank), parallel)
        try:
            return agreed_contents(corpus, parallel)
        except UserError as error:
            return str(error)

    same = Ranks(3).run(job)
    assert same[0] == same[1] == same[2] and isinstance(same[0], dict)
    change(tmp_path / "2" / "texts")
    found = Ranks(3).run(job)
    assert found[0] == found[1] == found[2]
    assert found[0].startswith(
        "the processes would not read the same data: source texts is another on rank 2 than on "
        f"rank 0 ({told}"
    )
