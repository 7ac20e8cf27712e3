"""The optimizer: every parameter in exactly one group, decay only where it belongs, state by
name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.models import MODELS
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from core.preset.train import TrainSettings
from core.training.optim import Optimizer
from tests.models.test_models import tiny_settings

V = 40


def build(kind: str = "adamw", seed: int = 1, **settings: Any) -> tuple[SimpleLM, Optimizer]:
    torch.manual_seed(seed)
    model = SimpleLM(SimpleLMSettings(hidden_size=16, num_layers=2, num_heads=2, seq_length=8), V)
    return model, Optimizer(
        list(model.named_parameters()),
        {"embedding.weight"},
        TrainSettings(optimizer=kind, **settings),
    )


def groups(optimizer: Optimizer) -> list[tuple[str, dict]]:
    """(class of the torch optimizer, group) of all groups."""
    return [(type(o).__name__, group) for o in optimizer.optimizers for group in o.param_groups]


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 0.1


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_is_in_exactly_one_group(name: str, kind: str) -> None:
    """Of every model: none forgotten, none twice; frozen ones in none."""
    model = MODELS[name][1](tiny_settings(name), V)
    frozen = next(model.parameters()).requires_grad_(False)
    embeddings = {n for n, p in model.named_parameters() if p.shape[:1] == (V,)}
    optimizer = Optimizer(list(model.named_parameters()), embeddings, TrainSettings(optimizer=kind))
    grouped = [id(p) for _, group in groups(optimizer) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert id(frozen) not in grouped


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_matrices_decay(kind: str) -> None:
    """Biases, norms and the position table do not: they would only shrink."""
    model, optimizer = build(kind, weight_decay=0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for _, group in groups(optimizer)
        for p in group["params"]
    }
    assert set(decay.values()) == {0.3, 0.0}
    for name, p in model.named_parameters():
        assert (decay[name] == 0.3) == (p.ndim == 2 and name != "pos_embedding.weight"), name


def test_muon_takes_the_matrices_of_the_trunk() -> None:
    """And nothing else: its update is for linear maps, not for tables of embeddings or vectors."""
    model, optimizer = build("muon", learning_rate=1e-3, muon_learning_rate=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {
        names[id(p)] for kind, group in groups(optimizer) if kind == "Muon" for p in group["params"]
    }
    wanted = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")
    assert taken == {name for name in names.values() if name.endswith(wanted)} and len(taken) == 8
    set_gradients(model, 0)
    optimizer.step(0.5)
    assert {kind: group["lr"] for kind, group in groups(optimizer)} == {
        "AdamW": 0.5e-3,
        "Muon": 0.025,
    }


def test_adamw_is_adamw() -> None:
    """One update against the formula, with decay and without."""
    model, optimizer = build(weight_decay=0.1, learning_rate=0.01, betas=(0.9, 0.95), eps=1e-8)
    before = weights(model)
    set_gradients(model, 0)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step(0.5)
    for name, p in model.named_parameters():
        decay = 0.1 if p.ndim == 2 and name != "pos_embedding.weight" else 0.0
        # at the first step the averages are the gradient itself
        update = gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(
            p.detach(), before[name] * (1 - 0.005 * decay) - 0.005 * update, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_are_those_of_torch(kind: str) -> None:
    """Bit for bit: only what surrounds torch's own methods is left out."""
    model, optimizer = build(kind, weight_decay=0.3)
    twin, _ = build(kind)
    mine = dict(zip(model.parameters(), twin.parameters()))
    theirs = []
    for o in optimizer.optimizers:
        made = [{**group, "params": [mine[p] for p in group["params"]]} for group in o.param_groups]
        theirs.append(getattr(torch.optim, type(o).__name__)(made))
    for step in range(3):
        set_gradients(model, step)
        set_gradients(twin, step)
        optimizer.step(1.0)
        for o in theirs:
            o.step()
        assert all(torch.equal(a, b) for a, b in mine.items())


def test_a_factor_of_0_changes_nothing() -> None:
    model, optimizer = build()
    before = weights(model)
    set_gradients(model, 0)
    optimizer.step(0.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resuming_equals_not_stopping(kind: str) -> None:
    """State by name, through a file as a checkpoint keeps it: the same bits as without the
    interruption."""
    import io

    straight, optimizer = build(kind)
    for step in range(6):
        set_gradients(straight, step)
        optimizer.step(1.0 - 0.1 * step)
        if step == 2:
            file = io.BytesIO()
            torch.save({"model": straight.state_dict(), "optimizer": optimizer.state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved["optimizer"]) == {name for name, _ in straight.named_parameters()}
    resumed, optimizer = build(kind, seed=99)
    resumed.load_state_dict(saved["model"])
    assert optimizer.load(saved["optimizer"]) == []
    for step in range(3, 6):
        set_gradients(resumed, step)
        optimizer.step(1.0 - 0.1 * step)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_what_does_not_fit_starts_afresh_and_is_named() -> None:
    """A longer position table, a parameter that is new, one now under another optimizer: the others
    keep their state."""
    model, optimizer = build()
    set_gradients(model, 0)
    optimizer.step(1.0)
    saved = optimizer.state()
    saved["pos_embedding.weight"]["exp_avg"] = torch.zeros(5, 16)
    del saved["norm.bias"]
    other, fresh_optimizer = build()
    assert sorted(fresh_optimizer.load(saved)) == ["norm.bias", "pos_embedding.weight"]
    assert set(fresh_optimizer.state()) == set(saved) - {"pos_embedding.weight"}
    _, muon = build("muon")
    assert sorted(muon.load(optimizer.state())) == sorted(
        name for name, p in other.named_parameters() if name.startswith("layers") and p.ndim == 2
    )


def test_loaded_state_is_a_copy() -> None:
    """Going back to a checkpoint twice must find it as it was."""
    model, optimizer = build()
    set_gradients(model, 0)
    optimizer.step(1.0)
    saved = {
        name: {k: v.clone() for k, v in state.items()} for name, state in optimizer.state().items()
    }
    kept = {name: state["exp_avg"].clone() for name, state in saved.items()}
    optimizer.load(saved)
    set_gradients(model, 1)
    optimizer.step(1.0)
    assert all(torch.equal(saved[name]["exp_avg"], kept[name]) for name in kept)


def test_muon_alone_where_only_matrices_are_trained() -> None:
    """Nothing is left for AdamW then, and torch's refuses to have nothing."""
    matrix = nn.Parameter(torch.randn(4, 3))
    optimizer = Optimizer([("layer.weight", matrix)], set(), TrainSettings(optimizer="muon"))
    before, matrix.grad = matrix.detach().clone(), torch.randn(4, 3)
    optimizer.step(1.0)
    assert not torch.equal(before, matrix) and set(optimizer.state()) == {"layer.weight"}
