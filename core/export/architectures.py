"""The architectures of the transformers library that models here are, exactly. Adding one: a
function, and its line in the table at the end.

In:    a Trained
Out:   Mapped: a model of the library with the same weights under its names; what has no place in
       it
State: none

    gpt2, hub                    the architecture of the library that they were made of
    simple_lm, pre-norm          gpt2
    polychromatic, "swiglu"      qwen3
    qwen3                        qwen3; without qk_norm llama
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.models.huggingface import HuggingFaceLM, transformers
from core.trained import Trained

WEIGHTS_ONLY = '"export": {"as": "weights"} writes them under their own names'


@dataclass(frozen=True)
class Mapped:
    """A model of the transformers library, in fp32 on the CPU, in evaluation mode.

    left_out   what the trained model has and this one has not, in words
    """

    model: Any
    left_out: list[str] = field(default_factory=list)


def as_transformers(trained: Trained[Any]) -> Mapped:
    """Return the model as the transformers library knows it. Raises UserError where it has no
    architecture that computes the same, naming what would be lost."""
    random = torch.get_rng_state()
    try:
        model = _build(trained)
    finally:
        torch.set_rng_state(random)
    end = trained.tokenizer.eos_id
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = end
    model.eval().requires_grad_(False)
    heads = sorted({name.partition(".")[0] for name in trained.saved_heads})
    return Mapped(model, [f"the auxiliary head {name}: no architecture has it" for name in heads])


def check_exportable(trained: Trained[Any]) -> None:
    """Raises UserError where a model is none that the transformers library knows."""
    kind = trained.preset.model.type
    reason = REFUSALS.get(kind, _unknown)(trained)
    if reason is not None:
        raise UserError(
            f"{trained.where} holds a {kind}, and no architecture of the transformers library "
            f"computes what it does: {reason}. Its weights alone can leave: {WEIGHTS_ONLY}."
        )


def _build(trained: Trained[Any]) -> Any:
    check_exportable(trained)
    return BUILDERS[trained.preset.model.type](trained)


def _unknown(trained: Trained[Any]) -> str | None:
    return "nobody has told which one would (core/export/architectures.py)"


def _nothing(trained: Trained[Any]) -> str | None:
    return None


# the architectures --------------------------------------------------------------------------------


ACTIVATIONS = {"silu": "silu", "relu_squared": "relu2"}


def _as_qwen3(trained: Trained[Any], weights: dict[str, Tensor]) -> Any:
    """Build Qwen3ForCausalLM of weights under its names: a decoder with RMSNorm, rotary positions
    in halves, grouped queries, gated feed-forward layers, and no bias anywhere. Without a norm of
    queries and keys it is a LlamaForCausalLM."""
    settings, library = trained.preset.model, transformers()
    kind = "Qwen3" if getattr(settings, "qk_norm", True) else "Llama"
    config = getattr(library, f"{kind}Config")(
        vocab_size=trained.model.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.neurons,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.seq_length,
        rms_norm_eps=settings.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=getattr(settings, "tie_embeddings", True),
        attention_bias=False,
        hidden_act=ACTIVATIONS[getattr(settings, "activation", "silu")],
    )
    return _loaded(getattr(library, f"{kind}ForCausalLM")(config), weights)


def _of_library(trained: Trained[Any]) -> Any:
    """Return the library's own model, which ours was made of."""
    model = trained.model
    assert isinstance(model, HuggingFaceLM)
    config = copy.deepcopy(model.config)
    config.use_cache = True
    built = transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _loaded(built, model.state_dict())


def _of_simple_lm(trained: Trained[Any]) -> Any:
    """Return GPT-2 with the baseline's weights."""
    settings, library = trained.preset.model, transformers()
    weights = renamed(trained.model.state_dict(), SIMPLE_LM)
    weights.pop("lm_head.bias", None)  # zero, or it would have been refused
    for name in weights:
        if name.endswith(TRANSPOSED):
            weights[name] = weights[name].T
    config = library.GPT2Config(
        vocab_size=trained.model.vocab_size,
        n_positions=len(weights["transformer.wpe.weight"]),
        n_embd=settings.hidden_size,
        n_layer=settings.num_layers,
        n_head=settings.num_heads,
        n_inner=settings.intermediate_size,
        activation_function=GPT2_ACTIVATIONS[settings.activation],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=settings.tie_embeddings,
    )
    return _loaded(library.GPT2LMHeadModel(config), weights)


def _simple_lm_refusal(trained: Trained[Any]) -> str | None:
    settings, bias = trained.preset.model, trained.model.state_dict().get("lm_head.bias")
    if settings.norm == "post":
        return 'GPT-2 normalises before each layer, and these blocks after it ("norm": "post")'
    if bias is not None and bool(bias.any()):
        return (
            'GPT-2\'s readout has no bias, and this one does ("tie_embeddings": false), which '
            "would be lost"
        )
    return None


def _of_qwen3(trained: Trained[Any]) -> Any:
    """Return Qwen3, or Llama, with the same weights under the same names."""
    return _as_qwen3(trained, trained.model.state_dict())


def _of_polychromatic(trained: Trained[Any]) -> Any:
    """Return Qwen3 with the weights of the SwiGLU baseline."""
    return _as_qwen3(trained, renamed(trained.model.state_dict(), POLYCHROMATIC))


def _polychromatic_refusal(trained: Trained[Any]) -> str | None:
    if trained.preset.model.feed_forward == "swiglu":
        return None
    return (
        "the routing of PolyGLU, by which each neuron chooses among four activations, would be "
        'lost, and the rest says nothing without it (a baseline with "feed_forward": "swiglu" is '
        "a Qwen3)"
    )


def _neobert_refusal(trained: Trained[Any]) -> str | None:
    if trained.preset.model.head == "distance":
        return (
            "its scores are distances to prototypes, which no library's readout computes, and it "
            "is an encoder that runs by code from the Hub, which is never run here"
        )
    return (
        "NeoBERT runs by code from its page on the Hub, which is never run here; the weights have "
        "the names that this code loads"
    )


# names --------------------------------------------------------------------------------------------

GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Matrices that GPT-2 keeps the other way round."""
SIMPLE_LM = {
    r"embedding\.": "transformer.wte.",
    r"pos_embedding\.": "transformer.wpe.",
    r"layers\.(\d+)\.self_attn\.in_proj_": r"transformer.h.\1.attn.c_attn.",
    r"layers\.(\d+)\.self_attn\.out_proj\.": r"transformer.h.\1.attn.c_proj.",
    r"layers\.(\d+)\.linear1\.": r"transformer.h.\1.mlp.c_fc.",
    r"layers\.(\d+)\.linear2\.": r"transformer.h.\1.mlp.c_proj.",
    r"layers\.(\d+)\.norm([12])\.": r"transformer.h.\1.ln_\2.",
    r"norm\.": "transformer.ln_f.",
    r"lm_head\.": "lm_head.",
}
POLYCHROMATIC = {
    r"embeddings\.": "model.embed_tokens.",
    r"model_core\.(\d+)\.rmsnorm_1\.gama": r"model.layers.\1.input_layernorm.weight",
    r"model_core\.(\d+)\.rmsnorm_2\.gama": r"model.layers.\1.post_attention_layernorm.weight",
    r"model_core\.(\d+)\.gqa\.rmsnorm_([qk])\.gama": r"model.layers.\1.self_attn.\2_norm.weight",
    r"model_core\.(\d+)\.gqa\.W_([qkvo])\.": r"model.layers.\1.self_attn.\2_proj.",
    r"model_core\.(\d+)\.swiglu\.W_(gate|up|down)\.": r"model.layers.\1.mlp.\2_proj.",
    r"rmsnorm\.gama": "model.norm.weight",
    r"output_head\.": "lm_head.",
    r"rope\.": "",  # computed by the library
}
"""{beginning of our name: what stands there in the library's}; "" leaves the tensor out."""


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return weights under the library's names. Every one has to be in the table."""
    result = {}
    for name, tensor in weights.items():
        (found,) = [(pattern, other) for pattern, other in names.items() if re.match(pattern, name)]
        if found[1]:
            result[re.sub(f"^{found[0]}", found[1], name)] = tensor
    return result


def _loaded(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Put weights into a library's model; every name has to fit."""
    model.load_state_dict({name: tensor.cpu().float() for name, tensor in weights.items()})
    return model


BUILDERS: dict[str, Callable[[Trained[Any]], Any]] = {
    "gpt2": _of_library,
    "hub": _of_library,
    "simple_lm": _of_simple_lm,
    "polychromatic": _of_polychromatic,
    "qwen3": _of_qwen3,
}
REFUSALS: dict[str, Callable[[Trained[Any]], str | None]] = {
    "gpt2": _nothing,
    "hub": _nothing,
    "simple_lm": _simple_lm_refusal,
    "polychromatic": _polychromatic_refusal,
    "qwen3": _nothing,
    "neobert": _neobert_refusal,
}
