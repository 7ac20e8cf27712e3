"""From a bare process to a running job: odd files beside good presets, refusals that lead back to
the menu, launchers."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch

import main
from core import launch
from core.environment import read_dotenv
from core.errors import Diverged, Interrupted, NoData, UserError
from core.jobs import Job
from core.preset.base import PresetBase
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import Runtime, detect_runtime
from core.terminal import tell, write_line
from tests.project import NO_HUB, ROOT, Project, tiny_preset

CPU = Runtime(torch.device("cpu"), 0, 0, 1)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def decoded(**changes: Any) -> Any:
    return decode_preset(tiny_preset(**changes), Preset, "t", "t")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with one good preset, that the launcher looks at."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "good.json").write_text(json.dumps(tiny_preset()))
    return tmp_path


# what stands beside a good preset -----------------------------------------------------------------


def test_one_odd_file_leaves_the_other_presets_as_they_are(root: Path) -> None:
    """Numbers without end, sizes without sense, folders, pipes, devices, dangling links, bytes: a
    line each, and at once."""
    configs = root / "configs"
    for name, text in {
        "ints": '{"train": {"seed": ' + "9" * 5000 + '}, "data": {"sources": ["pdf"]}}',
        "hidden": '{"model": {"hidden_size": 1e10}, "data": {"sources": ["pdf"]}}',
        "layers": '{"model": {"num_layers": 20000}, "data": {"sources": ["pdf"]}}',
        "deep": "[" * 5000,
        "text": "hello",
    }.items():
        (configs / f"{name}.json").write_text(text)
    (configs / "bytes.json").write_bytes(b"\xff\xfe\xfd\x80")
    (configs / "folder.json").mkdir()
    os.mkfifo(configs / "pipe.json")
    (configs / "device.json").symlink_to("/dev/zero")
    (configs / "dangling.json").symlink_to("nowhere")
    (configs / "._good.json").write_bytes(b"\0\x05\x16\x07")  # as macOS leaves them
    (configs / os.fsdecode(b"\xe9.json")).write_text("{}")
    began = time.monotonic()
    presets, cards = launch._read_presets(CPU)
    assert time.monotonic() - began < 5
    assert list(presets) == ["good"] and len(cards) == 12
    assert all(card.problem for card in cards if card.stem != "good")
    assert {card.stem: card for card in cards}["layers"].problem.endswith(
        "20000: input should be less than or equal to 1000"
    )


def test_without_the_packages_one_message_says_how_to_install_them() -> None:
    """Of packages that requirements.txt names only: a fault of the program's own is shown as it
    is."""
    for missing, code in (("", 2), ("sys.modules['core.launch'] = None; ", 1)):
        run = (
            f"import runpy, sys; sys.path.insert(0, '.'); {missing}runpy.run_path('main.py', "
            "run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", run], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code and ("Traceback" in done.stderr) == (code == 1), done
        assert ("pip install -r requirements.txt" in done.stderr) == (code == 2)


# refusals -----------------------------------------------------------------------------------------


class Menu:
    """Stands for the person: takes what it is told to, and keeps what it was shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *stems: str, drawn: bool = True):
        self.shown: list[str] = []
        self._stems = iter(stems)
        monkeypatch.setattr(launch, "choose", self.choose)
        monkeypatch.setattr(launch, "can_pick", lambda: drawn)

    def choose(self, cards: list[Any], default: str) -> str:
        self.shown += [
            f"{card.stem}: {card.problem or card.refusal}"
            for card in cards
            if card.problem or card.refusal
        ]
        return next(self._stems)


def test_what_is_refused_before_it_did_anything_leads_back_to_the_menu(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With the reason, on that preset; files are read again, so that what was mended meanwhile can
    start."""
    ran: list[str] = []

    def job(preset: Any, *_: Any) -> None:
        ran.append(preset.name)
        if len(ran) < 3:
            raise (UserError, NoData)[len(ran) - 1](f"no text {len(ran)}\x1b[2J")

    (root / "configs" / "bad.json").write_text("{")
    monkeypatch.setitem(launch.JOBS, "train", Job(job, PresetBase))
    menu = Menu(monkeypatch, "bad", "good", "good", "good")
    launch._run_until_one_starts(CPU, 0.0)
    assert ran == ["good"] * 3
    assert [line for line in menu.shown if line.startswith("good")] == [
        "good: no text 1\x1b[2J",
        "good: no text 2\x1b[2J",
    ]
    assert capsys.readouterr().err == "\nno text 1\n\nno text 2\n"


@pytest.mark.parametrize("ended", [Interrupted("saved"), Diverged("after an hour")])
def test_what_has_trained_or_was_interrupted_ends(
    ended: UserError, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(preset: Any, *_: Any) -> None:
        if isinstance(ended, Diverged):
            (root / "logs" / "good").mkdir(parents=True)
            (root / "logs" / "good" / "metrics.jsonl").write_text("{}\n")
        raise ended

    monkeypatch.setitem(launch.JOBS, "train", Job(job, PresetBase))
    Menu(monkeypatch, "good")
    with pytest.raises(type(ended)):
        launch._run_until_one_starts(CPU, 0.0)


def test_without_a_menu_a_refusal_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(*_: Any) -> None:
        raise NoData("none")

    monkeypatch.setitem(launch.JOBS, "train", Job(job, PresetBase))
    Menu(monkeypatch, "good", drawn=False)
    with pytest.raises(NoData):
        launch._run_until_one_starts(CPU, 0.0)


@pytest.mark.slow
def test_on_a_terminal_a_missing_file_leads_back_and_another_preset_trains(tmp_path: Path) -> None:
    missing = tiny_preset(name="MISSING", data={"sources": [{"type": "text", "path": "nowhere"}]})
    project = Project.make(
        tmp_path / "project", {"00_best_general": tiny_preset(), "0QQQQQQQQ": missing}
    )
    env = {
        **os.environ,
        **NO_HUB,
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    child = pexpect.spawn(
        sys.executable,
        ["main.py"],
        cwd=str(project.folder),
        env=env,
        dimensions=(40, 120),
        encoding="utf-8",
        timeout=90,
    )
    try:
        child.expect_exact("starts fresh")
        child.send("\x1b[B")
        # a name that shares no letter with the default's: only what changes is drawn again
        child.expect_exact("QQQQQQQQ")
        child.send("\r")
        child.expect_exact("choose a preset")
        child.expect_exact("nowhere")
        child.expect_exact("QQQQQQQQ")
        child.send("\x1b[A")
        child.expect_exact("best_general")
        child.send("\r")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0 and project.steps("00_best_general") == [1, 2, 3, 4, 5]
    finally:
        child.close(force=True)


# the launcher's variables -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_PORT is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"},
            "MASTER_ADDR",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "MASTER_PORT": "0",
                "MASTER_ADDR": "a",
            },
            "MASTER_PORT is '0'",
        ),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is"),
        ({"RANK": "1"}, "RANK is '1'; it has to be a whole number from 0 to 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is '3'"),
        ({"LOCAL_RANK": " "}, "LOCAL_RANK is ' '"),
    ],
)
def test_a_launcher_half_set_is_told_what_is_missing(
    variables: dict, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        detect_runtime()
    assert told in str(caught.value) and "torchrun" in str(caught.value)


def test_more_processes_than_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict(zip(LAUNCHER, ("3", "4", "3", "localhost", "29500")))
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert detect_runtime().rank == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK is 3, and this machine has 2 GPUs"):
        detect_runtime()


def test_processes_that_cannot_meet_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in zip(LAUNCHER, ("0", "2", "0", "127.0.0.1", str(taken.getsockname()[1]))):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="cannot meet at "):
            launch.rendezvous_store()


# what reaches the terminal ------------------------------------------------------------------------


def test_nothing_that_is_told_moves_the_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Errors as main.py prints them: colours, titles, cursor moves, reordering, NUL; lines stay
    lines."""

    def refuse(started: float) -> None:
        raise UserError(
            "one \x1b[31mred\x1b[0m\x1b]0;title\x07\n  two\x00 \u202egnp.exe "
            "\x9b2Jthree\rfour\ttabs é"
        )

    monkeypatch.setattr(launch, "launch", refuse)
    # it would put its own in the place of pytest's
    monkeypatch.setattr("core.terminal.guard_streams", lambda: None)
    monkeypatch.setattr("sys.argv", ["main.py"])
    assert main.main() == 2
    assert capsys.readouterr().err == "\none red\n  two gnp.exe three four tabs é\n"
    tell("a\x08b")
    assert capsys.readouterr().err == "ab\n"
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    write_line(stream, "é\x1b[2J\nb")
    assert stream.buffer.getvalue() == b"?\nb\n"  # type: ignore[attr-defined]


# .env ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "key", "told"),
    [
        (b"HF_TOKEN=hf_one\n", "hf_one", ""),
        (b"\xef\xbb\xbfexport HF_TOKEN='hf_one' # mine\r\n", "hf_one", ""),
        (b'HF_TOKEN="hf_one"\nOTHER=\x00\n', "hf_one", "line 2"),
        (b"HF_TOKEN=hf\x00_one\n", None, "line 1"),
        (b"HF_TOKEN='a\x1b[2Jb'\n", None, "line 1"),
        (b"\xff\xfeH\x00F\x00", None, "no UTF-8 text"),
        (b"HF_TOKEN=\xe9\n", None, "no UTF-8 text"),
    ],
)
def test_keys_of_a_file_of_any_bytes(
    content: bytes, key: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / ".env").write_bytes(content)
    notes = "\n".join(read_dotenv(tmp_path / ".env"))
    found = os.environ.pop("HF_TOKEN", None)  # before anything can fail: no other test gets it
    assert found == key and told in notes and bool(notes) == bool(told)


def test_a_pipe_in_the_place_of_keys_is_told_and_never_read(tmp_path: Path) -> None:
    """A folder of that name is a virtual environment."""
    os.mkfifo(tmp_path / ".env")
    assert "cannot be read" in read_dotenv(tmp_path / ".env")[0]
    (tmp_path / "venv" / ".env").mkdir(parents=True)
    assert read_dotenv(tmp_path / "venv" / ".env") == []
