"""Paired statistics over seeds, which tell a difference between a variant and the baseline from
noise.

Trials of the same seed see the same data in the same order, so their difference is free of the
noise that they share. The differences of the seeds are taken as a sample of normally distributed
numbers, and their mean is tested against zero (Student's paired t-test).

In:    a metric by seed, of the baseline and of a variant
Out:   Difference, SeedStats, Ratio; Holm's adjustment
State: none (the t-test's power is computed once for each number of seeds)
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

POWER = 0.8
"""Probability of finding a true difference of the size `Difference.smallest`."""
EQUAL = 1e-12
"""Numbers whose relative difference is smaller than this differ by rounding only."""


@dataclass(frozen=True)
class SeedStats:
    """Mean and sample standard deviation over n seeds; one seed has no deviation."""

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline, paired by seed.

    seeds, values   the seeds both have a number for, and their differences
    mean            of the differences; None without any
    low, high       confidence interval of the mean; None with one seed, or where the differences do
                    not vary
    p               two-sided p-value, not adjusted
    sd              standard deviation of the differences
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

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the ends of the confidence interval, where there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Ratio:
    """Variant over baseline, paired by seed: geometric mean, lowest and highest."""

    n: int
    mean: float
    low: float
    high: float


def seed_stats(values: Sequence[float]) -> SeedStats:
    """Compute the statistics of a metric, one value a seed."""
    mean = statistics.fmean(values) if values else None
    return SeedStats(len(values), mean, statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(
    baseline: Mapping[int, float | None],
    variant: Mapping[int, float | None],
    confidence: float = 0.95,
    variants: int = 1,
) -> Difference:
    """Compute the difference of two {seed: metric}. Seeds are left out where either lacks a finite
    number.

    confidence   level of the interval
    variants     number of variants that are compared with the baseline: `smallest` is computed at
                 the level that Holm's adjustment demands of the first
    """
    pairs = _finite_pairs(baseline, variant)
    seeds, values = tuple(pairs), tuple(after - before for before, after in pairs.values())
    if len(values) < 2:
        return Difference(seeds, values, mean=values[0] if values else None)
    n, mean, sd = len(values), statistics.fmean(values), statistics.stdev(values)
    size = max(abs(number) for pair in pairs.values() for number in pair)
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
    """Return the true mean difference that a two-sided paired t-test at `level` finds with
    probability `power` over n pairs, if the differences have the standard deviation `sd`.

    Computed from the noncentral t distribution, without the tail of finding the difference with the
    wrong sign (below 0.1 %). None where scipy cannot compute it.
    """
    shift = _shift(n, level, power)
    return None if shift is None else shift * sd / math.sqrt(n)


@cache
def _shift(n: int, level: float, power: float) -> float | None:
    """Return the mean difference in standard errors."""
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
    """Adjust p-values after Holm (1979): the probability of even one false finding among all stays
    at the level. None stays None."""
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
    """Compute the ratios over the seeds that both have a positive number for; None without any."""
    pairs = _finite_pairs(baseline, variant).values()
    ratios = [after / before for before, after in pairs if before > 0 and after > 0]
    if not ratios:
        return None
    return Ratio(len(ratios), statistics.geometric_mean(ratios), min(ratios), max(ratios))


def _finite_pairs(
    baseline: Mapping[int, float | None], variant: Mapping[int, float | None]
) -> dict[int, tuple[float, float]]:
    """Return {seed: (baseline's number, variant's number)} in the order of the seeds."""
    pairs = {}
    for seed in sorted(baseline):
        before, after = baseline[seed], variant.get(seed)
        if before is None or after is None:
            continue
        if math.isfinite(before) and math.isfinite(after):
            pairs[seed] = (before, after)
    return pairs
