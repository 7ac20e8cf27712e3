"""Preset 10_harmonic_sft from the outside, with a stand-in for what it fetches: the published names
at a small size, from a hub on loopback, with a tokenizer of BERT's kind."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from core.models.neobert import NeoBERT, NeoBERTSettings
from tests.data.test_hub_run import run
from tests.hub import Hub, parquet
from tests.project import ROOT, Project, Result, merged, story

NAME, DATA = "chandar-lab/NeoBERT", "mlfoundations/dclm-baseline-1.0-parquet"
SMALL = {"hidden_size": 24, "num_heads": 2, "intermediate_size": 24}
CONFIG = {
    "architectures": ["NeoBERTLMHead"],
    "auto_map": {"AutoConfig": "model.NeoBERTConfig", "AutoModel": "model.NeoBERT"},
    "model_type": "neobert",
    "num_hidden_layers": 28,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "norm_eps": 1e-5,
    "max_length": 4096,
    "hidden_act": "SwiGLU",
}
"""As the published one, but for the sizes; its code is on no hub, and nobody may ask for it."""
PRESET = {
    "extends": "10_harmonic_sft",
    "lineage": "t",
    "model": {**SMALL, "seq_length": 64},
    "train": {
        "per_gpu_batch_size": 8,
        "accumulation_steps": 2,
        "learning_rate": 0.01,
        "max_steps": 6,
        "eval_tokens": 300,
    },
    "data": {"lanes": 4, "validation_fraction": 0.1},
    "generate": {"neighbors_of": ["river", "stone"]},
}


def wordpiece() -> dict[str, bytes]:
    """A tokenizer of BERT's kind, as the files of a repository; the words of our stories are one
    token each."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([story(i) for i in range(40)], trainer)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "special_tokens_map.json": json.dumps(names).encode(),
        "vocab.txt": "\n".join(vocabulary).encode(),
    }


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """The files of the model's repository, and its weights: 172 of them."""
    files = wordpiece()
    vocab_size = len(files["vocab.txt"].split())
    torch.manual_seed(5)
    weights = NeoBERT(NeoBERTSettings(**SMALL), vocab_size).state_dict()
    assert len(weights) == 172
    config = json.dumps(CONFIG | {"vocab_size": vocab_size}).encode()
    return files | {"config.json": config, "model.safetensors": save(weights)}, weights


@pytest.fixture
def hub(published: tuple) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_model(NAME, published[0])
        rows = [{"text": story(i, sentences=40)} for i in range(60)]
        hub.add_dataset(DATA, {"filtered/part-0.parquet": parquet(rows, row_group_size=20)})
        yield hub


def project_of(folder: Path, **changes: dict) -> Project:
    preset = (ROOT / "configs" / "10_harmonic_sft.json").read_text()
    return Project.make(folder / "p", {"10_harmonic_sft": preset, "t": merged(PRESET, changes)})


def trained_part(name: str) -> bool:
    return name.startswith("model.transformer_encoder.27.") or name == "dist_head.weight"


@pytest.mark.slow
def test_the_last_block_and_the_prototypes_learn_and_nothing_else(
    hub: Hub, published: tuple, tmp_path: Path
) -> None:
    """The published weights arrive by name, without any code from the Hub; what is frozen keeps
    every bit; h_exp goes from -12 to -4; the first evaluation tells what the model could do
    before."""
    project = project_of(tmp_path)
    result = run(hub, project)
    assert result.code == 0 and f"starts from the published weights of {NAME}" in result.text, (
        result.text
    )
    assert not any(".py" in request and NAME in request for request in hub.requests)
    saved, before = project.checkpoint()["model"], published[1]
    assert set(saved) == {*before, "dist_head.weight"}
    changed = {name for name in before if not torch.equal(saved[name], before[name])}
    assert changed == {name for name in before if trained_part(name)}
    rows = before["model.encoder.weight"]
    drift = 1 - torch.cosine_similarity(saved["dist_head.weight"], rows)
    assert 1e-4 < float(drift.mean()) < 0.5, "prototypes begin as the embeddings, and move"
    assert float((saved["dist_head.weight"].norm(dim=1) - 1).abs().max()) <= 1e-6
    assert {name for name in project.checkpoint()["optimizer"]} == {
        name for name in saved if trained_part(name)
    }
    steps, evals = project.events("step"), project.events("eval")
    assert [steps[0]["scheduled"], steps[-1]["scheduled"]] == [
        {"harmonic.h_exp": -12.0},
        {"harmonic.h_exp": -4.0},
    ]
    assert (
        evals[0]["step"] == 0 and evals[0]["prototype_drift"] < 1e-6 < evals[-1]["prototype_drift"]
    )
    assert evals[-1]["nll_h4"] < evals[0]["nll_h4"] and "decoder_pseudo_perplexity" in evals[0]
    assert {event["word"] for event in project.events("neighbors")} == {"river", "stone"}
    assert all("[MASK]" in event["prompt"] for event in project.events("sample"))
    assert (project.folder / "logs" / "t" / "masked.png").stat().st_size > 10_000


def refused(hub: Hub, project: Project) -> Result:
    result = run(hub, project)
    assert result.code == 2 and not list((project.folder / "checkpoints").glob("*")), result.text
    return result


@pytest.mark.slow
def test_weights_that_are_not_its_own_are_refused_by_name(
    hub: Hub, published: tuple, tmp_path: Path
) -> None:
    """Shapes and names that differ are each told, and what to do; nothing is written. Settings:
    test_neobert_published.py."""
    files, weights = published
    wrong = {**weights, "model.transformer_encoder.27.wo.weight": torch.zeros(24, 20)}
    wrong["model.transformer_encoder.3.qkv.bias"] = torch.zeros(72)
    hub.add_model(NAME, {**files, "model.safetensors": save(wrong)})
    text = refused(hub, project_of(tmp_path / "a")).text
    assert "model.transformer_encoder.27.wo.weight is (24, 20) there, (24, 24) here" in text
    assert "model.transformer_encoder.3.qkv.bias is unknown here" in text and "model.name" in text
