"""The losses a preset can name."""

from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings

LOSSES = {"cross_entropy": (CrossEntropySettings, CrossEntropy)}
