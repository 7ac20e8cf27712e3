"""The base class of presets: what every preset has, whatever the tables hold.

In:    nothing
Out:   PresetBase; core/preset/tables.py makes the Preset class of it: it narrows its model,
       losses, heads and sources, and adds the sections of the jobs
State: none
"""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from core.file_names import LONGEST, NAME, file_name, is_file_name
from core.preset.data import DataSettingsBase
from core.preset.settings import (
    AuxiliarySettingsBase,
    CompareSettings,
    GenerateSettings,
    LoggingSettings,
    LossSettings,
    ModelSettings,
    Seed,
    Settings,
    TokenizerSettings,
    VariantSettings,
)
from core.preset.train import TrainSettings


def _checked_lineage(name: str) -> str:
    """Return the name of a lineage. Raises ValueError where files cannot be called so.

    A trial of a comparison has a folder for itself: <lineage>/<variant>/<seed>.
    """
    if name and not all(is_file_name(part) for part in name.split("/")):
        raise ValueError(
            f"names files: at most {LONGEST} letters, digits and . _ -, no dot at either end, and "
            f'no name that Windows keeps, such as CON; "{file_name(name)}" would do'
        )
    return name


Lineage = Annotated[str, AfterValidator(_checked_lineage)]
Tokenizer = Annotated[
    TokenizerSettings,
    BeforeValidator(
        lambda v: {"type": "hub", "name": v} if isinstance(v, str) else v,
        json_schema_input_type=TokenizerSettings | str,
    ),
]


class PresetBase(Settings):
    """A preset, whatever models, losses, sources and jobs there are."""

    schema_: str | None = Field(None, alias="$schema")
    """The JSON Schema an editor completes from."""
    name: str = ""
    """Name in the menu; left out, the file's."""
    description: str = ""
    """One line for the menu."""
    group: Annotated[str, StringConstraints(strip_whitespace=True)] = ""
    """Heading under which the menu shows it; left out, "Your own"."""
    extends: str | None = None
    """Another preset; this one states only what differs."""
    job: str
    """The job to do."""
    lineage: Lineage = Field("", json_schema_extra={"pattern": f"^({NAME.pattern})?$"})
    """Name of the checkpoints; left out, the file's."""
    init_from: str | None = Field(None, min_length=1)
    """Weights to begin with: a lineage, or a file (.pth .pt .safetensors), relative to the
    project."""
    model: ModelSettings
    """The architecture."""
    tokenizer: Tokenizer = TokenizerSettings()
    """Section, or the name of a Hub tokenizer."""
    train: TrainSettings = TrainSettings()
    """The recipe."""
    losses: list[LossSettings]
    """Weighted sum of losses on the vocabulary."""
    auxiliary: AuxiliarySettingsBase = AuxiliarySettingsBase()
    """Auxiliary heads."""
    data: DataSettingsBase
    """The texts to read, and the order and shape to read them in."""
    generate: GenerateSettings = GenerateSettings()
    """Sampling."""
    variants: list[VariantSettings] = Field([])
    """The sides of a comparison; the first is the baseline."""
    seeds: list[Seed] = Field([42, 43, 44], min_length=1)
    """Seeds that each variant is trained with."""
    compare: CompareSettings = CompareSettings()
    """The compare job's decision."""
    logging: LoggingSettings = LoggingSettings()
    """Places that metrics go to besides logs/."""
