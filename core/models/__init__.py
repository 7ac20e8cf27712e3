"""The table of models. Adding one: its file, its line here, a preset."""

from core.models.gpt2 import GPT2, GPT2Settings
from core.models.hub import Hub, HubSettings
from core.models.neobert import NeoBERT, NeoBERTSettings
from core.models.polychromatic import PolychromaticLM, PolychromaticSettings
from core.models.simple_lm import SimpleLM, SimpleLMSettings

MODELS = {
    "simple_lm": (SimpleLMSettings, SimpleLM),
    "gpt2": (GPT2Settings, GPT2),
    "polychromatic": (PolychromaticSettings, PolychromaticLM),
    "neobert": (NeoBERTSettings, NeoBERT),
    "hub": (HubSettings, Hub),
}
