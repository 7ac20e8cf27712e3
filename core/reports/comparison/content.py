"""What the report says, in sentences and tables of plain text: the same ones in HTML and in
Markdown.

In:    a Comparison
Out:   strings, not escaped, and Tables
State: none
"""

import json
import statistics
from collections.abc import Callable

from core.comparison.outcome import Outcome
from core.comparison.results import Comparison, Variant
from core.comparison.statistics import POWER, Ratio, SeedStats
from core.comparison.verdict import Amount, percent
from core.metrics.table import Metric, metric_of
from core.reports.page import Table
from core.ui.text import clean, count, duration, memory

NONE = "–"


# the answer ---------------------------------------------------------------------------------------


def state(comparison: Comparison) -> str:
    total, finished = (
        len(comparison.outcomes),
        sum(outcome.finished for outcome in comparison.outcomes),
    )
    if finished == total:
        return f"All {total} trials are finished."
    settled = sum(
        outcome.trial.status in ("finished", "diverged", "stopped early")
        for outcome in comparison.outcomes
    )
    told = f"{finished} of {total} trials are finished"
    return (
        f"{told}, {total - settled} are still to come: this is preliminary."
        if settled < total
        else f"{told}."
    )


def unfinished(comparison: Comparison) -> list[str]:
    """Each trial that is not finished, by name, and why."""
    return [
        f"{clean(trial.variant)}, seed {trial.seed}: {trial.status}"
        + (f" ({clean(trial.note)})" if trial.note else "")
        for trial in (outcome.trial for outcome in comparison.outcomes if not outcome.finished)
    ]


# tables -------------------------------------------------------------------------------------------


def verdict_table(comparison: Comparison) -> Table:
    """The primary metric: differences, intervals and what follows."""
    primary, rows = comparison.primary, []
    for variant, verdict in zip(comparison.variants[1:], comparison.verdicts):
        difference = variant.differences.get(comparison.metric)
        if difference is None:
            rows.append([clean(variant.name), verdict.word, *[NONE] * 7])
            continue
        amount = Amount(primary, difference)
        rows.append(
            [
                clean(variant.name),
                verdict.word,
                amount.number(difference.mean),
                amount.signed_span() or NONE,
                _p(difference.p),
                _p(verdict.adjusted),
                str(len(difference.seeds)),
                amount.number(difference.sd, signed=False),
                amount.number(difference.smallest, signed=False),
            ]
        )
    level = percent(comparison.confidence)
    head = [
        "variant",
        "verdict",
        "difference",
        f"{level} interval",
        "p",
        "p (Holm)",
        "seeds",
        "sd over seeds",
        "detectable",
    ]
    return Table(head, rows, words=2)


def difference_table(comparison: Comparison) -> Table:
    """Every metric: mean paired difference and interval."""
    rows = []
    for key in _primary_first(comparison):
        cells = []
        for variant in comparison.variants[1:]:
            difference = variant.differences[key]
            amount = Amount(metric_of(key), difference)
            span = amount.signed_span()
            cells.append(amount.number(difference.mean) + (f" ({span})" if span else ""))
        rows.append([metric_name(metric_of(key)), direction(metric_of(key)), *cells])
    return Table(
        ["metric", "better", *(clean(variant.name) for variant in comparison.variants[1:])],
        rows,
        words=2,
    )


def final_table(comparison: Comparison) -> Table:
    """Final metrics: mean and deviation over the finished seeds."""
    rows = [
        [metric_name(metric_of(key)), direction(metric_of(key))]
        + [_spread(variant.metrics[key], metric_of(key)) for variant in comparison.variants]
        for key in _primary_first(comparison)
    ]
    seeds = ["finished seeds", "", *(str(len(variant.finished)) for variant in comparison.variants)]
    return Table(
        ["metric", "better", *(clean(variant.name) for variant in comparison.variants)],
        [*rows, seeds],
        words=2,
    )


def cost_table(comparison: Comparison) -> Table:
    """Speed and memory, themselves and against the baseline."""
    rows = [
        [
            clean(variant.name),
            count(next((o.parameters for o in variant.outcomes if o.parameters is not None), None)),
            count(_median(variant, lambda o: o.tokens_per_second)),
            _ratio(variant.speed),
            memory(_median(variant, lambda o: o.memory_mb)),
            _ratio(variant.memory),
            duration(_median(variant, lambda o: o.seconds)),
            count(_median(variant, lambda o: o.skipped)),
        ]
        for variant in comparison.variants
    ]
    head = [
        "variant",
        "parameters",
        "tokens/s",
        "× baseline",
        "peak memory",
        "× baseline",
        "time a trial",
        "skipped updates",
    ]
    return Table(head, rows)


def trial_table(comparison: Comparison) -> Table:
    primary = comparison.primary
    rows = [
        [
            clean(outcome.trial.variant),
            outcome.trial.status,
            str(outcome.trial.seed),
            _value(outcome.metrics.get(comparison.metric), primary, extra=1),
            count(outcome.tokens),
            count(outcome.tokens_per_second),
            memory(outcome.memory_mb),
            duration(outcome.seconds),
        ]
        for outcome in comparison.outcomes
    ]
    head = [
        "variant",
        "status",
        "seed",
        metric_name(primary),
        "tokens",
        "tokens/s",
        "peak memory",
        "time",
    ]
    return Table(head, rows, words=2)


def changes_table(comparison: Comparison) -> Table:
    """What each variant sets."""
    rows = [
        [clean(variant.name), clean(path), clean(_json(before)), clean(_json(after))]
        for variant in comparison.variants[1:]
        for path, (before, after) in variant.changes.items()
    ]
    return Table(["variant", "setting", "baseline", "variant sets"], rows, words=4)


# samples ------------------------------------------------------------------------------------------


def samples(comparison: Comparison) -> tuple[int | None, list[tuple[str, list[str]]]]:
    """(seed, [(prompt, text of each variant)]): of the first seed that has any, so that every
    column is the same seed's."""
    for seed in dict.fromkeys(outcome.trial.seed for outcome in comparison.outcomes):
        columns = [
            next((dict(o.samples) for o in variant.outcomes if o.trial.seed == seed), {})
            for variant in comparison.variants
        ]
        prompts = list(dict.fromkeys(prompt for column in columns for prompt in column))
        if prompts:
            return seed, [
                (prompt, [column.get(prompt, NONE) for column in columns]) for prompt in prompts
            ]
    return None, []


# how it was done ----------------------------------------------------------------------------------


def method(comparison: Comparison) -> list[str]:
    """Paragraphs: pairing, test, what the words mean, noise."""
    label, level = comparison.primary.name, percent(1 - comparison.confidence)
    seeds = ", ".join(
        str(seed) for seed in dict.fromkeys(outcome.trial.seed for outcome in comparison.outcomes)
    )
    return [
        f"Every variant is trained with the seeds {seeds}. Trials of one seed read the same data "
        "in the same order, unless what "
        "is compared changes that, and, where the model is the same, start from the same weights. "
        "So the metric of the last "
        "evaluation is compared seed by seed, variant minus baseline, which removes what a seed "
        "does to both. Only seeds "
        "finished in both are counted.",
        f"Only the primary metric, {label}, is judged. The mean of its differences is tested "
        "against zero by a two-sided paired "
        "t-test, and the p-values of the variants are adjusted by Holm's method, so that the "
        "probability of even one false "
        f"“better” or “worse” among them is at most {level}. Intervals are Student's t intervals "
        "at "
        f"{percent(comparison.confidence)}, each for itself; those of the other metrics describe "
        "and are not tests. The t-test "
        "takes the differences of seeds to be about normal, which a few seeds cannot show.",
        f"“Not distinguishable” means that the adjusted p-value is {level} or more. It does not "
        "mean equal: a difference below "
        "the detectable one may well be there. Detectable is the smallest true difference which "
        "this test "
        f"would find with {percent(POWER)} probability if the differences vary between seeds as "
        "they did here (noncentral t, at "
        f"{level} divided by the number of variants compared, which is what Holm's method asks of "
        "the first). The test must be "
        "read once all trials are finished: stopping when the result pleases makes false findings "
        "more frequent.",
        noise(comparison),
    ]


def noise(comparison: Comparison) -> str:
    """Deviation over seeds, of the baseline and of the paired differences."""
    primary, found = comparison.primary, comparison.baseline.metrics.get(comparison.metric)
    if found is None or found.sd is None:
        return "Seed noise: not known, since the baseline has not finished with two seeds or more."
    unit = f" {primary.unit}" if primary.unit else ""
    told = (
        f"Seed noise: over {found.n} seeds the baseline's {primary.name} has a standard "
        f"deviation of {_digits(found.sd)}{unit}"
    )
    paired = [
        f"{_digits(difference.sd)} ({clean(variant.name)})"
        for variant in comparison.variants[1:]
        if (difference := variant.differences[comparison.metric]).sd is not None
    ]
    return told + (f"; the paired differences one of {', '.join(paired)}." if paired else ".")


# words and numbers --------------------------------------------------------------------------------


def metric_name(known: Metric) -> str:
    unit = f" ({known.unit})" if known.unit and known.unit != known.name else ""
    return clean(known.name) + unit


def direction(known: Metric) -> str:
    return {-1: "lower", 1: "higher", 0: ""}[known.better]


def _primary_first(comparison: Comparison) -> list[str]:
    return sorted(comparison.metrics, key=lambda key: key != comparison.metric)


def _value(value: float | None, known: Metric, extra: int = 0) -> str:
    return NONE if value is None else f"{value:.{known.digits + extra}f}".replace("-", "−")


def _spread(found: SeedStats, known: Metric) -> str:
    return _value(found.mean, known) + (
        f" ± {_value(found.sd, known)}" if found.sd is not None else ""
    )


def _digits(value: float) -> str:
    return f"{value:#.2g}".rstrip(".")


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return NONE
    return f"{ratio.mean:.2f}" + (f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.n > 1 else "")


def _median(variant: Variant, of: Callable[[Outcome], float | None]) -> float | None:
    known = [value for outcome in variant.finished if (value := of(outcome)) is not None]
    return statistics.median(known) if known else None


def _json(value: object) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
