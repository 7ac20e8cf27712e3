"""Paired statistics: against scipy, against numbers worked out by hand, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from core.comparison.statistics import (
    Difference,
    holm,
    paired_difference,
    paired_ratio,
    seed_stats,
    smallest_seen,
)
from core.comparison.verdict import judge
from core.metrics.table import metric_of

CE = metric_of("cross_entropy")


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(values, 1))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_p_and_interval_are_those_of_the_paired_t_test(n: int) -> None:
    chance = np.random.default_rng(n)
    base = chance.normal(3.5, 0.1, n)
    variant = base + chance.normal(0.03, 0.02, n)
    expected = stats.ttest_rel(variant, base)
    interval = expected.confidence_interval(0.9)
    found = paired_difference(by_seed(base), by_seed(variant), confidence=0.9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_three_seeds_by_hand() -> None:
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, standard error 0.1 / sqrt 3, and t(2) has
    its 0.975 quantile at 4.302653; the t value is 3.464102, for which p = 1 - t / sqrt(2 + t^2)."""
    found = paired_difference({1: 3.0, 2: 4.0, 3: 5.0}, {3: 5.3, 1: 3.1, 2: 4.2})
    assert found.seeds == (1, 2, 3) and found.values == pytest.approx((0.1, 0.2, 0.3))
    assert (found.mean, found.sd) == pytest.approx((0.2, 0.1))
    assert found.high - found.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert found.p == pytest.approx(1 - 3.464102 / math.sqrt(2 + 3.464102**2), rel=1e-6)


def test_only_seeds_with_a_number_on_both_sides_count() -> None:
    base = {1: 3.0, 2: 3.1, 3: math.nan, 4: 3.3, 5: 3.2}
    found = paired_difference(base, {1: 3.2, 2: 3.2, 3: 3.0, 4: None, 6: 1.0})
    assert found.seeds == (1, 2) and found.values == pytest.approx((0.2, 0.1))


def test_one_seed_and_none_have_no_interval() -> None:
    one = paired_difference({1: 3.0}, {1: 3.5})
    assert (one.mean, one.low, one.p, one.sd, one.smallest) == (0.5, None, None, None, None)
    assert paired_difference({1: 3.0}, {2: 3.5}) == Difference((), ())


def test_without_noise_nothing_is_claimed() -> None:
    """Identical numbers are no difference; a difference that never varies has nothing to be judged
    by."""
    base = {1: 3.1, 2: 3.2, 3: 3.3}
    same = paired_difference(base, dict(base))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    shifted = paired_difference(base, {seed: value + 0.1 for seed, value in base.items()})
    assert shifted.mean == pytest.approx(0.1) and shifted.p is None and shifted.low is None
    assert judge("v", "b", CE, same, 1.0, 0.95, 1).word == "not distinguishable"
    assert judge("v", "b", CE, shifted, None, 0.95, 0).word == "no seed noise: no interval"


def test_holm_by_hand() -> None:
    """0.01 times 4, 0.02 times 3, 0.03 times 2 is not below what came before, 0.5 times 1; None is
    no test."""
    assert holm([0.02, None, 0.5, 0.01, 0.03]) == pytest.approx([0.06, None, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == [] and holm([None]) == [None]


@pytest.mark.parametrize("n", [2, 3, 5, 20])
@pytest.mark.parametrize("level", [0.05, 0.0125])
def test_the_smallest_difference_seen_is_found_in_four_of_five_cases(n: int, level: float) -> None:
    """By simulation: differences around it, as noisy as was said."""
    true = smallest_seen(0.3, n, level)
    drawn = np.random.default_rng(n).normal(true, 0.3, (40000, n))
    found = np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < level)
    assert found == pytest.approx(0.8, abs=0.01)


def test_false_findings_and_coverage() -> None:
    """Four variants that do nothing, three seeds: in about 5 % of comparisons one is called better
    or worse, and about 95 % of the intervals hold the truth."""
    chance, rounds = np.random.default_rng(0), 1500
    false, alone, held = 0, 0, 0
    for _ in range(rounds):
        base = by_seed(chance.normal(3.5, 0.1, 3))
        found = [
            paired_difference(base, {s: v + chance.normal(0, 0.02) for s, v in base.items()})
            for _ in range(4)
        ]
        false += min(holm([each.p for each in found])) < 0.05
        alone += found[0].p < 0.05
        held += found[0].low <= 0 <= found[0].high
    assert 0.03 < false / rounds < 0.07
    assert 0.035 < alone / rounds < 0.065
    assert 0.935 < held / rounds < 0.965


def test_spread_and_ratio() -> None:
    assert seed_stats([]).mean is None and seed_stats([2.0]).sd is None
    assert (seed_stats([1.0, 3.0]).mean, seed_stats([1.0, 3.0]).sd) == pytest.approx(
        (2.0, math.sqrt(2))
    )
    ratio = paired_ratio({1: 100, 2: 100, 3: None}, {1: 50, 2: 200, 3: 7})
    assert (ratio.n, ratio.mean, ratio.low, ratio.high) == pytest.approx((2, 1.0, 0.5, 2.0))
    assert paired_ratio({1: None}, {1: 3.0}) is None


# words --------------------------------------------------------------------------------------------


def verdict(
    differences: list[float],
    key: str = "cross_entropy",
    adjusted: float | None = None,
    compared: int = 1,
):
    found = paired_difference(
        by_seed([3.0] * len(differences)), by_seed(3.0 + d for d in differences), variants=compared
    )
    return judge(
        "mix 0.5",
        "CE",
        metric_of(key),
        found,
        found.p if adjusted is None else adjusted,
        0.95,
        compared,
    )


def test_the_sentence_of_a_worse_variant() -> None:
    said = verdict([0.029, 0.031, 0.033], adjusted=0.01, compared=2)
    assert said.word == "worse"
    assert said.sentence == (
        "mix 0.5 is worse than CE in cross-entropy by 0.0310 nats per token (95 % interval 0.0260 "
        "to 0.0360, 3 seeds, "
        "Holm-adjusted p = 0.010)."
    )


def test_better_and_worse_follow_the_metric() -> None:
    rise, fall = [0.029, 0.031, 0.033], [-0.029, -0.031, -0.033]
    assert [verdict(fall).word, verdict(rise, "token_accuracy").word] == ["better", "better"]
    assert [verdict(fall, "token_accuracy").word, verdict(rise, "loss: cosine").word] == [
        "worse",
        "worse",
    ]
    assert [verdict(fall, "entropy").word, verdict(rise, "entropy").word] == ["lower", "higher"]
    assert (
        "mix 0.5 is better than CE in cross-entropy by 0.0310 nats per token (95 % interval "
        "0.0260 to" in verdict(fall).sentence
    )
    assert verdict(rise, "entropy").sentence.startswith(
        "mix 0.5 has a higher entropy than CE, by 0.0310 nats per token (95 %"
    )


def test_not_distinguishable_says_what_would_have_been_seen() -> None:
    said = verdict([0.03, -0.02, 0.01])
    assert said.word == "not distinguishable"
    assert "(95 % interval −0.056 to +0.069, 3 seeds, p = 0.69)" in said.sentence
    assert said.sentence.endswith(
        "A true difference of 0.082 nats per token would have been found with 80 % probability."
    )


def test_an_interval_without_zero_is_no_verdict_by_itself() -> None:
    said = verdict([0.02, 0.03, 0.04], adjusted=0.09, compared=3)
    assert (
        said.word == "not distinguishable"
        and "among 3 variants that is not rare enough" in said.sentence
    )


def test_too_few_seeds_are_no_verdict() -> None:
    one = judge("v", "b", CE, Difference((3,), (0.0312,), 0.0312), None, 0.95, 0)
    assert one.word == "one seed: no interval"
    assert one.sentence.startswith(
        "v has a cross-entropy 0.031 nats per token higher than b, in the only seed finished in "
        "both"
    )
    assert judge("v", "b", CE, Difference((), ()), None, 0.95, 0).word == "no common seed"
