"""NeoBERT (arXiv 2502.19587): an encoder that sees the whole document, to fill in masked tokens;
and specification 000's head, distances to prototypes on the unit sphere, in place of its decoder.

In:    Batch; published config.json and model.safetensors, where the settings name them
Out:   ModelOutput(hidden (B, T, D), LinearReadout or DistanceReadout)
State: parameters named as the published ones (`model.encoder`,
`model.transformer_encoder.N.ffn.w12`, `decoder`, ...), and
       `dist_head`, whose rows have length 1. No buffers: libraries that load weights leave them
       undefined

B batch, T time, D hidden_size, H num_heads, Dh head width D / H, F inner width of the feed-forward
layers, V vocab_size"""

import json
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from core.checkpoint.weights import read_weights
from core.contracts import Batch, LanguageModel, ModelOutput
from core.errors import UserError
from core.files import read_json
from core.models.attention import Attention, DocumentMask, attend, choose_backend, compute_dtype
from core.models.norm import rms_norm
from core.models.published import find_file, place_of, refuse_new_tokenizer, tokenizer_hint
from core.models.readout import DistanceReadout, LinearReadout
from core.parallel.shards import full
from core.preset.settings import MASKED_TOKENS, ModelSettings

INITIAL_RANGE = 0.02
"""Weights begin uniform between this and its negative, as published."""
CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "norm_eps": "norm_eps",
}
"""What a config.json calls our settings."""
BUILT_IN = {"rope": True, "rms_norm": True, "hidden_act": "swiglu"}
"""What a config.json may say, and only so: there is no setting for it."""


class NeoBERTSettings(ModelSettings):
    """NeoBERT. The defaults are those of the published model, 245,136,954 parameters."""

    objective: ClassVar[str] = MASKED_TOKENS
    """What it is trained to predict."""

    type: Literal["neobert"] = "neobert"
    name: str | None = Field(None, min_length=1)
    """Hub repository, such as "chandar-lab/NeoBERT", or a folder with config.json and
    model.safetensors, relative to the project, such as "./mine", whose weights it starts from; left
    out, it starts from random ones."""
    hidden_size: int = Field(768, ge=2, le=131_072)
    """Width of the hidden states."""
    num_layers: int = Field(28, ge=1, le=1_000)
    """Transformer blocks."""
    num_heads: int = Field(12, ge=1, le=16_384)
    """Attention heads; must divide hidden_size."""
    intermediate_size: int = Field(3072, ge=2, le=1_000_000)
    """The feed-forward layers are 2/3 of it wide, rounded up to a multiple of 8: their gate is a
    third matrix."""
    norm_eps: float = Field(1e-5, gt=0.0, le=1.0)
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = Field(10_000.0, ge=1.0, le=1e15)
    """Base of the rotary positions' wavelengths."""
    seq_length: int = Field(4096, ge=2, le=10_000_000)
    """Tokens a row of training text has."""
    head: Literal["decoder", "distance"] = "decoder"
    """decoder: a matrix and a bias give logits, as published. distance: squared distances to a
    prototype of each token on the unit sphere, which go with the harmonic loss."""
    prototypes: Literal["embedding", "decoder"] = "embedding"
    """What the prototypes begin as, scaled to length 1: the rows of the embedding table, or of the
    decoder."""
    keep_decoder: bool = False
    """With the distance head: keep the decoder beside it, never trained, for evaluations to compare
    with."""
    attention: Attention = "auto"
    """What computes attention, as for simple_lm."""

    @model_validator(mode="after")
    def _fits(self) -> "NeoBERTSettings":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"heads are hidden_size / num_heads = {self.head_dim} wide, which is odd, and "
                "rotary positions turn pairs; "
                "change one of them"
            )
        if self.head == "decoder" and self.keep_decoder:
            raise ValueError(
                'keep_decoder keeps it beside the distance head; write "head": "distance", or '
                "leave it out"
            )
        if self.head == "decoder" and self.prototypes != "embedding":
            raise ValueError(
                'prototypes are those of the distance head; write "head": "distance", or leave '
                "them out"
            )
        return self

    @property
    def published(self) -> str | None:
        """The name of the published weights it starts from."""
        return self.name

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """F."""
        return -(-(2 * self.intermediate_size // 3) // 8) * 8

    def activation_bytes(self, bf16: bool) -> int:
        """Count what one position leaves for the backward pass on a GPU, all layers together: of
        attention and feed-forward layer their inputs before and after the norm; queries, keys,
        values and their mix; gate, SiLU of it, up and the product."""
        D, F = self.hidden_size, self.inner_size
        return self.num_layers * (20 * D + 8 * F if bf16 else 32 * D + 16 * F)

    def num_parameters(self, vocab_size: int) -> int:
        """Counted without building anything: the menu asks."""
        D, F = self.hidden_size, self.inner_size
        encoder = vocab_size * D + self.num_layers * (4 * D * D + 3 * D * F + 2 * D) + D
        decoder = vocab_size * (D + 1) if self.head == "decoder" or self.keep_decoder else 0
        return encoder + decoder + (vocab_size * D if self.head == "distance" else 0)

    def num_frozen(self, vocab_size: int) -> int:
        """Count the parameters that no preset can train."""
        return vocab_size * (self.hidden_size + 1) if self.keep_decoder else 0

    def check_tokenizer_section(self, tokenizer: Any) -> None:
        """Raises UserError if a preset's tokenizer cannot be the one that the published weights
        were trained with."""
        if self.name is not None:
            refuse_new_tokenizer(self.name, tokenizer, 'no "name"')


class NeoBERTNorm(nn.Module):
    """rms_norm, whose gain the published weights call weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def turn_of(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021): (B, T) -> 2 x (B, T, 1, Dh / 2)."""
    # (Dh / 2,)
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype) / head_dim
    angles = position_ids[..., None, None].to(dtype) / theta**exponents  # (B, T, 1, Dh / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:  # (B, T, H, Dh) -> (B, T, H, Dh)
    """Interleaved: coordinate 2i turns with coordinate 2i + 1."""
    cos, sin = turn
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, Dh / 2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class NeoBERTFeedForward(nn.Module):
    """w3(SiLU(gate) * up), gate the first half of what w12 gives (Shazeer 2020)."""

    def __init__(self, settings: NeoBERTSettings):
        super().__init__()
        D, F = settings.hidden_size, settings.inner_size
        self.w12, self.w3 = nn.Linear(D, 2 * F, bias=False), nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        gate, up = self.w12(x).chunk(2, dim=-1)  # (B, T, F)
        return self.w3(functional.silu(gate) * up)


class NeoBERTBlock(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward layer."""

    def __init__(self, settings: NeoBERTSettings):
        super().__init__()
        D = settings.hidden_size
        self.num_heads = settings.num_heads
        self.qkv, self.wo = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.ffn = NeoBERTFeedForward(settings)
        self.attention_norm = NeoBERTNorm(D, settings.norm_eps)
        self.ffn_norm = NeoBERTNorm(D, settings.norm_eps)

    # (B, T, D) -> (B, T, D)
    def forward(self, x: Tensor, mask: DocumentMask, turn: tuple[Tensor, Tensor]) -> Tensor:
        # cast once here, or autocast keeps a copy for each matrix
        x = x + self._attention(self.attention_norm(x).to(mask.dtype), mask, turn)
        return x + self.ffn(self.ffn_norm(x).to(mask.dtype))

    def _attention(self, x: Tensor, mask: DocumentMask, turn: tuple[Tensor, Tensor]) -> Tensor:
        # each (B, T, H, Dh)
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        # a view of v would keep all of qkv for the backward pass
        q, k, v = rotate(q, turn), rotate(k, turn), v.contiguous()
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # each (B, H, T, Dh)
        mixed = attend(q, k, v, mask)  # (B, H, T, Dh)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Embeddings, blocks and a last norm."""

    def __init__(self, settings: NeoBERTSettings, vocab_size: int):
        super().__init__()
        self.settings = settings
        self.encoder = nn.Embedding(vocab_size, settings.hidden_size)
        self.transformer_encoder = nn.ModuleList(
            NeoBERTBlock(settings) for _ in range(settings.num_layers)
        )
        self.layer_norm = NeoBERTNorm(settings.hidden_size, settings.norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states of every position (B, T, D); each sees all of its document."""
        settings = self.settings
        x = self.encoder(batch.input_ids)  # (B, T, D)
        mask = DocumentMask.of(
            batch, compute_dtype(x), settings.head_dim, settings.attention, causal=False
        )
        at_least_fp32 = torch.promote_types(x.dtype, torch.float32)
        turn = turn_of(batch.position_ids, settings.head_dim, settings.rope_theta, at_least_fp32)
        for block in self.transformer_encoder:
            x = block(x, mask, turn)
        return self.layer_norm(x)


class NeoBERT(LanguageModel):
    """The masked language model of specification 000."""

    is_causal = False

    def __init__(self, settings: NeoBERTSettings, vocab_size: int):
        super().__init__()
        D = settings.hidden_size
        self.settings, self.vocab_size = settings, vocab_size
        self.model = Encoder(settings, vocab_size)
        distance = settings.head == "distance"
        self.decoder = nn.Linear(D, vocab_size) if settings.keep_decoder or not distance else None
        self.dist_head = nn.Linear(D, vocab_size, bias=False) if distance else None
        self.apply(_draw)
        if self.dist_head is not None:
            self._begin_prototypes()
            if self.decoder is not None:
                self.decoder.requires_grad_(False)

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput(self.model(batch), self._readout())

    def _readout(self) -> LinearReadout | DistanceReadout:
        if self.dist_head is not None:
            return DistanceReadout(self.dist_head.weight, self.model.encoder.weight)
        return self._decoder_readout()

    def _decoder_readout(self) -> LinearReadout:
        assert self.decoder is not None
        return LinearReadout(self.decoder.weight, self.decoder.bias, self.model.encoder.weight)

    def baseline_readout(self) -> LinearReadout | None:
        """The decoder kept beside the distance head; None where there is none."""
        return self._decoder_readout() if self.settings.keep_decoder else None

    def attention_note(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return a note for the user if `settings.attention` cannot be had on a device; `dtype` is
        that of matrix products."""
        return choose_backend(self.settings.attention, device, dtype, self.settings.head_dim)[1]

    # prototypes -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin_prototypes(self) -> None:
        """Begin the prototypes as rows of a table; a decoder that is not kept would be drawn as
        they are already."""
        assert self.dist_head is not None
        if self.settings.prototypes == "embedding":
            self.dist_head.weight.copy_(self.model.encoder.weight)
        elif self.decoder is not None:
            self.dist_head.weight.copy_(self.decoder.weight)
        project(self.dist_head.weight)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Back onto the unit sphere (specification 000)."""
        if self.dist_head is not None and self.dist_head.weight.requires_grad:
            project(self.dist_head.weight)

    # weights made before --------------------------------------------------------------------------

    def prepare_load(self, saved: dict[str, Tensor], notes: list[str]) -> None:
        """Make prototypes of weights that have none; leave out a head that this model does not
        have."""
        if self.dist_head is not None:
            origin = {"embedding": "model.encoder.weight", "decoder": "decoder.weight"}[
                self.settings.prototypes
            ]
            if "dist_head.weight" not in saved and origin in saved:
                saved["dist_head.weight"] = project(full(saved[origin]).float().clone())
                notes.append(f"the prototypes begin as the rows of {origin}, scaled to length 1")
            elif (rows := saved.get("dist_head.weight")) is not None and not _on_sphere(full(rows)):
                saved["dist_head.weight"] = project(full(rows).float().clone())
                notes.append("the prototypes are scaled to length 1")
        unused = {
            "dist_head.weight": self.dist_head,
            "decoder.weight": self.decoder,
            "decoder.bias": self.decoder,
        }
        if left_out := [
            name
            for name, part in unused.items()
            if part is None and saved.pop(name, None) is not None
        ]:
            notes.append(
                f'left out: {", ".join(left_out)}, as model.head is "{self.settings.head}"'
            )

    def load_published(self, notes: list[str]) -> None:
        """Fetch and load the weights that the settings name, as a lineage that starts fresh wants.
        Raises UserError, or CheckpointError naming what does not fit; nothing is changed then."""
        name = self.settings.name
        if name is None:
            return
        self._check_config(name)
        advice = (
            'It must have "model.safetensors" by that name: files of other formats may hold code, '
            "which is never run. Check "
            "model.name and the network, or leave model.name out: random weights."
        )
        path = find_file(name, "model.safetensors", advice)
        advice = (
            "Take another model.name, one of NeoBERT's own architecture, and its "
            f"tokenizer: {tokenizer_hint(name)}."
        )
        told = read_weights(path, f"model.safetensors of {name}").load_into(self, advice)
        notes += [f"starts from the published weights of {name}, from {place_of(name)}", *told]

    def _check_config(self, name: str) -> None:
        """Raises UserError naming every difference between a config.json and the settings: shapes
        do not show all of them."""
        advice = "Check model.name and the network, or leave model.name out: random weights."
        path = find_file(name, "config.json", advice)
        try:
            config = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f'config.json of model "{name}" cannot be read: {error}. {advice}'
            ) from None
        config = config if isinstance(config, dict) else {}
        problems = [
            f"{key} is {config[key]} there, model.{ours} {getattr(self.settings, ours)} here: "
            f'write "{ours}": {config[key]}'
            for key, ours in CONFIG_KEYS.items()
            if config.get(key, getattr(self.settings, ours)) != getattr(self.settings, ours)
        ]
        if config.get("vocab_size", self.vocab_size) != self.vocab_size:
            problems.append(
                f"vocab_size is {config['vocab_size']} there, and the preset's tokenizer has "
                f"{self.vocab_size} tokens: "
                f"write {tokenizer_hint(name)} (outside `model`)"
            )
        for key, only in BUILT_IN.items():
            told = config.get(key, only)
            if (told.lower() if isinstance(told, str) else told) != only:
                problems.append(
                    f"{key} is {json.dumps(told)} there, and only {json.dumps(only)} is built "
                    "here: take another"
                )
        if problems:
            raise UserError(
                f'model "{name}" is not the preset\'s model:\n  ' + "\n  ".join(problems)
            )


def project(prototypes: Tensor) -> Tensor:
    """Every row to length 1, in place: (V, D) -> (V, D). A row of zeros stays."""
    return prototypes.div_(prototypes.norm(dim=-1, keepdim=True).clamp_min_(1e-12))


def _on_sphere(prototypes: Tensor) -> bool:
    """Return whether rows are as `project` leaves them, but for rounding: then a run goes on from
    the very bits it saved."""
    lengths = prototypes.float().norm(dim=-1)
    return bool((((lengths - 1.0).abs() < 1e-4) | (lengths == 0.0)).all())


def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.uniform_(module.weight, -INITIAL_RANGE, INITIAL_RANGE)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
