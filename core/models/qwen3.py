"""A modern baseline in Qwen3's layout, which the ecosystem loads as it is: RMSNorm, rotary
positions, grouped-query attention with normalised queries and keys, gated feed-forward layers
(Yang et al. 2025, arXiv 2505.09388).

In:    Batch
Out:   ModelOutput(hidden (B, T, D), LinearReadout)
State: parameters named as the published ones (`model.embed_tokens`,
       `model.layers.N.self_attn.q_proj`, `model.layers.N.mlp.gate_proj`, ..., `lm_head`)

B batch, T time, D hidden_size, H num_heads, K num_kv_heads, Dh head_dim, F intermediate_size, L
num_layers, V vocab_size"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from core.contracts import Batch, LanguageModel, ModelOutput
from core.models.attention import Attention, DocumentMask, choose_backend, compute_dtype
from core.models.grouped_query import AttentionPass, RoPE, check_heads, layer_bytes, mixed
from core.models.initial import draw_residual, draw_weights
from core.models.kv_cache import KeyValueCache
from core.models.norm import rms_norm
from core.models.readout import LinearReadout
from core.preset.settings import ModelSettings


class Qwen3Settings(ModelSettings):
    """Qwen3's architecture with random weights, at any size: what is trained loads as a
    Qwen3ForCausalLM of transformers."""

    type: Literal["qwen3"] = "qwen3"
    hidden_size: int = Field(256, ge=1, le=131_072)
    """Width of the hidden states."""
    intermediate_size: int | None = Field(None, ge=1, le=1_000_000)
    """Neurons of a feed-forward layer; left out, 3 x hidden_size."""
    num_layers: int = Field(4, ge=1, le=1_000)
    """Transformer blocks."""
    num_heads: int = Field(4, ge=1, le=16_384)
    """Query heads."""
    num_kv_heads: int = Field(2, ge=1, le=16_384)
    """Key-value heads, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int = Field(64, ge=2, le=16_384)
    """Width of a head."""
    seq_length: int = Field(256, ge=2, le=10_000_000)
    """Tokens a row of training text has, and positions the model knows."""
    norm_eps: float = Field(1e-6, gt=0.0, le=1.0)
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = Field(10_000.0, ge=1.0, le=1e15)
    """Base of the rotary positions' wavelengths."""
    qk_norm: bool = True
    """Normalise queries and keys in each head. Without, the layout is Llama's."""
    activation: Literal["silu", "relu_squared"] = "silu"
    """Non-linearity of the gates: silu makes them SwiGLU. Published configurations call them silu
    and relu2."""
    tie_embeddings: bool = True
    """Readout and embedding share one table."""
    zero_projections: bool = False
    """Begin with zeros in what adds to the residual stream: each block is the identity at first.
    Otherwise it is drawn, narrower with depth."""
    attention: Attention = "auto"
    """What computes attention, as for simple_lm."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: each forward
    pass is done twice."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "Qwen3Settings":
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        return self

    @property
    def neurons(self) -> int:
        return self.intermediate_size or 3 * self.hidden_size

    def activation_bytes(self, bf16: bool) -> int:
        """Count what one position leaves for the backward pass on a GPU, all layers together."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        # gate and up, what the activation makes of the gate, and the product
        layer = layer_bytes(self.hidden_size, 4 * self.neurons, queries, keys, bf16)
        if self.activation_checkpointing:
            return 4 * self.hidden_size * self.num_layers + layer
        return layer * self.num_layers


ACTIVATIONS = {"silu": functional.silu, "relu_squared": lambda x: functional.relu(x).square()}


class RMSNorm(nn.Module):
    """rms_norm, whose gain the published weights call weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head, before they are turned."""

    def __init__(self, settings: Qwen3Settings):
        super().__init__()
        D, Dh = settings.hidden_size, settings.head_dim
        self.head_dim = Dh
        self.q_proj = nn.Linear(D, settings.num_heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, settings.num_kv_heads * Dh, bias=False)
        self.v_proj = nn.Linear(D, settings.num_kv_heads * Dh, bias=False)
        self.o_proj = nn.Linear(settings.num_heads * Dh, D, bias=False)
        normed = settings.qk_norm
        self.q_norm = RMSNorm(Dh, settings.norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(Dh, settings.norm_eps) if normed else nn.Identity()

    # (B, T, D) -> (B, T, D)
    def forward(self, x: Tensor, shared: AttentionPass, layer: int) -> Tensor:
        # (B, T, H or K, Dh)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (W(x).view(heads) for W in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(mixed(self.q_norm(q), self.k_norm(k), v, shared, layer))


class FeedForward(nn.Module):
    """Neurons with gates (Shazeer 2020)."""

    def __init__(self, settings: Qwen3Settings):
        super().__init__()
        D, F = settings.hidden_size, settings.neurons
        self.gate_proj, self.up_proj = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)
        self.activation = ACTIVATIONS[settings.activation]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward layer."""

    def __init__(self, settings: Qwen3Settings):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(settings), FeedForward(settings)
        self.input_layernorm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.post_attention_layernorm = RMSNorm(settings.hidden_size, settings.norm_eps)

    # (B, T, D) -> (B, T, D)
    def forward(self, x: Tensor, shared: AttentionPass, layer: int) -> Tensor:
        dtype = shared.mask.dtype  # cast once here, or autocast keeps a copy for each matrix
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), shared, layer)
        return x + self.mlp(self.post_attention_layernorm(x).to(dtype))


class Trunk(nn.Module):
    """Everything but the readout: `model` in the published names."""

    def __init__(self, settings: Qwen3Settings, vocab_size: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(Block(settings) for _ in range(settings.num_layers))
        self.norm = RMSNorm(settings.hidden_size, settings.norm_eps)


class Qwen3(LanguageModel):
    """A decoder in the layout of Qwen3."""

    is_causal = True

    def __init__(self, settings: Qwen3Settings, vocab_size: int):
        super().__init__()
        self.settings, self.vocab_size = settings, vocab_size
        # tables that are computed, and no part of the published weights
        self.rope = RoPE(
            settings.head_dim, settings.seq_length, settings.rope_theta, persistent=False
        )
        self.model = Trunk(settings, vocab_size)
        self.lm_head = nn.Linear(settings.hidden_size, vocab_size, bias=False)
        self._initialise()
        if settings.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, batch: Batch) -> ModelOutput:
        """Compute the hidden states of every position (B, T, D); attention stays inside each
        document."""
        x, settings = self.model.embed_tokens(batch.input_ids), self.settings  # (B, T, D)
        mask = DocumentMask.of(batch, compute_dtype(x), settings.head_dim, settings.attention)
        return self._layers(x, AttentionPass(mask=mask, turn=self.rope(batch.position_ids)))

    def _layers(self, x: Tensor, shared: AttentionPass) -> ModelOutput:
        again = self.settings.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.model.layers):
            if again:
                x = checkpoint(block, x, shared, layer, use_reentrant=False)
            else:
                x = block(x, shared, layer)
        readout = LinearReadout(self.lm_head.weight, table=self.model.embed_tokens.weight)
        return ModelOutput(self.model.norm(x), readout)

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(len(self.model.layers))

    def extend(self, input_ids: Tensor, cache: KeyValueCache) -> ModelOutput:
        """Compute the next t tokens (B, t) of texts of which `cache` holds the beginning."""
        x, begin = self.model.embed_tokens(input_ids), cache.length
        time = torch.arange(begin, begin + input_ids.shape[1], device=x.device)
        mask = DocumentMask("sdpa", compute_dtype(x), causal=True)
        turn = self.rope(time.expand(input_ids.shape))
        return self._layers(x, AttentionPass(mask=mask, turn=turn, cache=cache))

    def attention_note(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return a note for the user if `settings.attention` cannot be had on a device; `dtype` is
        that of matrix products."""
        return choose_backend(self.settings.attention, device, dtype, self.settings.head_dim)[1]

    def prepare_load(self, saved: dict[str, Tensor], notes: list[str]) -> None:
        """Complete published weights, which leave a tied readout out."""
        if self.settings.tie_embeddings and "model.embed_tokens.weight" in saved:
            saved.setdefault("lm_head.weight", saved["model.embed_tokens.weight"])

    def _initialise(self) -> None:
        """Draw weights from N(0, 0.02); what adds to the residual stream is scaled by 1 / sqrt(2
        L), or 0."""
        self.apply(draw_weights)
        for block in self.model.layers:
            assert isinstance(block, Block)
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                if self.settings.zero_projections:
                    nn.init.zeros_(projection.weight)
                else:
                    draw_residual(projection, len(self.model.layers))
