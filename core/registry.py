"""Every table put together: what a preset can name, and the Preset class that follows from it.

    MODELS   core/models    LOSSES   core/losses    HEADS   core/heads
    SOURCES  core/data/sources      JOBS    core/jobs

Metrics have a table of their own, core/metrics/table.py.

In:    the tables; adding to one is a file and a line in its package
Out:   Preset
State: none
"""

from typing import TYPE_CHECKING

from core.data.sources import NAMED_SOURCES, SOURCES
from core.heads import AuxiliarySettings
from core.jobs import JOBS
from core.losses import LOSSES
from core.models import MODELS
from core.preset.base import PresetBase
from core.preset.tables import preset_class

if TYPE_CHECKING:  # a type checker cannot read the tables
    Preset = PresetBase
else:
    Preset = preset_class(
        models=MODELS,
        losses=LOSSES,
        sources=SOURCES,
        source_names=NAMED_SOURCES,
        jobs={name: job.preset for name, job in JOBS.items()},
        auxiliary=AuxiliarySettings,
    )
