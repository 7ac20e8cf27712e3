"""How the weights of a published NeoBERT arrive, from a folder or the Hub, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from core.errors import CheckpointError, UserError
from core.models.neobert import NeoBERT, NeoBERTSettings
from core.preset.settings import TokenizerSettings
from tests.hub import Hub as LoopbackHub
from tests.hub import hub_env, run_python
from tests.models.test_neobert import (
    CONFIG,
    TINY,
    WEIGHTS,
    V,
    build,
    close,
    unit_rows,
)


def published(folder: Path, config: dict | None = None, **tensors: Tensor | None) -> Path:
    """A folder as the Hub has it, with the golden's weights; None takes a tensor away (its name
    with "__" for dots)."""
    folder.mkdir(exist_ok=True)
    changed = {name.replace("__", "."): t for name, t in tensors.items()}
    weights = {name: t for name, t in (WEIGHTS | changed).items() if t is not None}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "neobert", **CONFIG, **(config or {})})
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_from(name: Any, **changes: Any) -> tuple[NeoBERT, list[str]]:
    model, notes = build(name=str(name), **changes), []
    model.load_published(notes)
    return model, notes


def test_published_weights_arrive(tmp_path: Path) -> None:
    folder = published(tmp_path / "mine")
    model, notes = load_from(folder)
    assert all(torch.equal(t, WEIGHTS[name]) for name, t in model.state_dict().items())
    assert notes == [f"starts from the published weights of {folder}, from {folder}"]
    model, notes = load_from(folder, head="distance", prototypes="decoder")
    close(model.dist_head.weight, unit_rows(WEIGHTS["decoder.weight"]), 1e-6)
    assert len(notes) == 3 and notes[0].startswith("starts from")
    before, notes = build().state_dict(), []
    build().load_published(notes)
    fresh = build()
    fresh.load_published(notes)
    assert not notes and all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())


@pytest.mark.parametrize(
    "tensors, told",
    [
        ({"model__layer_norm__weight": None}, "model.layer_norm.weight is missing there"),
        ({"decoder__bias": torch.zeros(V + 1)}, r"decoder.bias is \(102,\) there, \(101,\) here"),
        ({"model__pooler__weight": torch.zeros(2)}, "model.pooler.weight is unknown here"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    tensors: dict, told: str, tmp_path: Path
) -> None:
    """And nothing of them is loaded."""
    folder = published(tmp_path / "mine", **tensors)
    model, before = build(name=str(folder)), build().state_dict()
    with pytest.raises(
        CheckpointError, match=f"(?s)model.safetensors of .*mine.*{told}.*Take another model.name"
    ):
        model.load_published([])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_every_difference_of_the_config_is_told(tmp_path: Path) -> None:
    """Shapes do not show the number of heads or the eps."""
    config = {"num_attention_heads": 6, "norm_eps": 1e-6, "vocab_size": 120, "hidden_act": "GELU"}
    folder = published(tmp_path / "mine", config)
    with pytest.raises(UserError) as told:
        load_from(folder)
    for part in (
        'num_attention_heads is 6 there, model.num_heads 4 here: write "num_heads": 6',
        'write "norm_eps": 1e-06',
        'vocab_size is 120 there, and the preset\'s tokenizer has 101 tokens: write "tokenizer"',
        'hidden_act is "GELU" there, and only "swiglu" is built here',
    ):
        assert part in str(told.value), told.value
    load_from(published(folder, {"hidden_act": "SwiGLU"}))


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    folder = published(tmp_path / "mine")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model.safetensors of .* cannot be read"):
        load_from(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError,
        match=r"(?s)there is no .*model.safetensors.*may hold code.*never run.*random weights",
    ):
        load_from(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json of model .* cannot be read"):
        load_from(folder)
    with pytest.raises(UserError, match=r"there is no .*absent/config.json"):
        load_from(tmp_path / "absent")


def test_published_weights_want_their_own_tokenizer() -> None:
    """A new one would give its tokens other meanings."""
    settings = NeoBERTSettings(name="chandar-lab/NeoBERT")
    for kind in ("bpe", "byte"):
        with pytest.raises(UserError, match='"tokenizer": "chandar-lab/NeoBERT"'):
            settings.check_tokenizer_section(TokenizerSettings(type=kind))
        NeoBERTSettings().check_tokenizer_section(TokenizerSettings(type=kind))
    settings.check_tokenizer_section(TokenizerSettings(type="hub", name="chandar-lab/NeoBERT"))


TRY = """
import json, sys, time
from core.errors import UserError
from core.models.neobert import NeoBERT, NeoBERTSettings
told = {}
for name in sys.argv[2:]:
    begin, notes = time.monotonic(), []
    try:
        model = NeoBERT(NeoBERTSettings(name=name, **json.loads(sys.argv[1])), 101)
        model.load_published(notes)
        said = [notes, float(sum(p.detach().double().sum() for p in model.parameters()))]
    except UserError as error:
        said = str(error)
    assert time.monotonic() - begin < 20, name
    told[name] = said
assert "transformers" not in sys.modules
print(json.dumps(told))
"""


@pytest.mark.slow
def test_the_hub_is_asked_once_and_what_it_refuses_is_said(tmp_path: Path) -> None:
    """Fetched weights are what was saved, also from the cache alone; no code of a repository is
    looked at."""
    files = {path.name: path.read_bytes() for path in published(tmp_path / "mine").iterdir()}
    config = {"config.json": files["config.json"]}
    files["model.py"] = b"raise SystemExit('code of the Hub was run')"
    fewer = {name: t for name, t in WEIGHTS.items() if name != "decoder.bias"}
    home, sizes = tmp_path / "home", json.dumps(TINY)
    with LoopbackHub() as hub:
        hub.add_model("me/tiny", files)
        hub.add_model("me/gated", files, gated=True)
        hub.add_model("me/old", config | {"pytorch_model.bin": b"code"})
        hub.add_model("me/less", config | {"model.safetensors": save(fewer)})
        online = hub.run(TRY, home, sizes, "me/tiny", "me/absent", "me/gated", "me/old", "me/less")
        fetched = [
            request
            for request in hub.requests
            if request.startswith("GET") and "me/tiny" in request
        ]
    offline = run_python(TRY, hub_env(hub.url, home), sizes, "me/tiny", "me/absent")
    total = float(sum(t.double().sum() for t in WEIGHTS.values()))
    for told in (online, offline):
        assert told["me/tiny"][0] == [
            "starts from the published weights of me/tiny, from the Hugging Face Hub"
        ]
        assert told["me/tiny"][1] == pytest.approx(total, abs=1e-9)
    assert sum("model.safetensors" in request for request in fetched) == 1 and not any(
        ".py" in r for r in hub.requests
    )
    for name, parts in {
        "me/absent": ["not on the Hub, or is private", "check the spelling", "random weights"],
        "me/gated": ["me/gated is gated", "agree to the terms", "HF_TOKEN="],
        "me/old": ["me/old has no model.safetensors", "may hold code, which is never run"],
        "me/less": ["model.safetensors of me/less", "decoder.bias is missing there"],
    }.items():
        assert isinstance(online[name], str) and all(part in online[name] for part in parts), (
            f"{name}: {online[name]}"
        )
    assert (
        "cannot reach 127.0.0.1" in offline["me/absent"]
        and "the local cache does not have it" in offline["me/absent"]
    )
