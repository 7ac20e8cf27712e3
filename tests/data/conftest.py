"""Fixtures of the test_resume files."""

from pathlib import Path

import pytest

from core.data import pipeline
from core.data import token_cache as cache
from core.data.sources import SOURCES, text
from core.data.sources.shards import ShardSource
from core.data.sources.tokens import TokensSource
from tests.data.resume_setup import write_data


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Every stretch that something is read, cut, cached or shuffled in is a few documents long."""
    monkeypatch.setattr(pipeline, "SNAPSHOT_EVERY", 5)
    monkeypatch.setattr(pipeline, "READ_AHEAD", 4)
    monkeypatch.setattr(cache, "BLOCK", 7)
    monkeypatch.setattr(cache, "FREE_BYTES", 0)
    monkeypatch.setattr(cache, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(text, "LOW", 40)
    monkeypatch.setattr(text, "HIGH", 80)
    monkeypatch.setattr(f"{SOURCES['pdf'][1].__module__}.LOW", 60)
    monkeypatch.setattr(f"{SOURCES['pdf'][1].__module__}.HIGH", 120)
    monkeypatch.setattr(ShardSource, "window", 6)
    monkeypatch.setattr(TokensSource, "window", 200)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(root / "library"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_data(root)
    return root
