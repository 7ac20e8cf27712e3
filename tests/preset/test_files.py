"""Preset files: JSON and its mistakes, and what one takes from another that it extends."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import PresetError
from core.preset.decode import read_preset
from core.registry import Preset

DATA = {"sources": ["python_stdlib"]}


def read(folder: Path, stem: str, **texts: str) -> Any:
    """Write `texts` as presets, then read one of them."""
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return read_preset(folder / f"{stem}.json", Preset)


def refused(folder: Path, stem: str, **texts: str) -> str:
    with pytest.raises(PresetError) as caught:
        read(folder, stem, **texts)
    return str(caught.value)


def test_json_errors_have_line_and_column(tmp_path: Path) -> None:
    told = refused(tmp_path, "a", a='{\n  "name": "a",\n  "data": {,}\n}')
    assert f"{tmp_path / 'a.json'} has 1 problem" in told and "line 3 column 12: " in told


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", "[" * 100_000, '"x"'])
def test_what_is_no_preset_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    """As a preset, and as the parent of one."""
    assert str(tmp_path / "a.json") in refused(tmp_path, "a", a=text)
    assert str(tmp_path / "a.json") in refused(tmp_path, "b", b='{"extends": "a"}')


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """JSON readers keep the last and drop the first without a word."""
    told = refused(
        tmp_path,
        "a",
        a='{"data": {"sources": ["pdf"]}, "train": {"seed": 1, "eps": 1e-8, "seed": 2}}',
    )
    assert '"seed" stands twice' in told


def test_extends_merges_sections_key_by_key(tmp_path: Path) -> None:
    """The child states only what differs; names and lineage are not inherited, lists are
    replaced."""
    base = {
        "name": "Base",
        "lineage": "shared",
        "model": {"hidden_size": 64, "num_layers": 3},
        "train": {"schedule": {"type": "cosine", "warmup": 0.1}, "seed": 7},
        "data": {"sources": ["pdf", "python_stdlib"], "mix_strategy": "sequential"},
    }
    middle = {"extends": "base", "train": {"schedule": {"warmup": 0.3}}}
    child = {"extends": "middle.json", "model": {"num_layers": 5}, "data": {"sources": ["pdf"]}}
    preset = read(
        tmp_path, "child", base=json.dumps(base), middle=json.dumps(middle), child=json.dumps(child)
    )
    assert (preset.name, preset.lineage) == ("child", "child")
    assert (preset.model.hidden_size, preset.model.num_layers) == (64, 5)
    assert (preset.train.schedule.type, preset.train.schedule.warmup, preset.train.seed) == (
        "cosine",
        0.3,
        7,
    )
    assert [source.name for source in preset.data.sources] == [
        "pdf"
    ] and preset.data.mix_strategy == "sequential"


def test_extends_with_another_type_starts_afresh(tmp_path: Path) -> None:
    """Keys of one kind of tokenizer mean nothing to another."""
    base = {"tokenizer": {"type": "bpe", "vocab_size": 500}, "data": DATA}
    child = {"extends": "base", "tokenizer": {"type": "byte"}}
    preset = read(tmp_path, "child", base=json.dumps(base), child=json.dumps(child))
    assert preset.tokenizer.model_dump() == {
        "type": "byte",
        "vocab_size": 8192,
        "name": None,
        "path": None,
    }


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, "a", a='{"extends": "b"}', b='{"extends": "c"}', c='{"extends": "a"}')
    assert "extends  goes in a circle: a -> b -> c -> a" in told


def test_extends_tells_files_of_one_name_apart(tmp_path: Path) -> None:
    """By where they lie, however that is written; a circle through folders and links is still
    one."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.json").write_text('{"extends": "old/base", "train": {"seed": 7}}')
    (tmp_path / "old" / "base.json").write_text(
        json.dumps({"data": DATA, "model": {"num_layers": 3}})
    )
    preset = read(
        tmp_path, "mine", mine='{"extends": "old/mine", "train": {"eps": 1e-6}}', base="[]"
    )
    assert (preset.train.seed, preset.train.eps, preset.model.num_layers) == (7, 1e-6, 3)
    (tmp_path / "old" / "back.json").write_text('{"extends": "mine"}')
    told = refused(tmp_path, "mine", mine='{"extends": "old/../old/back"}')
    assert "extends  goes in a circle: mine -> old/../old/back -> mine" in told


def test_extends_without_a_parent_names_the_nearest(tmp_path: Path) -> None:
    told = refused(
        tmp_path,
        "child",
        baseline='{"data": {"sources": ["pdf"]}}',
        child='{"extends": "base_line"}',
    )
    assert 'extends  "base_line" is no preset' in told and 'did you mean "baseline"?' in told
