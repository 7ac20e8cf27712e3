"""A runnable copy of the project in a folder of its own: what end-to-end tests start, stop, kill
and look into.

project = Project.make(tmp_path, {"t": tiny_preset(train={"max_steps": 5})})
result = project.run("t")
assert result.code == 0 and project.steps() == [1, 2, 3, 4, 5]
"""

import compileall
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent

NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
"""An endpoint where nothing listens: what a machine without a network sees, at once and on every
machine."""

OF_THE_MACHINE = {"time", "seconds", "tokens_per_second", "data_seconds", "memory_mb"}
"""Fields of the log that are about the machine, and differ each time."""

TINY_SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
}
"""Sizes that make a model of any kind small, as far as it has these settings."""


def merged(base: dict, changes: dict) -> dict:
    """`changes` over `base`, sections merged key by key."""
    both = {
        key: merged(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **changes, **both}


def tiny_preset(**changes: Any) -> dict:
    """A preset that trains in about a second on the text files of a Project."""
    preset = {
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "seq_length": 32},
        "tokenizer": {"type": "byte"},
        "train": {
            "per_gpu_batch_size": 4,
            "learning_rate": 0.003,
            "max_steps": 5,
            "eval_tokens": 200,
        },
        "data": {"sources": [{"type": "text", "path": "texts"}], "lanes": 4},
        "generate": {"prompts": ["The "], "max_tokens": 4},
    }
    return merged(preset, changes)


def story(number: int, sentences: int = 12) -> str:
    """Text that differs from every other story's and is the same on every machine."""
    words = [
        "river",
        "stone",
        "winter",
        "garden",
        "letter",
        "engine",
        "window",
        "market",
        "silver",
        "thunder",
        "captain",
    ]
    lines = []
    for i in range(sentences):
        a, b, c = (words[(number * k + i * j) % len(words)] for k, j in ((3, 5), (5, 7), (7, 3)))
        year = number * 31 + i
        lines.append(f"In year {year} the {a} of the {b} met a {c}, and nobody wrote it down.")
    return "\n".join(lines) + "\n"


def write_stories(root: Path) -> None:
    """Write the 40 stories that a Project reads into its folder `texts`."""
    (root / "texts").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        (root / "texts" / f"story{number:02}.txt").write_text(story(number))


@dataclass
class Result:
    """The end of a run: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class Project:
    """A copy of main.py, core/ and some presets; `texts/` holds 40 short stories."""

    folder: Path
    used: ClassVar[set[Path]] = set()
    """The folders made since a test began: no update may have been skipped in them."""

    def __post_init__(self) -> None:
        self.used.add(self.folder)

    @classmethod
    def make(cls, folder: Path, presets: dict[str, dict | str]) -> "Project":
        """Make the copy in `folder`.

        presets   by the stem of their file: each a preset, or the file's text
        """
        folder.mkdir(parents=True, exist_ok=True)
        compile_once()
        shutil.copytree(ROOT / "core", folder / "core")
        shutil.copy2(ROOT / "main.py", folder / "main.py")
        for name in ("configs", "pdfs"):
            (folder / name).mkdir()
        write_stories(folder)
        project = cls(folder)
        for stem, preset in presets.items():
            project.write_preset(stem, preset)
        return project

    def write_preset(self, stem: str, preset: dict | str) -> None:
        text = preset if isinstance(preset, str) else json.dumps(preset, indent=2)
        (self.folder / "configs" / f"{stem}.json").write_text(text)

    def start(
        self, line: str | None, *arguments: str, command: list[str] | None = None, **env: str
    ) -> subprocess.Popen:
        """Start main.py with one line on standard input; with standard input closed if it is
        None."""
        environment = {**os.environ, **NO_HUB, "OMP_NUM_THREADS": "1", **env}
        process = subprocess.Popen(
            [*(command or [sys.executable]), "main.py", *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL if line is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=(lambda: os.close(0)) if line is None else None,
        )
        if process.stdin is not None:
            # a program that refuses its arguments ends without reading
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{line}\n")
                process.stdin.close()
            process.stdin = None  # communicate() would write to it again
        return process

    def run(self, line: str | None, *arguments: str, timeout: float = 240.0, **how: Any) -> Result:
        """Run main.py to its end."""
        process = self.start(line, *arguments, **how)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            kill_group(process)
        return Result(process.returncode, out, err)

    def run_until(
        self, line: str, ready: Callable[[], bool], then: signal.Signals, **how: Any
    ) -> Result:
        """Run until `ready()`, then send a signal to the whole group; a run that ends before gets
        none."""
        process = self.start(line, **how)
        try:
            end = time.monotonic() + 120
            while process.poll() is None and not ready():
                assert time.monotonic() < end, "the run never got ready to be stopped"
                time.sleep(0.002)
            if process.poll() is None:
                os.killpg(process.pid, then)
                if then == signal.SIGKILL:
                    self.kill_what_is_left()
            out, err = process.communicate(timeout=120)
        finally:
            kill_group(process)
        return Result(process.returncode, out, err)

    def kill_what_is_left(self) -> None:
        """End every process that runs in this folder: torchrun starts its ranks in sessions of
        their own."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if Path(os.readlink(entry / "cwd")) == self.folder:
                        os.kill(int(entry.name), signal.SIGKILL)

    def events(self, kind: str | None = None, lineage: str = "t") -> list[dict]:
        """Read the lines of metrics.jsonl; a half-written last one, as a kill leaves it, is left
        out."""
        path = self.folder / "logs" / lineage / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [event for event in map(json.loads, lines) if kind in (None, event["event"])]

    def steps(self, lineage: str = "t") -> list[int]:
        return [event["step"] for event in self.events("step", lineage)]

    def num_steps(self, lineage: str = "t") -> int:
        """Count the steps in the log, quickly: for tests that wait for one."""
        path = self.folder / "logs" / lineage / "metrics.jsonl"
        return path.read_bytes().count(b'{"event": "step"') if path.exists() else 0

    def finished(self, lineage: str = "t") -> bool:
        """Return whether the newest checkpoint is the end of a run: the next start would begin
        another."""
        from core.checkpoint.slots import CheckpointStore

        state = CheckpointStore(self.folder / "checkpoints", lineage).load()[0]
        return state is not None and state["progress"]["finished"]

    def checkpoint(self, slot: str = "current", lineage: str = "t") -> dict[str, Any]:
        return torch.load(self.folder / "checkpoints" / f"{lineage}_{slot}.pth", weights_only=True)


def skipped_updates(folders: Iterable[Path]) -> dict[str, int]:
    """Count the updates that the runs in these folders skipped because a number was not finite, by
    log."""
    skipped = {}
    for log in {log for folder in folders for log in folder.rglob("metrics.jsonl")}:
        counts = [int(count) for count in re.findall(rb'"skipped": (\d+)', log.read_bytes())]
        skipped |= {str(log): max(counts)} if any(counts) else {}
    return skipped


@functools.cache
def compile_once() -> None:
    """Write bytecode for all copies: where Python is told to write none, each start would compile
    the whole program again."""
    compileall.compile_dir(ROOT / "core", quiet=1)


def train_here(preset: dict, root: Path, stem: str = "t") -> list[dict]:
    """Run a preset's training in this process, in a folder that gets the stories to read; returns
    every event so far.

    Figures are not drawn, which takes longer than the training does; real runs draw them.
    """
    from core.jobs.train import train
    from core.parallel.single import Single
    from core.preset.decode import decode_preset
    from core.registry import Preset
    from core.runtime import detect_runtime

    write_stories(root)
    decoded = decode_preset(preset, Preset, stem, stem)
    with (
        mock.patch("core.reports.run_card.plot_losses"),
        mock.patch("core.reports.curves_masked.plot_masked"),
    ):
        train(decoded, detect_runtime(), Single(), root, 0.0, io.StringIO())
    return Project(root).events(lineage=decoded.lineage)


def kill_group(process: subprocess.Popen) -> None:
    """Kill every process of a run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Name the parts that differ by a bit in two checkpoints, or are in one only: weights of the
    model and of its heads, optimizer, progress, position in the data and mix."""
    one, other = _tensors(a), _tensors(b)
    same = {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}
    names = [" ".join(name) for name in sorted((one.keys() | other.keys()) - same)]
    return names + [key for key in ("progress", "data", "adaptive") if a[key] != b[key]]


def _tensors(state: dict[str, Any]) -> dict[tuple[str, ...], torch.Tensor]:
    named = {}
    for part in ("model", "heads"):
        for name, tensor in state[part].items():
            named[part, name] = tensor
    for name, tensors in state["optimizer"].items():
        for key, tensor in tensors.items():
            named["optimizer", name, key] = tensor
    return named


def measured(events: Iterable[dict]) -> list[dict]:
    """Return the lines of a log that say how training went, in order, without times, speeds and
    memory."""
    kinds = ("step", "eval", "sample", "neighbors", "reweighted")

    def without_machine(
        value: Any,
    ) -> Any:  # a curriculum's seconds stand in a section of their own
        if not isinstance(value, dict):
            return value
        return {k: without_machine(v) for k, v in value.items() if k not in OF_THE_MACHINE}

    return [without_machine(event) for event in events if event["event"] in kinds]
