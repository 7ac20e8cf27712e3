"""The sections of a preset: every key a person may write, with its default, its limits and what it
does.

In:    nothing; the sections of models, losses and sources stand beside the code they configure
Out:   frozen pydantic classes, from which preset.py makes the Preset and its JSON Schema
State: none
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.bounds import Bounded
from core.schedules import Schedule, turns, value_at

RUN_TOKENS = 100_000_000
"""Training tokens of one run, over all ranks, padding not counted."""
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
NEXT_TOKEN, MASKED_TOKENS = "next_token", "masked_tokens"
"""What a model can learn: its objective, as its settings and a run's events name it."""


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
    """What a model with these settings learns; they need not say so where it is the usual thing."""
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
    """What every loss of the stack has; its `type` and its own keys stand beside its code."""

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
    def _hub_is_named(self) -> "TokenizerSettings":
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


class ScheduleSettings(Settings):
    type: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, decay. cosine: warm-up, cosine decay. constant: warm-up, then level."""
    warmup: float = Field(0.02, ge=0.0, le=1.0)
    """Fraction of the run that warms up."""
    decay: float = Field(0.2, ge=0.0, le=1.0)
    """Fraction of the run that decays at its end (wsd)."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """How it decays (wsd)."""
    floor: float = Field(0.0, ge=0.0, le=1.0)
    """Fraction of the peak learning rate left at the end (wsd, cosine)."""

    @model_validator(mode="after")
    def _fits(self) -> "ScheduleSettings":
        if self.type == "wsd" and self.warmup + self.decay > 1.0:
            raise ValueError(
                f"warmup {self.warmup:g} and decay {self.decay:g} are more than the whole run; "
                "together at most 1"
            )
        return self


class CurriculumSettings(Settings):
    """Which of the rows that are read are trained, by how difficult the model finds them: their
    loss among that of the others."""

    candidates: int = Field(2, ge=2, le=1_000)
    """Rows read, and scored by a forward pass, for each that is trained."""
    bucket_weights: list[Schedule] = Field([1.0, 1.0, 1.0, 1.0], min_length=2)
    """The candidates of a step are put into so many buckets of equal size by their loss, the
    easiest first. For each a number or schedule: a row's chance against the others of its group.
    All equal: left to chance."""

    @model_validator(mode="after")
    def _weights_fit(self) -> "CurriculumSettings":
        for moment in sorted(
            {0.0, 1.0, *(at for weight in self.bucket_weights for at in turns(weight))}
        ):
            found = [value_at(weight, moment) for weight in self.bucket_weights]
            if min(found) < 0 or sum(found) <= 0:
                raise ValueError(
                    f"bucket_weights must not be negative, and not all zero; at {moment:g} they "
                    f"are {found}"
                )
        return self


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A factor of a running average."""


class TrainSettings(Settings):
    per_gpu_batch_size: int = Field(32, ge=1, le=1_000_000)
    """Rows of one forward pass on each device."""
    accumulation_steps: int = Field(1, ge=1, le=1_000_000)
    """Forward passes of one optimizer step."""
    learning_rate: float = Field(6e-4, gt=0.0, le=100.0)
    """Peak learning rate."""
    schedule: ScheduleSettings = ScheduleSettings()
    """Shape of the learning rate over the run."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the trunk, AdamW for everything else."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's averaging factors."""
    eps: float = Field(1e-8, gt=0.0, le=1.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0.0, le=100.0)
    """Decoupled weight decay, on matrices only (biases, norms and the position table are
    exempt)."""
    muon_learning_rate: float = Field(0.02, gt=0.0, le=100.0)
    """Peak learning rate of the matrices under Muon."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Global norm the gradient is clipped to."""
    trainable: list[str] | None = Field(None, min_length=1)
    """Parameters to train, all others stay as they are: parts of names, such as
    "transformer_encoder.27", "*" for anything between two dots. Left out: all."""
    seed: Seed = 42
    """Seed of everything random."""
    runs: int = Field(1, ge=1, le=1_000_000)
    """Runs of 100,000,000 tokens chained into one horizon."""
    max_steps: int | None = Field(None, ge=1)
    """Shortens a run to so many optimizer steps."""
    max_epochs: int | None = Field(None, ge=1)
    """Reads each source at most so many times, over all `runs`, and ends when nothing is left."""
    eval_tokens: int = Field(500_000, ge=0)
    """Held-out tokens of one evaluation; 0: never evaluate."""
    eval_every_tokens: int = Field(10_000_000, ge=1)
    """Training tokens between evaluations."""
    eval_at_start: bool = False
    """Also evaluate before the first update: what trained weights could do before."""
    checkpoint_every_minutes: float = Field(10.0, gt=0.0, le=1_000_000.0)
    """Minutes between checkpoints. One is always written after the first steps, at the end and on
    Ctrl-C."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps."""
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile: auto compiles when the run is long enough to pay for it."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 compute over fp32 weights where the device computes bf16 natively, fp32
    elsewhere."""
    deterministic: bool = False
    """On a GPU, only kernels that give the same bits each time, which are slower; a CPU always
    does. See Checkpoints."""
    curriculum: CurriculumSettings | None = None
    """Reads more rows than are trained, and chooses among them by their loss. Left out: all rows
    are trained."""
    train_tokens: int | None = None
    """Accepted for old presets and overridden: one run is always 100,000,000 tokens."""

    @property
    def candidates(self) -> int:
        """Rows read for each that is trained."""
        return self.curriculum.candidates if self.curriculum is not None else 1


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
    """What it changes, as a preset that extends this one would say it; nothing for the preset as it
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


class DataSettingsBase(Settings):
    """Everything of `data` but the sources, whose kinds come from a table."""

    if TYPE_CHECKING:  # the last field of the class that is made from the table
        sources: list[SourceSettings]
    mix_strategy: Literal["round_robin", "sequential", "weighted"] = "round_robin"
    """round_robin: one document from each in turn. sequential: each to its end. weighted: shares of
    `source_weights`."""
    source_weights: list[Schedule] | None = None
    """One number or schedule per source (weighted): its share of what is drawn."""
    weights_of: Literal["documents", "tokens"] = "documents"
    """What source_weights are shares of: documents drawn, or their tokens (a source of long
    documents is drawn less often)."""
    min_text_length: int = Field(50, ge=1)
    """Texts of fewer characters are left out, and counted; conversations may be as short as they
    are."""
    mask_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of the tokens that are hidden behind [MASK] and predicted, where the model learns that
    (neobert)."""
    packing: Literal["documents", "best_fit", "padding"] = "documents"
    """documents: end to end, attention kept inside each. best_fit: kept whole wherever they fit.
    padding: one piece a row."""
    shuffle: Literal["documents", "shards"] = "documents"
    """What each epoch puts in another order: shards (files) only, or also the documents in
    stretches of 1,024 inside them."""
    validation_fraction: float = Field(0.01, gt=0.0, lt=0.5)
    """Share of the documents held out for evaluation, chosen by a hash of their text."""
    workers: int | None = Field(None, ge=0, le=64)
    """Processes that read and tokenize, per rank; 0: a thread. Left out: a thread on CPU, one
    process on a GPU."""
    cache_gigabytes: float = Field(20.0, ge=0.0, le=1_000_000.0)
    """Disk space for tokens of streams and compressed files, in .cache/ (safe to delete); 0: no
    cache."""
    lanes: int = Field(24, ge=1, le=4096)
    """Parallel lanes the order of documents is laid over. The number of ranks must divide it."""
    train_tokens: int | None = None
    """Accepted for old presets and overridden: one run is always 100,000,000 tokens."""

    @model_validator(mode="after")
    def _weights_fit(self) -> "DataSettingsBase":
        sources = self.sources
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f'two sources are called {", ".join(twice)}; give one another "name"')
        if self.mix_strategy == "weighted" and self.source_weights is None:
            raise ValueError(
                'mix_strategy "weighted" needs "source_weights", one number per source'
            )
        if self.source_weights is not None:
            if len(self.source_weights) != len(sources):
                raise ValueError(
                    f"{len(self.source_weights)} source_weights for {len(sources)} sources; give "
                    "one each"
                )
            for moment in sorted(
                {0.0, 1.0, *(end for weight in self.source_weights for end in turns(weight))}
            ):
                shares = [value_at(weight, moment) for weight in self.source_weights]
                if min(shares) < 0 or sum(shares) <= 0:
                    raise ValueError(
                        f"source_weights must not be negative, and not all zero; at {moment:g} "
                        f"they are {shares}"
                    )
            if self.mix_strategy != "weighted":
                raise ValueError(
                    'source_weights need "mix_strategy": "weighted", and it is '
                    f'"{self.mix_strategy}", which does not use them; '
                    "set it, or leave them out"
                )
        return self
