"""Which trials a comparison has, in which order, under which names, and what became of them.

In:    a preset of job `compare`: its variants and seeds
Out:   a Trial for each variant and seed, seed by seed and the baseline first; the preset that each
       of them runs
State: logs/<lineage>/state.json: the outcomes that no checkpoint tells of
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
"""What a trial computes follows from these sections."""
FREE_KEYS = (
    "data.workers",
    "data.cache_gigabytes",
    "train.checkpoint_every_minutes",
    "train.checkpoint_every_steps",
)
"""Keys in them that may change between two starts of a comparison: they change nothing in what a
trial computes."""


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
        """Its name in files: the part of its lineage below the comparison's."""
        return "/".join(self.preset["lineage"].rsplit("/", 2)[1:])

    @property
    def done(self) -> bool:
        return self.status not in ("waiting", "running")


def plan(preset: Any, root: Path) -> list[Trial]:
    """Every trial, waiting. A seed's trials stand together, so that a comparison cut short has
    whole pairs."""
    names = slugs([variant.name for variant in preset.variants])
    trials = []
    for seed in preset.seeds:
        for variant in preset.variants:
            own = trial_preset(preset, variant, names[variant.name], seed)
            trials.append(
                Trial(variant.name, seed, preset_json(own), root / "logs" / own.lineage, "waiting")
            )
    return trials


def trial_preset(preset: Any, variant: VariantSettings, slug: str, seed: int) -> Any:
    """What a trial trains. Its name follows from the trial alone: a run goes on only under the name
    it began with."""
    beside = {
        "variants": [],
        "seeds": type(preset).model_fields["seeds"].default,
        "compare": CompareSettings().model_dump(),
    }
    of_its_own = {
        "job": "train",
        "name": f"{slug}, seed {seed}",
        "lineage": f"{preset.lineage}/{slug}/{seed}",
        "train": {"seed": seed},
    }
    whole = merge(merge(preset_json(preset), variant.set), beside | of_its_own)
    return decode_preset(whole, type(preset), f"variant {variant.name}", preset.lineage)


def slugs(names: list[str]) -> dict[str, str]:
    """A folder name for each variant. Where two would be the same, also to a disk that ignores
    case, the later gets a hash."""
    taken = {name.casefold() for name in (STATE, *REPORTS)}
    found = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:SLUG_LENGTH].strip("._") or "variant"
        if slug.casefold() in taken or not is_file_name(slug):
            slug += "-" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
        taken.add(slug.casefold())
        found[name] = slug
    return found


def trial_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Tell what makes a trial another one than it was; both are resolved presets."""
    old, new = (
        {key: preset.get(key) for key in COMPUTES if key in preset} for preset in (before, now)
    )
    return changed(old, new, free=FREE_KEYS)


# what became of them ------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """The outcomes that no checkpoint tells of, by trial; and how many processes the trials were
    run on."""

    world_size: int
    trials: dict[str, dict[str, Any]]  # Trial.key -> {"status", "note", "preset"}


def read_outcomes(folder: Path, world_size: int) -> Outcomes:
    """As `write_outcomes` left them in logs/<lineage>. None there, or none that can be read:
    nothing has happened yet."""
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
    return all(
        isinstance(entry.get(key), kind)
        for key, kind in (("status", str), ("note", str), ("preset", dict))
    )


def write_outcomes(folder: Path, outcomes: Outcomes) -> None:
    write_json(folder / STATE, {"world_size": outcomes.world_size, "trials": outcomes.trials})


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, whatever ends the process. Raises UserError when it cannot be
    written."""
    try:
        write_file(path, json.dumps(value, indent=2), durable=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {cause(error, path)} Then start again."
        ) from None
