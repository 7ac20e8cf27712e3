"""The verdict on a variant, in one word and in the sentence a reviewer would accept.

In:    the difference of the primary metric, its Holm-adjusted p-value
Out:   a Verdict
State: none
"""

import math
from dataclasses import dataclass

from core.comparison.statistics import POWER, Difference
from core.metrics.table import Metric

NO_SEEDS, ONE_SEED, NO_NOISE = (
    "no common seed",
    "one seed: no interval",
    "no seed noise: no interval",
)
SAME = "not distinguishable"


@dataclass(frozen=True)
class Verdict:
    """
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
    """`compared`: how many variants have a p-value, over which it was adjusted."""
    n, amount = len(difference.seeds), Amount(metric, difference)
    if n == 0:
        sentence = (
            f"{variant} cannot be compared with {baseline}: no seed is finished in both "
            f"with a {metric.name}."
        )
        return Verdict(variant, NO_SEEDS, sentence)
    if adjusted is None:
        word, which, why = NO_NOISE, f"exactly so in all {n} seeds", "no noise between seeds"
        if n == 1:
            word, which, why = ONE_SEED, "in the only seed finished in both", "one seed"
        told = (
            f"{variant} has a {metric.name} {amount.size()} {_way(difference)} than "
            f"{baseline}, {which}"
        )
        return Verdict(variant, word, f"{told}; {why} gives no interval, so this is no verdict.")
    if difference.sd == 0:
        return Verdict(
            variant,
            SAME,
            f"{variant} has the same {metric.name} as {baseline} in all {n} seeds.",
            adjusted,
        )
    odds = f"{n} seeds, {'Holm-adjusted ' if compared > 1 else ''}{p_value(adjusted)}"
    if adjusted < 1 - confidence:
        told = f"{_told(variant, baseline, metric, difference)} by {amount.size()}"
        sentence = f"{told} ({percent(confidence)} interval {amount.size_span()}, {odds})."
        return Verdict(variant, _word(metric, difference), sentence, adjusted)
    sentence = (
        f"{variant} is not distinguishable from {baseline} in {metric.name}: the difference is "
        f"{amount.signed()} "
        f"({percent(confidence)} interval {amount.signed_span()}, {odds})."
    )
    if difference.p < 1 - confidence:
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
        self._difference, self._unit = difference, f" {metric.unit}" if metric.unit else ""
        known = (
            [difference.high - difference.low]
            if difference.low is not None and difference.high > difference.low
            else []
        )
        known += [abs(difference.mean)] if difference.mean and not known else []
        # two digits of the interval's half, or of the difference itself where there is no interval
        self._digits = (
            min(8, max(metric.digits, 1 - math.floor(math.log10(known[0] / 2))))
            if known
            else metric.digits
        )

    def number(self, value: float | None, signed: bool = True) -> str:
        if value is None:
            return "–"
        text = f"{value:{'+' if signed else ''}.{self._digits}f}"
        return text.replace("-", "−") if float(text) else text.lstrip("+-")

    def text(self, value: float) -> str:
        return self.number(value, signed=False) + self._unit

    def size(self) -> str:
        return self.text(abs(self._difference.mean or 0.0))

    def size_span(self) -> str:
        """The interval of the size of the difference, whatever its sign."""
        ends = sorted(self._sign() * end for end in (self._difference.low, self._difference.high))
        return " to ".join(self.number(end, signed=False) for end in ends)

    def signed(self) -> str:
        return self.number(self._difference.mean) + self._unit

    def signed_span(self) -> str:
        """Empty where there is no interval."""
        if self._difference.low is None:
            return ""
        return f"{self.number(self._difference.low)} to {self.number(self._difference.high)}"

    def _sign(self) -> int:
        return -1 if (self._difference.mean or 0.0) < 0 else 1


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def _way(difference: Difference) -> str:
    return "lower" if (difference.mean or 0.0) < 0 else "higher"


def _word(metric: Metric, difference: Difference) -> str:
    way = _way(difference)
    if metric.better == 0:
        return way
    return "better" if (way == "higher") == (metric.better > 0) else "worse"


def _told(variant: str, baseline: str, metric: Metric, difference: Difference) -> str:
    word = _word(metric, difference)
    if metric.better == 0:
        return f"{variant} has a {word} {metric.name} than {baseline},"
    return f"{variant} is {word} than {baseline} in {metric.name}"
