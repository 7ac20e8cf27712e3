"""Models of the transformers library and of the Hub: published names and weights, documents kept
apart, what is refused, and why.

B batch, T time, D hidden_size, V vocab_size
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import UserError
from core.models.gpt2 import GPT2, GPT2Settings
from core.models.hub import Hub, HubSettings
from core.models.huggingface import HuggingFaceLM, configure, obstacle, transformers
from core.preset.decode import decode_preset
from core.registry import Preset
from core.training.memory import size_of
from tests.hub import hub_env, run_python
from tests.models.test_models import T, V, golden, make_batch, random_ids, scores_of
from tests.project import NO_HUB

SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}
CONFIGS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 3}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 16}),
    "pythia": ("GPTNeoXConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 64,
            "window_size": 3,
        }
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "smollm3": ("SmolLM3Config", SIZES | {"pad_token_id": 0}),
    "opt": (
        "OPTConfig",
        HEADS | {"vocab_size": V, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomConfig", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "mamba": (
        "MambaConfig",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
}
ONE_BY_ONE = {"opt", "bloom", "mamba"}
"""Architectures whose code does not see that positions begin again."""


def build(name: str, dropout: float = 0.0, **changes: Any) -> HuggingFaceLM:
    """A tiny model of an architecture, in evaluation mode."""
    kind, sizes = CONFIGS[name]
    library = transformers()
    torch.manual_seed(1)
    config = configure(getattr(library, kind)(**sizes | changes), dropout)
    model = HuggingFaceLM(library.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.tell_how_to_pack()
    return model.eval()


# documents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_of_a_row_are_as_if_alone(name: str) -> None:
    """In every architecture, whatever its masks are; and where its own code keeps them apart, that
    is what is used."""
    model = build(name).double()
    assert model.packs == (name not in ONE_BY_ONE)
    assert (model.attention_note(torch.device("cpu"), torch.float32) is None) == model.packs
    ids = random_ids(2)
    lengths = [[5, 1, 10], [1, 1, 8, 2, 4]]
    packed = model(make_batch(ids, lengths)).hidden
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            alone = model(make_batch(ids[row : row + 1, start : start + size])).hidden
            torch.testing.assert_close(
                packed[row : row + 1, start : start + size], alone, atol=1e-6, rtol=0
            )
            start += size


@pytest.mark.parametrize("lengths", [None, [[5, 11]]])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_leaks(name: str, lengths: list[list[int]] | None) -> None:
    """Another token changes neither the positions before it nor the other document: not one bit."""
    model = build(name).double()
    ids = random_ids(1)
    before = model(make_batch(ids, lengths)).hidden
    for t in range(T):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % V
        changed = (model(make_batch(other, lengths)).hidden != before).any(-1)[0]
        end = T if lengths is None or t >= 5 else 5
        assert changed[t] and not changed[:t].any() and not changed[end:].any(), f"token {t}"


@pytest.mark.parametrize("lengths", [None, [[5, 11]]])
def test_a_sliding_window_stays_one(lengths: list[list[int]] | None) -> None:
    """One layer of Mistral with a window of 3 sees the token and two before it, packed or not."""
    model = build("mistral", num_hidden_layers=1).double()
    ids = random_ids(1)
    before = model(make_batch(ids, lengths)).hidden
    for t in range(T):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % V
        changed = (model(make_batch(other, lengths)).hidden != before).any(-1)[0]
        end = min(t + 3, 5 if lengths and t < 5 else T)
        assert changed.nonzero().flatten().tolist() == list(range(t, end))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_gradients_of_packed_rows_are_those_of_the_documents(name: str) -> None:
    """Every parameter's, also where each document is computed in a row of its own."""
    model = build(name).double()
    ids = random_ids(2)
    weights = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    trunk = [p for n, p in model.named_parameters() if not n.startswith("lm_head")]
    packed = torch.autograd.grad(
        (model(make_batch(ids, [[5, 11], [9, 7]])).hidden * weights).sum(), trunk
    )
    parts = [(0, 0, 5), (0, 5, 16), (1, 0, 9), (1, 9, 16)]
    alone = sum(
        (model(make_batch(ids[r : r + 1, a:b])).hidden * weights[r : r + 1, a:b]).sum()
        for r, a, b in parts
    )
    for one, other in zip(packed, torch.autograd.grad(alone, trunk), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiled_it_computes_the_same(name: str) -> None:
    """Dynamo traces it, packed and not."""
    plain, compiled = build(name), build(name)
    compiled.compile(backend="eager", dynamic=False)
    for lengths in (None, [[5, 11], [16]], [[7, 9], [3, 13]]):
        batch = make_batch(random_ids(2), lengths)
        torch.testing.assert_close(
            scores_of(compiled, batch), scores_of(plain, batch), atol=1e-5, rtol=0
        )


# names, scores and loss ---------------------------------------------------------------------------


def test_gpt2_by_its_published_names() -> None:
    """Loaded strictly: the library's logits; and labels shifted once, which gives 4.21855, not
    twice, which gives 4.634."""
    seen, weights, expected = golden("gpt2_tiny")
    config = expected["config"]
    settings = GPT2Settings(
        hidden_size=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        seq_length=config["n_positions"],
    )
    model = GPT2(settings, config["vocab_size"]).eval()
    model.load_state_dict(
        {"lm_head.weight": weights["transformer.wte.weight"], **weights}, strict=True
    )
    logits = scores_of(model, make_batch(seen["input_ids"]))
    torch.testing.assert_close(logits, seen["logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), seen["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(4.21855, abs=1e-5) and loss.item() == pytest.approx(
        expected["ce_numpy_f64"], abs=1e-5
    )
    assert abs(loss.item() - expected["ce_DOUBLE_SHIFT_bug"]) > 0.4


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_logits_are_the_librarys(name: str) -> None:
    """Every tensor of the state dict under its published name, shared ones once; and the same
    logits."""
    kind, sizes = CONFIGS[name]
    library = transformers()
    model = build(name)
    theirs = library.AutoModelForCausalLM.from_config(
        configure(getattr(library, kind)(**sizes), 0.0)
    ).eval()
    assert list(dict(model.named_parameters())) == list(dict(theirs.named_parameters()))
    model.load_state_dict(theirs.state_dict(), strict=True)
    ids = random_ids(2)
    torch.testing.assert_close(
        scores_of(model, make_batch(ids)), theirs(input_ids=ids).logits, atol=1e-5, rtol=0
    )
    assert (
        all("lm_head" not in name for name, _ in model.named_parameters())
        == theirs.config.tie_word_embeddings
    )


def test_every_dropout_is_the_presets() -> None:
    """The library's own defaults are 0.1 in GPT-2 and OPT; leaving out whole layers is another
    thing."""
    model = build("gpt2")
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    model = build("gpt2", dropout=0.25)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.25}
    config = configure(transformers().OPTConfig(layerdrop=0.5), 0.25)
    assert (config.dropout, config.attention_dropout, config.layerdrop, config.use_cache) == (
        0.25,
        0.0 + 0.25,
        0.0,
        False,
    )
    model = GPT2(
        GPT2Settings(hidden_size=32, num_layers=1, num_heads=2, seq_length=T, dropout=0.5), V
    )
    batch = make_batch(random_ids(1))
    assert not torch.equal(model(batch).hidden, model(batch).hidden)
    model.eval()
    assert torch.equal(model(batch).hidden, model(batch).hidden)


def test_gpt2_begins_as_the_library_begins_it() -> None:
    """N(0, 0.02), and the projections back into the residual stream scaled down by the square root
    of their number."""
    torch.manual_seed(0)
    model = GPT2(GPT2Settings(hidden_size=128, num_layers=8, num_heads=4, seq_length=T), 512)
    layer = model.transformer.h[3]
    assert layer.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert layer.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


def test_gpt2_has_the_published_number_of_parameters() -> None:
    assert GPT2Settings().num_parameters(50257) == 124_439_808


def test_position_tables_do_not_decay() -> None:
    from core.preset.train import TrainSettings
    from core.training.optim import Optimizer

    model = build("gpt2")
    optimizer = Optimizer(list(model.named_parameters()), set(), TrainSettings())
    plain = {
        id(p)
        for o in optimizer.optimizers
        for g in o.param_groups
        if g["weight_decay"] == 0.0
        for p in g["params"]
    }
    names = {name for name, p in model.named_parameters() if id(p) in plain}
    assert "transformer.wpe.weight" in names and "transformer.wte.weight" not in names


# what is refused ----------------------------------------------------------------------------------


REFUSED = {
    "gemma2": ("Gemma2Config", SIZES | {"head_dim": 16}, "changes its scores after the readout"),
    "cohere": ("CohereConfig", SIZES, "changes its scores after the readout"),
    "granite": (
        "GraniteConfig",
        SIZES | {"logits_scaling": 4.0},
        "changes its scores after the readout",
    ),
    "bert": (
        "BertConfig",
        {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
        "sees the ones after it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_trunk_and_linear_readout_is_refused(name: str, tmp_path: Path) -> None:
    """Also with random weights, whose scores are so small that a soft cap changes them by next to
    nothing."""
    kind, sizes, reason = REFUSED[name]
    library = transformers()
    config = getattr(library, kind)(**sizes)
    assert reason in (obstacle(library.AutoModelForCausalLM.from_config(config)) or "")
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"(?s){reason}.*GPT-2.*Llama"):
        Hub(HubSettings(name=str(tmp_path), seq_length=T), V)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_works_is_not_refused(name: str) -> None:
    kind, sizes = CONFIGS[name]
    library = transformers()
    assert (
        obstacle(library.AutoModelForCausalLM.from_config(getattr(library, kind)(**sizes))) is None
    )


def test_a_folder_is_as_good_as_the_hub(tmp_path: Path) -> None:
    """Its weights arrive; what does not fit or is not there is said."""
    folder = tmp_path / "mine"
    theirs = saved_gpt2(folder)
    settings = HubSettings(name=str(folder), seq_length=T)
    assert (
        settings.summary() == str(folder) and f"{folder}/tokenizer.json" in settings.tokenizer_hint
    )
    model, notes, ids = Hub(settings, V - 3), [], random_ids(2)
    assert model.vocab_size == V
    before = scores_of(model.eval(), make_batch(ids))
    random = torch.get_rng_state()
    model.load_published(notes)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(scores_of(model, make_batch(ids)), theirs(ids).logits) and not torch.equal(
        before, theirs(ids).logits
    )
    assert notes == [f"starts from the published weights of {folder}, from {folder}"]
    fresh = Hub(HubSettings(name=str(folder), seq_length=T, pretrained=False), V).eval()
    fresh.load_published(notes)
    assert len(notes) == 1 and not torch.equal(
        scores_of(fresh, make_batch(ids)), theirs(ids).logits
    )
    for changes, vocab_size, told in (
        ({"seq_length": 65}, V, "knows 64 positions, and model.seq_length is 65"),
        ({}, V + 1, "the tokenizer has 41 tokens, and model .* knows 40.*tokenizer.json"),
        (
            {"name": str(tmp_path / "absent")},
            V,
            "there is no .*absent/config.json. Correct model.name",
        ),
    ):
        with pytest.raises(UserError, match=f"(?s){told}"):
            Hub(HubSettings(**{"name": str(folder), "seq_length": T, **changes}), vocab_size)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the weights of model .* could not be loaded"):
        model.load_published(notes)


def test_weights_that_lack_something_are_refused(tmp_path: Path) -> None:
    """The library would fill the gap with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    saved_gpt2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 parts.*transformer.h.1.mlp.c_fc.weight"):
        Hub(HubSettings(name=str(tmp_path), seq_length=T), V).load_published([])


def saved_gpt2(folder: Path, **changes: Any) -> Any:
    """A tiny GPT-2 of the library, written as the Hub has them."""
    library = transformers()
    torch.manual_seed(8)
    model = library.GPT2LMHeadModel(library.GPT2Config(**GPT2_SIZES | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def preset_of(model: dict, **more: Any) -> Any:
    return decode_preset(
        {"model": model, "data": {"sources": ["python_stdlib"]}, **more}, Preset, "t", "t"
    )


@pytest.mark.slow
def test_the_menu_counts_without_the_library(tmp_path: Path) -> None:
    """Neither kind imports transformers or touches the Hub to be shown; nor does the table of
    models to be imported."""
    assert size_of(preset_of({"type": "hub", "name": "distilgpt2"}), 50257) is None
    code = """
import json, sys
from pathlib import Path
import core.models
loaded = [name in sys.modules for name in ("transformers", "huggingface_hub")]
from core.registry import Preset
from core.preset.decode import decode_preset
from core.preview import training_lines
from core.runtime import detect_runtime
lines = []
for model in (
    {"type": "gpt2"},
    {"type": "hub", "name": "distilgpt2"},
    {"type": "hub", "name": "gpt2", "pretrained": False},
):
    preset = {"model": model, "tokenizer": "gpt2", "data": {"sources": ["python_stdlib"]}}
    decoded = decode_preset(preset, Preset, "t", "t")
    lines.append(training_lines(decoded, detect_runtime(), Path())[::2])
print(json.dumps([lines, [*loaded, "transformers" in sys.modules]]))
"""
    lines, slow = run_python(code, hub_env(NO_HUB["HF_ENDPOINT"], tmp_path))
    assert slow == [False, False, False] and not list(tmp_path.iterdir())
    assert lines[0][0].startswith("124M parameters, 100,000,000 tokens") and lines[0][1].endswith(
        "GB of memory"
    )
    assert (
        lines[1][0].startswith("distilgpt2 from the Hub, 100,000,000 tokens")
        and "memory" not in lines[1][1]
    )
    assert lines[2][0].startswith("gpt2's architecture from the Hub")


def test_published_weights_want_their_own_tokenizer() -> None:
    settings = HubSettings(name="distilgpt2")
    for preset in (
        preset_of({"type": "hub", "name": "distilgpt2"}),
        preset_of({"type": "gpt2"}, tokenizer={"type": "byte"}),
    ):
        with pytest.raises(UserError, match='"tokenizer": "distilgpt2"'):
            settings.check_tokenizer_section(preset.tokenizer)
        HubSettings(name="distilgpt2", pretrained=False).check_tokenizer_section(preset.tokenizer)
    settings.check_tokenizer_section(preset_of({}, tokenizer="distilgpt2").tokenizer)


# the Hub ------------------------------------------------------------------------------------------
