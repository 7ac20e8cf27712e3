"""The typed preset: what a JSON file in configs/ may say, every mistake in it reported at once, and its JSON Schema.

In:    a file in configs/, and the tables of models, losses and sources (this floor knows none of them by name)
Out:   a Preset: frozen pydantic sections, every field with a default but `data.sources`
State: none
"""

import difflib
import json
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
from core.files import read_text
from core.settings import (
    AuxiliarySettings,
    CompareSettings,
    DataSettingsBase,
    EvaluateSettings,
    GenerateSettings,
    InterpretSettings,
    LoggingSettings,
    Settings,
    TokenizerSettings,
    TokenizeSettings,
    TrainSettings,
    VariantSettings,
)

WORD = "[A-Za-z0-9._-]"
"""A character of a lineage."""

NOT_IN_VARIANTS = {
    "train.seed": 'seeds are given by "seeds", the same for all variants',
    **dict.fromkeys(("job", "variants", "seeds", "compare"), "it is the same for all variants; set it beside them"),
    **dict.fromkeys(("name", "description", "lineage"), "trials are named after their variant and seed"),
    **dict.fromkeys(("extends", "$schema"), "it stands at the top of a file only"),
}
"""What a variant may not set, and why."""


def _union(
    table: dict[str, tuple[type[Settings], Any]], what: str, default: str | None, text_is: Any = None, names: tuple[str, ...] = ()
) -> Any:
    """A field type that picks its section class from a table by `type`; a string, one of `names`, is expanded by `text_is`."""

    def expand(value: Any) -> Any:
        return text_is(value) if text_is is not None and isinstance(value, str) else value

    def kind(value: Any) -> str | None:
        found = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)
        return found if isinstance(found, str) and found in table else None

    known = ", ".join(f'"{name}"' for name in table)
    members = [Annotated[settings, Tag(name)] for name, (settings, _) in table.items()]
    union: Any = members[0]
    for member in members[1:]:
        union = union | member
    picked = Discriminator(kind, custom_error_type="kind", custom_error_message=f"unknown type of {what}; known are {known}")
    section = Annotated[union, picked]
    if not names:
        return Annotated[section, BeforeValidator(expand)]
    return Annotated[section, BeforeValidator(expand, json_schema_input_type=section | Literal[names])]


def preset_class(models: dict, losses: dict, sources: dict, source_names: dict[str, dict], jobs: list[str]) -> type[BaseModel]:
    """The Preset class over these tables.

    models, losses, sources   {type: (Settings class, built class)}
    source_names              {short name: the source it stands for}, usable as plain strings in `data.sources`
    jobs                      what a preset can ask for
    """

    def named_source(name: str) -> dict:
        if name in source_names:
            return {"name": name, **source_names[name]}
        known = sorted(source_names)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(known)}"
        raise ValueError(f'no source is called "{name}"{hint}')

    tokenizer = Annotated[
        TokenizerSettings,
        BeforeValidator(
            lambda v: {"type": "hub", "name": v} if isinstance(v, str) else v, json_schema_input_type=TokenizerSettings | str
        ),
    ]
    model = _union(models, "model", default="simple_lm")
    source = _union(sources, "source", default=None, text_is=named_source, names=tuple(source_names))
    data = create_model(
        "DataSettings",
        __base__=DataSettingsBase,
        sources=(Annotated[list[source], Field(min_length=1, description="Where text comes from: names or sections.")], ...),
    )
    default_model = next(iter(models.values()))[0]
    return create_model(
        "Preset",
        __base__=Settings,
        schema_=(str | None, Field(None, alias="$schema", description="The JSON Schema an editor completes from.")),
        name=(str, Field("", description="Name in the menu; left out, the file's.")),
        description=(str, Field("", description="One line for the menu.")),
        extends=(str | None, Field(None, description="Another preset; this one states only what differs.")),
        job=(Literal[tuple(jobs)], Field(jobs[0], description="What to do.")),
        lineage=(
            str,
            Field(
                "",
                pattern=f"^({WORD}+(/{WORD}+)*)?$",  # a trial of a comparison has a folder for itself: <lineage>/<variant>/<seed>
                json_schema_extra={"pattern": f"^{WORD}*$"},
                description="Name of the checkpoints; left out, the file's.",
            ),
        ),
        init_from=(
            str | None,
            Field(
                None,
                min_length=1,
                description="Weights to begin with: a lineage, or a file (.pth .pt .safetensors), relative to the project.",
            ),
        ),
        model=(model, Field(default_factory=default_model, description="The architecture.")),
        tokenizer=(tokenizer, Field(TokenizerSettings(), description="Section, or the name of a Hub tokenizer.")),
        train=(TrainSettings, Field(TrainSettings(), description="The recipe.")),
        losses=(
            Annotated[list[_union(losses, "loss", default=None)], Field(min_length=1), AfterValidator(_named_apart)],
            Field(
                default_factory=lambda: [next(iter(losses.values()))[0]()],
                description="Weighted sum of losses on the vocabulary.",
            ),
        ),
        auxiliary=(AuxiliarySettings, Field(AuxiliarySettings(), description="Auxiliary heads.")),
        data=(data, Field(description="What to read, and how.")),
        generate=(GenerateSettings, Field(GenerateSettings(), description="Sampling.")),
        tokenize=(TokenizeSettings, Field(TokenizeSettings(), description="What the tokenize job writes.")),
        evaluate=(EvaluateSettings, Field(EvaluateSettings(), description="What the evaluate job measures.")),
        interpret=(InterpretSettings, Field(InterpretSettings(), description="How much the interpret job reads.")),
        variants=(list[VariantSettings], Field([], description="What the compare job compares; the first is the baseline.")),
        seeds=(list[int], Field([42, 43, 44], min_length=1, description="Seeds that each variant is trained with.")),
        compare=(CompareSettings, Field(CompareSettings(), description="How the compare job decides.")),
        logging=(LoggingSettings, Field(LoggingSettings(), description="Where metrics go besides logs/.")),
    )


def _named_apart(losses: list[Any]) -> list[Any]:
    names = [loss.name or loss.type for loss in losses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'two losses are called {", ".join(twice)}; give one of them another "name"')
    return losses


def read_preset(path: Path, cls: type[BaseModel]) -> Any:
    """The preset in a file, with what it extends merged in.

    Raises PresetError with every problem: JSON syntax with line and column, unknown keys with the nearest known one,
    wrong values with path, value and what would be right.
    """
    data = _read_json(path)
    seen = [path.stem]
    while isinstance(data, dict) and isinstance(parent := data.get("extends"), str):
        parent_path = path.parent / f"{parent.removesuffix('.json')}.json"
        if parent_path.stem in seen:
            raise PresetError(str(path), [f"extends  goes in a circle: {' -> '.join([*seen, parent_path.stem])}"])
        if not parent_path.exists():
            near = difflib.get_close_matches(parent, [p.stem for p in path.parent.glob("*.json")], n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise PresetError(str(path), [f'extends  "{parent}" is no preset in {path.parent}{hint}'])
        seen.append(parent_path.stem)
        base = _read_json(parent_path)
        if not isinstance(base, dict):
            raise PresetError(str(parent_path), ["a preset is a JSON object: { ... }"])
        own = {key: value for key, value in data.items() if key != "extends"}
        data = merge({key: value for key, value in base.items() if key not in ("name", "description", "lineage")}, own)
    if isinstance(data, dict) and "/" in str(lineage := data.get("lineage", "")):
        raise PresetError(str(path), [f"lineage  {json.dumps(lineage)}: letters, digits and . _ - only"])
    return decode_preset(data, cls, str(path), path.stem)


def decode_preset(data: Any, cls: type[BaseModel], where: str, stem: str) -> Any:
    """A preset from decoded JSON; `stem` names it and its lineage where it does not itself. Raises PresetError.

    What a variant sets comes out as the difference it makes to the resolved preset, so that a resolved preset decodes to itself.
    """
    if not isinstance(data, dict):
        raise PresetError(where, ["a preset is a JSON object: { ... }"])
    filled = {**data, "name": data.get("name") or stem, "lineage": data.get("lineage") or stem}
    preset, problems = _validated(filled, cls)
    variants, of_variants = _variants(filled, cls, known=problems)
    problems += _compare_problems(filled) + of_variants
    if filled.get("init_from") == filled["lineage"]:
        problems.append(f'init_from  "{filled["lineage"]}" is its own lineage, which a preset goes on with anyway; leave it out')
    if problems:
        raise PresetError(where, problems)
    if not variants:
        return preset
    base = preset_json(preset)
    sets = [
        {key: value for key, value in difference(base, variant).items() if key not in NOT_IN_VARIANTS} for variant in variants
    ]
    return preset.model_copy(
        update={"variants": [VariantSettings(name=v.name, set=own) for v, own in zip(preset.variants, sets)]}
    )


def _validated(data: dict, cls: type[BaseModel]) -> tuple[Any, list[str]]:
    """The preset, or every problem."""
    try:
        return cls.model_validate_json(json.dumps(data)), []
    except ValidationError as error:
        return None, [_explain(e, data, cls) for e in error.errors()]


def _variants(data: dict, cls: type[BaseModel], known: list[str]) -> tuple[list[dict], list[str]]:
    """Each variant's whole preset as JSON, and the problems that variants have of their own."""
    found, problems = [], []
    listed = data.get("variants")
    for i, variant in enumerate(listed if isinstance(listed, list) else []):
        own = variant.get("set", {}) if isinstance(variant, dict) else None
        if not isinstance(own, dict):
            continue  # said already
        where = f"variants[{i}].set"
        for path, why in NOT_IN_VARIANTS.items():
            section, _, key = path.partition(".")
            if section in own and (not key or (isinstance(own[section], dict) and key in own[section])):
                problems.append(f"{where}.{path}  a variant may not set this: {why}")
        preset, wrong = _validated(merge({k: v for k, v in data.items() if k not in ("variants", "job")}, own), cls)
        problems += [f"{where}.{line}" for line in wrong if line not in known]
        if preset is not None and preset.train.eval_tokens == 0:
            problems.append(f"{where}.train.eval_tokens  0: what is never evaluated cannot be compared; set it above 0")
        if preset is not None:
            found.append(preset_json(preset))
    return found, problems


def _compare_problems(data: dict) -> list[str]:
    """What does not fit together in job, variants and seeds."""
    found = []
    listed = data.get("variants")
    variants = [v for v in listed if isinstance(v, dict)] if isinstance(listed, list) else []
    if data.get("job") == "compare" and isinstance(listed, list | None) and len(listed or []) < 2:
        found.append(f"variants  {len(variants)} of them: the compare job needs at least two; the first is the baseline")
    if variants and data.get("job") != "compare":
        found.append('variants  only the compare job reads them: set "job": "compare", or "variants": [] to train one model')
    names = [v.get("name") for v in variants]
    for name in dict.fromkeys(name for name in names if isinstance(name, str) and names.count(name) > 1):
        found.append(f"variants  {names.count(name)} of them are called {json.dumps(name)}; give each a name of its own")
    seeds = data.get("seeds")
    if isinstance(seeds, list) and (twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]):
        found.append(f"seeds  {', '.join(map(str, twice))} stands there twice; every seed is one run of each variant")
    return found


def preset_json(preset: BaseModel) -> dict:
    """The resolved preset as plain JSON: what is broadcast, logged and kept in checkpoints."""
    return preset.model_dump(mode="json", by_alias=True, exclude={"schema_", "extends"})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, "utf-8-sig"), object_pairs_hook=lambda pairs: _object(pairs, path))
    except json.JSONDecodeError as error:
        raise PresetError(
            str(path), [f"line {error.lineno} column {error.colno}: {error.msg}; the file is not valid JSON"]
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise PresetError(str(path), [f"cannot be read: {error}"]) from None


def _object(pairs: list[tuple[str, Any]], path: Path) -> dict:
    """A JSON object. Of a key given twice, JSON readers drop the first value without a word."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise PresetError(str(path), [f'"{key}" stands twice in one object; keep one of them' for key in twice])
    return dict(pairs)


def merge(base: Any, own: Any) -> Any:
    """`own` over `base`: objects are merged key by key (unless their `type` changes), everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(own, dict)) or own.get("type", base.get("type")) != base.get("type"):
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


def _explain(error: Any, data: Any, cls: type[BaseModel]) -> str:
    """One line: path, value, what is wrong and what would be right."""
    path, node, missing = [], data, error["type"] == "missing"
    for depth, part in enumerate(error["loc"]):  # union tags in loc are not part of the user's path
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            path[-1:] = [f"{path[-1]}[{part}]"]
            node = node[part]
        elif isinstance(node, dict) and part in node:
            path.append(str(part))
            node = node[part]
        elif missing and depth == len(error["loc"]) - 1:
            path.append(str(part))
    where = ".".join(path) or "the preset"
    if missing:
        return f"{where}  is missing; it has no default"
    if error["type"] == "extra_forbidden":
        known = _known_keys(cls, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{where}  unknown key; " + (f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}")
    message = error["msg"].removeprefix("Value error, ")
    shown = json.dumps(node, default=str)
    return f"{where}  {shown if len(shown) <= 60 else shown[:57] + '...'}: {message[0].lower() + message[1:]}"


def _known_keys(cls: type[BaseModel], loc: tuple) -> list[str]:
    """The keys allowed where an unknown one was found, from the JSON Schema."""
    schema = cls.model_json_schema(by_alias=True)
    nodes = [schema]
    for part in loc:
        found = []
        for node in _resolved(nodes, schema):
            if isinstance(part, int):
                found += [node["items"]] if "items" in node else []
            elif part in node.get("properties", {}):
                found.append(node["properties"][part])
            else:  # a union tag: keep the members of that type
                kinds = node.get("properties", {}).get("type", {})
                found += [node] if kinds.get("const") in (part, None) else []
        nodes = found or nodes
    return sorted({key for node in _resolved(nodes, schema) for key in node.get("properties", {})})


def _resolved(nodes: list[dict], schema: dict) -> list[dict]:
    """Nodes with `$ref` followed and unions opened."""
    out = []
    for node in nodes:
        if "$ref" in node:
            out += _resolved([schema["$defs"][node["$ref"].rsplit("/", 1)[1]]], schema)
        elif "oneOf" in node or "anyOf" in node:
            out += _resolved(node.get("oneOf", []) + node.get("anyOf", []), schema)
        else:
            out.append(node)
    return out
