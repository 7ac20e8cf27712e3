"""The trials of a comparison: their order, their names, their presets, and their outcomes.

In:    a preset of job `compare`: its variants and seeds
Out:   a Trial for each variant and seed, seed by seed and the baseline first; the preset that each
       of them runs
State: logs/<lineage>/state.json: the outcomes that no checkpoint shows
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.file_names import is_file_name
from core.files import cause, read_json, write_file
from core.preset.base import PresetBase
from core.preset.decode import decode_preset
from core.preset.merge import changed, merge, preset_json
from core.preset.settings import CompareSettings, VariantSettings

STATE, REPORTS = "state.json", ("report.html", "report.md", "metrics.json")
SLUG_LENGTH = 60

COMPUTES = (
    "init_from",
    "model",
    "tokenizer",
    "train",
    "losses",
    "auxiliary",
    "data",
    "generate",
)
"""The sections of a preset that decide what a trial computes."""
FREE_KEYS = (
    "data.workers",
    "data.cache_gigabytes",
    "train.checkpoint_every_minutes",
    "train.checkpoint_every_steps",
)
"""Keys in these sections that may change between two starts of a comparison: they do not change
what a trial computes."""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    variant: str  # the variant's name as the user wrote it (any characters)
    seed: int
    preset: dict[str, Any]  # the resolved preset of this trial, as JSON
    folder: Path  # holds its metrics.jsonl
    status: str  # "waiting" | "running" | "finished" | "stopped early" | "diverged"
    note: str = ""  # why it was stopped

    @property
    def key(self) -> str:
        """Return the trial's name in files: the part of its lineage below the comparison's."""
        return "/".join(self.preset["lineage"].rsplit("/", 2)[1:])

    @property
    def done(self) -> bool:
        """Return True for a trial that will not be run any more."""
        return self.status not in ("waiting", "running")


def plan(preset: PresetBase, root: Path) -> list[Trial]:
    """Return every trial, waiting. The trials of one seed stand together, so that a comparison that
    is cut short has whole pairs."""
    names = slugs([variant.name for variant in preset.variants])
    trials = []
    for seed in preset.seeds:
        for variant in preset.variants:
            trained = trial_preset(preset, variant, names[variant.name], seed)
            folder = root / "logs" / trained.lineage
            trials.append(Trial(variant.name, seed, preset_json(trained), folder, "waiting"))
    return trials


def trial_preset(preset: PresetBase, variant: VariantSettings, slug: str, seed: int) -> PresetBase:
    """Return the preset that a trial trains. Its name depends on the trial alone: a run goes on
    only under the name it began with."""
    no_comparison = {
        "variants": [],
        "seeds": type(preset).model_fields["seeds"].default,
        "compare": CompareSettings().model_dump(),
    }
    of_the_trial = {
        "job": "train",
        "name": f"{slug}, seed {seed}",
        "lineage": f"{preset.lineage}/{slug}/{seed}",
        "train": {"seed": seed},
    }
    whole = merge(merge(preset_json(preset), variant.set), no_comparison | of_the_trial)
    return decode_preset(whole, type(preset), f"variant {variant.name}", preset.lineage)


def slugs(names: list[str]) -> dict[str, str]:
    """Return a folder name for each variant. Where two would be the same, also on a disk that
    ignores case, the second one gets a hash."""
    taken = {name.casefold() for name in (STATE, *REPORTS)}
    folders = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:SLUG_LENGTH].strip("._") or "variant"
        if slug.casefold() in taken or not is_file_name(slug):
            slug += "-" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
        taken.add(slug.casefold())
        folders[name] = slug
    return folders


def trial_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe every change between two resolved presets that changes what a trial computes."""

    def computing(preset: dict[str, Any]) -> dict[str, Any]:
        return {key: preset[key] for key in COMPUTES if key in preset}

    return changed(computing(before), computing(now), free=FREE_KEYS)


# outcomes -----------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """The outcomes that no checkpoint shows, by trial; and the number of processes that the trials
    were run on."""

    world_size: int
    trials: dict[str, dict[str, Any]]  # Trial.key -> {"status", "note", "preset"}


def read_outcomes(folder: Path, world_size: int) -> Outcomes:
    """Return what `write_outcomes` left in logs/<lineage>; no outcomes where there is no file, or
    none that can be read.

    world_size   processes to assume in that case
    """
    try:
        state = read_json(folder / STATE)
        known = {
            key: entry
            for key, entry in state["trials"].items()
            if (folder / key).is_dir() and _is_outcome(entry)
        }
        return Outcomes(int(state["world_size"]), known)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return Outcomes(world_size, {})


def _is_outcome(entry: dict[str, Any]) -> bool:
    kinds = {"status": str, "note": str, "preset": dict}
    return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def write_outcomes(folder: Path, outcomes: Outcomes) -> None:
    write_json(folder / STATE, {"world_size": outcomes.world_size, "trials": outcomes.trials})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all. Raises UserError when it cannot be written."""
    try:
        write_file(path, json.dumps(value, indent=2), durable=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {cause(error, path)} Then start again."
        ) from None
