"""The losses a preset can name. Adding one: its file, its line here."""

from core.losses.cosine import Cosine, CosineSettings
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.harmonic import Harmonic, HarmonicSettings
from core.losses.sharpness import Sharpness, SharpnessSettings
from core.losses.stack import LossStack
from core.losses.z_loss import ZLoss, ZLossSettings
from core.preset.base import PresetBase

LOSSES = {
    "cross_entropy": (CrossEntropySettings, CrossEntropy),
    "cosine": (CosineSettings, Cosine),
    "sharpness": (SharpnessSettings, Sharpness),
    "harmonic": (HarmonicSettings, Harmonic),
    "z_loss": (ZLossSettings, ZLoss),
}


def build_stack(preset: PresetBase) -> LossStack:
    """Build a preset's losses, as one stack."""
    return LossStack([LOSSES[settings.type][1](settings) for settings in preset.losses])
