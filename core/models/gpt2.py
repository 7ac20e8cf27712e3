"""GPT-2 of any size with random weights: the transformers library's module, its initialisation and
its names.

In:    Batch
Out:   ModelOutput(hidden (B, T, D), LinearReadout), the readout tied to the embedding table
State: parameters named as the published ones (`transformer.wte.weight`, ..., `lm_head.weight`)
"""

from typing import Literal

from pydantic import Field, model_validator

from core.models.huggingface import HuggingFaceLM, configure, transformers
from core.preset.settings import ModelSettings


class GPT2Settings(ModelSettings):
    """GPT-2's architecture with random weights, at any size. The defaults are those of the smallest
    published one."""

    type: Literal["gpt2"] = "gpt2"
    hidden_size: int = Field(768, ge=1, le=131_072)
    """Width of the hidden states."""
    num_layers: int = Field(12, ge=1, le=1_000)
    """Transformer blocks."""
    num_heads: int = Field(12, ge=1, le=16_384)
    """Attention heads; must divide hidden_size."""
    intermediate_size: int | None = Field(None, ge=1, le=1_000_000)
    """Width inside the feed-forward layers; left out, 4 x hidden_size."""
    seq_length: int = Field(1024, ge=2, le=10_000_000)
    """Tokens a row of training text has, and positions the model knows."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability of embeddings, attention and residual connections."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "GPT2Settings":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        return self

    def num_parameters(self, vocab_size: int) -> int:
        """Counted without the library, which takes seconds to import: the menu asks."""
        D, F = self.hidden_size, self.intermediate_size or 4 * self.hidden_size
        norms, attention, feed_forward = 4 * D, 4 * D * D + 4 * D, 2 * D * F + F + D
        return (
            (vocab_size + self.seq_length) * D
            + self.num_layers * (norms + attention + feed_forward)
            + 2 * D
        )


class GPT2(HuggingFaceLM):
    """GPT-2 (Radford et al. 2019), also used by specifications 002 and 004."""

    def __init__(self, settings: GPT2Settings, vocab_size: int):
        library = transformers()
        config = library.GPT2Config(
            vocab_size=vocab_size,
            n_positions=settings.seq_length,
            n_embd=settings.hidden_size,
            n_layer=settings.num_layers,
            n_head=settings.num_heads,
            n_inner=settings.intermediate_size,
            bos_token_id=None,
            eos_token_id=None,
        )
        super().__init__(library.GPT2LMHeadModel(configure(config, settings.dropout)))
        self.settings = settings
