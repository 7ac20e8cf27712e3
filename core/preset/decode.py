"""From a preset file to a typed preset, with every mistake in it reported at once.

In:    a file in configs/, and the Preset class (core/registry.py)
Out:   a preset: what it extends is merged in, everything is checked
State: none
"""

import difflib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from core.errors import PresetError
from core.file_names import file_name
from core.preset.base import PresetBase
from core.preset.json_file import UNREADABLE, read_json, shown
from core.preset.merge import difference, merge, preset_json
from core.preset.mistakes import explain
from core.preset.settings import RUN_TOKENS, VariantSettings
from core.preset.variants import NOT_IN_VARIANTS, compare_problems, metric_problems
from core.schedules import limits

P = TypeVar("P", bound=PresetBase)

NOT_INHERITED = ("name", "description", "group", "lineage")
"""Keys that a preset does not take from the one it extends."""


def read_preset(path: Path, cls: type[P]) -> P:
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
            {key: value for key, value in base.items() if key not in NOT_INHERITED},
            own,
        )
    if isinstance(data, dict) and "/" in str(lineage := data.get("lineage", "")):
        problems.append(f"lineage  {json.dumps(lineage)}: letters, digits and . _ - only")
        data = {**data, "lineage": ""}
    return decode_preset(data, cls, str(path), path.stem, problems)


def decode_preset(
    data: Any, cls: type[P], where: str, stem: str, found: list[str] | None = None
) -> P:
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
    problems += compare_problems(filled) + of_variants
    if variants and preset is not None:
        problems += metric_problems(preset.compare.metric, variants)
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


def _validated(data: dict, cls: type[P]) -> tuple[P | None, list[str]]:
    """The preset, or every problem."""
    try:
        preset = cls.model_validate_json(json.dumps(data))
    except ValidationError as error:
        return None, [explain(e, data, cls) for e in error.errors()]
    problems = _relations(preset)
    return None if problems else preset, problems


def _relations(preset: PresetBase) -> list[str]:
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


def _variants(data: dict, cls: type[P], known: list[str]) -> tuple[list[P], list[str]]:
    """Each variant's whole preset, and the problems that variants have of their own."""
    found: list[P] = []
    problems: list[str] = []
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
