"""Caches: a text read in pieces gives what it gives at once, to the last digits, in every model
that has one.

B batch rows, T time, H query heads, K key-value heads, Dh head width
"""

import random

import pytest
import torch
from torch import Tensor, nn

from core.contracts import call_if_defined
from core.generation.engine import TextGenerator, generate_text
from core.models import MODELS
from core.models.attention import DocumentMask, attend, attend_to_past
from core.models.huggingface import LibraryCache
from core.models.kv_cache import FIRST_CAPACITY, KeyValueCache
from core.preset.settings import GenerateSettings
from tests.models import test_huggingface
from tests.models.test_models import T, V, build, make_batch, random_ids, tiny_settings

ALL_AT_ONCE, ONE_BY_ONE = [T], [1] * T
EXACT = 1e-10  # in float64


def in_pieces(model: nn.Module, ids: Tensor, pieces: list[int]) -> Tensor:
    """Scores (B, T, V) of rows read piece by piece."""
    cache, found = model.new_cache(), []
    for piece in ids.split(pieces, dim=1):
        output = model.extend(piece, cache)
        found.append(output.readout(output.hidden))
    return torch.cat(found, dim=1)


def at_once(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(make_batch(ids))
    return output.readout(output.hidden)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    """However a text is cut; three rows at a time. A model that is not causal has no cache that
    could be exact."""
    model = build(name).double()
    if call_if_defined(model, "new_cache") is None:
        assert not model.is_causal or not hasattr(model, "new_cache"), (
            f"{name} is causal, but its cache is not exact"
        )
        return
    ids, cuts = random_ids(3), random.Random(1)
    whole = at_once(model, ids)
    for pieces in (
        ALL_AT_ONCE,
        ONE_BY_ONE,
        [1, 7, 1, 4, 3],
        [9, 7],
        *(random_pieces(cuts) for _ in range(4)),
    ):
        torch.testing.assert_close(
            in_pieces(model, ids, pieces), whole, atol=EXACT, rtol=0, msg=f"{name}, {pieces}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_what_was_cut_was_never_read(name: str) -> None:
    """Wrong tokens after right ones, forgotten, and then the right ones."""
    model = build(name).double()
    if (cache := call_if_defined(model, "new_cache")) is None:
        return
    ids = random_ids(3)
    whole, wrong = at_once(model, ids), (ids + 1) % V
    for begin, right, end in ((0, 4, 9), (4, 5, 8), (5, 7, 7), (7, 12, T)):
        output = model.extend(torch.cat([ids[:, begin:right], wrong[:, right:end]], dim=1), cache)
        found = output.readout(output.hidden)[:, : right - begin]
        torch.testing.assert_close(
            found, whole[:, begin:right], atol=EXACT, rtol=0, msg=f"{name}, from {begin} to {right}"
        )
        cache.cut(right)


def random_pieces(cuts: random.Random) -> list[int]:
    edges = [0, *sorted(cuts.sample(range(1, T), cuts.randint(1, 8))), T]
    return [b - a for a, b in zip(edges, edges[1:])]


def test_the_original_baseline_has_one_too() -> None:
    model = build("simple_lm", norm="post", activation="relu", tie_embeddings=False).double()
    ids = random_ids(2)
    for pieces in (ONE_BY_ONE, [5, 1, 10]):
        torch.testing.assert_close(
            in_pieces(model, ids, pieces), at_once(model, ids), atol=EXACT, rtol=0
        )


@pytest.mark.parametrize("name", test_huggingface.CONFIGS)
def test_an_architecture_of_the_hub_has_an_exact_cache_or_none(name: str) -> None:
    """Windows of 3 tokens, local attention and distances in place of positions included; what keeps
    a state has none."""
    model = test_huggingface.build(name).double()
    if name == "mamba":
        assert model.new_cache() is None
        return
    ids = random_ids(2)
    whole = at_once(model, ids)
    # the others compute positions or norms in fp32, whatever the weights are in
    exact = EXACT if name == "gpt2" else 1e-6
    for pieces in (ONE_BY_ONE, [7, 1, 8]):
        torch.testing.assert_close(
            in_pieces(model, ids, pieces), whole, atol=exact, rtol=0, msg=f"{name}, {pieces}"
        )


def test_a_cache_that_is_not_exact_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by trying, once; a model that was trained goes on training."""
    model, tries = build("gpt2").train(), []
    extend = model.extend

    def forgetful(ids: Tensor, cache: object) -> object:
        tries.append(ids.shape[1])
        return extend(ids, model._library_cache(LibraryCache))

    monkeypatch.setattr(model, "extend", forgetful)
    assert model.new_cache() is None and model.new_cache() is None
    assert tries == [5, 1] and model.training


# its parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (6, 1)])
def test_attention_to_the_past_is_attention(H: int, K: int) -> None:
    """New queries at the end of longer keys, with heads that share keys and values."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, H, T, 8, generator=random, dtype=torch.float64)
    k, v = (torch.randn(2, K, T, 8, generator=random, dtype=torch.float64) for _ in range(2))
    whole = attend(q, k, v, DocumentMask("sdpa", torch.float64, causal=True))
    for t in range(1, T + 1):
        last = attend_to_past(q[:, :, T - t :], k, v, torch.float64)
        torch.testing.assert_close(last, whole[:, :, T - t :], atol=1e-12, rtol=0)
    assert attend_to_past(q, k, v, torch.bfloat16).dtype == torch.bfloat16


def test_a_cache_grows_by_doubling() -> None:
    """Layers of their own; what was there stays; memory is asked for a few times, not at every
    token."""
    random = torch.Generator().manual_seed(0)
    n = 5 * FIRST_CAPACITY
    keys, values = (torch.randn(2, 3, n, 4, generator=random) for _ in range(2))
    cache, buffers = KeyValueCache(2), set()
    for i in range(n):
        assert cache.length == i
        for layer in (0, 1):
            k, v = cache.extend(
                layer, keys[:, :, i : i + 1] + layer, values[:, :, i : i + 1] - layer
            )
            assert torch.equal(k, keys[:, :, : i + 1] + layer) and torch.equal(
                v, values[:, :, : i + 1] - layer
            )
            assert cache.length == i + layer, "the new positions count when the last layer has them"
            buffers.add((layer, k.data_ptr()))
    assert len(buffers) == 2 * 4  # 64, 128, 256 and 512 positions


# generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_generation_says_the_same_with_a_cache(name: str) -> None:
    """Beyond the context too, where every token reads it all; within it, each token is read
    once."""
    torch.manual_seed(1)
    model = MODELS[name][1](tiny_settings(name, seq_length=24), V).double().eval()
    settings = GenerateSettings(max_tokens=40, no_repeat_ngram=0, temperature=2.0, top_p=1.0)

    class Small:  # the model knows fewer tokens than there are bytes
        eos_id, vocab_size = V - 1, V - 1

        def encode_batch(self, texts: list[str]) -> list[Tensor]:
            return [torch.tensor([i % V for i in text.encode()]) for text in texts]

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    read: list[int] = []
    extend = getattr(model, "extend", None)
    if call_if_defined(model, "new_cache") is not None:
        model.extend = lambda ids, cache: read.append(ids.shape[1]) or extend(ids, cache)
    texts = [generate_text(TextGenerator(model, Small(), 24), "abc", settings, seed=3)]  # type: ignore[arg-type]
    if read:
        assert read == [4] + [1] * 20
    model.new_cache = lambda: None
    texts.append(generate_text(TextGenerator(model, Small(), 24), "abc", settings, seed=3))  # type: ignore[arg-type]
    assert texts[0] == texts[1] and len(texts[0].split()) > 10
