"""Promises of every model in the table, and what the baseline LM must equal.

B batch, T time, D hidden_size, V vocab_size
"""

import atexit
import copy
import io
import json
import random
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from core.contracts import IGNORE_INDEX, Batch
from core.models import MODELS
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from tests.project import TINY_SIZES

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
V, T = 40, 16
CAUSAL = [name for name, (_, cls) in MODELS.items() if cls.is_causal]


@lru_cache
def hub_folder() -> str:
    """A tiny GPT-2 as the Hub has them; a folder, as the library reads the Hub's address once in a
    process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tempfile.mkdtemp(prefix="zeroarg-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=V,
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def tiny_settings(name: str, **changes: Any) -> Any:
    """Small sizes, for those settings that a kind of model has."""
    settings = MODELS[name][0]
    sizes = {key: value for key, value in TINY_SIZES.items() if key in settings.model_fields}
    where = {"name": hub_folder()} if name == "hub" else {}
    return settings(**sizes | where | changes)


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny model of a kind, in evaluation mode."""
    # first: making the folder of the Hub's model draws numbers, once
    settings = tiny_settings(name, seq_length=T, **changes)
    torch.manual_seed(1)
    return MODELS[name][1](settings, V).eval()


def make_batch(input_ids: Tensor, lengths: list[list[int]] | None = None) -> Batch:
    """A batch of one document a row, or of packed documents of these lengths; targets are
    random."""
    B, width = input_ids.shape
    lengths = lengths or [[width]] * B
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    documents = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    labels = torch.randint(0, V, input_ids.shape, generator=torch.Generator().manual_seed(3))
    sources = torch.zeros_like(input_ids, dtype=torch.int32)
    packed = any(len(row) > 1 for row in lengths)
    return Batch(
        input_ids, labels, torch.stack(positions), torch.stack(documents).int(), sources, packed
    )


def random_ids(rows: int, width: int = T, seed: int = 2) -> Tensor:
    return torch.randint(0, V, (rows, width), generator=torch.Generator().manual_seed(seed))


def scores_of(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T, V), higher is better whatever the readout gives."""
    output = model(batch)
    scores = output.readout(output.hidden.flatten(0, 1)).view(*output.hidden.shape[:2], -1)
    return scores if output.readout.provides == "logits" else -scores


@pytest.mark.parametrize("name", MODELS)
def test_shapes(name: str) -> None:
    """hidden (B, T, D), scores (B, T, V), for full and for shorter rows; the readout shows the
    input embedding table."""
    model = build(name)
    assert model.vocab_size == V
    for width in (T, 5, 1):
        batch = make_batch(random_ids(3, width))
        output = model(batch)
        assert output.hidden.shape == (3, width, 32) and output.readout.table.shape == (V, 32)
        assert scores_of(model, batch).shape == (3, width, V)
        assert output.readout.provides in ("logits", "distances")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_leak_from_the_future(name: str, packed: bool) -> None:
    """Another token at t changes nothing before t: exactly nothing, in float64; and it does change
    position t."""
    model = build(name).double()
    lengths = [[6, 10], [16]] if packed else None
    ids = random_ids(2)
    before = model(make_batch(ids, lengths)).hidden
    for t in range(T):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % V
        after = model(make_batch(other, lengths)).hidden
        assert torch.equal(after[:, :t], before[:, :t]), f"position {t} is seen by an earlier one"
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("name", MODELS)
def test_no_leak_between_packed_documents(name: str) -> None:
    """Other tokens in one document change exactly nothing in its neighbours, before and after
    it."""
    model = build(name).double()
    lengths = [[5, 4, 7]]
    ids = random_ids(1)
    before = model(make_batch(ids, lengths)).hidden
    for start, stop in ((0, 5), (5, 9), (9, 16)):
        other = ids.clone()
        other[:, start:stop] = (other[:, start:stop] + 1) % V
        after = model(make_batch(other, lengths)).hidden
        same = (after == before).all(-1)[0]
        assert same[:start].all() and same[stop:].all() and not same[start:stop].any()


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_document_is_as_if_alone(name: str) -> None:
    """Where a document lies in its row makes no difference."""
    model = build(name).double()
    ids = random_ids(1)
    packed = model(make_batch(ids, [[5, 4, 7]])).hidden
    for start, stop in ((0, 5), (5, 9), (9, 16)):
        alone = model(make_batch(ids[:, start:stop])).hidden
        torch.testing.assert_close(packed[:, start:stop], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("first", [0, V - 1])
def test_rows_that_begin_with_padding_or_end_tokens_give_no_nan(name: str, first: int) -> None:
    """Pad and end-of-document share an id: a mask by id would hide every key of such a row.
    Gradients are finite too."""
    for packed in (False, True):
        model = build(name)
        ids = random_ids(3)
        ids[0, 0] = ids[1, :] = ids[2, :8] = first
        scores = scores_of(model, make_batch(ids, [[1, 15], [16], [8, 8]] if packed else None))
        assert scores.isfinite().all()
        scores.logsumexp(-1).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_the_right_is_never_seen(name: str) -> None:
    """A short document padded to the row's length gives what it gives alone."""
    model = build(name).double()
    ids = random_ids(1)
    alone = model(make_batch(ids[:, :6])).hidden
    torch.testing.assert_close(model(make_batch(ids)).hidden[:, :6], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_overfits_one_batch(name: str) -> None:
    """Every part that is meant to learn does: random targets of one batch are learnt by heart."""
    model = build(name).train()
    batch = make_batch(random_ids(4), [[16], [5, 11], [9, 7], [16]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    first = loss = torch.tensor(float("nan"))
    for step in range(200):
        loss = F.cross_entropy(scores_of(model, batch).flatten(0, 1), batch.labels.flatten())
        first = loss.detach() if step == 0 else first
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hook := getattr(model, "after_optimizer_step", None):
            hook()
    assert first > 2.0 and loss < 0.1, (
        f"loss {loss:.2f} after {step + 1} steps, {first:.2f} at first"
    )


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_gives_the_same_bits(name: str) -> None:
    """What a fresh model computes with saved weights is bit for bit what was computed before."""
    model, batch = build(name), make_batch(random_ids(2), [[16], [7, 9]])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = build(name)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert not torch.equal(scores_of(build(name), batch), scores_of(model, batch))
    assert torch.equal(scores_of(again, batch), scores_of(model, batch))


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_off_by_default(name: str) -> None:
    """Hugging Face's GPT-2 silently brings 0.1."""
    model = MODELS[name][1](tiny_settings(name), V)
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, nn.Dropout))
    assert all(
        module.dropout == 0.0
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_fixes_the_weights(name: str) -> None:
    """And no parameter is left as the memory happened to be."""
    one, two = build(name).state_dict(), build(name).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(value.isfinite().all() for value in one.values() if value.is_floating_point())


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_a_model_of_its_own(name: str) -> None:
    """It computes the same bits, and shares nothing."""
    model, batch = build(name), make_batch(random_ids(2), [[16], [7, 9]])
    before = scores_of(model, batch)
    other = copy.deepcopy(model)
    assert torch.equal(scores_of(other, batch), before)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(scores_of(model, batch), before) and not torch.equal(
        scores_of(other, batch), before
    )


@pytest.mark.parametrize("name", MODELS)
def test_tied_tables_are_one_parameter(name: str) -> None:
    """What the readout reads is in the model, and where it is the embedding table it is the very
    same parameter, listed once."""
    model = build(name)
    readout = model(make_batch(random_ids(1))).readout
    listed = {id(p): key for key, p in model.named_parameters()}
    assert all(id(p) in listed for p in (*readout.parameters(), readout.table))
    if name in ("gpt2", "hub"):
        assert readout.linear[0] is readout.table and readout.linear[1] is None
        assert listed[id(readout.table)] == "transformer.wte.weight"


@pytest.mark.parametrize(
    "name", [name for name, (settings, _) in MODELS.items() if hasattr(settings, "num_parameters")]
)
def test_counting_without_building_counts_right(name: str) -> None:
    """What the menu says, for several sizes; None is an answer too."""
    for changes in (
        {},
        {"num_layers": 3, "intermediate_size": None, "seq_length": 24},
        {"hidden_size": 48, "intermediate_size": 7},
    ):
        fields = MODELS[name][0].model_fields
        known = {
            k: v
            for k, v in changes.items()
            if k in fields and (v is not None or fields[k].default is None)
        }
        settings = tiny_settings(name, **known)
        assert settings.num_parameters(V) in (
            None,
            sum(p.numel() for p in MODELS[name][1](settings, V).parameters()),
        )


# the baseline -------------------------------------------------------------------------------------


def test_dropout_works_when_asked_for() -> None:
    model, batch = build("simple_lm", dropout=0.5), make_batch(random_ids(2))
    assert torch.equal(model(batch).hidden, model(batch).hidden)
    model.train()
    assert not torch.equal(model(batch).hidden, model(batch).hidden)


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(inputs and outputs, weights, numbers) computed with the original."""
    folder = GOLDEN / name
    expected = json.loads((folder / "expected.json").read_text())
    return (
        load_file(folder / "io.safetensors"),
        load_file(folder / "state_dict.safetensors"),
        expected,
    )


def test_the_original_baseline_is_reproduced() -> None:
    """Post-norm, relu, untied, its state dict loaded by name: hidden states, logits and
    cross-entropy of the original."""
    seen, weights, expected = golden("muzero")
    config = expected["config"]
    settings = SimpleLMSettings(
        hidden_size=config["hidden_size"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        seq_length=config["max_seq_len"],
        norm="post",
        activation="relu",
        tie_embeddings=False,
    )
    heads = ("policy_head.", "value_head.", "dynamics_fc.", "span_projector.")
    trunk = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
    model = SimpleLM(settings, config["vocab_size"])
    model.load_state_dict(trunk, strict=True)
    ids = seen["input_ids"]
    output = model(make_batch(ids))
    logits = output.readout(output.hidden)
    # the original hides padding by its id from what comes after: only padding does
    real = ids != expected["pad_token_id"]
    assert real.sum() == real.numel() - 4
    torch.testing.assert_close(output.hidden[real], seen["hidden"][real], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[real], seen["logits"][real], atol=1e-4, rtol=0)
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == expected["pad_token_id"], IGNORE_INDEX)
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert (labels != IGNORE_INDEX).sum() == expected["ce_valid_tokens"]
    assert total.item() == pytest.approx(expected["ce_sum"], rel=1e-5)


def from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's state dict under the baseline's names; its Conv1D weights are (in, out)."""
    mine = {
        "embedding.weight": weights["transformer.wte.weight"],
        "lm_head.weight": weights["transformer.wte.weight"],
        "pos_embedding.weight": weights["transformer.wpe.weight"],
        "norm.weight": weights["transformer.ln_f.weight"],
        "norm.bias": weights["transformer.ln_f.bias"],
    }
    parts = {"attn.c_proj": "self_attn.out_proj", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    for layer in range(sum(name.endswith("ln_1.weight") for name in weights)):
        there, here = f"transformer.h.{layer}.", f"layers.{layer}."
        mine[here + "self_attn.in_proj_weight"] = weights[there + "attn.c_attn.weight"].T
        mine[here + "self_attn.in_proj_bias"] = weights[there + "attn.c_attn.bias"]
        for old, new in parts.items():
            mine[f"{here}{new}.weight"] = weights[f"{there}{old}.weight"].T
            mine[f"{here}{new}.bias"] = weights[f"{there}{old}.bias"]
        for number in (1, 2):
            for part in ("weight", "bias"):
                mine[f"{here}norm{number}.{part}"] = weights[f"{there}ln_{number}.{part}"]
    return mine


def gpt2_settings(config: dict) -> SimpleLMSettings:
    return SimpleLMSettings(
        hidden_size=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        seq_length=config["n_positions"],
        activation="gelu_tanh",
    )


def test_with_gpt2_weights_it_is_gpt2() -> None:
    """Pre-norm, gelu_tanh and tied, the baseline is GPT-2: same logits, same loss; and labels
    shifted once, not twice."""
    seen, weights, expected = golden("gpt2_tiny")
    model = SimpleLM(gpt2_settings(expected["config"]), expected["config"]["vocab_size"])
    model.load_state_dict(from_gpt2(weights), strict=True)
    output = model(make_batch(seen["input_ids"]))
    logits = output.readout(output.hidden)
    torch.testing.assert_close(logits, seen["logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), seen["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(expected["ce_numpy_f64"], abs=1e-5)


@pytest.mark.slow
def test_it_equals_the_installed_transformers_gpt2() -> None:
    """The same at another size, with random biases and norms, against the library itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {"vocab_size": V, "n_positions": T, "n_embd": 48, "n_layer": 3, "n_head": 3}
    torch.manual_seed(0)
    theirs = (
        GPT2LMHeadModel(GPT2Config(**config, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        .eval()
        .double()
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    mine = SimpleLM(gpt2_settings(config), V).double()
    mine.load_state_dict(from_gpt2(theirs.state_dict()), strict=True)
    ids = random_ids(3)
    output = mine(make_batch(ids))
    torch.testing.assert_close(
        output.readout(output.hidden), theirs(ids).logits, atol=1e-10, rtol=0
    )


def test_more_positions_change_nothing_for_the_old_ones() -> None:
    """extend_max_seq_len: known positions keep their bits, longer rows work, and a shorter length
    is no request."""
    model = build("simple_lm")
    batch, long_ids = make_batch(random_ids(2)), random_ids(2, 2 * T)
    before, table = model(batch).hidden, model.pos_embedding.weight.detach().clone()
    model.extend_max_seq_len(2 * T)
    assert model.max_seq_len == 2 * T and torch.equal(model.pos_embedding.weight[:T], table)
    assert torch.equal(model(batch).hidden, before)
    long = model(make_batch(long_ids)).hidden
    torch.testing.assert_close(
        long[:, :T], model(make_batch(long_ids[:, :T])).hidden, atol=1e-5, rtol=0
    )
    assert long.isfinite().all() and 0.01 < model.pos_embedding.weight[T:].std() < 0.03
    model.extend_max_seq_len(T)
    assert model.max_seq_len == 2 * T


def test_the_longer_position_table_wins_when_loading() -> None:
    """A checkpoint of shorter rows gets the new rows added; one of longer rows keeps all of its
    own."""
    short, notes = build("simple_lm"), []
    saved = short.state_dict()
    longer = SimpleLM(SimpleLMSettings(**short.settings.model_dump() | {"seq_length": 2 * T}), V)
    own = longer.pos_embedding.weight.detach().clone()
    longer.prepare_load(saved, notes)
    longer.load_state_dict(saved)
    assert torch.equal(longer.pos_embedding.weight[:T], short.pos_embedding.weight)
    assert torch.equal(longer.pos_embedding.weight[T:], own[T:])
    assert notes == [f"the position table grows from {T} to {2 * T} rows"]
    saved = longer.state_dict()
    short.prepare_load(saved, notes)
    short.load_state_dict(saved)
    assert torch.equal(short.pos_embedding.weight, longer.pos_embedding.weight) and len(notes) == 1
    assert short(make_batch(random_ids(1, 2 * T))).hidden.shape == (1, 2 * T, 32)


def test_random_packs_agree_with_single_documents() -> None:
    """Any way of cutting a row into documents, a document of one token included."""
    model, random_cuts = build("simple_lm").double(), random.Random(11)
    for seed in range(20):
        cuts = sorted(random_cuts.sample(range(1, T), random_cuts.randint(1, 6)))
        edges = [0, *cuts, T]
        ids = random_ids(1, seed=seed)
        packed = model(make_batch(ids, [[b - a for a, b in zip(edges, edges[1:])]])).hidden
        for a, b in zip(edges, edges[1:]):
            alone = model(make_batch(ids[:, a:b])).hidden
            torch.testing.assert_close(packed[:, a:b], alone, atol=1e-10, rtol=0)
