"""A small trained lineage for the tests of weights to start from."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.shares import SHARED, store
from tests.project import tiny_preset, train_here
from tests.training.runs import finish, session

SOURCE = tiny_preset(train={"max_steps": 3, "eval_tokens": 0})
"""The preset whose lineage "t" others start from."""


@pytest.fixture
def no_plots() -> Iterator[None]:
    """Drawing takes longer than training a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.reports.run_card.plot_losses", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lineage "t" has been trained for three steps; nobody may change it."""
    root = tmp_path_factory.mktemp("trained")
    train_here(SOURCE, root)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "project"))


@pytest.fixture(scope="module")
def made_in_shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lineage with the same step in both forms: in shares `current`, in one file `prev`; and step
    4 in shares."""
    root = tmp_path_factory.mktemp("made")
    built = session(root, **SHARED)
    finish(built)
    built.trainer.progress.evaluation_due = True  # as in the file
    built.trainer.saver.save(whole=False)
    built.trainer.store.wait()
    assert built.trainer.store.outcome() == (store(root).shares[0], pytest.approx(0, abs=60), "")
    return root


@pytest.fixture
def in_shares(made_in_shares: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made_in_shares, tmp_path / "project"))
