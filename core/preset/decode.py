"""The typed preset: what a JSON file in configs/ may say, every mistake in it reported at once, and
its JSON Schema.

In:    a file in configs/, and the tables of models, losses and sources (this floor knows none of
       them by name)
Out:   a Preset: frozen pydantic sections, every field with a default but `data.sources`
State: none
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
)

from core.errors import PresetError
from core.file_names import file_name
from core.preset.base import PresetBase
from core.preset.json_file import UNREADABLE, read_json, shown
from core.preset.mistakes import explain
from core.preset.settings import (
    RUN_TOKENS,
    AuxiliarySettingsBase,
    DataSettingsBase,
    Settings,
    VariantSettings,
)
from core.preset.variants import metrics_of
from core.schedules import limits

PLAIN_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What may be a repository of the Hub, as well as a path."""

NOT_IN_VARIANTS = {
    "train.seed": 'seeds are given by "seeds", the same for all variants',
    **dict.fromkeys(
        ("job", "variants", "seeds", "compare"),
        "it is the same for all variants; set it beside them",
    ),
    **dict.fromkeys(
        ("name", "description", "lineage"), "trials are named after their variant and seed"
    ),
    **dict.fromkeys(("extends", "$schema"), "it stands at the top of a file only"),
}
"""What a variant may not set, and why."""


def _union(
    table: dict[str, tuple[type[Settings], Any]],
    what: str,
    default: str | None,
    text_is: Any = None,
    names: tuple[str, ...] = (),
) -> Any:
    """A field type that picks its section class from a table by `type`; a string, one of `names`,
    is expanded by `text_is`."""

    def expand(value: Any) -> Any:
        """A section. Raises ValueError for what has a type that is none of ours, or is no
        section."""
        if isinstance(value, str) and text_is is not None:
            return text_is(value)
        found = value.get("type") if isinstance(value, dict) else value
        if (
            isinstance(found, str)
            and found not in table
            and (near := difflib.get_close_matches(found, table, n=1))
        ):
            near_one = f'"{near[0]}"' if isinstance(value, dict) else f'{{"type": "{near[0]}"}}'
            raise ValueError(f"unknown type of {what}; known are {known}; did you mean {near_one}?")
        if isinstance(value, str):
            raise ValueError(
                f'a {what} is a section: {{"type": '
                f'"{value if value in table else next(iter(table))}"}}'
            )
        return value

    def kind(value: Any) -> str | None:
        found = (
            value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)
        )
        return found if isinstance(found, str) and found in table else None

    known = ", ".join(f'"{name}"' for name in table)
    members = [Annotated[settings, Tag(name)] for name, (settings, _) in table.items()]
    union: Any = members[0]
    for member in members[1:]:
        union = union | member
    picked = Discriminator(
        kind,
        custom_error_type="kind",
        custom_error_message=f"unknown type of {what}; known are {known}",
    )
    section = Annotated[union, picked]
    accepted = section | Literal[names] if names else section
    return Annotated[section, BeforeValidator(expand, json_schema_input_type=accepted)]


def preset_class(
    models: dict,
    losses: dict,
    sources: dict,
    source_names: dict[str, dict],
    jobs: list[str],
    auxiliary: type[AuxiliarySettingsBase],
) -> type[PresetBase]:
    """The Preset class over these tables.

    models, losses, sources   {type: (Settings class, built class)}
    source_names              {short name: the source it stands for}, usable as plain strings in
                              `data.sources`
    jobs                      what a preset can ask for
    auxiliary                 the keys of all auxiliary heads
    """

    def named_source(name: str) -> dict:
        if name in source_names:
            return {"name": name, **source_names[name]}
        known = sorted(source_names)
        near = difflib.get_close_matches(name, known, n=1)
        if not near and re.search(r"[/\\.*~]", name):
            hub = (
                f', and a dataset of the Hub {{"type": "hf", "dataset": {json.dumps(name)}}}'
                if PLAIN_HUB.fullmatch(name)
                else ""
            )
            kind = "pdf" if name.lower().rstrip("/").endswith("pdf") else "text"
            raise ValueError(
                f'local files are a section: {{"type": "{kind}", "path": {json.dumps(name)}}}{hub}'
            )
        hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(known)}"
        raise ValueError(f'no source is called "{name}"{hint}')

    model = _union(models, "model", default="simple_lm")
    source = _union(
        sources, "source", default=None, text_is=named_source, names=tuple(source_names)
    )
    data = create_model(
        "DataSettings",
        __base__=DataSettingsBase,
        sources=(
            Annotated[
                list[source],
                Field(min_length=1, description="Where text comes from: names or sections."),
            ],
            ...,
        ),
    )
    default_model = next(iter(models.values()))[0]
    return create_model(
        "Preset",
        __base__=PresetBase,
        job=(Literal[tuple(jobs)], Field(jobs[0], description="What to do.")),
        model=(model, Field(default_factory=default_model, description="The architecture.")),
        losses=(
            Annotated[
                list[_union(losses, "loss", default=None)],
                Field(min_length=1),
                AfterValidator(_named_apart),
            ],
            Field(
                default_factory=lambda: [next(iter(losses.values()))[0]()],
                description="Weighted sum of losses on the vocabulary.",
            ),
        ),
        auxiliary=(auxiliary, Field(default_factory=auxiliary, description="Auxiliary heads.")),
        data=(data, Field(description="What to read, and how.")),
    )


def _named_apart(losses: list[Any]) -> list[Any]:
    names = [loss.name or loss.type for loss in losses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f'two losses are called {", ".join(twice)}; give one of them another "name"'
        )
    return losses


def read_preset(path: Path, cls: type[BaseModel]) -> Any:
    """The preset in a file, with what it extends merged in.

    Raises PresetError with every problem: JSON syntax with line and column, unknown keys with the
    nearest known one, wrong values with path, value and what would be right.
    """
    if UNREADABLE.search(path.stem):
        told = path.with_name(UNREADABLE.sub("?", path.name))
        raise PresetError(
            str(told), ["the file's name holds bytes that are no UTF-8 text; rename the file"]
        )
    data, problems = read_json(path)
    seen = {os.path.realpath(path): path.stem}
    while isinstance(data, dict) and isinstance(parent := data.get("extends"), str):
        stem = parent.removesuffix(".json")
        parent_path = path.parent / f"{stem}.json"
        if not os.path.exists(parent_path):
            near = difflib.get_close_matches(
                parent, [p.stem for p in path.parent.glob("*.json")], n=1
            )
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise PresetError(
                str(path),
                [*problems, f"extends  {shown(parent)} is no preset in {path.parent}{hint}"],
            )
        if (real := os.path.realpath(parent_path)) in seen:
            raise PresetError(
                str(path), [f"extends  goes in a circle: {' -> '.join([*seen.values(), stem])}"]
            )
        seen[real] = stem
        base, of_base = read_json(parent_path)
        if not isinstance(base, dict):
            raise PresetError(str(parent_path), ["a preset is a JSON object: { ... }"])
        if of_base:
            raise PresetError(str(parent_path), of_base)
        own = {key: value for key, value in data.items() if key != "extends"}
        data = merge(
            {
                key: value
                for key, value in base.items()
                if key not in ("name", "description", "lineage")
            },
            own,
        )
    if isinstance(data, dict) and "/" in str(lineage := data.get("lineage", "")):
        problems.append(f"lineage  {json.dumps(lineage)}: letters, digits and . _ - only")
        data = {**data, "lineage": ""}
    return decode_preset(data, cls, str(path), path.stem, problems)


def decode_preset(
    data: Any, cls: type[BaseModel], where: str, stem: str, found: list[str] | None = None
) -> Any:
    """A preset from decoded JSON; `stem` names it and its lineage where it does not itself. Raises
    PresetError, for what was `found` before as well.

    What a variant sets comes out as the difference it makes to the resolved preset, so that a
    resolved preset decodes to itself."""
    if not isinstance(data, dict):
        raise PresetError(where, ["a preset is a JSON object: { ... }"])
    filled = {
        **data,
        "name": data.get("name") or stem,
        "lineage": data.get("lineage") or file_name(stem),
    }
    preset, problems = _validated(filled, cls)
    variants, of_variants = _variants(filled, cls, known=problems)
    problems += _compare_problems(filled) + of_variants
    if variants and preset is not None:
        problems += _metric_problems(preset.compare.metric, variants)
    if filled.get("init_from") == filled["lineage"]:
        problems.append(
            f'init_from  "{filled["lineage"]}" is its own lineage, which a preset goes on with '
            "anyway; leave it out"
        )
    if problems := [*(found or []), *problems]:
        raise PresetError(where, problems)
    if not variants:
        return preset
    base = preset_json(preset)
    sets = [
        {
            key: value
            for key, value in difference(base, preset_json(variant)).items()
            if key not in NOT_IN_VARIANTS
        }
        for variant in variants
    ]
    return preset.model_copy(
        update={
            "variants": [
                VariantSettings(name=v.name, set=own) for v, own in zip(preset.variants, sets)
            ]
        }
    )


def _validated(data: dict, cls: type[BaseModel]) -> tuple[Any, list[str]]:
    """The preset, or every problem."""
    try:
        preset: Any = cls.model_validate_json(json.dumps(data))
    except ValidationError as error:
        return None, [explain(e, data, cls) for e in error.errors()]
    problems = _relations(preset)
    return None if problems else preset, problems


def _relations(preset: Any) -> list[str]:
    """What each section allows, but not beside the others."""
    train, found = preset.train, []
    tokens = train.per_gpu_batch_size * train.accumulation_steps * preset.model.seq_length
    if tokens > train.runs * RUN_TOKENS:
        rows, times, T = train.per_gpu_batch_size, train.accumulation_steps, preset.model.seq_length
        found.append(
            f"train.per_gpu_batch_size  {rows:,}: with accumulation_steps {times:,} and "
            f"model.seq_length {T:,} one step would be "
            f"{tokens:,} tokens, and the whole run has {train.runs * RUN_TOKENS:,}; make one of "
            "them smaller"
        )
    heads = [
        getattr(preset.auxiliary, f"{key.removeprefix('enable_')}_weight", 0.0)
        for key in preset.auxiliary.heads
    ]
    if all(limits(weight)[1] <= 0 for weight in [*(loss.weight for loss in preset.losses), *heads]):
        found.append(
            "losses  none of them has a weight above 0 at any moment of the run: nothing would be "
            "learned; give one of them a "
            "weight, or leave it out"
        )
    return found


def _variants(data: dict, cls: type[BaseModel], known: list[str]) -> tuple[list[Any], list[str]]:
    """Each variant's whole preset, and the problems that variants have of their own."""
    found, problems = [], []
    listed = data.get("variants")
    for i, variant in enumerate(listed if isinstance(listed, list) else []):
        own = variant.get("set", {}) if isinstance(variant, dict) else None
        if not isinstance(own, dict):
            continue  # said already
        where = f"variants[{i}].set"
        for path, why in NOT_IN_VARIANTS.items():
            section, _, key = path.partition(".")
            if section in own and (
                not key or (isinstance(own[section], dict) and key in own[section])
            ):
                problems.append(f"{where}.{path}  a variant may not set this: {why}")
        preset, wrong = _validated(
            merge({k: v for k, v in data.items() if k not in ("variants", "job")}, own), cls
        )
        problems += [f"{where}.{line}" for line in wrong if line not in known]
        if preset is not None and preset.train.eval_tokens == 0:
            problems.append(
                f"{where}.train.eval_tokens  0: what is never evaluated cannot be compared; set "
                "it above 0"
            )
        if preset is not None:
            found.append(preset)
    return found, problems


def _metric_problems(metric: str, variants: list[Any]) -> list[str]:
    """A metric that no evaluation of any variant gives would be missed only after the last
    trial."""
    known = sorted(set().union(*map(metrics_of, variants)))
    if metric in known:
        return []
    near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"they are {', '.join(known)}"
    return [
        f"compare.metric  {json.dumps(metric)}: is none of the numbers that these variants' "
        f"evaluations give; {hint}"
    ]


def _compare_problems(data: dict) -> list[str]:
    """What does not fit together in job, variants and seeds."""
    found = []
    listed = data.get("variants")
    variants = [v for v in listed if isinstance(v, dict)] if isinstance(listed, list) else []
    if data.get("job") == "compare" and isinstance(listed, list | None) and len(listed or []) < 2:
        found.append(
            f"variants  {len(variants)} of them: the compare job needs at least two; the first is "
            "the baseline"
        )
    if variants and data.get("job") != "compare":
        found.append(
            'variants  only the compare job reads them: set "job": "compare", or "variants": [] '
            "to train one model"
        )
    names = [v.get("name") for v in variants]
    for name in dict.fromkeys(
        name for name in names if isinstance(name, str) and names.count(name) > 1
    ):
        found.append(
            f"variants  {names.count(name)} of them are called {json.dumps(name)}; give each a "
            "name of its own"
        )
    listed = data.get("seeds")
    seeds = [seed for seed in listed if isinstance(seed, int)] if isinstance(listed, list) else []
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        found.append(
            f"seeds  {', '.join(map(str, twice))} stands there twice; every seed is one run of "
            "each variant"
        )
    return found


def preset_json(preset: BaseModel) -> dict:
    """The resolved preset as plain JSON: what is broadcast, logged and kept in checkpoints."""
    return preset.model_dump(mode="json", by_alias=True, exclude={"schema_", "extends"})


def merge(base: Any, own: Any) -> Any:
    """`own` over `base`: objects are merged key by key (unless their `type` changes), everything
    else is replaced."""
    if not (isinstance(base, dict) and isinstance(own, dict)) or own.get(
        "type", base.get("type")
    ) != base.get("type"):
        return own
    return {**base, **{key: merge(base.get(key), value) for key, value in own.items()}}


def difference(base: dict, other: dict) -> dict:
    """The least that merged over `base` gives `other`; both are resolved."""
    found = {}
    for key, value in other.items():
        before = base.get(key)
        if value == before and key in base:
            continue
        both = isinstance(before, dict) and isinstance(value, dict)
        alike = both and before.keys() <= value.keys() and before.get("type") == value.get("type")
        found[key] = difference(before, value) if alike else value
    return found
