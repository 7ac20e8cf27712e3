"""The baseline against its original, GPT-2, and longer position tables."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import IGNORE_INDEX
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from tests.models.test_models import T, V, build, golden, make_batch, random_ids


def test_dropout_works_when_asked_for() -> None:
    model, batch = build("simple_lm", dropout=0.5), make_batch(random_ids(2))
    assert torch.equal(model(batch).hidden, model(batch).hidden)
    model.train()
    assert not torch.equal(model(batch).hidden, model(batch).hidden)


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
