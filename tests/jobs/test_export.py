"""The export job: what it writes, the proof, what it refuses, and that nothing half is left."""

import io
import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.data.chat import MARKERS, encode_turn
from core.errors import UserError
from core.export import architectures
from core.export.tokenizer_files import transformers_tokenizer
from core.jobs import JOBS
from core.jobs.export import export, preview_export
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from core.trained import Trained, load_trained
from tests.data.test_chat import make_tokenizer
from tests.documents import GUIDE, block_of
from tests.hub import Hub
from tests.project import merged, tiny_preset, train_here

pytestmark = pytest.mark.slow  # each export is proved in a fresh process

TRAINED = tiny_preset(
    tokenizer={"type": "bpe", "vocab_size": 300},
    train={"max_steps": 3, "precision": "fp32"},
    auxiliary={"enable_value": True},
)
SWIGLU = {
    "type": "polychromatic",
    "feed_forward": "swiglu",
    "num_kv_heads": 1,
    "head_dim": 16,
    "rope_theta": 500.0,
}
MODERN = {"type": "qwen3", "num_kv_heads": 1, "head_dim": 16}


def preset_of(base: dict, **settings: Any) -> Any:
    changes = {"job": "export", "init_from": "t", "export": settings}
    return decode_preset(merged(base, changes), Preset, "e", "e")


def exported(root: Path, base: dict, **settings: Any) -> list[str]:
    """The lines on the screen."""
    console = io.StringIO()
    export(preset_of(base, **settings), detect_runtime(), Single(), root, 0.0, console)
    return console.getvalue().splitlines()


def trained_in(root: Path, base: dict) -> Trained[Any]:
    return load_trained(preset_of(base), root, detect_runtime())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lineage "t" is a trained baseline, and exported."""
    root = tmp_path_factory.mktemp("export")
    train_here(TRAINED, root)
    lines = exported(root, TRAINED)
    assert re.fullmatch(
        r"proved in a fresh process, on \d+ tokens of held-out text: logits within \S+, "
        r"\d+ greedy tokens the same",
        lines[-2],
    )
    assert lines[-3] == "note  not in the export: the auxiliary head value: no architecture has it"
    assert lines[-1] == "written exports/t/: GPT2LMHeadModel"
    return root


def test_what_an_export_leaves(root: Path) -> None:
    """The guide's files, and a card with what is known."""
    folder = root / "exports" / "t"
    files = {path.name for path in folder.iterdir()}
    shown = set(re.findall(r"[\w-]+\.(?:json|safetensors|md)", block_of(GUIDE, "exports/")))
    assert files == shown
    card = (folder / "README.md").read_text()
    state = torch.load(root / "checkpoints" / "t_current.pth", weights_only=True)
    for known in (
        "library_name: transformers",
        f"| receipt of the data | {state['data']['receipt']} |",
        f"| tokens | {state['progress']['tokens']:,} |",
        "| losses | cross_entropy × 1.0 |",
        "the auxiliary head value",
        "| held-out text | perplexity |",
        "local files (text) | not known",
        "Loaded as `GPT2LMHeadModel` in a fresh process",
    ):
        assert known in card, known
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["use_cache"]) == ("gpt2", True)
    assert JOBS["export"].files(preset_of(TRAINED), root)
    assert preview_export(preset_of(TRAINED, gguf=["f16"]), root) == [
        "exports t_current.pth, step 3: for transformers, GGUF f16",
        "writes exports/t/",
    ]


def test_an_export_that_fails_leaves_the_one_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof that fails, a disk that takes no more: neither half a folder, nor another one."""
    before = {path: path.read_bytes() for path in (root / "exports").rglob("*") if path.is_file()}
    wrong = {**architectures.SIMPLE_LM}
    wrong[r"layers\.(\d+)\.norm([12])\."] = r"transformer.h.\1.ln_\2."
    swapped = {r"layers\.0\.linear1\.weight": "transformer.h.1.mlp.c_fc.weight"}
    swapped |= {r"layers\.1\.linear1\.weight": "transformer.h.0.mlp.c_fc.weight"}
    swapped |= {r"layers\.(\d+)\.linear1\.bias": r"transformer.h.\1.mlp.c_fc.bias"}
    del wrong[r"layers\.(\d+)\.linear1\."]
    monkeypatch.setattr(architectures, "SIMPLE_LM", wrong | swapped)
    with pytest.raises(UserError, match=r"the export is not kept: read by transformers, its log"):
        exported(root, TRAINED)
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"exports/t cannot be written, and what was there is"):
            exported(root, TRAINED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = {path: path.read_bytes() for path in (root / "exports").rglob("*") if path.is_file()}
    assert before == after and [path.name for path in (root / "exports").iterdir()] == ["t"]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (SWIGLU, "Qwen3"),
        (MODERN, "Qwen3"),
        (MODERN | {"qk_norm": False, "activation": "relu_squared"}, "Llama"),
    ],
    ids=["swiglu", "qwen3", "llama"],
)
def test_modern_layouts_leave_as_they_are(model: dict, kind: str, tmp_path: Path) -> None:
    preset = merged(TRAINED, {"model": model, "auxiliary": {"enable_value": False}})
    train_here(preset, tmp_path)
    assert exported(tmp_path, preset)[-1] == f"written exports/t/: {kind}ForCausalLM"


def test_a_model_of_the_hub_leaves_as_what_it_was(root: Path, tmp_path: Path) -> None:
    """What was exported can be trained on as one."""
    folder = root / "exports" / "t"
    tuned = tiny_preset(train={"max_steps": 2, "precision": "fp32"})
    tuned |= {
        "model": {"type": "hub", "name": str(folder), "seq_length": 32},
        "tokenizer": {"type": "file", "path": f"{folder}/tokenizer.json"},
    }
    train_here(tuned, tmp_path)
    assert exported(tmp_path, tuned)[-1] == "written exports/t/: GPT2LMHeadModel"
    old = load_file(folder / "model.safetensors")
    new = load_file(tmp_path / "exports" / "t" / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert old.keys() == new.keys() and not torch.equal(old[name], new[name])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"norm": "post"}, r'GPT-2 normalises before each layer, .*\("norm": "post"\)'),
        ({"tie_embeddings": False}, r"GPT-2's readout has no bias"),
        ({"type": "polychromatic", "head_dim": 16, "num_kv_heads": 1}, "the routing of PolyGLU"),
        ({"type": "neobert", "head": "distance"}, "its scores are distances to prototypes"),
    ],
)
def test_what_has_no_home_elsewhere_is_refused(model: dict, reason: str, tmp_path: Path) -> None:
    """By name, with what is lost and what to do; before anything is written."""
    losses = {"losses": [{"type": "harmonic"}]} if "head" in model else {}
    base = merged(TRAINED, {"model": model, "auxiliary": {"enable_value": False}, **losses})
    train_here(base, tmp_path)
    with pytest.raises(UserError, match=rf'{reason}.*"export": {{"as": "weights"}}'):
        exported(tmp_path, base)
    assert not (tmp_path / "exports").exists()


def test_weights_alone_of_any_model(tmp_path: Path) -> None:
    """With the heads; another lineage can begin with them."""
    polyglu = {"model": {"type": "polychromatic", "head_dim": 16, "num_kv_heads": 1}}
    base = merged(TRAINED, polyglu)
    train_here(base, tmp_path)
    assert exported(tmp_path, base, **{"as": "weights"})[-1].endswith("read back equal")
    folder = tmp_path / "exports" / "t"
    weights = load_file(folder / "model.safetensors")
    state = torch.load(tmp_path / "checkpoints" / "t_current.pth", weights_only=True)
    assert all(torch.equal(weights[name], each) for name, each in state["model"].items())
    assert {name for name in weights if name.startswith("heads.value")}
    assert json.loads((folder / "preset.json").read_text()) == state["preset"]


def test_a_tokenizer_of_conversations_becomes_one(root: Path) -> None:
    """The library's chat template writes the tokens that training read."""
    trained = trained_in(root, TRAINED)
    trained.tokenizer = make_tokenizer("marked bpe")
    tokenizer = transformers_tokenizer(trained)
    messages = (("user", "Hello, how are you?"), ("assistant", "Well."), ("user", "Good"))
    talk = [{"role": role, "content": content} for role, content in messages]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert trained.tokenizer.special_id(MARKERS[0]) is not None
    assert ids == [trained.tokenizer.eos_id, *encode_turn(trained.tokenizer, messages)]


@pytest.mark.parametrize("model", [{"type": "gpt2"}, SWIGLU], ids=["gpt2", "qwen3"])
def test_gguf(model: dict, tmp_path: Path) -> None:
    base = merged(TRAINED, {"model": model, "auxiliary": {"enable_value": False}})
    train_here(base, tmp_path)
    lines = exported(tmp_path, base, gguf=["f32", "f16", "q8_0"])
    said = [line for line in lines if ".gguf: logits within" in line]
    assert [line.partition(":")[0] for line in said] == ["t-f32.gguf", "t-f16.gguf", "t-q8_0.gguf"]
    sizes = [(tmp_path / "exports" / "t" / f"t-{k}.gguf").stat().st_size for k in ("f32", "q8_0")]
    assert sizes[1] < 0.6 * sizes[0]


def test_what_gguf_has_no_form_for(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'gpt2 with gelu_new, .*"activation": "gelu_tanh"'):
        exported(root, TRAINED, gguf=["f32"])
    base = tiny_preset(model={"activation": "gelu_tanh"}, train={"max_steps": 1})
    train_here(base, tmp_path)
    with pytest.raises(UserError, match=r'bytes alone.*"tokenizer": {"type": "bpe"}'):
        exported(tmp_path, base, gguf=["f32"])
    changes = {"model": MODERN | {"activation": "relu_squared"}}
    modern = merged(merged(TRAINED, changes), {"auxiliary": {"enable_value": False}})
    (tmp_path / "modern").mkdir()
    train_here(modern, tmp_path / "modern")
    with pytest.raises(UserError, match=r"qwen3 with silu, and this model uses relu2"):
        exported(tmp_path / "modern", modern, gguf=["f32"])


def test_gguf_says_what_it_needs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="the package gguf is missing: pip install gguf"):
        exported(root, TRAINED, gguf=["f32"])


def test_a_push_is_asked_for_and_needs_a_token(tmp_path: Path) -> None:
    """All files in one commit to a private repository; a refusal says what to do and keeps them."""
    folder = tmp_path / "exports" / "t"
    folder.mkdir(parents=True)
    files = {"README.md": b"# t\n", "model.safetensors": bytes(range(256))}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    code = (
        "import json, sys; from pathlib import Path; from core.errors import UserError\n"
        "from core.export.push import push\n"
        "try: said = push(Path(sys.argv[1]), 'me/t', True)\n"
        "except UserError as error: said = str(error)\n"
        "print(json.dumps(said))"
    )
    with Hub() as hub:
        hub.tokens["hf_mine"] = set()
        arguments = (code, tmp_path / "cache", str(folder))
        said = hub.run(*arguments)
        assert "needs a token with write access" in said and "is written and stays" in said
        assert not hub.repos
        assert "the Hub refused your token" in hub.run(*arguments, HF_TOKEN="hf_other")
        assert hub.run(*arguments, HF_TOKEN="hf_mine") == f"{hub.url}/me/t"
        repo = hub.repos["models", "me/t"]
        assert repo.gated and {name: repo.files[name] for name in files} == files
