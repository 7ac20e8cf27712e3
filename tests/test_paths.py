"""A path of a preset, whatever key it stands under: relative to the project, or at a user's
home."""

import json
from pathlib import Path
from typing import Any

import pytest

from core import launch, preview
from core.data.sources import build_source
from core.errors import SourceUnavailable, UserError
from core.files import own_path
from core.jobs.tokenize import folder_of
from core.models import published
from core.preset.decode import decode_preset
from core.registry import Preset
from tests.project import ROOT, tiny_preset, train_here

NOBODY = "~no-such-user/there"
"""`Path.expanduser` raises RuntimeError for it."""


def test_a_path_is_relative_to_the_project_or_at_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = [str(own_path(path, tmp_path)) for path in ("a/b", "./a", "/a", "~/a", "~", NOBODY)]
    assert found == [
        f"{tmp_path}/a/b",
        f"{tmp_path}/a",
        "/a",
        "/home/me/a",
        "/home/me",
        f"{tmp_path}/{NOBODY}",
    ]


def test_no_other_place_decides_where_a_path_leads() -> None:
    assert [
        path.name
        for path in sorted((ROOT / "core").rglob("*.py"))
        if "expanduser" in path.read_text()
    ] == ["files.py"]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ('"metrics.jsonl"', ["core/metrics/events.py"]),
        ('"prev2"', ["core/file_names.py"]),
        ('_current.pth"', []),
    ],
)
def test_the_names_of_files_that_many_look_for_stand_in_one_place(
    name: str, places: list[str]
) -> None:
    files = [path for path in (ROOT / "core").rglob("*.py") if name in path.read_text()]
    assert [path.relative_to(ROOT).as_posix() for path in files] == places


@pytest.mark.parametrize(
    "section",
    [
        {"type": "text", "path": NOBODY},
        {"type": "pdf", "path": NOBODY},
        {"type": "tokens", "path": NOBODY},
        {"type": "hf", "dataset": NOBODY},
    ],
    ids=lambda section: section["type"],
)
def test_a_source_at_the_home_of_nobody_is_not_there(
    section: dict[str, Any], tmp_path: Path
) -> None:
    preset = decode_preset(tiny_preset() | {"data": {"sources": [section]}}, Preset, "t", "t")
    source = build_source(preset.data.sources[0], tmp_path, 0)
    with pytest.raises(SourceUnavailable, match="no-such-user"):
        source.open()


def test_local_text_at_the_home_of_nobody_leaves_the_dataset(tmp_path: Path) -> None:
    section = {"type": "hf", "dataset": "an/other", "local": NOBODY}
    preset = decode_preset(tiny_preset() | {"data": {"sources": [section]}}, Preset, "t", "t")
    assert build_source(preset.data.sources[0], tmp_path, 0).dataset == "an/other"


@pytest.mark.parametrize(
    "changes",
    [{"init_from": f"{NOBODY}.pt"}, {"tokenizer": {"type": "file", "path": f"{NOBODY}.json"}}],
    ids=lambda c: next(iter(c)),
)
def test_weights_and_a_tokenizer_at_the_home_of_nobody_are_not_there(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no-such-user"):
        train_here(tiny_preset() | changes, tmp_path)


def test_the_menu_and_a_start_stand_paths_at_the_home_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tokenize.output` is looked at even where the job is another."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    changes = {"tokenize": {"output": NOBODY}, "tokenizer": {"type": "file", "path": NOBODY}}
    preset = decode_preset(json.loads(json.dumps(tiny_preset() | changes)), Preset, "t", "t")
    assert (
        launch._files_of(preset) == {}
        and preview.known_vocab_size(preset.tokenizer, tmp_path) == 50_257
    )
    assert (
        folder_of(preset, tmp_path) == tmp_path / NOBODY
        and published.folder_of(NOBODY) == ROOT / NOBODY
    )
