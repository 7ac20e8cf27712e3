"""A comparison: one object, made of the trials' logs, with everything that the report says.

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
    SeedStats,
    holm,
    paired_difference,
    paired_ratio,
    seed_stats,
)
from core.comparison.trials import Trial
from core.comparison.verdict import Verdict, judge
from core.metrics.table import LOSS, READ, Metric, metric_of, ordered


@dataclass(frozen=True)
class Variant:
    """A variant and its results.

    preset        of its first trial
    outcomes      one a seed, in the order of the trials
    changes       the settings that it changes: {dotted path: (baseline's value, its value)}
    metrics       mean and deviation over its finished seeds
    differences   to the baseline, over the seeds finished in both; empty for the baseline itself
    speed         tokens per second over the baseline's; None for the baseline itself
    memory        peak memory over the baseline's
    """

    name: str
    preset: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    changes: dict[str, tuple[Any, Any]]
    metrics: dict[str, SeedStats]
    differences: dict[str, Difference]
    speed: Ratio | None
    memory: Ratio | None

    @property
    def finished(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.finished)


@dataclass(frozen=True)
class Comparison:
    """A comparison and its verdicts.

    requested   the metric that the preset names
    metric      the metric that decides; another one where comparing `requested` would not be fair
    metrics     every metric that some trial has, in the order of the report
    variants    the baseline first
    verdicts    on the other variants
    warnings    reasons to doubt the comparison
    """

    name: str
    description: str
    requested: str
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
    """Read every trial's log and compare. Trials that are not finished are left out of the
    statistics.

    metric       key of the metric that decides
    confidence   level of the intervals
    """
    assert trials, "nothing to compare"
    groups: dict[str, list[Outcome]] = {}
    for trial in trials:
        groups.setdefault(trial.variant, []).append(read_outcome(trial))
    presets = {variant: outcomes[0].trial.preset for variant, outcomes in groups.items()}
    outcomes = [outcome for group in groups.values() for outcome in group]
    chosen = primary(metric, list(presets.values()))
    measured = {key for outcome in outcomes for key in outcome.metrics}
    if "cross_entropy" in measured:  # the same number under its other name
        measured.discard(f"{LOSS}cross_entropy")
    shares = {key for key in measured if key.startswith(READ)}
    measured -= {key for key in shares if _same_everywhere(key, outcomes)}
    keys = tuple(ordered(measured))
    baseline = next(iter(groups.values()))
    variants = tuple(
        _variant(group, baseline, keys, confidence, len(groups) - 1) for group in groups.values()
    )
    warnings = unfairness(presets, outcomes, metric, chosen)
    return Comparison(
        name=name,
        description=description,
        requested=metric,
        metric=chosen,
        confidence=confidence,
        metrics=keys,
        variants=variants,
        verdicts=_verdicts(variants, chosen, confidence),
        warnings=tuple(warnings),
    )


def _same_everywhere(key: str, outcomes: list[Outcome]) -> bool:
    """Tell whether the finished trials of one seed all have the same value of a metric."""
    values = {
        (outcome.trial.seed, outcome.metrics.get(key)) for outcome in outcomes if outcome.finished
    }
    return len(values) == len({seed for seed, _ in values})


def _variant(
    group: list[Outcome],
    baseline: list[Outcome],
    keys: tuple[str, ...],
    confidence: float,
    compared: int,
) -> Variant:
    """Compute one variant's results.

    group, baseline   outcomes of the variant and of the baseline
    keys              the metrics
    compared          number of variants besides the baseline
    """
    trial, base = group[0].trial, baseline[0].trial
    finished = [outcome for outcome in group if outcome.finished]
    stats = {
        key: seed_stats([o.metrics[key] for o in finished if key in o.metrics]) for key in keys
    }
    variant = Variant(
        name=trial.variant,
        preset=trial.preset,
        outcomes=tuple(group),
        changes={},
        metrics=stats,
        differences={},
        speed=None,
        memory=None,
    )
    if group is baseline:
        return variant

    def difference(key: str) -> Difference:
        before, after = (_by_seed(part, lambda o: o.metrics.get(key)) for part in (baseline, group))
        return paired_difference(before, after, confidence, compared)

    def ratio(value: Callable[[Outcome], float | None]) -> Ratio | None:
        return paired_ratio(_by_seed(baseline, value), _by_seed(group, value))

    return replace(
        variant,
        changes=changes(base.preset, trial.preset),
        differences={key: difference(key) for key in keys},
        speed=ratio(lambda o: o.tokens_per_second),
        memory=ratio(lambda o: o.memory_mb),
    )


def _by_seed(
    outcomes: list[Outcome], value: Callable[[Outcome], float | None]
) -> dict[int, float | None]:
    return {outcome.trial.seed: value(outcome) for outcome in outcomes if outcome.finished}


def _verdicts(variants: tuple[Variant, ...], metric: str, confidence: float) -> tuple[Verdict, ...]:
    """Judge every variant but the baseline, with Holm's adjustment over all of them."""
    baseline, *others = variants
    differences = [variant.differences.get(metric, Difference((), ())) for variant in others]
    adjusted = holm([difference.p for difference in differences])
    compared = sum(difference.p is not None for difference in differences)
    verdicts = []
    for variant, difference, p in zip(others, differences, adjusted):
        verdict = judge(
            variant.name, baseline.name, metric_of(metric), difference, p, confidence, compared
        )
        sentence = verdict.sentence + _lost_seeds(baseline, variant)
        verdicts.append(replace(verdict, sentence=sentence))
    return tuple(verdicts)


def _lost_seeds(baseline: Variant, variant: Variant) -> str:
    """Name the seeds that are not counted: without them, a variant that diverges looks better than
    it is."""
    lost = [
        f"seed {outcome.trial.seed} ({part.name}: {outcome.trial.status})"
        for part in (baseline, variant)
        for outcome in part.outcomes
        if outcome.trial.status in ("diverged", "stopped early")
    ]
    return f" Not counted: {', '.join(lost)}." if lost else ""
