"""The Preset class, made from the tables of models, losses, heads, sources and jobs.

In:    the tables (this floor knows none of their entries by name)
Out:   a subclass of PresetBase: frozen pydantic sections, every field with a default but
       `data.sources`
State: none
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, create_model

from core.preset.base import PresetBase
from core.preset.data import DataSettingsBase
from core.preset.settings import (
    AuxiliarySettingsBase,
    LossSettings,
    ModelSettings,
    Settings,
    SourceSettings,
)

PLAIN_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Names that may be a repository of the Hub as well as a path."""

Table = Mapping[str, tuple[type[Settings], Any]]
"""{type: (its Settings class, the class that is built from it)}."""


def preset_class(
    models: Mapping[str, tuple[type[ModelSettings], Any]],
    losses: Mapping[str, tuple[type[LossSettings], Any]],
    sources: Mapping[str, tuple[type[SourceSettings], Any]],
    source_names: Mapping[str, dict[str, Any]],
    jobs: Mapping[str, type[PresetBase]],
    auxiliary: type[AuxiliarySettingsBase],
) -> type[PresetBase]:
    """Make the Preset class over these tables. The first model, loss and job are the defaults.

    models, losses, sources   {type: (Settings class, built class)}
    source_names              {short name: the source it stands for}, usable as plain strings in
                              `data.sources`
    jobs                      {job: PresetBase, or a subclass with a section of the job's own}
    auxiliary                 the keys of all auxiliary heads
    """
    # subclasses first, as Python wants the bases of a class; fields come in the table's order
    bases = [cls for cls in reversed([*jobs.values()]) if cls is not PresetBase] or [PresetBase]
    loss: Any = _union(losses, "loss", default=None)
    job: Any = Literal[tuple(jobs)]
    return create_model(
        "Preset",
        __base__=tuple(bases),
        job=(job, Field(next(iter(jobs)), description="The job to do.")),
        model=(
            _union(models, "model", default=next(iter(models))),
            Field(default_factory=_first(models), description="The architecture."),
        ),
        losses=(
            Annotated[list[loss], Field(min_length=1), AfterValidator(_named_apart)],
            Field(
                default_factory=lambda: [_first(losses)()],
                description="Weighted sum of losses on the vocabulary.",
            ),
        ),
        auxiliary=(auxiliary, Field(default_factory=auxiliary, description="Auxiliary heads.")),
        data=(
            _data_class(sources, source_names),
            Field(description="The texts to read, and the order and shape to read them in."),
        ),
    )


def _first(table: Table) -> type[Settings]:
    return next(iter(table.values()))[0]


def _data_class(
    sources: Table, source_names: Mapping[str, dict[str, Any]]
) -> type[DataSettingsBase]:
    """Make the class of the `data` section."""
    named = partial(_named_source, source_names)
    source: Any = _union(sources, "source", None, text_is=named, names=tuple(source_names))
    about = Field(min_length=1, description="Where text comes from: names or sections.")
    return create_model(
        "DataSettings", __base__=DataSettingsBase, sources=(Annotated[list[source], about], ...)
    )


def _named_source(source_names: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the section that a short name stands for. Raises ValueError with what was meant."""
    if name in source_names:
        return {"name": name, **source_names[name]}
    known = sorted(source_names)
    near = difflib.get_close_matches(name, known, n=1)
    if not near and re.search(r"[/\\.*~]", name):
        text = json.dumps(name)
        kind = "pdf" if name.lower().rstrip("/").endswith("pdf") else "text"
        hub = f', and a dataset of the Hub {{"type": "hf", "dataset": {text}}}'
        raise ValueError(
            f'local files are a section: {{"type": "{kind}", "path": {text}}}'
            + (hub if PLAIN_HUB.fullmatch(name) else "")
        )
    hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(known)}"
    raise ValueError(f'no source is called "{name}"{hint}')


def _union(
    table: Table,
    what: str,
    default: str | None,
    text_is: Callable[[str], dict[str, Any]] | None = None,
    names: tuple[str, ...] = (),
) -> Any:
    """Make a field type that picks its section class from a table by `type`.

    default   the type of a section that states none
    text_is   expands a string, one of `names`, to a section
    """
    known = ", ".join(f'"{name}"' for name in table)

    def expand(value: Any) -> Any:
        """Return a section. Raises ValueError for a type that is not in the table."""
        if isinstance(value, str) and text_is is not None:
            return text_is(value)
        kind = value.get("type") if isinstance(value, dict) else value
        unknown = isinstance(kind, str) and kind not in table
        if unknown and (near := difflib.get_close_matches(str(kind), table, n=1)):
            meant = f'"{near[0]}"' if isinstance(value, dict) else f'{{"type": "{near[0]}"}}'
            raise ValueError(f"unknown type of {what}; known are {known}; did you mean {meant}?")
        if isinstance(value, str):
            example = value if value in table else next(iter(table))
            raise ValueError(f'a {what} is a section: {{"type": "{example}"}}')
        return value

    def kind_of(value: Any) -> str | None:
        if isinstance(value, dict):
            kind = value.get("type", default)
        else:
            kind = getattr(value, "type", None)
        return kind if isinstance(kind, str) and kind in table else None

    members = [Annotated[settings, Tag(name)] for name, (settings, _) in table.items()]
    union: Any = members[0]
    for member in members[1:]:
        union = union | member
    message = f"unknown type of {what}; known are {known}"
    picked = Discriminator(kind_of, custom_error_type="kind", custom_error_message=message)
    section = Annotated[union, picked]
    accepted = section | Literal[names] if names else section
    return Annotated[section, BeforeValidator(expand, json_schema_input_type=accepted)]


def _named_apart(losses: list[LossSettings]) -> list[LossSettings]:
    """Refuse two losses of one name. Raises ValueError."""
    names = [loss.name or loss.type for loss in losses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f'two losses are called {", ".join(twice)}; give one of them another "name"'
        )
    return losses
