"""The verdict on a variant, in one word and in the sentence a reviewer would accept.

In:    the difference of the primary metric, its Holm-adjusted p-value
Out:   a Verdict
State: none
"""

import math
from dataclasses import dataclass

from core.comparison.statistics import POWER, Difference
from core.metrics.table import Metric

NO_SEEDS = "no common seed"
ONE_SEED = "one seed: no interval"
NO_NOISE = "no seed noise: no interval"
SAME = "not distinguishable"


@dataclass(frozen=True)
class Verdict:
    """A comparison's judgement of one variant.

    word       "better", "worse" ("higher", "lower" where neither is better), "not distinguishable",
               "one seed: no interval", "no seed noise: no interval" or "no common seed"
    adjusted   the p-value after Holm's adjustment over the variants, on which the word rests
    """

    variant: str
    word: str
    sentence: str
    adjusted: float | None = None


def judge(
    variant: str,
    baseline: str,
    metric: Metric,
    difference: Difference,
    adjusted: float | None,
    confidence: float,
    compared: int,
) -> Verdict:
    """Judge a variant by the difference of its primary metric.

    variant, baseline   their names
    adjusted            Holm-adjusted p-value; None where there is none
    compared            number of variants that have a p-value, over which it was adjusted
    """
    n, amount = len(difference.seeds), Amount(metric, difference)
    if n == 0:
        sentence = (
            f"{variant} cannot be compared with {baseline}: no seed is finished in both "
            f"with a {metric.name}."
        )
        return Verdict(variant, NO_SEEDS, sentence)
    if adjusted is None:
        word, where, why = NO_NOISE, f"exactly so in all {n} seeds", "no noise between seeds"
        if n == 1:
            word, where, why = ONE_SEED, "in the only seed finished in both", "one seed"
        sentence = (
            f"{variant} has a {metric.name} {amount.size()} {_direction(difference)} than "
            f"{baseline}, {where}; {why} gives no interval, so this is no verdict."
        )
        return Verdict(variant, word, sentence)
    if difference.sd == 0:
        sentence = f"{variant} has the same {metric.name} as {baseline} in all {n} seeds."
        return Verdict(variant, SAME, sentence, adjusted)
    odds = f"{n} seeds, {'Holm-adjusted ' if compared > 1 else ''}{p_value(adjusted)}"
    if adjusted < 1 - confidence:
        sentence = (
            f"{_finding(variant, baseline, metric, difference)} by {amount.size()} "
            f"({percent(confidence)} interval {amount.size_span()}, {odds})."
        )
        return Verdict(variant, _word(metric, difference), sentence, adjusted)
    sentence = (
        f"{variant} is not distinguishable from {baseline} in {metric.name}: the difference is "
        f"{amount.signed()} ({percent(confidence)} interval {amount.signed_span()}, {odds})."
    )
    if difference.p is not None and difference.p < 1 - confidence:
        sentence += (
            f" Its interval alone leaves zero out, but among {compared} variants that is "
            "not rare enough."
        )
    elif difference.smallest is not None:
        smallest = amount.text(difference.smallest)
        sentence += (
            f" A true difference of {smallest} would have been found with "
            f"{percent(POWER)} probability."
        )
    return Verdict(variant, SAME, sentence, adjusted)


class Amount:
    """A difference in words, with as many digits as its interval is known to."""

    def __init__(self, metric: Metric, difference: Difference):
        self._unit = f" {metric.unit}" if metric.unit else ""
        self._mean, self._interval = difference.mean, difference.interval
        self._digits = metric.digits
        # two digits of the interval's half, or of the difference itself where there is no interval
        low, high = self._interval or (0.0, 0.0)
        known = high - low if high > low else abs(self._mean or 0.0)
        if known:
            digits = 1 - math.floor(math.log10(known / 2))
            self._digits = min(8, max(metric.digits, digits))

    def number(self, value: float | None, signed: bool = True) -> str:
        """Format a number of the metric, without its unit; a dash for None."""
        if value is None:
            return "–"
        text = f"{value:{'+' if signed else ''}.{self._digits}f}"
        return text.replace("-", "−") if float(text) else text.lstrip("+-")

    def text(self, value: float) -> str:
        """Format a number that is not negative, with its unit."""
        return self.number(value, signed=False) + self._unit

    def size(self) -> str:
        """Format the size of the difference, without its sign."""
        return self.text(abs(self._mean or 0.0))

    def size_span(self) -> str:
        """Format the interval of the difference's size: that of −0.3 is "0.2 to 0.4". Empty where
        there is none."""
        if self._interval is None:
            return ""
        sign = -1 if (self._mean or 0.0) < 0 else 1
        ends = sorted(sign * end for end in self._interval)
        return " to ".join(self.number(end, signed=False) for end in ends)

    def signed(self) -> str:
        """Format the difference with its sign and unit."""
        return self.number(self._mean) + self._unit

    def signed_span(self) -> str:
        """Format the interval of the difference; empty where there is none."""
        return " to ".join(self.number(end) for end in self._interval or ())


def p_value(p: float) -> str:
    """Format a p-value: "p = 0.04"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def percent(share: float) -> str:
    """Format a share as "95 %"."""
    return f"{100 * share:g} %"


def _direction(difference: Difference) -> str:
    return "lower" if (difference.mean or 0.0) < 0 else "higher"


def _word(metric: Metric, difference: Difference) -> str:
    direction = _direction(difference)
    if metric.better == 0:
        return direction
    return "better" if (direction == "higher") == (metric.better > 0) else "worse"


def _finding(variant: str, baseline: str, metric: Metric, difference: Difference) -> str:
    word = _word(metric, difference)
    if metric.better == 0:
        return f"{variant} has a {word} {metric.name} than {baseline},"
    return f"{variant} is {word} than {baseline} in {metric.name}"
