"""The table of models. Adding one: its file, its line here, a preset."""

from typing import TYPE_CHECKING

import torch

from core.contracts import LanguageModel
from core.models.gpt2 import GPT2, GPT2Settings
from core.models.hub import Hub, HubSettings
from core.models.neobert import NeoBERT, NeoBERTSettings
from core.models.polychromatic import PolychromaticLM, PolychromaticSettings
from core.models.qwen3 import Qwen3, Qwen3Settings
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from core.preset.settings import ModelSettings
from core.randomness import derive_seed

if TYPE_CHECKING:  # models can be imported without presets
    from core.preset.base import PresetBase

MODELS: dict[str, tuple[type[ModelSettings], type[LanguageModel]]] = {
    "simple_lm": (SimpleLMSettings, SimpleLM),
    "gpt2": (GPT2Settings, GPT2),
    "polychromatic": (PolychromaticSettings, PolychromaticLM),
    "qwen3": (Qwen3Settings, Qwen3),
    "neobert": (NeoBERTSettings, NeoBERT),
    "hub": (HubSettings, Hub),
}


def build_model(preset: "PresetBase", vocab_size: int) -> LanguageModel:
    """Build a preset's model, with weights that follow from its seed."""
    torch.manual_seed(derive_seed(preset.train.seed, "init"))
    return MODELS[preset.model.type][1](preset.model, vocab_size)
