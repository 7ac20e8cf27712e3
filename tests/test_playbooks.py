"""The playbooks, followed in a copy of the project: what they add is trained or run, and tested."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.metrics.events import LOG
from tests.documents import fenced
from tests.project import ROOT, Project

PLAYBOOKS = sorted((ROOT / "docs" / "playbooks").glob("*.md"))


@dataclass(frozen=True)
class Followed:
    """What a playbook made in a copy of the project."""

    kind: str  # the name of the model, loss, head, source, job or metric that it adds
    preset: str  # the stem of its preset
    files: list[Path]

    @property
    def tests(self) -> list[str]:
        """The tests that it wrote, or else the project's tests of all that are in the table."""
        own = [str(path) for path in self.files if path.name.startswith("test_")]
        of_table = {
            "models": "tests/models/test_models.py",
            "losses": "tests/losses/test_losses.py",
        }
        return own or [of_table[path.parent.name] for path in self.files[:1]]


def follow(playbook: Path, project: Project) -> Followed:
    """Do what a playbook says in a copy of the project."""
    made = []
    for block in fenced(playbook.read_text()):
        if not block.info.startswith("file="):
            continue
        path = project.folder / block.info.removeprefix("file=")
        lines = block.code.splitlines()
        if block.language != "diff":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
            made.append(path)
        elif all(line.startswith("+") for line in lines):
            add_to_table(path, [line[1:] for line in lines])
        else:
            apply_diff(path, lines)
    (preset,) = [path.stem for path in made if path.suffix == ".json"]
    return Followed(preset.removeprefix("my_"), preset, made)


def add_to_table(path: Path, lines: list[str]) -> None:
    """An import at the top, and an entry at the end of the one table that stands in capitals in the
    file's first dict."""
    imported, entry = lines
    source = path.read_text()
    table = next(
        node
        for node in ast.parse(source).body
        if isinstance(getattr(node, "value", None), ast.Dict)
    ).value  # type: ignore[attr-defined]
    rows = source.splitlines(True)
    end = sum(len(row) for row in rows[: table.end_lineno - 1]) + table.end_col_offset - 1
    before = source[:end].rstrip().removesuffix(",")
    changed = f"{before}, {entry.strip()}{source[end:]}"
    path.write_text(changed.replace("from core", f"{imported}\nfrom core", 1))


def apply_diff(path: Path, lines: list[str]) -> None:
    """Lines that begin with + are new; the others stand in the file, once, one after the other."""
    context = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    source = path.read_text()
    assert context and source.count(context) == 1, f"{path.name} has no such lines:\n{context}"
    path.write_text(source.replace(context, "".join(f"{line[1:]}\n" for line in lines)))


def run_preset(followed: Followed, project: Project) -> None:
    """Run what a playbook added: a training of two steps that has it, or its job."""
    result = project.run(followed.preset)
    assert result.code == 0, result.text
    logs = project.folder / "logs" / followed.preset
    if followed.files[0].parent.name == "jobs":
        assert (logs / f"{followed.kind}.json").exists() and not (logs / LOG).exists()
        return
    assert project.steps(followed.preset) == [1, 2]
    (evaluation,) = project.events("eval", followed.preset)
    settled = json.dumps(json.loads((logs / "preset.json").read_text()))
    heads = evaluation.get("heads", {})
    in_preset = f'"type": "{followed.kind}"' in settled
    assert followed.kind in evaluation or followed.kind in heads or in_preset


@pytest.mark.slow
def test_playbooks_work(make_project: Callable[..., Project]) -> None:
    """The files, the lines and the presets of the playbooks, in one project: each is run, and its
    own tests, or those of everything in its table."""
    project = make_project({"90_quick_test": (ROOT / "configs" / "90_quick_test.json").read_text()})
    all_followed = [follow(playbook, project) for playbook in PLAYBOOKS]
    for followed in all_followed:
        run_preset(followed, project)
    for name in (
        "conftest.py",
        "project.py",
        "hub.py",
        "__init__.py",
        "models",
        "losses",
        "heads",
        "golden",
    ):
        source, target = ROOT / "tests" / name, project.folder / "tests" / name
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            target.symlink_to(source)
    kinds = [followed.kind for followed in all_followed]
    paths = [path for followed in all_followed for path in followed.tests]
    options = ["-v", "-p", "no:cacheprovider", "-k", " or ".join(kinds)]
    checked = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *paths],
        cwd=project.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for kind in kinds:
        assert re.search(rf"{kind}.* PASSED", checked.stdout), checked.stdout
