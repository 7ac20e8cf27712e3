"""The `deepspeed` section of `train`: what goes through to DeepSpeed.

In:    nothing
Out:   DeepSpeedSettings
State: none
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from core.preset.settings import Settings

ROWS = "train.per_gpu_batch_size and train.accumulation_steps"
OURS = {
    "train_batch_size": ROWS,
    "train_micro_batch_size_per_gpu": ROWS,
    "gradient_accumulation_steps": ROWS,
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
}
"""Keys of DeepSpeed that the preset has elsewhere."""


class DeepSpeedSettings(Settings):
    """Keys of DeepSpeed's own configuration."""

    zero_optimization: dict[str, Any] = Field({"stage": 2})
    """Its section of this name: the stage, 0 to 3 (2 where it is left out), and what else
    DeepSpeed takes there; not the offloading."""
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """What gradients travel in; left out, as they are: fp32."""
    wall_clock_breakdown: bool = False
    """Prints the time that DeepSpeed's parts take."""
    comms_logger: dict[str, Any] | None = None
    """Its section of this name: prints what travels."""
    flops_profiler: dict[str, Any] | None = None
    """Its section of this name: prints the arithmetic of a step."""

    @model_validator(mode="before")
    @classmethod
    def _not_ours(cls, section: Any) -> Any:
        ours = [key for key in OURS if key in section] if isinstance(section, dict) else []
        if ours:
            told = ", ".join(f"{key} is set by {OURS[key]}" for key in ours)
            raise ValueError(f"{told}: leave it out here")
        return section

    @field_validator("zero_optimization")
    @classmethod
    def _stage(cls, section: dict[str, Any]) -> dict[str, Any]:
        section = {"stage": 2} | {k: v for k, v in section.items() if v != "auto"}
        if section["stage"] not in (0, 1, 2, 3) or isinstance(section["stage"], bool):
            raise ValueError(f"stage is 0, 1, 2 or 3, not {section['stage']}")
        if offloads := [key for key in section if "offload" in key or key == "zenflow"]:
            raise ValueError(
                f"{offloads[0]} is not supported: weights and the optimizer's state stay on the "
                "devices; leave it out"
            )
        others = ("zero_quantized", "zero_hpz", "round_robin_gradients")
        if found := [key for key in section if key.startswith(others)]:
            raise ValueError(
                f"{found[0]} is not supported: what travels is not rounded, and shares are laid "
                "out one behind the other over all processes; leave it out"
            )
        return section
