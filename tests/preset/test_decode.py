"""Presets decode strictly: every problem at once, with path, value and what would be right."""

import json
from typing import Any

import pytest

from core.assembly.reading import budget_of
from core.errors import PresetError
from core.preset.decode import decode_preset
from core.preset.merge import preset_json
from core.preset.settings import RUN_TOKENS
from core.registry import Preset

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
        "train.optimizer  \"adam\": input should be 'adamw' or 'muon'; did you mean \"adamw\"?",
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


# the specification -------------------------------------------------------------------------------


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
