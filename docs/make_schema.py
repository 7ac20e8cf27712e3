"""`python docs/make_schema.py`: writes configs/preset.schema.json, and the guide's list of presets
and keys, from the code.

In:    core.assembly.Preset: its fields, defaults and docstrings; configs/*.json
Out:   configs/preset.schema.json (JSON Schema, draft 2020-12); the text between the marks `preset
       list` and `preset reference`
State: none; the same code gives the same bytes. tests/test_docs.py fails when either file is not
current."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_PATH, GUIDE_PATH = ROOT / "configs" / "preset.schema.json", ROOT / "docs" / "guide.md"
MARKS = "<!-- preset {0}: begin (python docs/make_schema.py) -->", "<!-- preset {0}: end -->"

Json = dict[str, Any]


def preset_schema() -> Json:
    """Make the JSON Schema of a preset *file*: unlike the class, which is a whole preset, it may
    leave things to what it extends."""
    from core.data.sources import SOURCES
    from core.losses import LOSSES
    from core.preset.variants import NOT_IN_VARIANTS
    from core.registry import Preset

    schema = _tidied(Preset.model_json_schema(by_alias=True))
    definitions = schema["$defs"]
    # in lists nothing is merged: each entry says what it is
    for name in _names(SOURCES) + _names(LOSSES):
        definition = definitions[name]
        definition["required"] = ["type", *definition.get("required", [])]
    del schema["required"], definitions["DataSettings"]["required"]
    variant = definitions["VariantSettings"]["properties"]["set"]
    variant["properties"] = {
        key: field for key, field in schema["properties"].items() if key not in NOT_IN_VARIANTS
    }
    variant["additionalProperties"] = False
    whole = {"required": ["data"], "properties": {"data": {"required": ["sources"]}}}
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "zeroarg preset"}
    schema |= {"title": about["title"], "if": {"not": {"required": ["extends"]}}, "then": whole}
    return about | schema


def _names(table: Mapping[str, tuple[type, Any]]) -> list[str]:
    """Return the names of the classes that configure the entries of a table."""
    return [settings.__name__ for settings, _ in table.values()]


def _job_sections() -> list[tuple[str, str]]:
    """Return the name of the class and the key of each section that belongs to a job."""
    from core.jobs import JOBS
    from core.preset.base import PresetBase

    fields = {key: field for job in JOBS.values() for key, field in job.preset.model_fields.items()}
    return [
        (getattr(field.annotation, "__name__", key), key)
        for key, field in fields.items()
        if key not in PresetBase.model_fields
    ]


def _tidied(node: Any, names: bool = False) -> Any:
    """Leave out generated titles, nested defaults and the bounds that every number has; write
    `anyOf` for `oneOf`, as a section that extends another may omit its `type`.

    names   whether the keys of this object are names of fields, not words of JSON Schema
    """
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {}
    for key, value in node.items():
        if not names and _is_usual(key, value):
            continue
        if not names and (
            key == "title" or (key == "default" and (value is None or isinstance(value, dict)))
        ):
            continue
        word = "anyOf" if key == "oneOf" and not names else key
        out[word] = _tidied(value, names=not names and key in ("properties", "$defs"))
    return out


def _is_usual(key: str, value: Any) -> bool:
    """Tell whether this is a bound that no field states: the guide and the program tell it once."""
    from core.bounds import LARGEST_WHOLE

    return (
        key in ("minimum", "maximum")
        and isinstance(value, int | float)
        and abs(value) >= LARGEST_WHOLE
    )


def presets() -> str:
    """Return the table of the presets in configs/, with the menu's words."""
    from core.preset.decode import read_preset
    from core.registry import Preset

    rows = ["| Preset | Name in the menu | What it does |", "|---|---|---|"]
    for path in sorted((ROOT / "configs").glob("[0-9][0-9]_*.json")):
        preset = read_preset(path, Preset)
        rows.append(f"| `{path.stem}` | {preset.name} | {preset.description} |")
    return "\n".join(rows)


def reference() -> str:
    """Return the key reference of docs/guide.md: a table for each section."""
    from core.data.sources import SOURCES
    from core.losses import LOSSES
    from core.models import MODELS
    from core.registry import Preset

    schema = Preset.model_json_schema(by_alias=True)
    titles: dict[str, str] = {}
    order: list[tuple[str, Any]] = [
        ("model", MODELS),
        ("TokenizerSettings", "tokenizer"),
        ("TrainSettings", "train"),
        ("ScheduleSettings", "train.schedule"),
        ("CurriculumSettings", "train.curriculum"),
        ("losses", LOSSES),
        ("AuxiliarySettings", "auxiliary"),
        ("DataSettings", "data"),
        ("data.sources", SOURCES),
        ("GenerateSettings", "generate"),
        *_job_sections(),
        ("VariantSettings", "variants"),
        ("CompareSettings", "compare"),
        ("LoggingSettings", "logging"),
        ("Piece", "a piece of a schedule"),
    ]
    for kind, sections in order:
        if isinstance(sections, str):
            titles[kind] = sections
        else:
            titles |= {
                settings.__name__: f'{kind}, "type": "{name}"'
                for name, (settings, _) in sections.items()
            }
    titles |= {name: name for name in schema["$defs"] if name not in titles}
    listed = _names(LOSSES) + _names(SOURCES)
    tables = [
        _table(f"`{title}`", schema["$defs"][name], name in listed)
        for name, title in titles.items()
    ]
    return "\n\n".join([_table("The file itself", schema, False), *tables])


def _table(title: str, node: Json, listed: bool) -> str:
    """Write one section. `listed`: it is an entry of a list, and so must state its `type`."""
    rows = ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    for key, field in node["properties"].items():
        needed = key in node.get("required", []) or (listed and key == "type")
        meaning = field.get("description") or ("Names this kind." if key == "type" else "")
        cells = [f"`{key}`", _value(field), "needed" if needed else _default(field), meaning]
        escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        rows.append(f"| {' | '.join(escaped)} |")
    about = node.get("description", "").strip()
    return "\n\n".join(part for part in (f"#### {title}", about, "\n".join(rows)) if part)


def _default(field: Json) -> str:
    value = field.get("default")
    if value is None or isinstance(value, dict):
        return ""
    return f"`{json.dumps(value)}`"


def _value(field: Json) -> str:
    """Say in words what may stand there."""
    if options := field.get("anyOf") or field.get("oneOf"):
        if any(option.get("$ref", "").endswith("/Piece") for option in options):
            return "number or schedule"
        kinds = [_value(option) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in field:
        return "section"
    if "const" in field or "enum" in field:
        values = field.get("enum", [field.get("const")])
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])} numbers"
    if field["type"] == "array":
        of = _value(field["items"])
        plural = {
            "string": "strings",
            "number": "numbers",
            "whole number": "whole numbers",
            "section": "sections",
        }
        return "list of " + plural.get(of, of)
    plain = {"integer": "whole number", "boolean": "`true` or `false`", "object": "section"}
    kind = str(field["type"])
    word = plain.get(kind, kind)
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [
        f"{sign} {_plain(field[key])}"
        for key, sign in signs.items()
        if key in field and not _is_usual(key, field[key])
    ]
    return f"{word} {', '.join(limits)}" if limits else word


def _plain(number: float) -> str:
    return f"{int(number):,}" if number == int(number) and number < 1e12 else f"{number:g}"


def schema_text() -> str:
    return json.dumps(preset_schema(), indent=2, ensure_ascii=False) + "\n"


def guide_text(guide: str) -> str:
    """Return the guide with its list of presets and its reference made anew."""
    for what, made in (("list", presets()), ("reference", reference())):
        begin, end = (mark.format(what) for mark in MARKS)
        before, rest = guide.split(begin)
        _, after = rest.split(end)
        guide = f"{before}{begin}\n\n{made}\n\n{end}{after}"
    return guide


def main() -> None:
    SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
    GUIDE_PATH.write_text(guide_text(GUIDE_PATH.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {SCHEMA_PATH.relative_to(ROOT)}, the lists in {GUIDE_PATH.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
