"""PolychromaticLM (specification 001, arXiv 2603.13347): grouped-query attention, and feed-forward
layers whose neurons choose among four activations, by a preference of their own and by what was
read; and its SwiGLU baseline.

In:    Batch
Out:   ModelOutput(hidden (B, T, D), LinearReadout), the readout tied to the embedding table
State: parameters and buffers named as the published ones (`embeddings`, `model_core.N.gqa.W_q`,
`model_core.N.polyglu.alpha`,
       `rope.cosines`, `output_head`, ...); the temperature tau, which follows from the progress of
       the run

B batch, T time, D hidden_size, H num_heads, K num_kv_heads, Dh head_dim, F intermediate_size, L
num_layers, G gate width"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.contracts import Batch, LanguageModel, ModelOutput
from core.models.attention import Attention, DocumentMask, choose_backend, compute_dtype
from core.models.grouped_query import RoPE, check_heads, layer_bytes, mixed
from core.models.initial import draw_residual, draw_weights
from core.models.kv_cache import KeyValueCache
from core.models.norm import rms_norm
from core.models.polyglu import NUM_ACTIVATIONS, entropy
from core.models.polyglu_layer import GATE_WIDTH, Pass, PolyGLU, RoutingSettings, SwiGLU
from core.models.readout import LinearReadout
from core.parallel.shards import full
from core.preset.settings import ModelSettings
from core.schedules import value_at


class PolychromaticSettings(ModelSettings):
    """PolychromaticLM. The defaults are those of the published model, 597,153,888 parameters."""

    type: Literal["polychromatic"] = "polychromatic"
    hidden_size: int = Field(1024, ge=1, le=131_072)
    """Width of the hidden states."""
    intermediate_size: int | None = Field(None, ge=1, le=1_000_000)
    """Neurons of a feed-forward layer; left out, 4 x hidden_size."""
    num_layers: int = Field(28, ge=1, le=1_000)
    """Transformer blocks."""
    num_heads: int = Field(16, ge=1, le=16_384)
    """Query heads."""
    num_kv_heads: int = Field(8, ge=1, le=16_384)
    """Key-value heads, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int = Field(64, ge=2, le=16_384)
    """Width of a head."""
    seq_length: int = Field(4096, ge=2, le=10_000_000)
    """Tokens a row of training text has, and positions the model knows."""
    norm_eps: float = Field(1e-6, gt=0.0, le=1.0)
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = Field(10_000.0, ge=1.0, le=1e15)
    """Base of the rotary positions' wavelengths."""
    feed_forward: Literal["polyglu", "swiglu"] = "polyglu"
    """polyglu: four activations, routed. swiglu: SiLU alone, the baseline of the same shape."""
    routing: RoutingSettings = RoutingSettings()
    """How PolyGLU's neurons choose."""
    attention: Attention = "auto"
    """What computes attention, as for simple_lm."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: each forward
    pass is done twice."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "PolychromaticSettings":
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        return self

    @property
    def neurons(self) -> int:
        return self.intermediate_size or 4 * self.hidden_size

    def activation_bytes(self, bf16: bool) -> int:
        """Count what one position leaves for the backward pass on a GPU, all layers together."""
        # SwiGLU: SiLU's result and the product as well
        kept = 2 if self.feed_forward == "polyglu" else 4
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = layer_bytes(self.hidden_size, kept * self.neurons, queries, keys, bf16)
        return (
            4 * self.hidden_size * self.num_layers + layer
            if self.activation_checkpointing
            else layer * self.num_layers
        )

    def num_parameters(self, vocab_size: int) -> int:
        """Counted without building anything: the menu asks."""
        D, F, Dh = self.hidden_size, self.neurons, self.head_dim
        attention = 2 * D * Dh * (self.num_heads + self.num_kv_heads) + 2 * Dh
        gate_net = D * GATE_WIDTH + GATE_WIDTH + GATE_WIDTH * NUM_ACTIVATIONS + NUM_ACTIVATIONS
        routing = (F + 1) * NUM_ACTIVATIONS + gate_net if self.feed_forward == "polyglu" else 0
        return vocab_size * D + self.num_layers * (attention + 3 * D * F + routing + 2 * D) + D


class RMSNorm(nn.Module):
    """rms_norm, whose gain the published weights call gama."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.gama, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gama, self.eps)


class GQA(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head, before they are turned."""

    def __init__(self, settings: PolychromaticSettings):
        super().__init__()
        D, Dh = settings.hidden_size, settings.head_dim
        self.head_dim = Dh
        self.rmsnorm_q = RMSNorm(Dh, settings.norm_eps)
        self.rmsnorm_k = RMSNorm(Dh, settings.norm_eps)
        self.W_q = nn.Linear(D, settings.num_heads * Dh, bias=False)
        self.W_k = nn.Linear(D, settings.num_kv_heads * Dh, bias=False)
        self.W_v = nn.Linear(D, settings.num_kv_heads * Dh, bias=False)
        self.W_o = nn.Linear(settings.num_heads * Dh, D, bias=False)

    def forward(self, x: Tensor, shared: Pass, layer: int) -> Tensor:  # (B, T, D) -> (B, T, D)
        # (B, T, H or K, Dh)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (W(x).view(heads) for W in (self.W_q, self.W_k, self.W_v))
        return self.W_o(mixed(self.rmsnorm_q(q), self.rmsnorm_k(k), v, shared, layer))


class TransformerBlock(nn.Module):
    """x + GQA(norm(x)), then the same with the feed-forward layer."""

    def __init__(self, settings: PolychromaticSettings):
        super().__init__()
        self.rmsnorm_1 = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.rmsnorm_2 = RMSNorm(settings.hidden_size, settings.norm_eps)
        D, F = settings.hidden_size, settings.neurons
        routes = settings.feed_forward == "polyglu"
        layer = PolyGLU(D, F, settings.routing) if routes else SwiGLU(D, F)
        self.add_module(settings.feed_forward, layer)
        self.gqa = GQA(settings)

    @property
    def feed_forward(self) -> SwiGLU:
        """The layer, which is called `polyglu` or `swiglu` in the published weights."""
        layer = self.polyglu if hasattr(self, "polyglu") else self.swiglu
        assert isinstance(layer, SwiGLU)
        return layer

    # (B, T, D) -> (B, T, D), f
    def forward(self, x: Tensor, shared: Pass, layer: int) -> tuple[Tensor, Tensor | None]:
        dtype = shared.mask.dtype  # cast once here, or autocast keeps a copy for each matrix
        x = x + self.gqa(self.rmsnorm_1(x).to(dtype), shared, layer)
        added, f = self.feed_forward(self.rmsnorm_2(x).to(dtype), shared, layer)
        return x + added, None if f is None else f.detach()


class PolychromaticLM(LanguageModel):
    """The language model of specification 001."""

    is_causal = True

    def __init__(self, settings: PolychromaticSettings, vocab_size: int):
        super().__init__()
        self.settings, self.vocab_size = settings, vocab_size
        self.routes = settings.feed_forward == "polyglu"
        self.is_causal = not self.routes or settings.routing.pool == "causal"
        self.rope = RoPE(settings.head_dim, settings.seq_length, settings.rope_theta)
        self.embeddings = nn.Embedding(vocab_size, settings.hidden_size)
        self.model_core = nn.ModuleList(
            TransformerBlock(settings) for _ in range(settings.num_layers)
        )
        self.rmsnorm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.output_head = nn.Linear(settings.hidden_size, vocab_size, bias=False)
        self._initialise()
        self.output_head.weight = self.embeddings.weight
        # a tensor, because a number would make a compiled model compile again at every change
        self.register_buffer(
            "tau", torch.tensor(float(value_at(settings.routing.tau, 0.0))), persistent=False
        )
        self.tau: Tensor
        self.gates: Tensor | None = None
        """f of the last forward pass, (L, B, T or 1, 4), without gradient: what the routing made of
        what it read."""

    # the forward pass -----------------------------------------------------------------------------

    def forward(self, batch: Batch) -> ModelOutput:
        """Compute the hidden states of every position (B, T, D); attention, and the causal pool,
        stay inside each document."""
        x = self.embeddings(batch.input_ids)  # (B, T, D)
        mask = DocumentMask.of(
            batch, compute_dtype(x), self.settings.head_dim, self.settings.attention
        )
        return self._layers(x, self._pass(mask, batch.position_ids))

    def _pass(
        self, mask: DocumentMask, position_ids: Tensor, cache: KeyValueCache | None = None
    ) -> Pass:
        turn = self.rope(position_ids)
        return Pass(mask=mask, turn=turn, cache=cache, position_ids=position_ids, tau=self.tau)

    def _layers(self, x: Tensor, shared: Pass) -> ModelOutput:
        gates = []
        again = self.settings.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.model_core):
            if again:  # the second computation draws the same noise: checkpoint() sees to it
                x, f = checkpoint(block, x, shared, layer, use_reentrant=False)
            else:
                x, f = block(x, shared, layer)
            gates.append(f)
        self.gates = torch.stack(gates) if self.routes else None
        return ModelOutput(
            self.rmsnorm(x), LinearReadout(self.output_head.weight, table=self.embeddings.weight)
        )

    def new_cache(self) -> KeyValueCache | None:
        """Return an empty cache; None where a later token changes what was computed for earlier
        ones, or noise does."""
        if self.routes and (not self.is_causal or self.settings.routing.evaluate == "sample"):
            return None
        return KeyValueCache(len(self.model_core))

    def extend(self, input_ids: Tensor, cache: KeyValueCache) -> ModelOutput:
        """Compute the next t tokens (B, t) of texts of which `cache` holds the beginning."""
        x, begin = self.embeddings(input_ids), cache.length
        time = torch.arange(begin, begin + input_ids.shape[1], device=x.device)
        position_ids = time.expand(input_ids.shape)
        mask = DocumentMask("sdpa", compute_dtype(x), causal=True)
        return self._layers(x, self._pass(mask, position_ids, cache))

    # what the trainer calls -----------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Put the temperature where its schedule has it."""
        self.tau.fill_(value_at(self.settings.routing.tau, progress))

    @torch.no_grad()
    def report(self) -> dict[str, Tensor]:
        """Return the temperature, and the routing's entropies in nats (ln 4 at most):
        `routing_entropy` of alpha alone, `dynamic_routing_entropy` of alpha + beta f at up to 8
        places of each row; both without tau and noise."""
        if not self.routes:
            return {}
        layers = [layer for layer in self.modules() if isinstance(layer, PolyGLU)]
        alphas = [full(layer.alpha) for layer in layers]
        found = {
            "tau": self.tau,
            "routing_entropy/mean": torch.stack([entropy(a).mean() for a in alphas]).mean(),
        }
        if self.gates is not None:
            f = self.gates[:, :, :: max(1, self.gates.shape[2] // 8)]  # (L, B, 8, 4)
            # (L,)
            betas = [full(layer.beta) for layer in layers]
            dynamic = torch.stack(
                [entropy(a + (b * at)[:, :, None]).mean() for a, b, at in zip(alphas, betas, f)]
            )
            found["dynamic_routing_entropy/mean"] = dynamic.mean()
            found |= {
                f"dynamic_routing_entropy/layer_{i}": value for i, value in enumerate(dynamic)
            }
        return found

    def attention_note(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return a note for the user if `settings.attention` cannot be had on a device; `dtype` is
        that of matrix products."""
        return choose_backend(self.settings.attention, device, dtype, self.settings.head_dim)[1]

    def prepare_load(self, saved: dict[str, Tensor], notes: list[str]) -> None:
        """Keep the tables of rotary positions: they are computed, never loaded, as published ones
        have another length, or bf16's precision."""
        own = {"rope.cosines": self.rope.cosines, "rope.sins": self.rope.sins}
        if any(name in saved and saved[name].shape != table.shape for name, table in own.items()):
            notes.append(f"rotary positions are computed for {self.settings.seq_length} tokens")
        saved.update(own)
        saved.setdefault(
            "output_head.weight", saved.get("embeddings.weight", self.output_head.weight)
        )

    def _initialise(self) -> None:
        """Draw weights from N(0, 0.02), biases 0; what adds to the residual stream is scaled by 1 /
        sqrt(2 L) (specification 001)."""
        self.apply(draw_weights)
        for block in self.model_core:
            assert isinstance(block, TransformerBlock)
            for projection in (block.gqa.W_o, block.feed_forward.W_down):
                draw_residual(projection, len(self.model_core))
