"""Fixtures every test may use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.project import Project


@pytest.fixture
def make_project(tmp_path: Path) -> Callable[..., Project]:
    """make_project({"stem": preset}) -> a runnable copy of the project with these presets."""
    return lambda presets, name="project": Project.make(tmp_path / name, presets)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Torch with one thread: tiny models run faster so, and a busy machine slows them less."""
    torch.set_num_threads(1)
