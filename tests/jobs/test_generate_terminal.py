"""The generate job from the outside: in a terminal, through main.py, under torchrun."""

import os
import sys
from collections.abc import Callable, Iterator

import pexpect
import pytest

from tests.jobs.test_generate import TALK, TRAINED
from tests.project import NO_HUB, ROOT, Project, merged, train_here


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the program with a trained model, and one preset: to talk with it."""
    root = tmp_path_factory.mktemp("trained")
    train_here(TRAINED, root)
    project = Project.make(tmp_path_factory.mktemp("talk") / "project", {"g": TALK})
    (project.folder / "checkpoints").mkdir()
    (project.folder / "checkpoints" / "t_current.pth").write_bytes(
        (root / "checkpoints" / "t_current.pth").read_bytes()
    )
    return project


@pytest.fixture
def terminal(project: Project) -> Iterator[pexpect.spawn]:
    """The program in a terminal, at its prompt: the menu is over, by Enter."""
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
        dimensions=(24, 100),
        encoding="utf-8",
        env=env,
        timeout=60,
    )
    child.expect_exact("talks with t_current.pth, step 3")
    child.send("\r")
    child.expect_exact("sees 32 tokens")
    child.expect_exact("continues what you type")
    child.expect_exact("Ctrl-D leaves")
    child.expect_exact("> ")
    yield child
    child.close(force=True)


def ends(child: pexpect.spawn, status: int) -> None:
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == status, child.before


@pytest.mark.slow
def test_talking_in_a_terminal(terminal: pexpect.spawn) -> None:
    """Commands and their mistakes, an answer, one that is stopped, and one after it; /quit
    leaves."""
    for line, said in (
        ("/temprature 1", "did you mean /temperature?"),
        ("/temperature hot", 'not "hot"; it stays 0.9'),
        ("/temperature 0", "temperature is 0.0 now"),
        ("/help", "Ctrl-C stops an answer"),
        ("/max 1000000", "max is 1000000 now"),
    ):
        terminal.sendline(line)
        terminal.expect_exact(said)
        terminal.expect_exact("> ")
    terminal.sendline("In year 31")
    terminal.expect(r"\S+ +\S+")  # it streams
    terminal.expect(r".{20}")
    terminal.send("\x03")
    terminal.expect_exact("(stopped; Ctrl-D leaves)")
    terminal.expect_exact("> ")
    terminal.send("\x03")  # at the prompt too
    terminal.expect_exact("(stopped; Ctrl-D leaves)")
    terminal.sendline("/max 5")
    terminal.expect_exact("max is 5 now")
    terminal.expect_exact("> ")
    terminal.sendline("In year")
    terminal.expect(r"In year\r\n.+\r\n")
    terminal.expect_exact("> ")
    terminal.sendline("/quit")
    ends(terminal, 0)


@pytest.mark.slow
def test_ctrl_d_leaves(terminal: pexpect.spawn) -> None:
    terminal.send("\x04")
    ends(terminal, 0)


@pytest.mark.slow
def test_through_main(project: Project) -> None:
    """A pipe with lines and without; a model that is missing is exit code 2, with what to run."""
    project.write_preset("m", merged(TALK, {"init_from": "missing"}))
    try:
        result = project.run("g\nIn year\nThe ")
        assert (
            result.code == 0
            and result.err == ""
            and "\n> In year\n" in result.out
            and "\n> The \n" in result.out
        )
        result = project.run("g")
        assert result.code == 0 and result.out.count("\n> ") == 1 and "\n> The \n" in result.out
        result = project.run("m\nhello")
        assert (
            result.code == 2
            and result.out == ""
            and 'run a preset of lineage "missing" first' in result.err
        )
    finally:
        (project.folder / "configs" / "m.json").unlink()


@pytest.mark.slow
def test_under_torchrun_rank_0_alone_answers(project: Project) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = project.run("g\nIn year\nThe ", command=torchrun)
    assert result.code == 0 and "Traceback" not in result.text, result.text
    assert result.out.count("> In year\n") == result.out.count("> The \n") == 1


@pytest.mark.slow
def test_the_shipped_preset_follows_the_quick_test(make_project: Callable[..., Project]) -> None:
    project = make_project(
        {
            stem: (ROOT / "configs" / f"{stem}.json").read_text()
            for stem in ("90_quick_test", "93_generate_cpu")
        }
    )
    assert project.run("93_generate_cpu\nhello").code == 2
    assert project.run("90_quick_test").code == 0
    result = project.run("93_generate_cpu\nimport os")
    assert result.code == 0 and "\n> import os\n" in result.out
