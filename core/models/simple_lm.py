"""The baseline language model of specification 003: embeddings, nn.MultiheadAttention blocks, a
linear readout.

In:    Batch
Out:   ModelOutput(hidden (B, T, D), LinearReadout)
State: parameters named as the original's (`embedding`, `pos_embedding`, `layers.N.self_attn`, ...,
`lm_head`)

B batch, T time, D hidden_size, H num_heads, Dh head width D/H, F intermediate_size, V vocab_size
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import Batch, LanguageModel, ModelOutput
from core.models.attention import (
    Attention,
    DocumentMask,
    attend,
    attend_to_past,
    choose_backend,
    compute_dtype,
)
from core.models.initial import STD, draw_residual, draw_weights
from core.models.kv_cache import KeyValueCache
from core.models.readout import LinearReadout
from core.parallel.shards import full
from core.preset.settings import ModelSettings


class SimpleLMSettings(ModelSettings):
    """The baseline LM."""

    type: Literal["simple_lm"] = "simple_lm"
    hidden_size: int = Field(256, ge=1, le=131_072)
    """Width of the hidden states."""
    num_layers: int = Field(4, ge=1, le=1_000)
    """Transformer blocks."""
    num_heads: int = Field(4, ge=1, le=16_384)
    """Attention heads; must divide hidden_size."""
    intermediate_size: int | None = Field(None, ge=1, le=1_000_000)
    """Width inside the feed-forward layers; left out, 4 x hidden_size."""
    seq_length: int = Field(256, ge=2, le=10_000_000)
    """Tokens a row of training text has, and positions the model knows."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability after attention and feed-forward layers."""
    norm: Literal["pre", "post"] = "pre"
    """pre: normalise before each layer, and once at the end. post: the original block, normalised
    after each layer."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    """Non-linearity of the feed-forward layers; the original's is relu."""
    tie_embeddings: bool = True
    """Readout and embedding share one table. Untied, the readout has its own and a bias, as the
    original's."""
    attention: Attention = "auto"
    """What computes attention; the result is the same. auto is sdpa, which runs everywhere. flex,
    varlen and flash (the package flash-attn) skip what lies outside a document, on GPUs; where one
    cannot run, the program says so and uses sdpa."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "SimpleLMSettings":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        return self


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class SelfAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention's parameters and arithmetic, on the shortest way to the attention
    kernel.

    The stock forward cannot be told that a mask is plainly causal, and has a path in evaluation
    mode whose rows turn NaN where a mask hides every key.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: DocumentMask | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Inside each document of `mask`; or, with a cache, over all that its layer holds and x
        itself."""
        B, T, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3D)
        # each (B, H, T, Dh)
        q, k, v = qkv.view(B, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if cache is None:
            assert mask is not None
            mixed = attend(q, k, v, mask)  # (B, H, T, Dh)
        else:
            mixed = attend_to_past(q, *cache.extend(layer, k, v), compute_dtype(x))  # (B, H, T, Dh)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, T, D))


class SimpleBlock(nn.Module):
    """One transformer block, pre-norm or post-norm."""

    def __init__(self, settings: SimpleLMSettings):
        super().__init__()
        D, inner = settings.hidden_size, settings.intermediate_size or 4 * settings.hidden_size
        self.self_attn = SelfAttention(D, settings.num_heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(D, inner), nn.Linear(inner, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(settings.dropout)
        self.activation = ACTIVATIONS[settings.activation]
        self.pre_norm = settings.norm == "pre"

    def forward(
        self,
        x: Tensor,
        mask: DocumentMask | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        if self.pre_norm:
            x = x + self.dropout(self.self_attn(self.norm1(x), mask, cache, layer))
            return x + self.dropout(self._feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.self_attn(x, mask, cache, layer)))
        return self.norm2(x + self.dropout(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))  # (B, T, F) inside


class SimpleLM(LanguageModel):
    """Causal transformer language model with learned positions (specification 003)."""

    is_causal = True

    def __init__(self, settings: SimpleLMSettings, vocab_size: int):
        super().__init__()
        D = settings.hidden_size
        self.settings, self.vocab_size = settings, vocab_size
        self.embedding = nn.Embedding(vocab_size, D)
        self.pos_embedding = nn.Embedding(settings.seq_length, D)
        self.layers = nn.ModuleList(SimpleBlock(settings) for _ in range(settings.num_layers))
        self.norm = nn.LayerNorm(D) if settings.norm == "pre" else nn.Identity()
        self.dropout = nn.Dropout(settings.dropout)
        self.lm_head = nn.Linear(D, vocab_size, bias=not settings.tie_embeddings)
        self._initialise()
        if settings.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def max_seq_len(self) -> int:
        return self.pos_embedding.num_embeddings

    @property
    def _head_dim(self) -> int:
        return self.settings.hidden_size // self.settings.num_heads

    def attention_note(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return a note for the user if `settings.attention` cannot be had on a device; `dtype` is
        that of matrix products."""
        return choose_backend(self.settings.attention, device, dtype, self._head_dim)[1]

    def forward(self, batch: Batch) -> ModelOutput:
        """Hidden states of every position; attention stays inside each document."""
        x = self.embedding(batch.input_ids) + self.pos_embedding(batch.position_ids)  # (B, T, D)
        x = self.dropout(x)
        mask = DocumentMask.of(batch, compute_dtype(x), self._head_dim, self.settings.attention)
        for layer in self.layers:
            x = layer(x, mask)
        return ModelOutput(self.norm(x), self._readout())

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(len(self.layers))

    def extend(self, input_ids: Tensor, cache: KeyValueCache) -> ModelOutput:
        """Hidden states of the next positions (B, t) of unpacked texts; up to max_seq_len of them
        in all."""
        positions = torch.arange(
            cache.length, cache.length + input_ids.shape[1], device=input_ids.device
        )
        x = self.dropout(self.embedding(input_ids) + self.pos_embedding(positions))  # (B, t, D)
        for number, layer in enumerate(self.layers):
            x = layer(x, None, cache, number)
        return ModelOutput(self.norm(x), self._readout())

    def _readout(self) -> LinearReadout:
        return LinearReadout(self.lm_head.weight, self.lm_head.bias, self.embedding.weight)

    @torch.no_grad()
    def extend_max_seq_len(self, new_length: int) -> None:
        """Make room for longer rows: known positions stay, new ones start at N(0, 0.02)."""
        old = self.pos_embedding.weight
        if new_length <= len(old):
            return
        self.pos_embedding = nn.Embedding(
            new_length, old.shape[1], device=old.device, dtype=old.dtype
        )
        nn.init.normal_(self.pos_embedding.weight, std=STD)
        self.pos_embedding.weight[: len(old)] = old

    def prepare_load(self, saved: dict[str, Tensor], notes: list[str]) -> None:
        """Make saved weights of another row length fit: the longer position table wins."""
        table = saved.get("pos_embedding.weight")
        if (
            table is None
            or table.shape[1:] != self.pos_embedding.weight.shape[1:]
            or len(table) == self.max_seq_len
        ):
            return
        if len(table) < self.max_seq_len:
            notes.append(f"the position table grows from {len(table)} to {self.max_seq_len} rows")
            table = full(table)
            saved["pos_embedding.weight"] = torch.cat(
                [table, full(self.pos_embedding.weight.detach())[len(table) :].to(table)]
            )
        else:
            self.extend_max_seq_len(len(table))

    def _initialise(self) -> None:
        """N(0, 0.02), biases 0; pre-norm layers that add to the residual stream are scaled down
        (GPT-2, section 2.3)."""
        for module in self.modules():
            draw_weights(module)
            if isinstance(module, SelfAttention):
                nn.init.normal_(module.in_proj_weight, std=STD)
        if self.settings.norm == "pre":
            for layer in self.layers:
                assert isinstance(layer, SimpleBlock)
                for projection in (layer.self_attn.out_proj, layer.linear2):
                    draw_residual(projection, len(self.layers))
