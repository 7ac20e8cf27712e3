"""Heads in whole runs: off they leave no trace, on they learn, are reported, saved, resumed, added
and taken away."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError, UserError
from core.heads import HEADS
from core.heads.stack import HeadStack
from core.models.initial import draw_weights
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from core.trained import load_trained
from tests.heads.setup import ALL
from tests.parallel.test_ddp import assert_ended, on_two
from tests.project import Project, differences, merged, tiny_preset, train_here
from tests.training.runs import (
    UPHILL,
    assert_close,
    equal,
    events,
    finish,
    poison,
    session,
    weights,
)

BY_ROW = {key: value for key, value in ALL.items() if key != "enable_span_contrastive"}
"""The heads whose loss in one row does not depend on the other rows."""
FOLLOWING = ("policy", "draft")
"""Those that learn to say what the model says, which changes as it learns."""


def head_weights(built: Any) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone() for name, p in built.trainer.objective.heads.named_parameters()
    }


def test_off_they_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No module, no parameter, no place, nothing in checkpoint or report: the path is the one
    without heads."""
    for used in ("choose", "count", "forward"):
        monkeypatch.setattr(HeadStack, used, lambda *_: pytest.fail("a head that is off was asked"))
    built = session(tmp_path)
    assert built.trainer.objective.heads is None
    finish(built)
    state = Project(tmp_path).checkpoint()
    assert state["heads"] == {} and not [
        name for name in state["optimizer"] if name.startswith("heads.")
    ]
    assert all(set(event["losses"]) == {"cross_entropy"} for event in events(tmp_path, "step"))


def test_they_touch_training_only_through_their_gradient(tmp_path: Path) -> None:
    """With weights of 0 the model ends with the same bits as without heads, dropout and all; the
    heads' losses are still told."""
    train = {"max_steps": 4, "accumulation_steps": 2, "max_grad_norm": 1e9}
    nothing = {head.weight_key: 0.0 for _, head in HEADS.values()}
    off = session(tmp_path / "off", model={"dropout": 0.1}, train=train)
    on = session(tmp_path / "on", model={"dropout": 0.1}, train=train, auxiliary=ALL | nothing)
    finish(off)
    finish(on)
    assert equal(weights(off), weights(on))
    told = events(tmp_path / "on", "step")
    assert [e["loss"] for e in told] == [e["loss"] for e in events(tmp_path / "off", "step")]
    assert all(
        math.isfinite(told[0]["losses"][name]) and told[0]["losses"][name] > 0 for name in HEADS
    )


@pytest.mark.parametrize("name", [name for name, (_, head) in HEADS.items() if head.apart])
def test_a_head_apart_leaves_the_models_training_as_it_is(name: str, tmp_path: Path) -> None:
    """Whatever its weight, and though gradients are clipped: the bits of the model and of other
    heads, and the gradient's norm, are those without it; and the head learns."""
    train = {"max_steps": 8, "accumulation_steps": 2, "max_grad_norm": 0.3, "learning_rate": 3e-3}
    others = {f"enable_{other}": True for other in HEADS[name][1].needs}
    mine = {f"enable_{name}": True, HEADS[name][1].weight_key: 30.0}
    off = session(tmp_path / "off", model={"dropout": 0.1}, train=train, auxiliary=others)
    on = session(tmp_path / "on", model={"dropout": 0.1}, train=train, auxiliary=others | mine)
    begun = head_weights(on)
    finish(off)
    finish(on)
    ended = head_weights(on)
    assert equal(weights(off), weights(on)) and not equal(begun, ended)
    if others:
        assert equal(
            head_weights(off),
            {key: value for key, value in ended.items() if key.split(".")[0] != name},
        )
    one, other = events(tmp_path / "off", "step"), events(tmp_path / "on", "step")
    assert [e["grad_norm"] for e in one] == [e["grad_norm"] for e in other] and min(
        e["grad_norm"] for e in one
    ) > 0.3
    assert [e["losses"]["cross_entropy"] for e in one] == [
        e["losses"]["cross_entropy"] for e in other
    ]


def test_each_head_learns(tmp_path: Path) -> None:
    """Every head's loss falls, and so does cross-entropy; `loss` is the weighted sum, and scheduled
    weights are told."""
    train = {"max_steps": 120, "learning_rate": 3e-3, "per_gpu_batch_size": 16}
    # spans: at 0.05, they want more steps
    weights_of = {"value_weight": {"from": 0.1, "to": 0.05}, "span_contrastive_weight": 0.5}
    built = session(tmp_path, train=train, auxiliary=ALL | weights_of)
    finish(built)
    told = events(tmp_path, "step")
    for name in ("cross_entropy", *(name for name in HEADS if name not in FOLLOWING)):
        values = [event["losses"][name] for event in told]
        # it begins beside the model, which knows nothing yet either, and has to catch up first
        first = max(values[:30]) if name == "value" else sum(values[:5]) / 5
        last = sum(values[-5:]) / 5
        assert last < 0.9 * first, f"{name}: {first} to {last}"
    for event, value_weight in ((told[0], 0.1), (told[-1], 0.05)):
        assert event["scheduled"] == {"value.weight": pytest.approx(value_weight)}
        of = {"cross_entropy": 1.0, **dict.fromkeys(HEADS, 0.05), "value": value_weight}
        of |= {"span_contrastive": 0.5, "memory": 0.2, "draft": 1.0}
        assert event["loss"] == pytest.approx(
            sum(of[name] * value for name, value in event["losses"].items()), rel=1e-6
        )


def test_heads_that_follow_the_model_learn(tmp_path: Path) -> None:
    """It knows nothing at first, so their losses may rise as it learns: heads that have not learned
    are measured beside them."""
    train = {"max_steps": 60, "learning_rate": 3e-3, "per_gpu_batch_size": 16, "eval_tokens": 500}
    finish(
        built := session(
            tmp_path, train=train, auxiliary={f"enable_{name}": True for name in FOLLOWING}
        )
    )
    learned = built.trainer.inspector.inspection.evaluate(built.trainer.model, 1.0)["heads"]
    built.trainer.objective.heads.apply(draw_weights)
    ignorant = built.trainer.inspector.inspection.evaluate(built.trainer.model, 1.0)["heads"]
    assert all(learned[name] < 0.7 * ignorant[name] for name in FOLLOWING), (learned, ignorant)
    assert learned["draft.first"] > ignorant["draft.first"], (learned, ignorant)


def test_the_value_head_begins_where_a_model_begins(tmp_path: Path) -> None:
    """At the nll of one that knows nothing, ln V: from 0, its gradient would drown the first
    steps."""
    built = session(tmp_path, train={"max_steps": 1}, auxiliary={"enable_value": True})
    assert head_weights(built)["value.bias"].item() == pytest.approx(
        math.log(built.trainer.model.vocab_size)
    )
    finish(built)
    assert events(tmp_path, "step")[0]["losses"]["value"] < 0.5


@pytest.mark.parametrize("packing", ["padding", "documents"])
def test_accumulation_does_not_change_the_update(packing: str, tmp_path: Path) -> None:
    """8 rows at once, 4 x 2 and 8 x 1: the same positions, gradient, losses and weights. The span
    contrastive head compares spans of one forward pass, and so is left out."""
    trained, of_heads, losses, norms = [], [], [], []
    for rows, accumulation in ((8, 1), (2, 4), (1, 8)):
        root = tmp_path / f"{rows}"
        train = {
            "per_gpu_batch_size": rows,
            "accumulation_steps": accumulation,
            "max_steps": 4,
            "learning_rate": 1e-3,
        }
        built = session(
            root, train=train, data={"packing": packing, "min_text_length": 10}, auxiliary=BY_ROW
        )
        finish(built)
        trained.append(weights(built))
        of_heads.append(head_weights(built))
        losses.append(
            [value for event in events(root, "step") for value in event["losses"].values()]
        )
        norms.append([event["grad_norm"] for event in events(root, "step")])
    for other in (1, 2):
        assert_close(trained[0], trained[other], 1e-5)
        # a planner begins with gradients near 0, of which AdamW sees the sign
        assert_close(of_heads[0], of_heads[other], 5e-5)
        assert losses[0] == pytest.approx(losses[other], rel=1e-4)
        assert norms[0] == pytest.approx(norms[other], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_equals_not_stopping(optimizer: str, tmp_path: Path) -> None:
    """Stopped in between, all heads on, with dropout: model, heads, optimizer and losses are bit
    for bit the same."""
    settings: dict = {
        "model": {"dropout": 0.1},
        "train": {"max_steps": 9, "optimizer": optimizer},
        "auxiliary": ALL,
    }
    finish(session(tmp_path / "straight", **settings))
    for stop_at in (4, 99):
        built: list[Any] = []
        reached = partial(
            lambda built, stop: built[0].trainer.progress.step >= stop, built, stop_at
        )
        built.append(session(tmp_path / "stopped", reached, **settings))
        finish(built[0])
    one, other = Project(tmp_path / "straight"), Project(tmp_path / "stopped")
    a, b = one.checkpoint(), other.checkpoint()
    assert differences(a, b) == []
    assert [e["losses"] for e in one.events("step")] == [e["losses"] for e in other.events("step")]
    assert set(a["optimizer"]) >= {f"heads.{name}" for name in a["heads"]}
    assert {
        "policy.weight",
        "value.bias",
        "dynamics.2.weight",
        "span_contrastive.0.weight",
        "planner.0.bias",
    } <= set(a["heads"])
    weight = a["heads"].pop("value.bias")
    b["heads"] |= {"value.bias": weight, "policy.weight": b["heads"]["policy.weight"] + 1}
    b["optimizer"]["new"] = {"step": weight}
    told = ["heads policy.weight", "heads value.bias", "optimizer new step"]
    assert differences(a, b) == differences(b, a) == told, (
        "or what is compared everywhere is less than it says"
    )
    muon = {name for name, state in a["optimizer"].items() if set(state) == {"momentum_buffer"}}
    assert bool(muon) == (optimizer == "muon") and not any(
        name.startswith("heads.") for name in muon
    )


def test_heads_come_and_go_between_runs(tmp_path: Path) -> None:
    """Off, then two on, then one of them and another: what stays keeps its weights and state, each
    difference is told."""
    found = []
    for auxiliary in (
        {},
        {"enable_policy": True, "enable_value": True},
        {"enable_value": True, "enable_dynamics": True},
        {},
    ):
        preset = tiny_preset(train={"learning_rate": 1e-9, "max_steps": 2}, auxiliary=auxiliary)
        told = train_here(preset, tmp_path)
        notes = [
            note
            for note in [e for e in told if e["event"] == "run_start"][-1]["notes"]
            if "head" in note
        ]
        found.append((notes, Project(tmp_path).checkpoint()))
    assert found[0][0] == [] and found[0][1]["heads"] == {}
    assert "auxiliary heads: policy, value; " in found[1][0][0]
    assert found[1][0][1:3] == [
        "auxiliary head policy is new: starts untrained",
        "auxiliary head value is new: starts untrained",
    ]
    assert "optimizer state starts afresh for 4 parameters: heads." in found[1][0][3]
    assert found[2][0][1:3] == [
        "auxiliary head dynamics is new: starts untrained",
        "auxiliary head policy of the checkpoint is off and was left out",
    ]
    assert {name.split(".")[0] for name in found[2][1]["heads"]} == {"value", "dynamics"}
    torch.testing.assert_close(
        found[2][1]["heads"]["value.weight"],
        found[1][1]["heads"]["value.weight"],
        atol=1e-7,
        rtol=0,
    )
    assert found[2][1]["optimizer"]["heads.value.weight"]["step"] == 4
    assert found[3][0] == [
        f"auxiliary head {name} of the checkpoint is off and was left out"
        for name in ("dynamics", "value")
    ]
    assert found[3][1]["heads"] == {} and found[3][1]["progress"]["step"] == 8


def test_a_trained_model_has_its_heads_again(tmp_path: Path) -> None:
    """Whoever uses a model, with whatever preset, gets the heads it was trained with."""
    train_here(tiny_preset(auxiliary={"enable_value": True, "enable_dynamics": True}), tmp_path)
    trained = load_trained(
        decode_preset(tiny_preset(job="generate"), Preset, "t", "t"), tmp_path, detect_runtime()
    )
    heads, saved = trained.heads(), Project(tmp_path).checkpoint()["heads"]
    assert heads is not None and set(heads) == {"value", "dynamics"} and not heads.training
    assert equal(heads.state_dict(), saved)


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    train_here(tiny_preset(auxiliary={"enable_value": True}), tmp_path)
    path = tmp_path / "checkpoints" / "t_current.pth"
    state = torch.load(path, weights_only=True)
    state["heads"]["value.weight"] = torch.zeros(1, 5)
    of_head = state["optimizer"]["heads.value.weight"]
    # a slot that is whole, of another model
    of_head |= {key: torch.zeros(1, 5) for key, value in of_head.items() if value.ndim}
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"value\.weight is \(1, 5\) there, \(1, 32\) here"):
        train_here(tiny_preset(auxiliary={"enable_value": True}), tmp_path)


@pytest.mark.skips_updates
def test_going_back_to_a_checkpoint_takes_the_heads_along(tmp_path: Path) -> None:
    built = session(tmp_path, train={"max_steps": 9, "checkpoint_every_steps": 3}, auxiliary=ALL)
    poison(built, lambda step: step >= 5)
    moved = built.trainer.optimizer.step
    seen: list[dict[str, torch.Tensor]] = []

    def step(factor: float) -> None:
        moved(factor)
        seen.append(head_weights(built))

    built.trainer.optimizer.step = step
    finish(built)
    assert len(seen) == 4 and equal(head_weights(built), seen[2]) and not equal(seen[3], seen[2])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model": {"type": "neobert"}, "tokenizer": {"type": "bpe", "vocab_size": 300}},
            "predicts masked tokens",
        ),
        (
            {
                "model": {
                    "type": "polychromatic",
                    "num_kv_heads": 1,
                    "head_dim": 16,
                    "routing": {"pool": "sequence"},
                },
                "auxiliary": {"enable_policy": True},
            },
            "is not causal",
        ),
        ({"train": {"per_gpu_batch_size": 1}}, "per_gpu_batch_size is 1"),
        (
            {"auxiliary": {"memory_tokens_after": 16}},
            "needs rows of 33 tokens or more, and model.seq_length is 32",
        ),
        (
            {"losses": [{"type": "cross_entropy", "name": "value"}]},
            "value is the name of an auxiliary head",
        ),
        (
            {"auxiliary": {"enable_value": False, "enable_policy": False}},
            r"Set auxiliary\.enable_policy, \S+enable_value to true",
        ),
    ],
)
def test_what_means_nothing_is_refused(changes: dict, told: str, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(UserError, match=told):
        train_here(tiny_preset(**merged({"auxiliary": ALL}, changes)), tmp_path)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_accumulation(
    make_project: Callable[..., Project],
) -> None:
    """Rows are looked at in the same positions, and a curriculum trains the same of them: the same
    losses of all heads, step by step, and the same heads in the end. All run on two ranks."""
    preset = tiny_preset(
        train={"max_steps": 12, "learning_rate": 1e-4, "precision": "fp32", "curriculum": UPHILL},
        data={"packing": "documents"},
        auxiliary=BY_ROW,
    )
    every = merged(preset, {"auxiliary": ALL, "train": {"max_steps": 3}})
    two = make_project({"t": preset, "every": every}, "two")
    assert_ended(on_two(two))
    assert_ended(on_two(two, "every"))
    assert all(set(e["losses"]) == {"cross_entropy", *HEADS} for e in two.events("step", "every"))
    one = two.folder.parent / "one"
    train_here(merged(preset, {"train": {"accumulation_steps": 2}}), one)
    mine, theirs = Project(one).events("step"), two.events("step")
    assert len(mine) == len(theirs) == 12
    for a, b in zip(mine, theirs):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4) and a["loss"] == pytest.approx(
            b["loss"], rel=1e-4
        )
        chosen, others = a["curriculum"], b["curriculum"]
        assert chosen["buckets"] == others["buckets"] and chosen["loss"] == pytest.approx(
            others["loss"], rel=1e-5
        )
        assert a["sources"]["texts"]["tokens"] == b["sources"]["texts"]["tokens"]
    assert_close(Project(one).checkpoint()["heads"], two.checkpoint()["heads"], 1e-5)
