"""Published weights from the Hub: fetched once, refused in words, fine-tuned, resumed offline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import UserError
from tests.hub import Hub as LoopbackHub
from tests.hub import hub_env, run_python
from tests.models.test_huggingface import saved_gpt2
from tests.models.test_models import T
from tests.project import Project, Result, train_here


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


TRY = """
import json, sys, time
import torch
from core.errors import UserError
from core.models.hub import Hub, HubSettings
told = {}
for name, how, wanted in json.loads(sys.argv[1]):
    begin, notes = time.monotonic(), []
    try:
        model = Hub(HubSettings(name=name, **how), 40).eval()
        if wanted == "weights":
            model.load_published(notes)
        said = [notes, float(sum(p.detach().double().sum() for p in model.parameters()))]
    except UserError as error:
        said = str(error)
    assert time.monotonic() - begin < 20, name
    told[f"{wanted} of {name}"] = said
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of asking a hub for models, in one process, and then, in another, when nothing
    listened there any more."""
    saved, home = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("home")
    theirs = saved_gpt2(saved)
    files = files_of(saved)
    gpt2 = json.loads(files["config.json"])

    def config(**keys: Any) -> dict[str, bytes]:
        return {"config.json": json.dumps(keys).encode()}

    refused = {
        "me/absent": {},
        "me/gated": files,
        "me/t5": config(model_type="t5"),
        "me/long": files,
        "me/new": config(
            model_type="hyperlm", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}
        ),
        "me/unknown": config(model_type="hyperlm"),
        "me/small": config(**gpt2 | {"vocab_size": 39}),
        "me/four_bits": config(**gpt2, quantization_config={"quant_method": "gptq", "bits": 4}),
        "me/no_weights": {"config.json": files["config.json"]},
    }
    fits = {"seq_length": T}
    tries = [("me/tiny", fits, "weights"), ("me/config_only", fits, "config")]
    tries += [
        (name, fits if name != "me/long" else {"seq_length": 65}, "weights") for name in refused
    ]
    with LoopbackHub() as hub:
        for name, found in {"me/tiny": files, "me/config_only": files, **refused}.items():
            if found:
                hub.add_model(name, found, gated=name == "me/gated")
        online = hub.run(TRY, home, json.dumps(tries))
    again = [
        ("me/tiny", fits, "weights"),
        *(("me/config_only", fits, kind) for kind in ("config", "weights")),
    ]
    offline = run_python(
        TRY, hub_env(hub.url, home), json.dumps([*again, ("me/not_cached", fits, "config")])
    )
    total = float(sum(p.detach().double().sum() for p in theirs.parameters()))
    return {"online": online, "offline": offline, "requests": hub.requests, "total": total}


@pytest.mark.slow
def test_weights_come_from_the_hub_once_and_a_resume_needs_none(tried: dict[str, Any]) -> None:
    """Fetched, they are what was saved. With nothing but the cached config, and no network, the
    architecture is still there."""
    online, offline = tried["online"], tried["offline"]
    assert online["config of me/config_only"][0] == []
    fetched = [request for request in tried["requests"] if "safetensors" in request]
    assert not [request for request in fetched if "config_only" in request]
    assert online["weights of me/tiny"] == [
        ["starts from the published weights of me/tiny, from the Hugging Face Hub"],
        pytest.approx(tried["total"], abs=1e-9),
    ]
    assert sum(request.startswith("GET") and "me/tiny" in request for request in fetched) == 1
    assert isinstance(offline["config of me/config_only"], list) and isinstance(
        offline["weights of me/tiny"], list
    )
    for name, part in (
        ("weights of me/config_only", "the weights of"),
        ("config of me/not_cached", '"type": "gpt2"'),
    ):
        assert "cannot reach 127.0.0.1" in offline[name] and part in offline[name]


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_words(tried: dict[str, Any]) -> None:
    told = {name.removeprefix("weights of "): said for name, said in tried["online"].items()}
    for name, parts in {
        "me/absent": ["not on the Hub, or is private", "check the spelling"],
        "me/gated": ["me/gated is gated", "agree to the terms", "HF_TOKEN=", '"type": "gpt2"'],
        "me/t5": ['of type "t5", which is no causal language model', "distilgpt2"],
        "me/new": ["code from the Hub is never run"],
        "me/unknown": ["the installed transformers has not"],
        "me/small": ["the tokenizer has 40 tokens", "knows 39", '"tokenizer": "me/small"'],
        "me/four_bits": ["quantized"],
        "me/no_weights": ["the weights of model", "could not be loaded"],
        "me/long": ["knows 64 positions", 'Write "seq_length": 64 or less'],
    }.items():
        assert isinstance(told[name], str) and all(part in told[name] for part in parts), (
            f"{name}: {told[name]}"
        )


DISTILGPT2 = {
    "vocab_size": 330,
    "n_positions": 64,
    "n_ctx": 64,
    "n_embd": 48,
    "n_layer": 6,
    "n_head": 4,
}
"""distilgpt2's config.json, but for the sizes; its table has more rows than the tokenizer below has
tokens."""


def distilgpt2(folder: Path) -> dict[str, bytes]:
    """What stands in for the repository: six layers, dropout of 0.1, published names, a tokenizer
    of 310 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from tests.project import story

    saved_gpt2(folder, **DISTILGPT2, bos_token_id=309, eos_token_id=309)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=[AddedToken("<|endoftext|>", special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([story(1)], trainer)
    made.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "GPT2TokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return files_of(folder)


@pytest.mark.slow
def test_distilgpt2_is_fine_tuned_and_resumed_without_the_hub(tmp_path: Path) -> None:
    """Through main.py: it begins from the published weights, the loss falls, samples are there, and
    a resume needs no Hub."""
    preset = {
        "lineage": "t",
        "model": {"type": "hub", "name": "distilgpt2", "seq_length": 32},
        "tokenizer": "distilgpt2",
        "train": {
            "per_gpu_batch_size": 8,
            "learning_rate": 3e-3,
            "max_steps": 60,
            "eval_tokens": 500,
        },
        "data": {"sources": [{"type": "text", "path": "texts"}], "lanes": 4},
        "generate": {"prompts": ["In year "], "max_tokens": 8},
    }
    wrong = {**preset, "lineage": "w", "tokenizer": {"type": "bpe", "vocab_size": 300}}
    project = Project.make(tmp_path / "project", {"t": preset})
    with LoopbackHub() as hub:
        hub.add_model("distilgpt2", distilgpt2(tmp_path / "saved"))
        env = {
            k: v for k, v in hub.env(tmp_path / "home").items() if k.startswith(("HF_", "NO_PROXY"))
        }

        with pytest.raises(UserError, match='"tokenizer": "distilgpt2"'):
            train_here(wrong, project.folder)
        assert not list(project.folder.glob("checkpoints/*")) and not list(
            project.folder.glob("logs/*")
        )

        result = run(project, "t", env)
        assert result.code == 0, result.text
        assert "distilgpt2" in result.out and "published weights of distilgpt2" in " ".join(
            result.out.split()
        )
    losses = [event["loss"] for event in project.events("step")]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    saved = project.checkpoint()
    names = set(saved["model"])
    assert {"transformer.wte.weight", "transformer.h.5.mlp.c_proj.bias", "lm_head.weight"} <= names
    assert saved["model"]["lm_head.weight"].shape == (330, 48)
    assert project.events("sample") and all(event["text"] for event in project.events("sample"))

    result = run(project, "t", env)  # nothing listens at the Hub's address any more
    assert result.code == 0 and len(project.events("step")) == 120, result.text
    assert "published weights" not in result.out.split("run 2 begins")[-1]
    assert project.events("step")[60]["loss"] < 0.8 * losses[0]


def run(project: Project, preset: str, env: dict[str, str]) -> Result:
    result = project.run(preset, **env)
    assert "Traceback" not in result.text, result.text
    return result


def test_what_no_token_has_is_never_sampled() -> None:
    """A published table may have more rows than the tokenizer has tokens: they would decode to
    nothing."""
    from core.contracts import Batch, ModelOutput
    from core.data.tokenizer_build import build_tokenizer
    from core.generation.engine import TextGenerator, generate_text
    from core.models.readout import LinearReadout
    from core.preset.settings import GenerateSettings, TokenizerSettings

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.eye(300))

        def forward(self, batch: Batch) -> ModelOutput:
            hidden = torch.zeros(*batch.input_ids.shape, 300)
            hidden[..., 257:] = 100.0
            return ModelOutput(hidden, LinearReadout(self.table))

    tokenizer = build_tokenizer(TokenizerSettings(type="byte"), [])
    seen: list[Tensor] = []
    model = Wide()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].input_ids))
    generate_text(
        TextGenerator(model, tokenizer, 64),
        "a",
        GenerateSettings(max_tokens=40, no_repeat_ngram=0),
        seed=1,
    )  # type: ignore[arg-type]
    assert len(seen) > 2 and int(torch.cat(seen, dim=1).max()) < tokenizer.vocab_size
