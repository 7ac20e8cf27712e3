"""Sections of a preset: the bases of all, and those that belong to no part of the program alone.
Each key has its default, its limits and its meaning.

In:    nothing; the sections of models, heads, losses, sources and jobs stand beside their code
Out:   frozen pydantic classes, from which tables.py makes the Preset and its JSON Schema
State: none
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.bounds import Bounded
from core.schedules import Schedule

RUN_TOKENS = 100_000_000
"""Training tokens of one run, over all ranks, padding not counted."""
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
NEXT_TOKEN, MASKED_TOKENS = "next_token", "masked_tokens"
"""The objectives of models, as their settings and a run's events name them."""


class Settings(Bounded, BaseModel):
    """The base of every section: unknown keys are errors, values are not coerced, numbers have
    bounds, nothing changes after decoding."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


def objective_of(model: Settings) -> str:
    """Return the objective of a model with these settings: the next token, unless they name it."""
    return getattr(model, "objective", NEXT_TOKEN)


class ModelSettings(Settings):
    """The base of every model's section, which stands beside the model's code."""

    if TYPE_CHECKING:  # each class has them as fields of its own, in its own order
        type: str
        seq_length: int


class SourceSettings(Settings):
    """The base of every source's section, which stands beside the source's code.

    The order of a section's keys is a part of fingerprints in checkpoints and caches.
    """

    if TYPE_CHECKING:  # each class has them as fields of its own, in its own order
        type: str
        name: str


class LossSettings(Settings):
    """The base of every loss's section; its `type` and further keys stand beside its code."""

    if TYPE_CHECKING:
        type: str
    name: str | None = Field(None, min_length=1)
    """Name in logs; left out, its type. Two losses of one type need different ones."""
    weight: Schedule = 1.0
    """Factor in the sum of losses. 0: only reported. Below 0: rewarded; one of the losses has to be
    above 0 at some moment."""


class TokenizerSettings(Settings):
    type: Literal["bpe", "byte", "hub", "file"] = "bpe"
    """bpe: byte-level BPE trained on a sample of the preset's own sources. byte: 256 bytes. hub: a
    Hugging Face tokenizer. file: a tokenizer.json on this machine."""
    vocab_size: int = Field(8192, ge=260, le=1_000_000)
    """Vocabulary of a trained BPE."""
    name: str | None = Field(None, min_length=1)
    """Hub repository of a `hub` tokenizer, such as "gpt2"."""
    path: str | None = Field(None, min_length=1)
    """The tokenizer.json of a `file` tokenizer, relative to the project, such as
    "./data/tokens/tokenizer.json". What ends a document is read from the tokenizer_config.json
    beside it."""

    @model_validator(mode="after")
    def _hub_is_named(self) -> Self:
        if (self.type == "hub") != (self.name is not None):
            raise ValueError(
                '"type": "hub" goes with a "name", and only with it; to name a Hub tokenizer '
                'write "tokenizer": "gpt2"'
            )
        if (self.type == "file") != (self.path is not None):
            raise ValueError(
                '"type": "file" goes with a "path" to a tokenizer.json, and only with it'
            )
        return self


class AuxiliarySettingsBase(Settings):
    """The keys of `auxiliary` that belong to no head: adaptive weights of sources (specification
    003, tier 1). Each head's keys stand beside its code; core/heads puts them together."""

    enable_adaptive_sources: bool = False
    """Draw more from sources with a higher loss (mix_strategy weighted)."""
    adaptive_interval_tokens: int = Field(5_000_000, ge=1)
    """Tokens between changes of the weights."""
    adaptive_min_weight: float = Field(0.5, gt=0.0)
    """Lowest factor on a source's weight."""
    adaptive_max_weight: float = Field(3.0, gt=0.0)
    """Highest factor on a source's weight."""
    adaptive_smoothing: float = Field(0.9, ge=0.0, lt=1.0)
    """Share of the old factor kept at a change."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        if self.adaptive_min_weight > self.adaptive_max_weight:
            raise ValueError(
                f"adaptive_min_weight is {self.adaptive_min_weight:g}, above adaptive_max_weight, "
                f"{self.adaptive_max_weight:g}"
            )
        return self

    @property
    def heads(self) -> list[str]:
        """The keys of the heads that are on."""
        return [
            key
            for key, value in self
            if key.startswith("enable_") and key != "enable_adaptive_sources" and value
        ]

    @property
    def head_weights(self) -> list[Schedule]:
        """The weights of the heads that are on; the policy head's is that of its divergence."""
        values, weights = dict(self), []
        for name in (key.removeprefix("enable_") for key in self.heads):
            weights.append(values.get(f"{name}_weight", values.get(f"{name}_kl_weight", 0.0)))
        return weights


class GenerateSettings(Settings):
    prompts: list[str] = ["Once upon a time", "The most important", "def main("]
    """Beginnings continued at each evaluation; a model that predicts masked tokens (neobert) fills
    in each [MASK] instead."""
    neighbors_of: list[str] = []
    """Words whose nearest neighbours among the readout's vectors are told at each evaluation. Each
    has to be one token."""
    max_tokens: int = Field(60, ge=1, le=1_000_000)
    """New tokens of a sample, or of an answer."""
    temperature: float = Field(0.9, ge=0.0)
    """Divides the scores before sampling. 0: always the likeliest token."""
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    """Nucleus sampling: the smallest set of tokens that reaches this probability."""
    no_repeat_ngram: int = Field(3, ge=0)
    """No sequence of so many tokens appears twice; 0: no block."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a text; they do not belong to it."""
    planner: bool = False
    """The generate job: draw from the planner's distribution instead of the model's
    (`auxiliary.enable_planner`)."""
    draft: Literal["auto", "never"] = "auto"
    """The generate job: auto lets a model that has a draft head guess tokens ahead and verify them
    at once; never does not. What is said is the same."""
    chat: Literal["auto", "always", "never"] = "auto"
    """The generate job: whether what is typed are turns of a conversation (ChatML), or beginnings
    to be continued. auto: a conversation where the tokenizer has the special tokens <|im_start|>
    and <|im_end|>."""
    memory: bool = True
    """The generate job: where the model was trained with the memory head, a text that outgrows
    model.seq_length goes on behind a summary of its beginning. false: its oldest tokens are left
    out, as without that head."""


class VariantSettings(Settings):
    """One side of a comparison: the preset with some of its keys set otherwise."""

    name: str = Field(min_length=1)
    """Name in the report and the logs. The first variant is the baseline."""
    set: dict[str, Any] = {}
    """Its changes, as a preset that extends this one would say them; none for the preset as it
    stands."""


class CompareSettings(Settings):
    """The compare job: every variant with every seed, on the same data in the same order."""

    metric: str = Field("cross_entropy", min_length=1)
    """Number of an evaluation that decides, such as "bits_per_byte"; "loss: cosine" is the value of
    that loss."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """Probability with which the reported intervals hold."""
    stop_worse_by: float | None = Field(None, gt=0.0)
    """Stop a variant whose cross-entropy is worse than the baseline's by more than this, from a
    third of the run on."""


class LoggingSettings(Settings):
    wandb: bool = False
    """Mirror the metrics log to Weights & Biases; offline when there is no key."""
    wandb_project: str = Field("zeroarg", min_length=1)
    """Project name there."""
