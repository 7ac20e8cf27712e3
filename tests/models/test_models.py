"""Promises of every model in the table, and what the baseline LM must equal.

B batch, T time, D hidden_size, V vocab_size
"""

import atexit
import copy
import io
import json
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

from core.contracts import Batch
from core.models import MODELS
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


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(inputs and outputs, weights, numbers) computed with the original."""
    folder = GOLDEN / name
    expected = json.loads((folder / "expected.json").read_text())
    return (
        load_file(folder / "io.safetensors"),
        load_file(folder / "state_dict.safetensors"),
        expected,
    )


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
