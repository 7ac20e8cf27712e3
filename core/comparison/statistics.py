"""Paired statistics over seeds: is a variant's metric different from the baseline's, or is it only
noise?

Trials of the same seed saw the same data in the same order, so their difference is free of what
they share. The seeds' differences are taken as a sample of normal numbers, and their mean is tested
against zero (Student's paired t-test).

In:    a metric by seed, of the baseline and of a variant
Out:   Difference, Spread, Ratio; Holm's adjustment
State: none (how much of a difference is seen with n seeds is worked out once)
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

POWER = 0.8
"""Probability with which the smallest difference that can be seen would have been seen."""
EQUAL = 1e-12
"""Numbers that differ by less than this share of their size differ by rounding only."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; one seed has no deviation."""

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline, paired by seed.

    seeds, values   the seeds both have a number for, and their differences
    low, high       confidence interval of the mean; None with one seed, or where the differences do
                    not vary
    p               two-sided p-value, not adjusted
    sd              of the differences
    smallest        true difference that would have been found with probability 0.8; see
                    `smallest_seen`
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    sd: float | None = None
    smallest: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Variant over baseline, paired by seed: geometric mean, lowest and highest."""

    n: int
    mean: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if not values:
        return Spread(0, None, None)
    return Spread(
        len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    )


def paired_difference(
    baseline: Mapping[int, float | None],
    variant: Mapping[int, float | None],
    confidence: float = 0.95,
    variants: int = 1,
) -> Difference:
    """The difference of two {seed: metric}; seeds that either lacks, or has no finite number for,
    are left out.

    confidence   level of the interval
    variants     how many are compared with the baseline: `smallest` is at the level Holm's
                 adjustment asks of the first
    """
    seeds = tuple(
        seed for seed in sorted(baseline) if _finite(baseline[seed]) and _finite(variant.get(seed))
    )
    values = tuple(variant[seed] - baseline[seed] for seed in seeds)
    if len(values) < 2:
        return Difference(seeds, values, mean=values[0] if values else None)
    n, mean, sd = len(values), statistics.fmean(values), statistics.stdev(values)
    size = max(abs(number) for seed in seeds for number in (baseline[seed], variant[seed]))
    if sd <= EQUAL * size:  # no noise was seen, so there is nothing to judge a difference by
        if abs(mean) <= EQUAL * size:
            return Difference(seeds, values, mean, low=0.0, high=0.0, p=1.0, sd=0.0)
        return Difference(seeds, values, mean, sd=0.0)
    from scipy import stats

    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    smallest = smallest_seen(sd, n, (1 - confidence) / max(1, variants))
    return Difference(seeds, values, mean, mean - half, mean + half, p, sd, smallest)


def smallest_seen(sd: float, n: int, level: float, power: float = POWER) -> float | None:
    """The true mean difference that a two-sided paired t-test at `level` finds with probability
    `power` over n pairs, were the standard deviation of the differences `sd`.

    From the noncentral t distribution; the tail of finding it with the wrong sign (below 0.1 %) is
    left out."""
    shift = _shift(n, level, power)
    return None if shift is None else shift * sd / math.sqrt(n)


@cache
def _shift(n: int, level: float, power: float) -> float | None:
    """By how many standard errors the mean must be off."""
    from scipy import optimize, stats

    critical = stats.t.ppf(1 - level / 2, n - 1)

    def missing(shift: float) -> float:
        return float(stats.nct.sf(critical, n - 1, shift)) - power

    high = max(1.0, 2 * float(critical))
    while missing(high) < 0:
        high *= 2
    # scipy's noncentral t gives up (NaN) far out in its tails: then nothing is claimed
    return float(optimize.brentq(missing, 0.0, high)) if missing(high) >= 0 else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment: the probability of even one false finding among all stays at the level.
    None stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def paired_ratio(
    baseline: Mapping[int, float | None], variant: Mapping[int, float | None]
) -> Ratio | None:
    """Ratios over the seeds both have a positive number for; None where there are none."""
    both = [
        seed
        for seed in sorted(baseline)
        if _positive(baseline[seed]) and _positive(variant.get(seed))
    ]
    ratios = [variant[seed] / baseline[seed] for seed in both]
    return (
        Ratio(len(ratios), statistics.geometric_mean(ratios), min(ratios), max(ratios))
        if ratios
        else None
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _positive(value: float | None) -> bool:
    return _finite(value) and value > 0
