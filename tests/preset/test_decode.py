"""Presets decode strictly: every problem at once, with path, value and what would be right."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from core.assembly.reading import budget_of
from core.comparison.trials import plan
from core.errors import PresetError
from core.preset.decode import decode_preset, read_preset
from core.preset.merge import preset_json
from core.preset.settings import RUN_TOKENS
from core.registry import Preset
from tests.project import ROOT, TINY_SIZES, train_here

CONFIGS = [
    path for path in sorted((ROOT / "configs").glob("*.json")) if path.name != "preset.schema.json"
]
DATA = {"sources": ["python_stdlib"]}

AUXILIARY_003 = """
"auxiliary": {
  "enable_policy": true,
  "enable_value": true,
  "enable_dynamics": true,
  "enable_span_contrastive": true,
  "policy_kl_weight": 0.05,
  "value_weight": 0.05,
  "dynamics_weight": 0.05,
  "span_contrastive_weight": 0.05,
  "span_mask_fraction": 0.15,
  "span_contrastive_temperature": 0.07,
  "span_l2_normalize": true,
  "enable_adaptive_sources": true,
  "adaptive_interval_tokens": 5000000,
  "adaptive_min_weight": 0.5,
  "adaptive_max_weight": 3.0,
  "adaptive_smoothing": 0.9
}
"""

QA_PLUS_WIKI_003 = """
{
  "name": "qa_plus_wiki",
  "model": {"hidden_size":256, "num_layers":3, "num_heads":4, "seq_length":256},
  "train": {"per_gpu_batch_size":128, "accumulation_steps":4, "eval_tokens":2000000},
  "data": {
    "sources": [
      {"type":"hf","dataset":"sentence-transformers/natural-questions","split":"train","fields":["question","answer"],"format":"Q: {question}\\nA: {answer}"},
      "wikipedia"
    ],
    "mix_strategy": "round_robin",
    "min_text_length": 50
  }
}
"""  # noqa: E501


def problems(**sections: Any) -> list[str]:
    """What is wrong with a preset of these sections; a good "data" is there unless given."""
    with pytest.raises(PresetError) as caught:
        decode_preset({"data": DATA, **sections}, Preset, "configs/p.json", "p")
    assert str(caught.value).startswith("configs/p.json has ")
    return caught.value.problems


def decoded(**sections: Any) -> Any:
    return decode_preset({"data": DATA, **sections}, Preset, "configs/p.json", "p")


def test_only_the_sources_have_no_default() -> None:
    """Everything but data.sources may be left out; the file's stem names preset and lineage."""
    preset = decoded()
    assert (preset.name, preset.lineage, preset.job, preset.model.type) == (
        "p",
        "p",
        "train",
        "simple_lm",
    )
    with pytest.raises(PresetError, match="data  is missing"):
        decode_preset({}, Preset, "p.json", "p")
    assert problems(data={}) == ["data.sources  is missing; it has no default"]


def test_every_problem_is_reported_at_once() -> None:
    """A person mends a preset in one go: path, value and what would be right for each mistake."""
    found = problems(
        model={"num_layer": 3},
        train={"learning_rate": -1, "max_steps": "3", "optimizer": "adam", "schedule": {"warm": 1}},
        losses=[{"type": "cross_entropi"}],
    )
    assert found == [
        'model.num_layer  unknown key; did you mean "num_layers"?',
        "train.learning_rate  -1: input should be greater than 0",
        'train.schedule.warm  unknown key; did you mean "warmup"?',
        "train.optimizer  \"adam\": input should be 'adamw' or 'muon'",
        'train.max_steps  "3": input should be a valid integer; write 3, without quotes',
        found[5],
    ]
    assert found[5].startswith(
        'losses[0]  {"type": "cross_entropi"}: unknown type of loss; known are '
    )
    assert '"cross_entropy"' in found[5]


@pytest.mark.parametrize(
    ("sections", "path", "near"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"hiden_size": 1}}, "model.hiden_size", "hidden_size"),
        ({"model": {"type": "simple_lm", "num_head": 1}}, "model.num_head", "num_heads"),
        ({"tokenizer": {"vocab": 300}}, "tokenizer.vocab", "vocab_size"),
        ({"train": {"acumulation_steps": 1}}, "train.acumulation_steps", "accumulation_steps"),
        ({"train": {"schedule": {"dekay": 1}}}, "train.schedule.dekay", "decay"),
        ({"losses": [{"type": "cross_entropy", "wieght": 1}]}, "losses[0].wieght", "weight"),
        (
            {"losses": [{"type": "cross_entropy", "weight": {"from": 1, "to": 2, "begn": 0}}]},
            "losses[0].weight.begn",
            "begin",
        ),
        ({"auxiliary": {"enable_polcy": True}}, "auxiliary.enable_polcy", "enable_policy"),
        (
            {"data": {"sources": ["pdf"], "mix_strateggy": "weighted"}},
            "data.mix_strateggy",
            "mix_strategy",
        ),
        (
            {"data": {"sources": ["pdf", {"type": "text", "path": "x", "text_feild": "t"}]}},
            "data.sources[1].text_feild",
            "text_field",
        ),
        ({"generate": {"topp": 1}}, "generate.topp", "top_p"),
        ({"logging": {"wandbb": True}}, "logging.wandbb", "wandb"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(sections: dict, path: str, near: str) -> None:
    """At every level: a misspelt key is never dropped in silence."""
    assert problems(**sections) == [f'{path}  unknown key; did you mean "{near}"?']


def test_an_unknown_key_that_is_near_to_none_lists_them_all() -> None:
    (found,) = problems(logging={"zzz": 1})
    assert found == "logging.zzz  unknown key; known are wandb, wandb_project"


def test_an_unknown_source_names_the_nearest_known_one() -> None:
    (found,) = problems(data={"sources": ["wikipdia"]})
    assert (
        found
        == 'data.sources[0]  "wikipdia": no source is called "wikipdia"; did you mean "wikipedia"?'
    )


@pytest.mark.parametrize("wrong", ["3", True, 2.5, None, [3]])
def test_values_are_not_coerced(wrong: Any) -> None:
    """A string is no number, a switch is no count: nothing is guessed."""
    (found,) = problems(train={"accumulation_steps": wrong})
    assert found.startswith(f"train.accumulation_steps  {json.dumps(wrong)}: ")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"sources": []}, "at least 1 item"),
        ({"sources": ["pdf", "pdf"]}, "two sources are called pdf"),
        ({"sources": ["pdf"], "mix_strategy": "weighted"}, 'needs "source_weights"'),
        (
            {"sources": ["pdf", "wikipedia"], "source_weights": [0.9, 0.1]},
            'source_weights need "mix_strategy": "weighted"',
        ),
        (
            {"sources": ["pdf"], "mix_strategy": "sequential", "source_weights": [1.0]},
            'and it is "sequential"',
        ),
        ({"sources": ["pdf"], "source_weights": [1.0, 2.0]}, "2 source_weights for 1 sources"),
        ({"sources": ["pdf", "wikipedia"], "source_weights": [-1.0, 2.0]}, "must not be negative"),
        ({"sources": ["pdf", "wikipedia"], "source_weights": [0.0, 0.0]}, "not all zero"),
    ],
)
def test_sources_and_weights_must_fit(data: dict, told: str) -> None:
    (found,) = problems(data=data)
    assert told in found and found.startswith("data")


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        ("0.5", "a schedule is a number, a piece like"),
        (True, "a schedule is a number, a piece like"),
        ([], "at least 1 item"),
        ({"from": 1.0}, 'shape "linear" needs a "to"'),
        ({"to": 1.0}, "from  is missing"),
        ({"from": 1.0, "to": 2.0, "shape": "cubic"}, "'linear', 'cosine' or 'constant'"),
        (
            {"from": 1.0, "to": 2.0, "begin": 0.5, "end": 0.2},
            "ends at 0.2, before it begins at 0.5",
        ),
        ({"from": 1.0, "to": 2.0, "end": 1.5}, "less than or equal to 1"),
        (
            [{"from": 1.0, "to": 2.0, "end": 0.5}, {"from": 2.0, "to": 3.0, "begin": 0.4}],
            "begins at 0.4, before the one before",
        ),
    ],
)
def test_a_wrong_schedule_is_explained(weight: Any, told: str) -> None:
    (found,) = problems(losses=[{"type": "cross_entropy", "weight": weight}])
    assert found.startswith("losses[0].weight") and told in found


def test_learning_rate_schedules_longer_than_the_run_are_refused() -> None:
    (found,) = problems(train={"schedule": {"type": "wsd", "warmup": 0.7, "decay": 0.4}})
    assert "warmup 0.7 and decay 0.4 are more than the whole run" in found


def test_epochs_may_end_a_chain_of_runs() -> None:
    """The schedules span what is there to read, or all runs where that is less."""
    for tokens, spanned in ((30_000_000, 60_000_000), (200_000_000, 300_000_000)):
        budget = budget_of(decoded(train={"runs": 3, "max_epochs": 2}), tokens)
        assert (budget.run_tokens, budget.schedule_tokens) == (RUN_TOKENS, spanned)


def test_a_tokenizer_may_be_a_hub_name() -> None:
    assert decoded(tokenizer="gpt2").tokenizer.model_dump() == {
        "type": "hub",
        "vocab_size": 8192,
        "name": "gpt2",
        "path": None,
    }
    assert (
        len(problems(tokenizer={"type": "hub"}))
        == len(problems(tokenizer={"type": "bpe", "name": "gpt2"}))
        == 1
    )


def test_a_run_is_always_the_same_number_of_tokens() -> None:
    """train_tokens of old presets is accepted, in both sections, and overridden."""
    preset = decoded(train={"train_tokens": 5}, data={**DATA, "train_tokens": 7})
    budget = budget_of(preset, None)
    assert budget.run_tokens == budget.schedule_tokens == RUN_TOKENS == 100_000_000


def test_a_preset_survives_being_broadcast() -> None:
    """What rank 0 sends decodes to the same preset on the other ranks; so does what a checkpoint
    holds."""
    weight = [
        {"from": 0.0, "to": 1.0, "end": 0.5},
        {"from": 1.0, "shape": "constant", "begin": 0.5},
    ]
    preset = decoded(
        tokenizer="gpt2",
        losses=[{"type": "cross_entropy", "weight": weight}],
        train={"betas": [0.8, 0.9]},
    )
    assert (
        decode_preset(json.loads(json.dumps(preset_json(preset))), Preset, "rank 0", "other")
        == preset
    )


# files --------------------------------------------------------------------------------------------


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


# the specification's, and ours --------------------------------------------------------------------


def test_the_examples_of_specification_003_decode() -> None:
    """Word for word as printed there."""
    preset = decode_preset(json.loads(QA_PLUS_WIKI_003), Preset, "003", "003")
    assert (preset.name, preset.model.type, preset.train.per_gpu_batch_size) == (
        "qa_plus_wiki",
        "simple_lm",
        128,
    )
    assert (
        preset.data.sources[0].fields == ["question", "answer"]
        and preset.data.sources[1].name == "wikipedia"
    )
    auxiliary = decoded(**json.loads("{" + AUXILIARY_003 + "}")).auxiliary
    assert (
        len(auxiliary.heads) == 4
        and auxiliary.enable_adaptive_sources
        and auxiliary.span_contrastive_temperature == 0.07
    )


def test_two_losses_of_one_type_need_names() -> None:
    penalties = [
        {"type": "sharpness", "penalty": penalty} for penalty in ("non_max_sum", "neg_entropy")
    ]
    assert problems(losses=penalties) == [
        f"losses  {json.dumps(penalties)[:57]}...: two losses are called sharpness; give one of "
        'them another "name"'
    ]
    named = [penalties[0], {**penalties[1], "name": "entropy"}]
    assert [loss.name for loss in decoded(losses=named).losses] == [None, "entropy"]


@pytest.mark.parametrize(
    "loss, said",
    [
        ({"type": "cosine", "temperature": 0.0}, "temperature must stay above 0"),
        ({"type": "cosine", "temperature": {"from": 1.0, "to": -1.0}}, "goes down to -1"),
        ({"type": "cross_entropy", "label_smoothing": 1.0}, "label_smoothing must stay in [0, 1)"),
        ({"type": "harmonic", "h_exp": {"from": -4.0, "to": 1.0}}, "h_exp must stay below 0"),
        ({"type": "sharpness", "penalty": "entropy"}, "non_max_sum"),
        ({"type": "cosine", "topk": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_of_losses_are_checked(loss: dict, said: str) -> None:
    (problem,) = problems(losses=[loss])
    assert said in problem and problem.startswith("losses[0]")


def test_there_are_presets() -> None:
    assert {"00_best_general", "01_best_qa", "90_quick_test"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_preset_decodes(path: Path) -> None:
    """And says in one line what it is for."""
    preset = read_preset(path, Preset)
    assert preset.description and "\n" not in preset.description


def shrunk(preset: Any, models: Path) -> dict:
    """The preset at a size that takes two steps in a second, on local text, everything else as it
    is. A model of the Hub becomes a tiny one in `models`, published weights random ones, and
    whichever block is trained the last of two."""
    small = preset_json(preset)
    if small["model"]["type"] == "hub":
        from transformers import GPT2Config

        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64).save_pretrained(
            models
        )
        small["model"] |= {"name": str(models), "pretrained": False}
    if small["model"]["type"] == "neobert":
        small["model"]["name"] = None
    if small["train"]["trainable"]:
        small["train"]["trainable"] = [
            re.sub(r"\d+", "1", pattern) for pattern in small["train"]["trainable"]
        ]
    small["model"] |= {key: value for key, value in TINY_SIZES.items() if key in small["model"]} | {
        "seq_length": 32
    }
    small["tokenizer"] = {"type": "byte"}
    small["train"] |= {
        "per_gpu_batch_size": 2,
        "accumulation_steps": 2,
        "max_steps": 2,
        "runs": 1,
        "eval_tokens": 100,
    }
    small["train"] |= {"compile": "never"}
    # its evaluations hide a thousand tokens one by one, so many rows at once
    if small["model"]["type"] == "neobert":
        small["train"]["per_gpu_batch_size"] = 16
    names = [source["name"] for source in small["data"]["sources"]]
    small["data"]["sources"] = [{"type": "text", "path": "texts", "name": name} for name in names]
    small["data"] |= {"lanes": 4, "workers": 0}
    small["auxiliary"]["memory_tokens_after"] = 8
    small["generate"] |= {"max_tokens": 3}
    small["logging"] = {}
    return small


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_preset_that_trains_takes_two_steps(path: Path, tmp_path: Path) -> None:
    """Shrunk, on local text: it builds, trains, evaluates and saves. Of a comparison, every
    variant."""
    preset = read_preset(path, Preset)
    if preset.job not in ("train", "compare"):
        pytest.skip("does not train")
    if preset.init_from is not None:  # what another shipped preset trains
        origin = read_preset(path.with_stem(preset.init_from), Preset)
        train_here(shrunk(origin, tmp_path / "model"), tmp_path, origin.lineage)
    runs = (
        [preset]
        if preset.job == "train"
        else [variant_preset(preset, i) for i in range(len(preset.variants))]
    )
    for run in runs:
        events = train_here(shrunk(run, tmp_path / "model"), tmp_path, run.lineage)
        assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]
        assert events[-1]["event"] == "run_end" and events[-1]["reason"] == "max_steps"
        *_, measured = [event for event in events if event["event"] == "eval"]
        of_logits = {
            "cross_entropy",
            "max_probability",
            "entropy",
            "embedding_cosine",
            "table_cosine",
        }
        assert (
            {"nll_h12", "nll_h4"} if measured["losses"].keys() == {"harmonic"} else of_logits
        ) <= set(measured)
        assert set(measured["losses"]) == {loss.name or loss.type for loss in run.losses}
        assert (tmp_path / "checkpoints" / f"{run.lineage}_current.pth").exists()


def variant_preset(preset: Any, number: int) -> Any:
    """What the first seed's trial of a variant trains, under a name of its own."""
    trial = plan(preset, Path())[number]
    return decode_preset(
        trial.preset | {"lineage": f"{preset.lineage}-{number}"}, Preset, trial.variant, "v"
    )
