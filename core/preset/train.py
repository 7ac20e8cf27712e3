"""The `train` section of a preset: optimizer, length of a run, evaluations, checkpoints.

In:    nothing
Out:   TrainSettings, with ScheduleSettings and CurriculumSettings
State: none
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core.preset.deepspeed import DeepSpeedSettings
from core.preset.settings import Seed, Settings
from core.schedules import Schedule, values_at_turns


class ScheduleSettings(Settings):
    type: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, decay. cosine: warm-up, cosine decay. constant: warm-up, then level."""
    warmup: float = Field(0.02, ge=0.0, le=1.0)
    """Fraction of the run that warms up."""
    decay: float = Field(0.2, ge=0.0, le=1.0)
    """Fraction of the run that decays at its end (wsd)."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """Shape of the decay (wsd)."""
    floor: float = Field(0.0, ge=0.0, le=1.0)
    """Fraction of the peak learning rate left at the end (wsd, cosine)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.type == "wsd" and self.warmup + self.decay > 1.0:
            raise ValueError(
                f"warmup {self.warmup:g} and decay {self.decay:g} are more than the whole run; "
                "together at most 1"
            )
        return self


class CurriculumSettings(Settings):
    """The curriculum: more rows are read than are trained. They are chosen by how difficult the
    model finds them: by their loss among that of the others."""

    candidates: int = Field(2, ge=2, le=1_000)
    """Rows read, and scored by a forward pass, for each that is trained."""
    bucket_weights: list[Schedule] = Field([1.0, 1.0, 1.0, 1.0], min_length=2)
    """A number or schedule for each of the buckets of equal size that the candidates of a step are
    sorted into by their loss, the easiest first: a row's chance against the others of its group.
    All equal: left to chance."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        for moment, weights in values_at_turns(self.bucket_weights):
            if min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(
                    f"bucket_weights must not be negative, and not all zero; at {moment:g} they "
                    f"are {weights}"
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
    """Runs of 100,000,000 tokens whose schedules span all of them."""
    max_steps: int | None = Field(None, ge=1)
    """Shortens a run to so many optimizer steps."""
    max_epochs: int | None = Field(None, ge=1)
    """Reads each source at most so many times, over all `runs`, and ends when nothing is left."""
    eval_tokens: int = Field(500_000, ge=0)
    """Held-out tokens of one evaluation; 0: never evaluate."""
    eval_every_tokens: int = Field(10_000_000, ge=1)
    """Training tokens between evaluations."""
    eval_tasks: list[Literal["blimp"]] = Field([])
    """Tasks that each evaluation runs as well. blimp: the share of minimal pairs of sentences whose
    grammatical one is the likelier, for models of next tokens."""
    eval_task_limit: int | None = Field(100, ge=1)
    """Pairs of each of BLiMP's 67 paradigms, the first ones; null: all 1,000."""
    blimp_path: str | None = Field(None, min_length=1)
    """Folder or zip that BLiMP's files are read from, relative to the project; left out, the
    Hub."""
    eval_at_start: bool = False
    """Also evaluate before the first update: what trained weights could do before."""
    checkpoint_every_minutes: float = Field(10.0, gt=0.0, le=1_000_000.0)
    """Minutes between checkpoints. One is always written after the first steps, at the end and on
    Ctrl-C."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps."""
    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """What keeps the weights, of several processes. ddp: each of them all, gradients are averaged.
    fsdp: each a share of weights, gradients and optimizer state, for models that do not fit one
    device. deepspeed: ZeRO, see `deepspeed`. auto: ddp where the model fits, else fsdp. single: one
    process."""
    deepspeed: DeepSpeedSettings | None = None
    """What goes through to DeepSpeed, with engine deepspeed; left out: ZeRO stage 2."""
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
    def deepspeed_config(self) -> dict[str, Any]:
        """What goes through to DeepSpeed."""
        return (self.deepspeed or DeepSpeedSettings()).model_dump(exclude_none=True)

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO, where DeepSpeed is the engine; 0 elsewhere."""
        config = self.deepspeed_config
        return config["zero_optimization"]["stage"] if self.engine == "deepspeed" else 0

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        of_stage_3 = self.zero_stage == 3
        if (self.engine == "fsdp" or of_stage_3) and self.compile == "always":
            engine = "deepspeed in ZeRO stage 3" if of_stage_3 else '"fsdp"'
            raise ValueError(
                f'compile "always" does not go with engine {engine}, which runs models as they are '
                'written; set compile to "auto", or engine to "ddp"'
            )
        if self.optimizer == "muon" and self.zero_stage > 0:
            raise ValueError(
                'optimizer "muon" does not go with ZeRO stages 1 to 3, which update parts of '
                'matrices; set engine to "fsdp", or deepspeed.zero_optimization.stage to 0'
            )
        if self.curriculum is not None and self.zero_stage == 3:
            raise ValueError(
                "curriculum does not go with ZeRO stage 3, whose weights are there only while "
                'losses are computed for training; set engine to "fsdp", or '
                "deepspeed.zero_optimization.stage to 2"
            )
        if self.deepspeed is not None and self.engine != "deepspeed":
            raise ValueError(
                f'the section deepspeed goes with engine "deepspeed", and engine is "{self.engine}"'
            )
        return self

    @property
    def candidates(self) -> int:
        """Rows read for each that is trained."""
        return self.curriculum.candidates if self.curriculum is not None else 1
