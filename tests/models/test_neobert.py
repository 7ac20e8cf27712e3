"""NeoBERT against numbers of the published code, and its heads.

B batch, T time, D hidden_size, V vocab_size, L num_layers
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from core.checkpoint.fitting import load_model
from core.contracts import IGNORE_INDEX, Batch
from core.errors import CheckpointError
from core.losses.harmonic import Harmonic, HarmonicSettings
from core.losses.scores import SphereScores
from core.losses.stack import LossStack
from core.models import grouped_query, neobert
from core.models.neobert import NeoBERT, NeoBERTSettings
from core.preset.train import TrainSettings
from core.training.optim import Optimizer
from tests.models.test_models import GOLDEN, golden, make_batch

SEEN, WEIGHTS, EXPECTED = golden("neobert")
CONFIG = json.loads((GOLDEN / "neobert" / "names_shapes.json").read_text())["config"]
V = 101
TINY = {
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 100,
    "seq_length": 32,
}
REAL = SEEN["attention_mask"].bool()


def build(**changes: Any) -> NeoBERT:
    """Of the golden's shape, with random weights, in evaluation mode."""
    torch.manual_seed(1)
    return NeoBERT(NeoBERTSettings(**TINY | changes), V).eval()


def loaded(**changes: Any) -> NeoBERT:
    """With the golden's weights, in float64."""
    model = build(**changes)
    saved = dict(WEIGHTS)
    model.prepare_load(saved, [])
    load_model(model, saved, "the golden")
    return model.double()


def ids_of(rows: int, width: int, seed: int = 2) -> Tensor:
    return torch.randint(0, V, (rows, width), generator=torch.Generator().manual_seed(seed))


def padded_batch() -> Batch:
    """The golden's rows as our batches have them: padding is a document of its own."""
    return make_batch(SEEN["input_ids"], [[13], [9, 4]])


def logits_of(model: NeoBERT, batch: Batch) -> Tensor:
    output = model(batch)
    return output.readout(output.hidden)


def close(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), atol=atol, rtol=0)


# the published code -------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_logits_and_loss_are_the_published_ones() -> None:
    model = loaded()
    output = model(padded_batch())
    logits = output.readout(output.hidden)
    close(output.hidden[REAL], SEEN["hidden_masked"][REAL])
    close(logits[REAL], SEEN["logits_masked"][REAL])
    close(logits_of(model, make_batch(SEEN["input_ids"][:1])), SEEN["logits_row0_nomask"])
    loss = F.cross_entropy(logits.flatten(0, 1), SEEN["labels"].flatten())
    assert loss.item() == pytest.approx(EXPECTED["mlm_ce"], abs=1e-5)
    close(logits_of(model.float(), padded_batch())[REAL], SEEN["logits_masked"][REAL])


@torch.no_grad()
def test_the_residual_stream_is_the_published_one() -> None:
    model, found = loaded(), []
    model.model.encoder.register_forward_hook(lambda _, __, x: found.append(x))
    for block in model.model.transformer_encoder:
        block.register_forward_hook(lambda _, __, x: found.append(x))
    model(padded_batch())
    for number, x in enumerate(found):
        close(x[REAL], SEEN[f"residual_after_{number}_blocks"][REAL])


def _gate_second(model: NeoBERT, _: pytest.MonkeyPatch) -> None:
    for block in model.model.transformer_encoder:
        block.ffn.w12.weight.copy_(torch.cat(block.ffn.w12.weight.chunk(2)[::-1]))


def _whole_thirds(model: NeoBERT, _: pytest.MonkeyPatch) -> None:
    for block in model.model.transformer_encoder:
        thirds = block.qkv.weight.unflatten(0, (3, 4, 12))  # as if all of Q stood before all of K
        block.qkv.weight.copy_(thirds.transpose(0, 1).flatten(0, 2))


def _half_split(_: NeoBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neobert, "rotate", grouped_query.rotate)


@pytest.mark.parametrize(
    "wrong, differs", [(_gate_second, 1.0), (_whole_thirds, 1.0), (_half_split, 1.0), (None, 1e-3)]
)
@torch.no_grad()
def test_other_readings_of_it_are_told_apart(
    wrong: Callable[..., None] | None, differs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is the eps of the published class, with which nothing was trained."""
    model = loaded(norm_eps=1e-6 if wrong is None else 1e-5)
    if wrong is not None:
        wrong(model, monkeypatch)
    assert (
        logits_of(model, padded_batch())[REAL] - SEEN["logits_masked"][REAL]
    ).abs().max() > differs


def test_the_published_names_shapes_and_size() -> None:
    """All 172 of them, in the released model's size; nothing else is in the state dict."""
    full = json.loads((GOLDEN / "neobert" / "full_size_names_shapes.json").read_text())
    shapes = full.get("state_dict", full)
    settings = NeoBERTSettings()
    with torch.device("meta"):
        model = NeoBERT(settings, 30522)
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == shapes and len(
        shapes
    ) == 172
    assert (
        sum(p.numel() for p in model.parameters()) == settings.num_parameters(30522) == 245_136_954
    )
    assert not list(model.buffers())
    with torch.device("meta"):
        model = NeoBERT(NeoBERTSettings(head="distance"), 30522)
    assert set(shapes) ^ set(model.state_dict()) == {
        "decoder.weight",
        "decoder.bias",
        "dist_head.weight",
    }


def test_it_begins_as_published() -> None:
    """Uniform, also in the row of the padding token; biases 0, norms 1."""
    for name, p in build(num_layers=1, intermediate_size=96).named_parameters():
        if p.ndim == 1:
            assert (p == float(name.endswith("norm.weight"))).all(), name
        else:
            assert p.abs().max() <= 0.02 and p.std().item() == pytest.approx(
                0.02 / 3**0.5, rel=0.05
            ), name
            assert p.abs().sum(-1).min() > 0


@torch.no_grad()
def test_it_sees_all_of_a_document_and_nothing_else() -> None:
    """A packed document, or one before padding, is as if alone; the first of its tokens depends on
    the last."""
    model, ids = loaded(), ids_of(1, 24)
    packed = model(make_batch(ids, [[5, 1, 7, 11]])).hidden
    for start, stop in ((0, 5), (5, 6), (6, 13), (13, 24)):
        close(packed[:, start:stop], model(make_batch(ids[:, start:stop])).hidden, 1e-10)
    other = ids.clone()
    other[:, 12] = (other[:, 12] + 1) % V
    changed = (model(make_batch(other, [[5, 1, 7, 11]])).hidden != packed).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(6, 13)) and not NeoBERT.is_causal


@torch.no_grad()
def test_bf16_stays_near() -> None:
    """Positions are turned and norms taken in fp32, whatever the matrices are multiplied in."""
    model, batch = loaded().float(), make_batch(ids_of(2, 24))
    exact = model(batch).hidden
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch).hidden
    assert found.dtype == torch.float32 and (found - exact).norm() / exact.norm() < 0.05
    turn = neobert.turn_of(torch.tensor([[4095]]), 64, 1e4, torch.float32)
    exact = neobert.turn_of(torch.tensor([[4095]]), 64, 1e4, torch.float64)
    close(turn[0], exact[0], 1e-3)


# memory -------------------------------------------------------------------------------------------


def kept_for_backward(model: NeoBERT, batch: Batch, bf16: bool = False) -> int:
    """Bytes that a forward pass leaves, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[Tensor] = []  # or one storage after another has the same address
    with torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_layer_keeps_is_what_the_menu_says(bf16: bool) -> None:
    """Two layers more, at a length where a CPU's attention keeps no scores in bf16 either;
    autocast's copies of the weights are the little that is over."""
    sizes = {"hidden_size": 96, "num_heads": 4, "intermediate_size": 384, "seq_length": 520}
    batch = make_batch(ids_of(8, 520))
    settings = [NeoBERTSettings(**sizes, num_layers=layers) for layers in (1, 3)]
    one, three = (kept_for_backward(NeoBERT(s, V), batch, bf16) for s in settings)
    told = settings[1].activation_bytes(bf16) - settings[0].activation_bytes(bf16)
    assert (three - one) / batch.input_ids.numel() == pytest.approx(told, rel=0.05)


def test_blocks_below_the_first_trained_parameter_keep_nothing() -> None:
    """Specification 000 trains the last block and the prototypes."""
    model, batch = build(head="distance", num_layers=5), make_batch(ids_of(4, 32))
    everything = kept_for_backward(model, batch)
    for name, p in model.named_parameters():
        p.requires_grad_("transformer_encoder.4." in name or name.startswith("dist_head"))
    assert kept_for_backward(model, batch) < 0.4 * everything
    output = model(batch)
    output.readout(output.hidden[0]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


# the head of distances ----------------------------------------------------------------------------


def unit_rows(table: Tensor) -> Tensor:
    return F.normalize(table.detach().float(), dim=-1)


def off_sphere(model: NeoBERT) -> float:
    return (model.dist_head.weight.detach().double().norm(dim=-1) - 1.0).abs().max().item()


@pytest.mark.parametrize(
    "changes, origin",
    [
        ({}, "model.encoder.weight"),
        ({"keep_decoder": True}, "model.encoder.weight"),
        ({"keep_decoder": True, "prototypes": "decoder"}, "decoder.weight"),
        ({"prototypes": "decoder"}, None),
    ],
)
def test_prototypes_begin_as_a_table_on_the_unit_sphere(changes: dict, origin: str | None) -> None:
    model = build(head="distance", **changes)
    state = model.state_dict()
    assert off_sphere(model) < 1e-6 and ("decoder.weight" in state) == ("keep_decoder" in changes)
    if origin is not None:
        close(state["dist_head.weight"], unit_rows(state[origin]), 1e-6)
    settings = model.settings
    assert settings.num_parameters(V) == sum(p.numel() for p in model.parameters())
    readout, baseline = model(make_batch(ids_of(1, 8))).readout, model.baseline_readout()
    assert readout.provides == "distances" and readout.linear[0] is model.dist_head.weight
    assert readout.table is model.model.encoder.weight
    if "keep_decoder" in changes:
        assert (
            baseline.provides == "logits"
            and baseline.linear[0] is model.decoder.weight
            and baseline.table is readout.table
        )
        assert not model.decoder.weight.requires_grad and not model.decoder.bias.requires_grad
    else:
        assert baseline is None and build().baseline_readout() is None


def test_distances_are_those_between_unit_vectors() -> None:
    model = loaded(head="distance")
    output = model(make_batch(ids_of(2, 9)))
    expected = torch.cdist(F.normalize(output.hidden, dim=-1), model.dist_head.weight) ** 2
    close(output.readout(output.hidden), expected, 1e-6)  # what unit length in fp32 leaves


def test_every_step_ends_on_the_unit_sphere() -> None:
    """While the decoder beside it stays as it is; frozen prototypes are left alone, to the bit."""
    model = build(head="distance", keep_decoder=True).train()
    optimizer = Optimizer(
        list(model.named_parameters()), {"dist_head.weight"}, TrainSettings(learning_rate=1e-2)
    )
    kept, before = model.decoder.weight.clone(), model.dist_head.weight.detach().clone()
    for step in range(5):
        batch = make_batch(ids_of(2, 16, seed=step))
        F.cross_entropy(
            -20.0 * logits_of(model, batch).flatten(0, 1), batch.labels.flatten()
        ).backward()
        optimizer.step(1.0)
        model.after_optimizer_step()
        assert off_sphere(model) < 1e-6
        model.zero_grad()
    assert torch.equal(model.decoder.weight, kept) and not torch.allclose(
        model.dist_head.weight, before
    )
    with torch.no_grad():
        model.dist_head.weight.mul_(2.0)
    model.dist_head.weight.requires_grad_(False)
    frozen = model.dist_head.weight.clone()
    model.after_optimizer_step()
    assert torch.equal(model.dist_head.weight, frozen)


def test_settings_that_do_not_go_together_are_refused() -> None:
    for changes, said in (
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 48"),
        ({"num_heads": 16}, "3 wide, which is odd"),
        ({"keep_decoder": True}, '"head": "distance"'),
        ({"prototypes": "decoder"}, '"head": "distance"'),
    ):
        with pytest.raises(ValidationError, match=said):
            NeoBERTSettings(**TINY | changes)


# weights made before ------------------------------------------------------------------------------


def test_weights_without_prototypes_get_them() -> None:
    """From the table or the decoder that was saved, not from the random one; a decoder that is not
    kept is left out."""
    for changes, origin in (
        ({}, "model.encoder.weight"),
        ({"prototypes": "decoder"}, "decoder.weight"),
        ({"keep_decoder": True}, "model.encoder.weight"),
    ):
        model, saved, notes = build(head="distance", **changes), dict(WEIGHTS), []
        model.prepare_load(saved, notes)
        load_model(model, saved, "here")
        close(model.dist_head.weight, unit_rows(WEIGHTS[origin]), 1e-6)
        assert (
            off_sphere(model) < 1e-6
            and notes[0] == f"the prototypes begin as the rows of {origin}, scaled to length 1"
        )
        if "keep_decoder" in changes:
            assert torch.equal(model.decoder.weight, WEIGHTS["decoder.weight"]) and len(notes) == 1
        else:
            assert notes[1] == 'left out: decoder.weight, decoder.bias, as model.head is "distance"'


def test_weights_with_prototypes_keep_them_to_the_bit() -> None:
    """A run goes on from where it was; what is not on the sphere comes back to it; another head
    leaves them out."""
    trained = loaded(head="distance", keep_decoder=True).float()
    with torch.no_grad():
        trained.dist_head.weight.copy_(unit_rows(torch.randn(V, 48)))
        trained.dist_head.weight[3] = 0.0
    model, notes = build(head="distance", keep_decoder=True), []
    saved = dict(trained.state_dict())
    model.prepare_load(saved, notes)
    load_model(model, saved, "here")
    assert torch.equal(model.dist_head.weight, trained.dist_head.weight) and not notes
    saved = dict(trained.state_dict()) | {"dist_head.weight": 3.0 * torch.randn(V, 48)}
    model.prepare_load(saved, notes)
    load_model(model, saved, "here")
    assert off_sphere(model) < 1e-6 and notes == ["the prototypes are scaled to length 1"]
    plain, notes, saved = build(), [], dict(trained.state_dict())
    plain.prepare_load(saved, notes)
    load_model(plain, saved, "here")
    assert notes == ['left out: dist_head.weight, as model.head is "decoder"']


def test_a_head_that_nothing_can_be_made_of_is_refused() -> None:
    encoder = {name: t for name, t in WEIGHTS.items() if not name.startswith("decoder")}
    for changes, lacking in (
        ({"head": "distance", "prototypes": "decoder"}, "dist_head.weight"),
        ({"head": "distance", "keep_decoder": True}, "decoder.bias"),
        ({}, "decoder.weight"),
    ):
        model, saved = build(**changes), dict(encoder)
        model.prepare_load(saved, [])
        with pytest.raises(CheckpointError, match=f"{lacking} is missing there"):
            load_model(model, saved, "here")


# the whole way ------------------------------------------------------------------------------------

MASKED = SEEN["labels"] != IGNORE_INDEX


@pytest.mark.parametrize("name, distance", [("sq", "squared"), ("euclid", "euclidean")])
@pytest.mark.parametrize("h_exp", [-12, -4])
def test_the_loss_of_the_published_model_with_prototypes(
    name: str, distance: str, h_exp: int
) -> None:
    """From token ids to the negative log-likelihood of each masked token, prototypes made of the
    published embeddings."""
    expected = json.loads((GOLDEN / "harmonic" / "expected.json").read_text())[
        "neobert_end_to_end"
    ][f"{name}_h{h_exp}"]
    model, batch = loaded(head="distance"), replace(padded_batch(), labels=SEEN["labels"])
    stack = LossStack([Harmonic(HarmonicSettings(h_exp=float(h_exp), distance=distance))])
    terms = stack.measure(model(batch), batch, 0.0, 1).terms
    close(terms.values[MASKED], torch.tensor(expected["per_token"]).double(), 1e-4)
    assert abs(float(terms.sums["harmonic"]) / int(MASKED.sum()) - expected["mean"]) <= 1e-4


def test_only_masked_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    forward = SphereScores.forward
    monkeypatch.setattr(
        SphereScores,
        "forward",
        lambda self, hidden: scored.append(len(hidden)) or forward(self, hidden),
    )
    model, batch = loaded(head="distance"), replace(padded_batch(), labels=SEEN["labels"])
    total, _ = LossStack([Harmonic(HarmonicSettings())])(
        model(batch), batch, int(MASKED.sum()), 0.0, 1
    )
    total.backward()
    assert sum(scored) == int(MASKED.sum()) < MASKED.numel()
