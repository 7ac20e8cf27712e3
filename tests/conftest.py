"""Fixtures every test may use."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.project import Project, skipped_updates


@pytest.fixture
def make_project(tmp_path: Path) -> Callable[..., Project]:
    """make_project({"stem": preset}) -> a runnable copy of the project with these presets."""
    return lambda presets, name="project": Project.make(tmp_path / name, presets)


@pytest.fixture(scope="session", autouse=True)
def hang_ups_arrive() -> None:
    """Undo what nohup or a job runner left: the program leaves a signal alone that it inherited as
    ignored, and what tests start would inherit it."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Torch with one thread: tiny models run faster so, and a busy machine slows them less."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_update_is_skipped(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run whose loss or gradient is not finite skips that update and goes on: no test passes so
    that has not asked for it."""
    own = {request.getfixturevalue("tmp_path")} if "tmp_path" in request.fixturenames else set()
    yield
    folders = own | Project.used
    Project.used.clear()
    if request.node.get_closest_marker("skips_updates") is None:
        assert (skipped := skipped_updates(folders)) == {}, (
            f"updates were skipped: {skipped}; see the marker skips_updates"
        )
