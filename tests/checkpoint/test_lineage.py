"""A lineage has one owner at a time; what it was learned from is told; put aside, it is another
lineage, whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.checkpoint import lineage as lineage_module
from core.checkpoint.lineage import has_checkpoints, owned, put_aside
from core.errors import UserError
from tests.data.pdfs import column, pdf_of_lines
from tests.project import ROOT, tiny_preset, train_here

HOLD = """
import sys, time
from pathlib import Path
from core.checkpoint import lineage
if sys.argv[3] == "no locks":
    lineage.fcntl = None
with lineage.owned(Path(sys.argv[1]), sys.argv[2], "train"):
    print("held", flush=True)
    time.sleep(120)
"""


class Holder:
    """Another process that owns a lineage."""

    def __init__(self, root: Path, name: str, locks: str = "locks"):
        run = [sys.executable, "-c", HOLD, str(root), name, locks]
        self.process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.communicate(timeout=30)


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the system's locks, and as on a file system that has none."""
    if request.param == "no locks":
        monkeypatch.setattr(lineage_module, "fcntl", None)
    yield request.param


def test_the_second_owner_is_refused_by_name_and_a_killed_one_is_no_obstacle(
    tmp_path: Path, locks: str
) -> None:
    """With its process, host and since when. Another lineage is free; after kill -9 and after an
    orderly end this one is, too."""
    for how in (signal.SIGKILL, signal.SIGINT):
        holder = Holder(tmp_path, "t", locks)
        with pytest.raises(UserError) as caught:
            owned(tmp_path, "t", "train").__enter__()
        for told in (
            f"process {holder.process.pid} on {socket.gethostname()}, since 20",
            '"t" is in use',
            "(job train)",
            '"lineage"',
        ):
            assert told in str(caught.value)
        with owned(tmp_path, "t2", "train"):
            pass
        holder.end(how)
        with owned(tmp_path, "t", "train"):
            assert (
                json.loads((tmp_path / "checkpoints" / "t.lock").read_text())["process"]
                == os.getpid()
            )
        assert not (tmp_path / "checkpoints" / "t.lock").exists()


@pytest.mark.parametrize(
    "left",
    [
        {"host": "elsewhere"},  # another machine's, as it lies in a folder that was copied
        {"process": 1, "began": "0"},  # the number has gone round
        {"process": 2**22 + 5},
        {"process": "1"},
        b"",
        b"garbage",
        b"[1]",
        b"[" * 3000,
    ],
)
def test_what_a_dead_owner_left_is_no_obstacle(tmp_path: Path, left: Any, locks: str) -> None:
    path = tmp_path / "checkpoints" / "t.lock"
    path.parent.mkdir()
    facts = {
        "process": os.getppid(),
        "began": lineage_module._began(os.getppid()),
        "host": socket.gethostname(),
        "since": 1.0,
    }
    path.write_bytes(left if isinstance(left, bytes) else json.dumps(facts | left).encode())
    with owned(tmp_path, "t", "train"):
        pass


def test_a_lock_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Nor does a pipe in its place hang anybody."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "other").write_text("precious")
    path = tmp_path / "checkpoints" / "t.lock"
    for stand_in in (
        lambda: path.symlink_to(tmp_path / "other"),
        lambda: os.mkfifo(path),
        path.mkdir,
    ):
        stand_in()
        with pytest.raises(
            UserError,
            match=r"the lock .*t\.lock cannot be made: .*(is a link|it is no file).*\. Remove it",
        ):
            owned(tmp_path, "t", "train").__enter__()
        path.rmdir() if path.is_dir() else path.unlink()
    assert (tmp_path / "other").read_text() == "precious"


@pytest.mark.slow
def test_two_starts_of_one_lineage(make_project: Any) -> None:
    """The second is refused, by whatever job, and changes nothing; killed, the first is no
    obstacle, and it all goes on."""
    long = tiny_preset(lineage="t", train={"max_steps": 100_000, "checkpoint_every_steps": 20})
    compared = {
        **tiny_preset(lineage="t"),
        "job": "compare",
        "variants": [{"name": "a"}, {"name": "b"}],
        "seeds": [1],
    }
    project = make_project({"t": long, "compared": compared})
    first = project.start("t")
    try:
        end = time.monotonic() + 120
        while project.num_steps() < 45:
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.05)
        for preset in ("t", "compared"):
            second = project.run(preset)
            assert (
                second.code == 2
                and f"process {first.pid} on {socket.gethostname()}, since" in second.err
            ), second.text
            assert "Traceback" not in second.text
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    project.write_preset("t", tiny_preset(lineage="t", train={"max_steps": 60}))
    assert project.run("t").code == 0
    steps = project.steps()
    assert steps == list(range(1, len(steps) + 1)), "the log has a step twice, or lacks one"
    assert not (project.folder / "checkpoints" / "t.lock").exists()


# what it was learned from -------------------------------------------------------------------------


MINE = {"type": "pdf", "path": "./pdfs", "name": "mine"}
"""A source that may be missing: a run goes on without the folder that presets name by default."""
TEXTS = {"type": "text", "path": "texts"}


def told(events: list[dict]) -> list[str]:
    """What the last start said, as warnings and notes."""
    ends = [0, *(i for i, event in enumerate(events[:-1]) if event["event"] == "run_end")]
    last = events[ends[-1] :]
    warnings = [event["message"] for event in last if event["event"] == "warning"]
    notes = next(event for event in last if event["event"] == "run_start")["notes"]
    return [each for each in (*warnings, *notes) if "were learned" in each]


def test_a_mended_source_is_told(tmp_path: Path) -> None:
    """Missing in the first run, there in the second: the weights are not what the preset says they
    are."""
    both = tiny_preset(data={"sources": [TEXTS, MINE]})
    train_here(both, tmp_path)
    (tmp_path / "pdfs").mkdir()
    for number in range(12):
        lines = column(
            f"My text, number {number}, is of some length and goes on. " * 30, 50, 780, 80
        )
        (tmp_path / "pdfs" / f"{number}.pdf").write_bytes(pdf_of_lines([lines]))
    (line,) = told(train_here(both, tmp_path))
    assert (
        "the weights of step 5 were learned without mine, which could not be read then" in line
        and "start fresh" in line
    )
    assert told(train_here(both, tmp_path)) == [], "from now on it is as the preset says"
    (line,) = told(train_here(tiny_preset(data={"sources": [MINE]}), tmp_path))
    assert "with texts, which the preset no longer names" in line
    (line,) = told(train_here(tiny_preset(data={"sources": [{**TEXTS, "name": "mine"}]}), tmp_path))
    assert "with another mine (type, path changed)" in line


# put aside ----------------------------------------------------------------------------------------


def test_a_lineage_put_aside_is_whole_under_another_name(tmp_path: Path) -> None:
    """Checkpoints, logs and what is damaged; its neighbours stay. The next start is fresh;
    `init_from` takes the old one."""
    for stem in ("t", "t_b"):
        train_here(tiny_preset(train={"checkpoint_every_steps": 2}), tmp_path, stem)
    (tmp_path / "checkpoints" / "t_prev.pth.damaged").write_text("kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    name = put_aside(tmp_path, "t")
    assert (
        name.startswith("t.before-20")
        and not has_checkpoints(tmp_path, "t")
        and has_checkpoints(tmp_path, name)
    )
    after = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert after == {k if k.startswith("t_b") else name + k[1:]: v for k, v in before.items()}
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {name, "t_b"}
    assert [e["step"] for e in train_here(tiny_preset(), tmp_path) if e["event"] == "step"] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert put_aside(tmp_path, "t") == f"{name}-2"
    events = train_here(tiny_preset(init_from=name), tmp_path)
    assert (
        f"{name}_current.pth" in next(e for e in events if e["event"] == "run_start")["init_from"]
    )


def test_what_is_in_use_is_not_put_aside(tmp_path: Path) -> None:
    holder = Holder(tmp_path, "t")
    (tmp_path / "checkpoints" / "t_current.pth").write_text("x")
    try:
        with pytest.raises(UserError, match="is in use"):
            put_aside(tmp_path, "t")
    finally:
        holder.end(signal.SIGKILL)
    assert (tmp_path / "checkpoints" / "t_current.pth").exists()
