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
from core import launch, preview
from core.environment import read_dotenv
from core.errors import Diverged, Interrupted, NoData, UserError
from core.jobs import Job
from core.preset.base import PresetBase
from core.preset.decode import decode_preset
from core.registry import Preset
from core.reports.run_card import RunCard, read_card
from core.runtime import Runtime, detect_runtime
from core.terminal import tell, write_line
from core.training.memory import check_memory, size_of
from tests.project import NO_HUB, ROOT, Project, merged, tiny_preset, train_here

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


@pytest.mark.parametrize(
    "card", ["[]", "3", "{", "null", '{"preset": []}', "NaN", "[" * 5000, "\xff"]
)
def test_no_log_of_one_preset_spoils_its_preview(card: str, root: Path) -> None:
    preset = decoded()
    (root / "logs" / "t").mkdir(parents=True)
    (root / "logs" / "t" / "run.json").write_bytes(card.encode("latin-1"))
    lines = preview.preview_lines(preset, CPU, launch.ROOT)
    assert lines[0].endswith("steps of 128") and lines[-1] == "starts fresh"


def test_a_speed_of_nothing_and_slots_that_lack_everything(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known is told; what cannot be told costs its own line."""
    preset = decoded()
    facts = {
        "preset": preset.name,
        "device": CPU.device_name,
        "world_size": 1,
        "tokens_per_step": 128,
        "tokens_per_second": 0,
    }
    (root / "logs" / "t").mkdir(parents=True)
    (root / "logs" / "t" / "run.json").write_text(json.dumps(facts))
    assert preview.preview_lines(preset, CPU, launch.ROOT)[-1] == "starts fresh"
    (root / "checkpoints").mkdir()
    torch.save(
        {"progress": {"step": 3}, "preset": {}, "model": {}}, root / "checkpoints" / "t_current.pth"
    )
    assert "parameters" in preview.preview_lines(preset, CPU, launch.ROOT)[0]
    monkeypatch.setattr(preview, "resume_lines", lambda preset, root: 1 // 0)
    assert preview.preview_lines(preset, CPU, launch.ROOT)[-1].startswith(
        "cannot tell more: ZeroDivisionError"
    )


def test_small_models_are_counted_and_a_preset_without_words_shows_none() -> None:
    preset = decoded()
    assert preview.preset_card("t", preset, CPU, launch.ROOT).description == "short", (
        "nothing stands behind it"
    )
    assert (
        preview.preset_card(
            "t", preset.model_copy(update={"description": "Tiny."}), CPU, launch.ROOT
        ).description
        == "short · Tiny."
    )
    model = size_of(preset, preview.known_vocab_size(preset.tokenizer, launch.ROOT))
    assert preview.training_lines(preset, CPU, launch.ROOT)[0].startswith(
        f"{model.parameters / 1000:.1f}k parameters, "
    )


def test_the_card_keeps_what_the_last_whole_run_took(tmp_path: Path) -> None:
    """Through runs that stop before their end, and those that went on from a checkpoint; not on
    another device."""
    facts = {"preset": "t", "device": "CPU", "world_size": 1}

    def run(reason: str, seconds: float, first: int = 0, **changes: Any) -> Any:
        card = RunCard(tmp_path, {}, 0.0, tmp_path)
        card.update(
            {
                "event": "run_start",
                "time": 100.0,
                "step": first,
                "tokens": 0,
                "run_step": first,
                **facts,
                **changes,
            }
        )
        step = {"step": first + 1, "tokens": 640, "time": 101.0}
        card.update({"event": "step", **step, "run_tokens": 640, "tokens_per_second": 64.0})
        card.update({"event": "run_end", **step, "reason": reason, "time": 100.0 + seconds})
        return read_card(tmp_path).get("whole_run")

    whole = {"seconds": 246.0, "tokens": 640}
    assert run("interrupted", 5.0) is None
    assert run("max_steps", 246.0) == whole
    assert run("interrupted", 5.0) == run("max_steps", 5.0, first=3) == whole
    assert run("interrupted", 5.0, device="GPU") is None


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
            launch._rendezvous_store()


# sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model": {"hidden_size": 131_072, "num_layers": 40, "num_heads": 1_024}},
            "weights and what trains them",
        ),
        (
            {"model": {"type": "polychromatic", "hidden_size": 131_072, "num_layers": 900}},
            "weights and what trains them",
        ),
        (
            {
                "model": {
                    "type": "gpt2",
                    "hidden_size": 98_304,
                    "num_layers": 1_000,
                    "num_heads": 512,
                }
            },
            "weights and what trains them",
        ),
        (
            {"model": {"seq_length": 64}, "train": {"per_gpu_batch_size": 1_000_000}},
            "a pass of 1,000,000 rows",
        ),
        (
            {
                "train": {
                    "per_gpu_batch_size": 1_000_000,
                    "accumulation_steps": 10_000,
                    "runs": 1_000_000,
                }
            },
            "the 10,000,000,000 rows of a step",
        ),
    ],
)
def test_what_no_memory_holds_is_refused_with_its_bytes(
    changes: dict, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built or read."""
    monkeypatch.setattr(Runtime, "memory_bytes", lambda self: 1 << 34)
    preset = merged(tiny_preset(), changes)
    if "type" in changes.get("model", {}):
        preset["model"] = changes["model"]
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=rf"{told} take [\d,]+ bytes of memory or more, and .* has 17,179,869,184\. Set ",
    ):
        check_memory(decode_preset(preset, Preset, "t", "t"), 257, CPU)
    assert time.monotonic() - began < 30
    check_memory(decoded(), 257, CPU)


def test_sizes_are_counted_without_touching_what_is_random() -> None:
    """The menu counts in a thread of its own, while the chosen preset may begin to draw its
    weights."""
    before = torch.random.get_rng_state()
    assert size_of(decoded(), 257)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_machine_has_memory() -> None:
    assert 1 << 28 < CPU.memory_bytes() < 1 << 50


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


def test_a_model_that_no_memory_holds_stops_before_anything_is_read(tmp_path: Path) -> None:
    """Not as an error of the allocator, and not after minutes of reading."""
    model = {"type": "polychromatic", "hidden_size": 131_072, "num_layers": 1_000, "seq_length": 32}
    with pytest.raises(
        UserError, match=r"[\d,]+ weights and what trains them take [\d,]+ bytes of memory or more"
    ):
        train_here({**tiny_preset(), "model": model}, tmp_path)
    assert not (tmp_path / "logs" / "t" / "metrics.jsonl").exists()
