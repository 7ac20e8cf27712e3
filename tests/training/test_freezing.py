"""train.trainable: which parameters a pattern names, that those and no others move, and what is
told of it."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import UserError
from core.models import build_model
from core.preset.decode import decode_preset
from core.preview import training_lines
from core.registry import Preset
from core.runtime import detect_runtime
from core.training.freezing import names, share_with_graph, train_only
from core.training.memory import memory_estimate, size_of
from tests.parallel.test_ddp import assert_ended, on_two
from tests.project import ROOT, TINY_SIZES, Project, differences, tiny_preset
from tests.training.runs import (
    SAME,
    assert_close,
    assert_same_checkpoint,
    events,
    finish,
    session,
    weights,
)

NEOBERT = {"type": "neobert", "head": "distance", "keep_decoder": True, "intermediate_size": 64}
HARMONIC = {"losses": [{"type": "harmonic"}]}
KINDS: dict[str, tuple[dict, list[str], str]] = {
    "simple_lm": ({"model": {"type": "simple_lm"}}, ["layers.1", "norm"], r"layers\.1\.|norm\."),
    "gpt2": ({"model": {"type": "gpt2"}}, ["h.1.mlp", "ln_f"], r"transformer\.(h\.1\.mlp|ln_f)\."),
    "polychromatic": (
        {"model": {"type": "polychromatic", **TINY_SIZES}},
        ["polyglu.gate_net", "rmsnorm_?"],
        r"model_core\.\d\.(polyglu\.gate_net\.|rmsnorm_[12]\.)|model_core\.\d\.gqa\.rmsnorm_[qk]\.",
    ),
    "neobert": (
        {"model": NEOBERT, **HARMONIC},
        ["transformer_encoder.1", "dist_head"],
        r"model\.transformer_encoder\.1\.|dist_head\.",
    ),
}
"""Of each model: a preset, patterns, and what the full names are that they stand for."""


def tiny(kind: str, trainable: list[str] | None = None, **train: Any) -> dict:
    changes = KINDS[kind][0]
    return {**changes, "train": {"max_steps": 4, "trainable": trainable or KINDS[kind][1], **train}}


def expected_names(kind: str, model: nn.Module) -> set[str]:
    found = {name for name, _ in model.named_parameters() if re.match(KINDS[kind][2], name)}
    assert found and found != set(dict(model.named_parameters()))
    return found


class Named(nn.Module):
    """Nothing but parameters of these names; those with "kept" in them the model itself never
    trains."""

    def __init__(self, *paths: str):
        super().__init__()
        for path in paths:
            *parents, last = path.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.register_parameter(
                last, nn.Parameter(torch.zeros(2), requires_grad="kept" not in path)
            )


# patterns -----------------------------------------------------------------------------------------

BLOCKS = [
    f"model.transformer_encoder.{i}.{part}"
    for i in range(28)
    for part in ("qkv.weight", "ffn.w12.weight", "ffn_norm.weight")
]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("transformer_encoder.2", [name for name in BLOCKS if ".2." in name]),
        ("transformer_encoder.27", [name for name in BLOCKS if ".27." in name]),
        ("transformer_encoder.2?", [name for name in BLOCKS if re.search(r"\.2\d\.", name)]),
        ("2*", [name for name in BLOCKS if re.search(r"\.2\d?\.", name)]),
        ("model", BLOCKS),
        ("ffn", [name for name in BLOCKS if ".ffn.w12" in name]),
        ("ffn*", [name for name in BLOCKS if ".ffn" in name]),
        ("transformer_encoder.*.qkv", [name for name in BLOCKS if ".qkv." in name]),
        ("*.0.ffn.*", [name for name in BLOCKS if ".0.ffn.w12" in name]),
        ("model.transformer_encoder.3.qkv.weight", ["model.transformer_encoder.3.qkv.weight"]),
        ("transformer_encoder.28", []),
        ("encoder.2", []),
        ("transformer_encoder.QKV", []),
        ("transformer_encoder.qkv", []),
        ("model.transformer_encoder.3.qkv.weight.more", []),
        ("", []),
    ],
)
def test_a_pattern_names_whole_parts_side_by_side(pattern: str, found: list[str]) -> None:
    """Block 2 is neither block 27 nor one of the twenties; "*" and "?" stay inside a part."""
    assert [name for name in BLOCKS if names(pattern, name)] == found


def test_no_patterns_freeze_nothing_and_patterns_all_else() -> None:
    model = Named(*BLOCKS, "decoder.kept", "dist_head.weight")
    train_only(model, None)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"decoder.kept"}
    train_only(model, ["transformer_encoder.2", "dist_head"])
    expected = {name for name in BLOCKS if ".2." in name} | {"dist_head.weight"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_a_wide_pattern_never_trains_what_the_model_keeps() -> None:
    model = Named("decoder.kept", "dist_head.weight")
    train_only(model, ["*"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"dist_head.weight"}


def test_all_wrong_patterns_are_told_at_once_with_the_nearest_names() -> None:
    """And what parameters there are, one line for a stack of blocks; nothing is frozen by what is
    refused."""
    model = Named(*BLOCKS, "decoder.kept", "dist_head.weight")
    with pytest.raises(UserError) as refused:
        train_only(
            model,
            ["dist_haed", "transformer_encoder.1", "zzz", "decoder", "transformer_encoder.28"],
        )
    told, outline = str(refused.value).split("\n")
    assert told == (
        'train.trainable: "dist_haed" names no parameter; did you mean "dist_head"?; "zzz" names '
        "no parameter; "
        '"decoder" names only what this model keeps as it is; "transformer_encoder.28" names no '
        "parameter."
    )
    assert (
        outline == "The model's parameters are model.transformer_encoder.0..27, dist_head.weight."
    )
    assert all(p.requires_grad for name, p in model.named_parameters() if "kept" not in name)


@pytest.mark.parametrize(
    ("trainable", "share"),
    [
        (["*"], 1.0),
        (["blocks.0"], 1.0),
        (["blocks.1.w"], 0.75),
        (["blocks.3", "head"], 0.25),
        (["head"], 0.0),
        (["embedding"], 1.0),
        (["embedding", "blocks.3"], 1.0),
        (["norm"], 0.0),
    ],
)
def test_layers_from_the_first_trained_one_on_leave_something(
    trainable: list[str], share: float
) -> None:
    """What a matrix within a block numbers of its own counts as that block."""
    model = Named(
        "embedding.w",
        *(f"blocks.{i}.{part}" for i in range(4) for part in ("w", "mlp.0.w", "mlp.9.w")),
        "norm.w",
        "head.w",
    )
    train_only(model, trainable)
    assert share_with_graph(model) == share


# what moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_named_parameters_move(kind: str, tmp_path: Path) -> None:
    """Bit for bit nothing else, weight decay and all; the optimizer keeps state of them alone, here
    and in the checkpoint."""
    built = session(tmp_path, **tiny(kind, weight_decay=0.1, learning_rate=0.01))
    before, expected = weights(built), expected_names(kind, built.trainer.model)
    assert {
        name for name, p in built.trainer.model.named_parameters() if p.requires_grad
    } == expected
    told = built.start_event
    sizes = {name: p.numel() for name, p in built.trainer.model.named_parameters()}
    assert (told["parameters"], told["trained_parameters"]) == (
        sum(sizes.values()),
        sum(sizes[name] for name in expected),
    )
    assert finish(built) == "max_steps"
    after = weights(built)
    assert {name for name in after if not torch.equal(after[name], before[name])} == expected
    assert set(built.trainer.optimizer.state()) == expected
    saved = Project(tmp_path).checkpoint()
    assert set(saved["optimizer"]) == expected
    assert all(torch.equal(saved["model"][name], after[name]) for name in after)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_what_moves_is_that_of_a_whole_run(kind: str, tmp_path: Path) -> None:
    """Freezing leaves out work, and changes nothing of what is left: the same loss, the same first
    gradients."""

    def gradients(name: str, trainable: list[str]) -> dict[str, Tensor]:
        preset = tiny(kind, trainable, max_steps=1, max_grad_norm=1e9)
        built, found = session(tmp_path / name, **preset), {}

        def keep(factor: float) -> None:
            found.update(
                {
                    n: p.grad.clone()
                    for n, p in built.trainer.model.named_parameters()
                    if p.grad is not None
                }
            )

        built.trainer.optimizer.step = keep
        finish(built)
        return found

    some, everything = gradients("some", KINDS[kind][1]), gradients("all", ["*"])
    assert set(some) == expected_names(
        kind, build_model(decode_preset(tiny_preset(**KINDS[kind][0]), Preset, "t", "t"), 300)
    )
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, everything[name], rtol=1e-4, atol=1e-8)
    one, other = (events(tmp_path / name, "step")[0]["loss"] for name in ("some", "all"))
    assert one == pytest.approx(other, rel=1e-6)


def test_resuming_equals_not_stopping(tmp_path: Path) -> None:
    preset = tiny("neobert", max_steps=6)
    whole = session(tmp_path / "whole", **preset)
    finish(whole)
    half = session(tmp_path / "halves", **preset)
    half.trainer.should_stop = lambda: half.trainer.progress.step == 3
    assert finish(half) == "interrupted"
    rest = session(tmp_path / "halves", **preset)
    assert rest.trainer.progress.step == 3 and not any("afresh" in note for note in rest.notes)
    finish(rest)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halves")


def test_another_choice_in_the_next_run_of_a_lineage(tmp_path: Path) -> None:
    """What was trained before goes on with its state, what is new starts afresh, and is named; what
    is left out stays."""
    finish(session(tmp_path, **tiny("neobert", ["transformer_encoder.1", "dist_head"])))
    first = Project(tmp_path).checkpoint()
    second = session(tmp_path, **tiny("neobert", ["transformer_encoder.0", "dist_head"]))
    (told,) = [note for note in second.notes if "afresh" in note]
    assert told.startswith(
        "optimizer state starts afresh for 6 parameters: model.transformer_encoder.0."
    )
    kept = second.trainer.optimizer.state()
    assert set(kept) == {"dist_head.weight"}
    assert all(
        torch.equal(value, first["optimizer"]["dist_head.weight"][key])
        for key, value in kept["dist_head.weight"].items()
    )
    finish(second)
    after = Project(tmp_path).checkpoint()
    moved = {
        name
        for name in after["model"]
        if not torch.equal(after["model"][name], first["model"][name])
    }
    assert (
        moved == set(after["optimizer"]) == {n for n in moved if ".0." in n} | {"dist_head.weight"}
    )
    assert len(moved) == 7
    third = session(tmp_path, **tiny("neobert", ["dist_head"]))
    assert not any("afresh" in note for note in third.notes)
    third.trainer.loader.close()
    third.log.close()


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(make_project: Callable[..., Project]) -> None:
    """kill -9: the frozen parameters are those it began with, the others those of a run that nobody
    killed."""
    preset = tiny_preset(**tiny("neobert", max_steps=120, checkpoint_every_steps=7))
    whole, killed = make_project({"t": preset}, "whole"), make_project({"t": preset}, "killed")
    assert_ended(whole.run("t"))
    result = killed.run_until("t", lambda: killed.num_steps() >= 40, signal.SIGKILL)
    assert result.code == -9 and not killed.finished()
    assert_ended(killed.run("t"))
    assert killed.events("run_start")[-1]["resumed_from"] is not None
    assert differences(whole.checkpoint(), killed.checkpoint()) == []


@pytest.mark.slow
def test_two_ranks_move_the_same_parameters(
    make_project: Callable[..., Project], tmp_path: Path
) -> None:
    """As one rank with twice the accumulation, and the frozen ones to the bit."""
    train = {"learning_rate": 1e-4, "precision": "fp32", "eval_tokens": 0}
    two = make_project({"t": tiny_preset(**tiny("neobert", **train))})
    assert_ended(on_two(two))
    one = session(
        tmp_path / "one",
        data={"min_text_length": 50},
        **tiny("neobert", accumulation_steps=2, **train),
    )
    before, expected = weights(one), expected_names("neobert", one.trainer.model)
    one.trainer.loader.close()
    one.log.close()
    saved = two.checkpoint()
    assert set(saved["optimizer"]) == expected
    assert {
        name for name in before if not torch.equal(saved["model"][name], before[name])
    } == expected
    alone = make_project(
        {"t": tiny_preset(**tiny("neobert", accumulation_steps=2, **train))}, "alone"
    )
    assert_ended(alone.run("t"))
    assert_close(alone.checkpoint()["model"], saved["model"], SAME)


# what is told -------------------------------------------------------------------------------------


def card_of(**changes: Any) -> list[str]:
    preset = decode_preset(tiny_preset(**changes), Preset, "t", "t")
    return training_lines(preset, detect_runtime(), ROOT)


def gigabytes(lines: list[str]) -> float:
    (told,) = [
        float(found[1]) for line in lines if (found := re.search(r"about ([\d.]+) GB", line))
    ]
    return told


LARGE = {
    "model": NEOBERT | {"hidden_size": 256, "num_layers": 12, "num_heads": 4, "seq_length": 512},
    **HARMONIC,
}


def test_the_menu_tells_what_is_trained_and_a_smaller_need_of_memory() -> None:
    everything = card_of(**LARGE)
    last = card_of(**LARGE, train={"trainable": ["transformer_encoder.11", "dist_head"]})
    found = re.match(r"([\d.]+)M parameters \(([\d.]+)k trained\), ", last[0])
    assert found and float(found[2]) < 1000 * float(found[1]) / 4
    assert gigabytes(last) < gigabytes(everything)
    assert "trained" not in card_of()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_menu_counts_what_a_run_trains(kind: str) -> None:
    """Without making any weights, as a model that is made counts itself."""
    preset = decode_preset(tiny_preset(**tiny(kind)), Preset, "t", "t")
    size = size_of(preset, 300)
    model = build_model(preset, 300)
    train_only(model, preset.train.trainable)
    parameters = list(model.parameters())
    assert size.parameters == sum(p.numel() for p in parameters)
    assert size.trained == sum(p.numel() for p in parameters if p.requires_grad) < size.parameters
    assert size.share_with_graph == share_with_graph(model)
    whole = size_of(decode_preset(tiny_preset(**KINDS[kind][0]), Preset, "t", "t"), 300)
    less, more = (memory_estimate(preset, each, 300, bf16=False) for each in (size, whole))
    assert less[0] == more[0] - 12 * (whole.trained - size.trained) and less[1] <= more[1]


def test_the_menu_says_of_a_wrong_pattern_that_it_cannot_start() -> None:
    (line,) = card_of(train={"trainable": ["layers.7", "layers.1"]})
    assert line.startswith('cannot start yet: train.trainable: "layers.7" names no parameter')


@pytest.mark.slow
def test_a_wrong_pattern_ends_a_start_before_anything_is_written(
    make_project: Callable[..., Project],
) -> None:
    project = make_project({"t": tiny_preset(train={"trainable": ["layer.1", "embeding"]})})
    result = project.run("t")
    assert_ended(result, 2)
    for part in (
        '"layer.1" names no parameter; did you mean "layers"?',
        '"embeding" names no parameter; did you mean "embedding"?',
    ):
        assert part in result.err
    assert not (project.folder / "logs").exists() and not (project.folder / "checkpoints").exists()
