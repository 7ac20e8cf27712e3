"""GGUF files, which llama.cpp, Ollama and LM Studio read.

In:    a model of the transformers library, of type gpt2 or qwen3; the Tokenizer
Out:   one file for each kind of numbers: f32, f16, q8_0
State: none

Matrices are of that kind; norms, biases and positions stay f32, as do matrices whose rows q8_0's
blocks of 32 do not divide.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from core.data.tokenizer import Tokenizer
from core.errors import MissingPackage, UserError
from core.export.architectures import TRANSPOSED
from core.export.tokenizer_files import end_ids
from core.optional_packages import need

Kind = Literal["f32", "f16", "q8_0"]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer cuts a text into words, which llama.cpp calls qwen2."""
LARGEST_ERROR = {"f32": 0.0, "f16": 1e-3, "q8_0": 1e-2}
"""Of a tensor that is read back, relative to its largest number: half of the last digit."""
NORMAL, CONTROL = 1, 3
"""llama.cpp's types of tokens."""


def check_gguf(model: Any, tokenizer: Tokenizer) -> None:
    """Raises UserError where GGUF has no form for a model or its tokenizer."""
    _library()
    need("accelerate", "accelerate", MissingPackage)  # the library's reader of GGUF wants it
    kind = model.config.model_type
    if kind not in ("gpt2", "qwen3"):
        raise UserError(
            f"export.gguf: GGUF files are made of gpt2 and qwen3, and this is a {kind}. Leave "
            "export.gguf out; llama.cpp's own convert_hf_to_gguf.py reads the exported folder."
        )
    theirs, preset = {"gpt2": ("gelu_new", "gelu_tanh"), "qwen3": ("silu", "silu")}[kind]
    ours = getattr(model.config, "activation_function", None) or model.config.hidden_act
    if ours != theirs:
        raise UserError(
            f"export.gguf: llama.cpp computes a {kind} with {theirs}, and this model uses {ours}. "
            f'Leave export.gguf out, or train with "activation": "{preset}".'
        )
    _splitting(tokenizer)


def write_gguf(path: Path, model: Any, tokenizer: Tokenizer, kind: Kind) -> None:
    """Write one file, read it back, and compare. Raises UserError, OSError."""
    gguf = _library()
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_name(path.stem)
        writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[kind]))
        _add_sizes(writer, config)
        _add_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
        tensors = _tensors(gguf, model, arch)
        for name, values in tensors.items():
            stored = _stored_kind(name, values, kind)
            quantization = getattr(gguf.GGMLQuantizationType, stored.upper())
            data = gguf.quants.quantize(values, quantization)
            writer.add_tensor(name, data, raw_dtype=quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _read_back(gguf, path, tensors, kind)


FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def _library() -> Any:
    return need("gguf", "gguf", MissingPackage)


def _add_sizes(writer: Any, config: Any) -> None:
    if config.model_type == "gpt2":
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _splitting(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name of the way a tokenizer cuts texts. Raises UserError where it has
    none."""
    facts = json.loads(tokenizer.state()["json"])
    if facts["model"]["type"] == "BPE":
        if not facts["model"]["merges"]:
            raise UserError(
                'export.gguf: this tokenizer is bytes alone ("type": "byte"), and llama.cpp '
                'demands merges. Leave export.gguf out, or train with "tokenizer": {"type": "bpe"}.'
            )
        cutting = json.dumps(facts["pre_tokenizer"])
        if json.dumps(QWEN2_SPLIT) in cutting:
            return "qwen2"
        if facts["pre_tokenizer"]["type"] == "ByteLevel" and facts["normalizer"] is None:
            return "gpt-2"
    raise UserError(
        "export.gguf: llama.cpp's name for the way this tokenizer cuts words is not known here. "
        "Leave export.gguf out; llama.cpp's own convert_hf_to_gguf.py reads the exported folder."
    )


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Add the vocabulary; rows of the table without a token get a name that no text has."""
    facts = json.loads(tokenizer.state()["json"])
    added = {token["id"]: token["content"] for token in facts["added_tokens"]}
    names = {index: name for name, index in facts["model"]["vocab"].items()} | added
    special = {token["id"] for token in facts["added_tokens"] if token["special"]}
    vocabulary = [names.get(i, f"[unused{i}]") for i in range(rows)]
    types = [CONTROL if i in special or i not in names else NORMAL for i in range(rows)]
    merges = [" ".join(m) if isinstance(m, list) else m for m in facts["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tokenizer))
    writer.add_token_list(vocabulary)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(end_ids(tokenizer)[-1])
    writer.add_add_bos_token(True)


def _tensors(gguf: Any, model: Any, arch: str) -> dict[str, np.ndarray]:
    """Return the weights under GGUF's names, each matrix (out, in), tied tables once."""
    number = gguf.MODEL_ARCH[arch.upper()]
    layers = getattr(model.config, "n_layer", None) or model.config.num_hidden_layers
    names = gguf.get_tensor_name_map(number, layers)
    tied, tensors = model.config.tie_word_embeddings, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        matrix = tensor.T if arch == "gpt2" and name.endswith(TRANSPOSED) else tensor
        tensors[found] = matrix.to(torch.float32).contiguous().numpy()
    return tensors


def _stored_kind(name: str, values: np.ndarray, kind: Kind) -> Kind:
    if values.ndim < 2 or name == "position_embd.weight":
        return "f32"
    return "f32" if kind == "q8_0" and values.shape[-1] % 32 else kind


def _read_back(gguf: Any, path: Path, tensors: dict[str, np.ndarray], kind: Kind) -> None:
    """Raises UserError where a file holds other weights than were written."""
    found = {each.name: each for each in gguf.GGUFReader(path).tensors}
    for name, values in tensors.items():
        read = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        error = np.abs(read.reshape(values.shape) - values).max(initial=0.0)
        if not error <= LARGEST_ERROR[kind] * np.abs(values).max(initial=0.0):
            raise UserError(
                f"{path.name} holds another {name} than was written, off by {error:.2g}; it is not "
                "kept. Update the package gguf, and start again."
            )
