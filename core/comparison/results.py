"""A comparison: trials' logs in, one object out that holds everything the report says.

In:    trials, the first one's variant being the baseline
Out:   Comparison
State: none
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from core.comparison.fairness import changes, primary, unfairness
from core.comparison.outcome import Outcome, read_outcome
from core.comparison.statistics import (
    Difference,
    Ratio,
    Spread,
    holm,
    paired_difference,
    paired_ratio,
    spread,
)
from core.comparison.trials import Trial
from core.comparison.verdict import Verdict, judge
from core.metrics.table import LOSS, READ, Metric, metric_of, ordered


@dataclass(frozen=True)
class Variant:
    """
    preset        of its first trial
    outcomes      one a seed, in the order of the trials
    changes       what it sets: {dotted path: (baseline's value, its value)}
    metrics       mean and deviation over its finished seeds
    differences   to the baseline, over the seeds finished in both; empty for the baseline itself
    speed         tokens per second over the baseline's; None for the baseline itself
    memory        peak memory over the baseline's
    """

    name: str
    preset: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    changes: dict[str, tuple[Any, Any]]
    metrics: dict[str, Spread]
    differences: dict[str, Difference]
    speed: Ratio | None
    memory: Ratio | None

    @property
    def finished(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.finished)


@dataclass(frozen=True)
class Comparison:
    """
    asked       the metric that was asked for
    metric      the one that gives the verdicts: another one where comparing `asked` would not be
                fair
    metrics     every metric some trial has, in the order of the report
    variants    the baseline first
    verdicts    on the other variants
    warnings    reasons to doubt the comparison
    """

    name: str
    description: str
    asked: str
    metric: str
    confidence: float
    metrics: tuple[str, ...]
    variants: tuple[Variant, ...]
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]

    @property
    def baseline(self) -> Variant:
        return self.variants[0]

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return tuple(outcome for variant in self.variants for outcome in variant.outcomes)

    @property
    def primary(self) -> Metric:
        return metric_of(self.metric)


def collect(
    trials: list[Trial],
    *,
    name: str,
    description: str,
    metric: str = "cross_entropy",
    confidence: float = 0.95,
) -> Comparison:
    """Read every trial's log and compare. Works at any time: what is not finished yet is left out
    of the statistics."""
    assert trials, "nothing to compare"
    groups: dict[str, list[Outcome]] = {}
    for trial in trials:
        groups.setdefault(trial.variant, []).append(read_outcome(trial))
    presets = {variant: outcomes[0].trial.preset for variant, outcomes in groups.items()}
    outcomes = [outcome for group in groups.values() for outcome in group]
    chosen = primary(metric, list(presets.values()))
    found = {key for outcome in outcomes for key in outcome.metrics}
    if "cross_entropy" in found:  # the same number under its other name
        found.discard(f"{LOSS}cross_entropy")
    found -= {key for key in found if key.startswith(READ) and _same_everywhere(key, outcomes)}
    keys = tuple(ordered(found))
    baseline = next(iter(groups.values()))
    variants = tuple(
        _variant(group, baseline, keys, confidence, len(groups) - 1) for group in groups.values()
    )
    warnings = unfairness(presets, outcomes, metric, chosen)
    return Comparison(
        name,
        description,
        metric,
        chosen,
        confidence,
        keys,
        variants,
        _verdicts(variants, chosen, confidence),
        tuple(warnings),
    )


def _same_everywhere(key: str, outcomes: list[Outcome]) -> bool:
    """Whether trials of one seed do not differ in it."""
    found = {
        (outcome.trial.seed, outcome.metrics.get(key)) for outcome in outcomes if outcome.finished
    }
    return len(found) == len({seed for seed, _ in found})


def _variant(
    group: list[Outcome],
    baseline: list[Outcome],
    keys: tuple[str, ...],
    confidence: float,
    compared: int,
) -> Variant:
    trial, base = group[0].trial, baseline[0].trial
    finished = [outcome for outcome in group if outcome.finished]
    spreads = {key: spread([o.metrics[key] for o in finished if key in o.metrics]) for key in keys}
    rest: dict[str, Any] = {"changes": {}, "differences": {}, "speed": None, "memory": None}
    if group is not baseline:

        def by_seed(of: Callable[[Outcome], float | None]) -> tuple[dict, dict]:
            return tuple(
                {o.trial.seed: of(o) for o in part if o.finished} for part in (baseline, group)
            )  # type: ignore

        rest = {
            "changes": changes(base.preset, trial.preset),
            "differences": {
                key: paired_difference(
                    *by_seed(lambda o, key=key: o.metrics.get(key)), confidence, compared
                )
                for key in keys
            },
            "speed": paired_ratio(*by_seed(lambda o: o.tokens_per_second)),
            "memory": paired_ratio(*by_seed(lambda o: o.memory_mb)),
        }
    return Variant(trial.variant, trial.preset, tuple(group), metrics=spreads, **rest)


def _verdicts(variants: tuple[Variant, ...], metric: str, confidence: float) -> tuple[Verdict, ...]:
    baseline, *others = variants
    differences = [variant.differences.get(metric, Difference((), ())) for variant in others]
    adjusted = holm([difference.p for difference in differences])
    compared = sum(difference.p is not None for difference in differences)
    found = []
    for variant, difference, p in zip(others, differences, adjusted):
        verdict = judge(
            variant.name, baseline.name, metric_of(metric), difference, p, confidence, compared
        )
        found.append(replace(verdict, sentence=verdict.sentence + _left_out(baseline, variant)))
    return tuple(found)


def _left_out(baseline: Variant, variant: Variant) -> str:
    """The seeds that came to nothing: leaving them out makes what diverges look better than it is,
    so it is said."""
    lost = [
        f"seed {outcome.trial.seed} ({part.name}: {outcome.trial.status})"
        for part in (baseline, variant)
        for outcome in part.outcomes
        if outcome.trial.status in ("diverged", "stopped early")
    ]
    return f" Not counted: {', '.join(lost)}." if lost else ""
