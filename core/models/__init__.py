"""The table of models. Adding one: its file, its line here, a preset."""

from core.models.simple_lm import SimpleLM, SimpleLMSettings

MODELS = {"simple_lm": (SimpleLMSettings, SimpleLM)}
