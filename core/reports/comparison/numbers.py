"""Every number of a comparison, for programs.

In:    a Comparison
Out:   metrics.json: standard JSON; numbers that are not finite are null
State: none
"""

import json
import math
from dataclasses import asdict
from typing import Any

from core.comparison.outcome import Outcome
from core.comparison.results import Comparison, Variant
from core.metrics.table import metric_of

FORMAT = 1


def json_report(comparison: Comparison) -> str:
    """Return the comparison as JSON. Its keys are an interface."""
    report = {
        "format": FORMAT,
        "name": comparison.name,
        "description": comparison.description,
        "metric": comparison.metric,
        "metric_asked_for": comparison.requested,
        "confidence": comparison.confidence,
        "baseline": comparison.baseline.name,
        "verdicts": [asdict(verdict) for verdict in comparison.verdicts],
        "warnings": comparison.warnings,
        "measures": {key: _metric(key) for key in comparison.metrics},
        "variants": [_variant(variant) for variant in comparison.variants],
        "differences": [
            {"variant": variant.name, "metric": key, **asdict(difference)}
            for variant in comparison.variants
            for key, difference in variant.differences.items()
        ],
        "trials": [_trial(outcome) for outcome in comparison.outcomes],
    }
    return json.dumps(_plain(report), indent=1, allow_nan=False) + "\n"


def _metric(key: str) -> dict[str, Any]:
    metric = metric_of(key)
    return {
        "key": key,
        "label": metric.name,
        "unit": metric.unit,
        "better": metric.better,
        "digits": metric.digits,
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "changes": {
            path: {"baseline": before, "variant": after}
            for path, (before, after) in variant.changes.items()
        },
        "metrics": {key: asdict(stats) for key, stats in variant.metrics.items()},
        "speed_ratio": variant.speed and asdict(variant.speed),
        "memory_ratio": variant.memory and asdict(variant.memory),
        "preset": variant.preset,
    }


def _trial(outcome: Outcome) -> dict[str, Any]:
    trial = outcome.trial
    numbers = {key: value for key, value in vars(outcome).items() if key != "trial"}
    return {
        "variant": trial.variant,
        "seed": trial.seed,
        "status": trial.status,
        "note": trial.note,
        **numbers,
    }


def _plain(value: Any) -> Any:
    """Replace tuples by lists, and numbers that are not finite by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
