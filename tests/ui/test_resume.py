"""The question whether to resume or to start fresh, in a real pseudo-terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from core.checkpoint.lineage import has_checkpoints
from tests.project import NO_HUB, Project, tiny_preset, train_here

SCRIPT = """
import sys
from pathlib import Path
from core.ui.resume import offer_fresh
try:
    offer_fresh(Path(sys.argv[1]), "t", lambda: ["resumes run 1 at step 7", "evil \\x1b[31m"])
    print("WENT ON")
except KeyboardInterrupt:
    print("LEFT")
"""
DOWN = "\x1b[B"


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Callable[..., pexpect.spawn]]:
    """Asks in a terminal of 24 x 80, about a lineage that has a checkpoint unless told
    otherwise."""
    script, children = tmp_path / "ask.py", []
    script.write_text(SCRIPT)

    def ask(has: bool = True, term: str = "xterm-256color") -> pexpect.spawn:
        if has:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "checkpoints" / "t_current.pth").write_text("x")
        env = {**os.environ, "TERM": term, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "utf-8"}
        run = [str(script), str(tmp_path)]
        children.append(
            pexpect.spawn(
                sys.executable, run, dimensions=(24, 80), encoding="utf-8", env=env, timeout=20
            )
        )
        return children[-1]

    yield ask
    for child in children:
        child.close(force=True)


@pytest.mark.parametrize(
    ("keys", "told", "kept"),
    [("\r", "WENT ON", True), (DOWN + "\r", "WENT ON", False), ("\x03", "LEFT", True)],
)
def test_enter_alone_resumes(
    asked: Callable, tmp_path: Path, keys: str, told: str, kept: bool
) -> None:
    child = asked()
    child.expect_exact("resumes run 1 at step 7")
    child.expect_exact("start fresh; what is there is kept as the lineage")
    assert "\x1b[31m" not in child.before
    child.send(keys)
    if not kept:
        child.expect_exact('what was there is the lineage "t.before-20')
    child.expect_exact(told)
    assert has_checkpoints(tmp_path, "t") is kept
    assert len(list((tmp_path / "checkpoints").glob("t*_current.pth"))) == 1, (
        "nothing is ever deleted"
    )


@pytest.mark.parametrize("how", [{"has": False}, {"term": "dumb"}])
def test_where_there_is_nothing_to_ask_or_nobody_nothing_is_asked(
    asked: Callable, how: dict
) -> None:
    child = asked(**how)
    child.expect_exact("WENT ON")
    assert "fresh" not in child.before


@pytest.mark.slow
def test_starting_fresh_through_the_menu(tmp_path: Path) -> None:
    """Enter, down, Enter: the run begins at step 1; what was there is a lineage of its own."""
    project = Project.make(tmp_path / "project", {"t": tiny_preset()})
    train_here(tiny_preset(), project.folder)
    env = {**os.environ, **NO_HUB, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    child = pexpect.spawn(
        sys.executable,
        ["main.py"],
        cwd=str(project.folder),
        dimensions=(40, 120),
        encoding="utf-8",
        env=env,
    )
    try:
        child.expect_exact("starts run 2 from step 5", timeout=60)
        child.send("\r")
        child.expect_exact("resume where it stopped?", timeout=60)
        child.send(DOWN + "\r")
        child.expect(pexpect.EOF, timeout=120)
    finally:
        child.close(force=True)
    assert child.exitstatus == 0
    (old,) = {
        path.name.removesuffix("_current.pth")
        for path in (project.folder / "checkpoints").glob("t.before-*_current.pth")
    }
    for lineage in ("t", old):
        assert (
            project.steps(lineage) == [1, 2, 3, 4, 5]
            and project.checkpoint(lineage=lineage)["progress"]["run"] == 1
        )
