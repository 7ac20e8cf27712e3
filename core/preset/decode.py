"""From a preset file to a typed preset, with every mistake in it reported at once.

In:    a file in configs/, and the Preset class (core/registry.py)
Out:   a preset: what it extends is merged in, everything is checked
State: none
"""

import difflib
import json
import os
from collections.abc import Sequence
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
NO_OBJECT = "a preset is a JSON object: { ... }"


def read_preset(path: Path, cls: type[P]) -> P:
    """Read the preset in a file, with what it extends merged in.

    Raises PresetError with every problem: JSON syntax with line and column, unknown keys with the
    nearest known one, wrong values with path, value and what would be right.
    """
    if UNREADABLE.search(path.stem):
        shown_path = path.with_name(UNREADABLE.sub("?", path.name))
        raise PresetError(
            str(shown_path), ["the file's name holds bytes that are no UTF-8 text; rename the file"]
        )
    data, problems = read_json(path)
    data = _extended(path, data, problems)
    if isinstance(data, dict) and "/" in str(lineage := data.get("lineage", "")):
        problems.append(f"lineage  {json.dumps(lineage)}: letters, digits and . _ - only")
        data = {**data, "lineage": ""}
    return decode_preset(data, cls, str(path), path.stem, problems)


def _extended(path: Path, data: Any, problems: list[str]) -> Any:
    """Merge a file's JSON over that of the presets it extends. Raises PresetError."""
    chain = {os.path.realpath(path): path.stem}
    while isinstance(data, dict) and isinstance(name := data.get("extends"), str):
        stem = name.removesuffix(".json")
        parent = path.parent / f"{stem}.json"
        if not os.path.exists(parent):
            stems = [each.stem for each in path.parent.glob("*.json")]
            near = difflib.get_close_matches(name, stems, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            problem = f"extends  {shown(name)} is no preset in {path.parent}{hint}"
            raise PresetError(str(path), [*problems, problem])
        real = os.path.realpath(parent)
        if real in chain:
            circle = " -> ".join([*chain.values(), stem])
            raise PresetError(str(path), [f"extends  goes in a circle: {circle}"])
        chain[real] = stem
        base, base_problems = read_json(parent)
        if not isinstance(base, dict):
            raise PresetError(str(parent), [NO_OBJECT])
        if base_problems:
            raise PresetError(str(parent), base_problems)
        inherited = {key: value for key, value in base.items() if key not in NOT_INHERITED}
        data = merge(inherited, {key: value for key, value in data.items() if key != "extends"})
    return data


def decode_preset(
    data: Any, cls: type[P], where: str, stem: str, problems_before: Sequence[str] = ()
) -> P:
    """Make a preset from decoded JSON. Raises PresetError with every problem.

    where             the file, or whatever `data` came from, in messages
    stem              names the preset and its lineage where `data` does not
    problems_before   found in the file already

    What a variant sets comes out as the difference it makes to the resolved preset, so that a
    resolved preset decodes to itself.
    """
    if not isinstance(data, dict):
        raise PresetError(where, [NO_OBJECT])
    filled = {
        **data,
        "name": data.get("name") or stem,
        "lineage": data.get("lineage") or file_name(stem),
    }
    preset, problems = _validated(filled, cls)
    variants, variant_problems = _variants(filled, cls, known=problems)
    problems += compare_problems(filled) + variant_problems
    if variants and preset is not None:
        problems += metric_problems(preset.compare.metric, variants)
    if filled.get("init_from") == filled["lineage"]:
        problems.append(
            f'init_from  "{filled["lineage"]}" is its own lineage, which a preset goes on with '
            "anyway; leave it out"
        )
    problems = [*problems_before, *problems]
    if problems or preset is None:
        raise PresetError(where, problems)
    return _with_least_variants(preset, variants) if variants else preset


def _with_least_variants(preset: P, variants: list[P]) -> P:
    """Let each variant set only what it changes in the resolved preset."""
    base, least = preset_json(preset), []
    for settings, variant in zip(preset.variants, variants):
        changes = difference(base, preset_json(variant))
        allowed = {key: value for key, value in changes.items() if key not in NOT_IN_VARIANTS}
        least.append(VariantSettings(name=settings.name, set=allowed))
    return preset.model_copy(update={"variants": least})


def _validated(data: dict[str, Any], cls: type[P]) -> tuple[P | None, list[str]]:
    """Return the preset, or None and every problem."""
    try:
        preset = cls.model_validate_json(json.dumps(data))
    except ValidationError as error:
        return None, [explain(each, data, cls) for each in error.errors()]
    problems = _relation_problems(preset)
    return None if problems else preset, problems


def _relation_problems(preset: PresetBase) -> list[str]:
    """Find what a section allows, but not beside the others."""
    train, problems = preset.train, []
    rows, times, T = train.per_gpu_batch_size, train.accumulation_steps, preset.model.seq_length
    if rows * times * T > train.runs * RUN_TOKENS:
        problems.append(
            f"train.per_gpu_batch_size  {rows:,}: with accumulation_steps {times:,} and "
            f"model.seq_length {T:,} one step would be {rows * times * T:,} tokens, and the whole "
            f"run has {train.runs * RUN_TOKENS:,}; make one of them smaller"
        )
    weights = [*(loss.weight for loss in preset.losses), *preset.auxiliary.head_weights]
    if all(limits(weight)[1] <= 0 for weight in weights):
        problems.append(
            "losses  none of them has a weight above 0 at any moment of the run: nothing would be "
            "learned; give one of them a weight, or leave it out"
        )
    return problems


def _variants(data: dict[str, Any], cls: type[P], known: list[str]) -> tuple[list[P], list[str]]:
    """Return each variant's whole preset, and the problems of variants that are not `known` of the
    preset itself."""
    presets: list[P] = []
    problems: list[str] = []
    listed = data.get("variants")
    base = {key: value for key, value in data.items() if key not in ("variants", "job")}
    for i, variant in enumerate(listed if isinstance(listed, list) else []):
        changes = variant.get("set", {}) if isinstance(variant, dict) else None
        if not isinstance(changes, dict):
            continue  # the class has said so
        where = f"variants[{i}].set"
        problems += [
            f"{where}.{path}  a variant may not set this: {why}"
            for path, why in NOT_IN_VARIANTS.items()
            if _sets(changes, path)
        ]
        preset, wrong = _validated(merge(base, changes), cls)
        problems += [f"{where}.{line}" for line in wrong if line not in known]
        if preset is None:
            continue
        if preset.train.eval_tokens == 0:
            problems.append(
                f"{where}.train.eval_tokens  0: what is never evaluated cannot be compared; set "
                "it above 0"
            )
        presets.append(preset)
    return presets, problems


def _sets(changes: dict[str, Any], path: str) -> bool:
    """Tell whether a variant sets a key, or a key of a section: "train.seed"."""
    section, _, key = path.partition(".")
    if section not in changes:
        return False
    return not key or (isinstance(changes[section], dict) and key in changes[section])
