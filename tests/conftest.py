"""Fixtures every test may use."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.project import Project


@pytest.fixture
def make_project(tmp_path: Path) -> Callable[..., Project]:
    """make_project({"stem": preset}) -> a runnable copy of the project with these presets."""
    return lambda presets, name="project": Project.make(tmp_path / name, presets)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch with one thread: tiny models run faster so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
