"""The modern baseline against transformers' Qwen3 and Llama with the same weights, and its
switches.

B batch, T time, V vocab_size, L num_layers
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.checkpoint.fitting import load_model
from core.models.qwen3 import Qwen3, Qwen3Settings
from tests.models.test_models import V, make_batch, random_ids

T = 16
SIZES = {
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "seq_length": T,
}
FORMS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "relu squared": {"activation": "relu_squared", "rope_theta": 1e6},
    "every query head its own": {"num_kv_heads": 4, "norm_eps": 1e-5},
    "llama": {"qk_norm": False},
}
HIDDEN_ACT = {"silu": "silu", "relu_squared": "relu2"}


def published(settings: Qwen3Settings) -> Any:
    """The model of transformers that such settings describe, with random weights."""
    import transformers

    kind = "Qwen3" if settings.qk_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.neurons,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        hidden_act=HIDDEN_ACT[settings.activation],
        max_position_embeddings=settings.seq_length,
        rms_norm_eps=settings.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=settings.tie_embeddings,
        attn_implementation="sdpa",
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # far from uniform, norms included
            p.add_(0.15 * torch.randn_like(p))
    return model


def both(form: str) -> tuple[Qwen3, Any]:
    """A model with the weights of transformers' one, which is the second."""
    settings = Qwen3Settings(**SIZES | FORMS[form])
    other, model = published(settings), Qwen3(settings, V)
    weights = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_model(model, weights, "transformers")
    return model.eval(), other


def logits(model: Qwen3, ids: Tensor, lengths: list[list[int]] | None = None) -> Tensor:
    output = model(make_batch(ids, lengths))
    return output.readout(output.hidden)


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1  # there is something to get wrong
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits_are_those_of_transformers(form: str) -> None:
    """Of whole rows, and of packed documents, each of which transformers reads alone."""
    model, other = both(form)
    ids, lengths = random_ids(2, T), [[5, 11], [9, 7]]
    close(logits(model, ids), other(ids).logits)
    packed = logits(model, ids, lengths)
    for row, sizes in enumerate(lengths):
        for at, document in zip((0, sizes[0]), ids[row].split(sizes)):
            expected = other(document[None]).logits[0]
            close(packed[row, at : at + len(document)], expected)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_cache_gives_what_transformers_own_gives(form: str) -> None:
    """Piece by piece on both sides."""
    model, other = both(form)
    ids, cache, past = random_ids(3, T), model.new_cache(), None
    for piece in ids.split([4, 1, 1, 7, 3], dim=1):
        output = model.extend(piece, cache)
        expected = other(piece, past_key_values=past, use_cache=True)
        past = expected.past_key_values
        close(output.readout(output.hidden), expected.logits)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained_loads_in_transformers(form: str) -> None:
    """The names and shapes of the state are its own, nothing more and nothing less."""
    settings = Qwen3Settings(**SIZES | FORMS[form])
    model, other = Qwen3(settings, V), published(settings)
    found = other.load_state_dict(model.state_dict(), strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    ids = random_ids(2, T)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(make_batch(ids)).readout(model(make_batch(ids)).hidden),
            other(ids).logits,
            atol=1e-5,
            rtol=1e-5,
        )


def test_gradients_are_those_of_transformers() -> None:
    model, other = both("untied")
    ids = random_ids(2, T)
    for scores in (logits(model.train(), ids), other.train()(ids).logits):
        nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(other.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_published_file_without_the_tied_readout_loads() -> None:
    """As safetensors keep it: once."""
    model, other = both("tied")
    weights = {k: v.clone() for k, v in other.state_dict().items() if k != "lm_head.weight"}
    again = Qwen3(model.settings, V).eval()
    load_model(again, weights, "a file")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = random_ids(1, T)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_zero_projections_begin_with_the_identity() -> None:
    """And learn all the same: what adds to the stream gets a gradient, and then everything."""
    model = Qwen3(Qwen3Settings(**SIZES, zero_projections=True), V)
    ids = random_ids(2, T)
    embedded = model.model.norm(model.model.embed_tokens(ids))
    assert torch.equal(model(make_batch(ids)).hidden, embedded)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits(model, ids).logsumexp(-1).sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_recomputing_activations_changes_nothing() -> None:
    plain, again = (
        Qwen3(Qwen3Settings(**SIZES, activation_checkpointing=on), V).train()
        for on in (False, True)
    )
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        logits(model, random_ids(2, T)).square().sum().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert again.settings.activation_bytes(True) < plain.settings.activation_bytes(True)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"), ({"head_dim": 5}, "odd")],
)
def test_heads_that_do_not_fit_are_told(wrong: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Qwen3Settings(**SIZES | wrong)
