"""Variants of a comparison: keys they may not set, mistakes among them, metrics that may decide.

In:    a preset file's JSON; the whole preset of each variant
Out:   problems, one line each
State: none
"""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from core.metrics.table import HEAD, HELD_OUT, LOSS, METRICS, READ, GivenBy
from core.preset.base import PresetBase
from core.preset.settings import MASKED_TOKENS, objective_of

NOT_IN_VARIANTS = {
    "train.seed": 'seeds are given by "seeds", the same for all variants',
    **dict.fromkeys(
        ("job", "variants", "seeds", "compare"),
        "it is the same for all variants; set it beside them",
    ),
    **dict.fromkeys(
        ("name", "description", "lineage"), "trials are named after their variant and seed"
    ),
    **dict.fromkeys(("extends", "group", "$schema"), "it stands at the top of a file only"),
}
"""Keys that a variant may not set, and the reasons."""


def metrics_of(preset: PresetBase) -> set[str]:
    """Return every metric that evaluations of a preset may give."""
    model, sources = preset.model, [source.name for source in preset.data.sources]
    givers: set[GivenBy] = {"every model"}
    if getattr(model, "head", None) == "distance":
        givers.add("distances")
    else:
        masked = objective_of(model) == MASKED_TOKENS
        givers |= {"logits", "masked logits" if masked else "next-token logits"}
    if getattr(model, "keep_decoder", False):
        givers.add("decoder")
    if preset.train.eval_tasks:
        givers.add("tasks")
    found = {key for key, metric in METRICS.items() if metric.given_by in givers}
    found |= {f"{LOSS}{loss.name or loss.type}" for loss in preset.losses}
    for head in (HEAD + key.removeprefix("enable_") for key in preset.auxiliary.heads):
        found |= {head, *(key for key in METRICS if key.startswith(f"{head}."))}
    return found | {
        f"{what}{name}" for what in (HELD_OUT, READ) for name in sources if len(sources) > 1
    }


def metric_problems(metric: str, variants: Sequence[PresetBase]) -> list[str]:
    """Find a metric that no evaluation of any variant gives: it would be missed only after the last
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


def compare_problems(data: dict[str, Any]) -> list[str]:
    """Find what does not fit together in job, variants and seeds."""
    problems = []
    listed = data.get("variants")
    variants = [v for v in listed if isinstance(v, dict)] if isinstance(listed, list) else []
    if data.get("job") == "compare" and isinstance(listed, list | None) and len(listed or []) < 2:
        problems.append(
            f"variants  {len(variants)} of them: the compare job needs at least two; the first is "
            "the baseline"
        )
    if variants and data.get("job") != "compare":
        problems.append(
            'variants  only the compare job reads them: set "job": "compare", or "variants": [] '
            "to train one model"
        )
    names = [v.get("name") for v in variants]
    twice = [name for name in names if isinstance(name, str) and names.count(name) > 1]
    for name in dict.fromkeys(twice):
        problems.append(
            f"variants  {names.count(name)} of them are called {json.dumps(name)}; give each a "
            "name of its own"
        )
    listed = data.get("seeds")
    seeds = [seed for seed in listed if isinstance(seed, int)] if isinstance(listed, list) else []
    if repeated := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        problems.append(
            f"seeds  {', '.join(map(str, repeated))} stands there twice; every seed is one run of "
            "each variant"
        )
    return problems
