"""The plan of a comparison: which trials, in which order, under which names; what variants set;
what makes a trial another."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.comparison.trials import (
    Outcomes,
    plan,
    read_outcomes,
    slugs,
    trial_changes,
    write_outcomes,
)
from core.errors import PresetError
from core.preset.decode import decode_preset, read_preset
from core.preset.merge import preset_json
from core.registry import Preset
from tests.project import merged

BASE = {
    "job": "compare",
    "data": {"sources": ["python_stdlib"]},
    "seeds": [1, 2],
    "variants": [
        {"name": "as it is"},
        {
            "name": "other",
            "set": {"train": {"learning_rate": 0.01}, "model": {"num_heads": 2, "hidden_size": 64}},
        },
    ],
}


def preset_of(**changes: Any) -> Any:
    return decode_preset(merged(BASE, changes), Preset, "t", "t")


def problems_of(**changes: Any) -> list[str]:
    with pytest.raises(PresetError) as caught:
        preset_of(**changes)
    return caught.value.problems


# the plan -----------------------------------------------------------------------------------------


def test_seed_by_seed_the_baseline_first(tmp_path: Path) -> None:
    """Cut short anywhere, a comparison has whole pairs. Every trial is a preset that trains, in
    folders of its own."""
    trials = plan(preset_of(), tmp_path)
    assert [(t.variant, t.seed) for t in trials] == [
        ("as it is", 1),
        ("other", 1),
        ("as it is", 2),
        ("other", 2),
    ]
    assert [t.folder.relative_to(tmp_path).as_posix() for t in trials] == [
        "logs/t/as_it_is/1",
        "logs/t/other/1",
        "logs/t/as_it_is/2",
        "logs/t/other/2",
    ]
    assert {t.status for t in trials} == {"waiting"} and trials[1].key == "other/1"
    for trial in trials:
        again = decode_preset(trial.preset, Preset, "a checkpoint", "x")
        assert preset_json(again) == trial.preset
        assert (again.job, again.variants, again.train.seed) == ("train", [], trial.seed)
        assert again.lineage == trial.folder.relative_to(tmp_path / "logs").as_posix()
    assert (
        trials[1].preset["train"]["learning_rate"] == 0.01
        and trials[0].preset["train"]["learning_rate"] == 6e-4
    )


def test_a_variant_differs_in_what_it_sets_and_nothing_else(tmp_path: Path) -> None:
    base, other, *_ = plan(preset_of(), tmp_path)
    found = trial_changes(base.preset, other.preset)
    assert found == [
        "model.hidden_size was 256, is 64",
        "model.num_heads was 4, is 2",
        "train.learning_rate was 0.0006, is 0.01",
    ]


def test_other_ranks_and_readers_of_a_log_get_the_same_plan(tmp_path: Path) -> None:
    """A resolved preset decodes to itself, though what a variant sets was merged over an unresolved
    one."""
    sets = {
        "tokenizer": "gpt2",
        "losses": [{"type": "cross_entropy", "weight": 2.0}],
        "train": {"schedule": {"type": "cosine"}},
    }
    weights = {"mix_strategy": "weighted", "source_weights": [1, {"from": 1, "to": 2}]}
    sets |= {"data": {"sources": ["pdf", "python_stdlib"], **weights}}
    preset = preset_of(
        tokenizer={"type": "byte"}, variants=[{"name": "a", "set": {}}, {"name": "b", "set": sets}]
    )
    sent = json.loads(json.dumps(preset_json(preset)))
    received = decode_preset(sent, Preset, "rank 0", "preset")
    assert received == preset and plan(received, tmp_path) == plan(preset, tmp_path)
    b = plan(preset, tmp_path)[1].preset
    assert b["tokenizer"]["name"] == "gpt2" and b["train"]["schedule"]["type"] == "cosine"


def test_presets_that_extend_a_comparison(tmp_path: Path) -> None:
    """Seeds, variants and everything else can be replaced; to train one model of it, variants are
    emptied."""
    (tmp_path / "t.json").write_text(json.dumps(BASE))
    (tmp_path / "more.json").write_text(
        json.dumps({"extends": "t", "seeds": [7], "train": {"max_steps": 3}})
    )
    (tmp_path / "one.json").write_text(json.dumps({"extends": "t", "job": "train", "variants": []}))
    more = read_preset(tmp_path / "more.json", Preset)
    assert [t.folder.parts[-3:] for t in plan(more, tmp_path)] == [
        ("more", "as_it_is", "7"),
        ("more", "other", "7"),
    ]
    assert {t.preset["train"]["max_steps"] for t in plan(more, tmp_path)} == {3}
    assert read_preset(tmp_path / "one.json", Preset).job == "train"


def test_every_variant_has_a_folder_of_its_own() -> None:
    """Any characters, names that differ in case only, names of the report's files: on any disk,
    stable when some are added."""
    names = [
        "a b",
        "a_b",
        "A b",
        "狐",
        "犬",
        "..",
        "report.html",
        "STATE.json",
        "x" * 80,
        "x" * 79,
        "ok-1.5",
        " ",
    ]
    found = slugs(names)
    assert len({slug.casefold() for slug in found.values()}) == len(names)
    assert all(slug.strip("._") and len(slug) < 80 and "/" not in slug for slug in found.values())
    assert not {"report.html", "state.json"} & {slug.casefold() for slug in found.values()}
    assert found["a b"] == "a_b" and found["ok-1.5"] == "ok-1.5"
    assert {
        name: slug for name, slug in slugs([*names, "new", "a-b"]).items() if name in found
    } == found


# what was begun before ----------------------------------------------------------------------------


def test_what_may_change_between_two_starts(tmp_path: Path) -> None:
    """Names, logging and what only decides how fast it goes; nothing that a result follows from."""
    before, *_ = plan(preset_of(), tmp_path)
    free = {
        "name": "X",
        "description": "Y",
        "logging": {"wandb": True},
        "seeds": [1, 5],
        "compare": {"confidence": 0.9},
        "data": {"workers": 2, "cache_gigabytes": 1.0},
        "train": {"checkpoint_every_steps": 3},
    }
    now, *_ = plan(preset_of(**free), tmp_path)
    assert trial_changes(before.preset, now.preset) == []
    now, *_ = plan(preset_of(data={"min_text_length": 9}, train={"max_steps": 5}), tmp_path)
    assert trial_changes(before.preset, now.preset) == [
        "data.min_text_length was 50, is 9",
        "train.max_steps was null, is 5",
    ]
    old = {
        **before.preset,
        "train": {k: v for k, v in before.preset["train"].items() if k != "precision"},
    }
    assert trial_changes(old, before.preset) == []


def test_outcomes_are_kept_until_their_folder_is_deleted(tmp_path: Path) -> None:
    outcomes = Outcomes(2, {"b/1": {"status": "diverged", "note": "why", "preset": {}}})
    write_outcomes(tmp_path, outcomes)
    assert read_outcomes(tmp_path, 1) == Outcomes(2, {})
    (tmp_path / "b" / "1").mkdir(parents=True)
    assert read_outcomes(tmp_path, 1) == outcomes
    for text in (
        "",
        "[]",
        '{"trials": 3}',
        "{",
        "[" * 100_000,
        '{"trials": {"b/1": 5}, "world_size": 1}',
    ):
        (tmp_path / "state.json").write_text(text)
        assert read_outcomes(tmp_path, 1) == Outcomes(1, {})
    (tmp_path / "state.json").write_text(
        '{"trials": {"b/1": {"status": "diverged"}}, "world_size": 1}'
    )
    assert read_outcomes(tmp_path, 1) == Outcomes(1, {})


# mistakes -----------------------------------------------------------------------------------------


def test_every_mistake_is_told_at_once_with_its_path() -> None:
    bad = {
        "losses": [{"type": "cross_entropy", "weigth": 1}],
        "train": {"seed": 3, "learnin_rate": 1, "eval_tokens": 0},
        "job": "train",
        "moddel": {},
    }
    found = problems_of(
        seeds=[1, 2, 1],
        train={"max_steps": 0},
        compare={"confidence": 2.0},
        variants=[
            {"name": "a"},
            {"name": "b", "set": bad},
            {"name": "b", "sett": {}},
            {"name": "", "set": 3},
        ],
    )
    for line in (
        "train.max_steps  0: input should be greater than or equal to 1",
        "compare.confidence  2.0: input should be less than 1",
        'variants[1].set.losses[0].weigth  unknown key; did you mean "weight"?',
        'variants[1].set.train.learnin_rate  unknown key; did you mean "learning_rate"?',
        'variants[1].set.moddel  unknown key; did you mean "model"?',
        'variants[1].set.train.seed  a variant may not set this: seeds are given by "seeds", the '
        "same for all variants",
        "variants[1].set.job  a variant may not set this: it is the same for all variants; set it "
        "beside them",
        'variants[2].sett  unknown key; did you mean "set"?',
        'variants[3].name  "": string should have at least 1 character',
        "variants[3].set  3: input should be an object",
        'variants  2 of them are called "b"; give each a name of its own',
        "seeds  1 stands there twice; every seed is one run of each variant",
    ):
        assert line in found, line
    assert len(found) == 12, found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"variants": [{"name": "a"}]}, "variants  1 of them: the compare job needs at least two"),
        ({"variants": []}, "variants  0 of them: the compare job needs at least two"),
        ({"variants": 3}, "variants  3: input should be a valid array"),
        ({"job": "train"}, 'variants  only the compare job reads them: set "job": "compare"'),
        ({"seeds": []}, "seeds  []: list should have at least 1 item"),
        (
            {"variants": [{"name": "a"}, {"name": "b", "set": {"train": {"eval_tokens": 0}}}]},
            "variants[1].set.train.eval_tokens  ",
        ),
        (
            {"variants": [{"name": "a"}, {"name": "b", "set": {"model": {"num_heads": 3}}}]},
            "variants[1].set.model  ",
        ),
    ],
)
def test_what_is_no_comparison(changes: dict, told: str) -> None:
    (found,) = problems_of(**changes)
    assert found.startswith(told)


@pytest.mark.parametrize(
    "key", ["job", "lineage", "name", "variants", "seeds", "compare", "extends"]
)
def test_what_a_variant_may_not_set(key: str) -> None:
    value = {"job": "train", "variants": [], "seeds": [1], "compare": {}}.get(key, "x")
    found = problems_of(variants=[{"name": "a"}, {"name": "b", "set": {key: value}}])
    assert [
        line
        for line in found
        if line.startswith(f"variants[1].set.{key}  a variant may not set this")
    ]


def test_a_lineage_that_a_person_writes_is_one_word(tmp_path: Path) -> None:
    """Only trials stand in folders; a slash of the user's would reach outside of checkpoints/ and
    logs/."""
    (tmp_path / "t.json").write_text(json.dumps(BASE | {"lineage": "a/b"}))
    with pytest.raises(PresetError, match='lineage  "a/b"'):
        read_preset(tmp_path / "t.json", Preset)
    for lineage in ("/x", "a//b", "a/", "a b"):
        assert len(problems_of(lineage=lineage)) == 1
