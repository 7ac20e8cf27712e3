"""The content of the report: sentences and tables of plain text, the same in HTML and in Markdown.

In:    a Comparison
Out:   strings, not escaped, and tables
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
from core.reports.page import ReportTable
from core.ui.text import clean, count, duration, memory

NONE = "–"


# the answer ---------------------------------------------------------------------------------------


def state(comparison: Comparison) -> str:
    """Return how many trials are finished."""
    total = len(comparison.outcomes)
    finished = sum(outcome.finished for outcome in comparison.outcomes)
    if finished == total:
        return f"All {total} trials are finished."
    open_trials = sum(not outcome.trial.done for outcome in comparison.outcomes)
    sentence = f"{finished} of {total} trials are finished"
    if open_trials:
        sentence += f", {open_trials} are still to come: this is preliminary"
    return f"{sentence}."


def unfinished(comparison: Comparison) -> list[str]:
    """Return each trial that is not finished, and the reason."""
    lines = []
    for trial in (outcome.trial for outcome in comparison.outcomes if not outcome.finished):
        note = f" ({clean(trial.note)})" if trial.note else ""
        lines.append(f"{clean(trial.variant)}, seed {trial.seed}: {trial.status}{note}")
    return lines


# tables -------------------------------------------------------------------------------------------


def verdict_table(comparison: Comparison) -> ReportTable:
    """Return the differences in the primary metric: intervals, p-values and verdicts."""
    rows = []
    for variant, verdict in zip(comparison.variants[1:], comparison.verdicts):
        difference = variant.differences.get(comparison.metric)
        if difference is None:
            rows.append([clean(variant.name), verdict.word, *[NONE] * 7])
            continue
        amount = Amount(comparison.primary, difference)
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
    return ReportTable(head, rows, words=2)


def difference_table(comparison: Comparison) -> ReportTable:
    """Return the mean paired difference of every metric, with its interval."""
    rows = []
    for key in _primary_first(comparison):
        cells = []
        for variant in comparison.variants[1:]:
            difference = variant.differences[key]
            amount = Amount(metric_of(key), difference)
            span = amount.signed_span()
            cells.append(amount.number(difference.mean) + (f" ({span})" if span else ""))
        rows.append([metric_name(metric_of(key)), direction(metric_of(key)), *cells])
    return ReportTable(
        ["metric", "better", *(clean(variant.name) for variant in comparison.variants[1:])],
        rows,
        words=2,
    )


def final_table(comparison: Comparison) -> ReportTable:
    """Return the final metrics: mean and deviation over the finished seeds."""
    rows = [
        [metric_name(metric_of(key)), direction(metric_of(key))]
        + [_mean_and_sd(variant.metrics[key], metric_of(key)) for variant in comparison.variants]
        for key in _primary_first(comparison)
    ]
    seeds = ["finished seeds", "", *(str(len(variant.finished)) for variant in comparison.variants)]
    return ReportTable(
        ["metric", "better", *(clean(variant.name) for variant in comparison.variants)],
        [*rows, seeds],
        words=2,
    )


def cost_table(comparison: Comparison) -> ReportTable:
    """Return speed and memory, and their ratios to the baseline's."""
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
    return ReportTable(head, rows)


def trial_table(comparison: Comparison) -> ReportTable:
    """Return the final numbers of every trial."""
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
    return ReportTable(head, rows, words=2)


def changes_table(comparison: Comparison) -> ReportTable:
    """Return the settings that each variant changes."""
    rows = [
        [clean(variant.name), clean(path), clean(_json(before)), clean(_json(after))]
        for variant in comparison.variants[1:]
        for path, (before, after) in variant.changes.items()
    ]
    return ReportTable(["variant", "setting", "baseline", "variant sets"], rows, words=4)


# samples ------------------------------------------------------------------------------------------


def samples(comparison: Comparison) -> tuple[int | None, list[tuple[str, list[str]]]]:
    """Return (seed, [(prompt, text of each variant)]) of the first seed that has samples; (None,
    []) without any. All columns are of the same seed."""
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


# method -------------------------------------------------------------------------------------------


def method(comparison: Comparison) -> list[str]:
    """Return paragraphs on the pairing, the test, the words of verdicts, and the noise."""
    label, level = comparison.primary.name, percent(1 - comparison.confidence)
    seeds = ", ".join(
        str(seed) for seed in dict.fromkeys(outcome.trial.seed for outcome in comparison.outcomes)
    )
    pairing = (
        f"Every variant is trained with the seeds {seeds}. Trials of one seed read the same data "
        "in the same order, unless what is compared changes that, and, where the model is the "
        "same, start from the same weights. So the metric of the last evaluation is compared seed "
        "by seed, variant minus baseline, which removes what a seed does to both. Only seeds "
        "finished in both are counted."
    )
    test = (
        f"Only the primary metric, {label}, is judged. The mean of its differences is tested "
        "against zero by a two-sided paired t-test, and the p-values of the variants are adjusted "
        "by Holm's method, so that the probability of even one false “better” or “worse” among "
        f"them is at most {level}. Intervals are Student's t intervals at "
        f"{percent(comparison.confidence)}, each for itself; those of the other metrics describe "
        "and are not tests. The t-test takes the differences of seeds to be about normal, which a "
        "few seeds cannot show."
    )
    words = (
        f"“Not distinguishable” means that the adjusted p-value is {level} or more. It does not "
        "mean equal: a difference below the detectable one may well be there. Detectable is the "
        f"smallest true difference which this test would find with {percent(POWER)} probability "
        "if the differences vary between seeds as they did here (noncentral t, at "
        f"{level} divided by the number of variants compared, which is what Holm's method asks of "
        "the first). The test must be read once all trials are finished: stopping when the result "
        "pleases makes false findings more frequent."
    )
    return [pairing, test, words, noise(comparison)]


def noise(comparison: Comparison) -> str:
    """Return the deviation over seeds, of the baseline and of the paired differences."""
    primary, stats = comparison.primary, comparison.baseline.metrics.get(comparison.metric)
    if stats is None or stats.sd is None:
        return "Seed noise: not known, since the baseline has not finished with two seeds or more."
    unit = f" {primary.unit}" if primary.unit else ""
    sentence = (
        f"Seed noise: over {stats.n} seeds the baseline's {primary.name} has a standard "
        f"deviation of {_digits(stats.sd)}{unit}"
    )
    paired = [
        f"{_digits(difference.sd)} ({clean(variant.name)})"
        for variant in comparison.variants[1:]
        if (difference := variant.differences[comparison.metric]).sd is not None
    ]
    if paired:
        sentence += f"; the paired differences have one of {', '.join(paired)}"
    return f"{sentence}."


# words and numbers --------------------------------------------------------------------------------


def metric_name(metric: Metric) -> str:
    """Return a metric's name with its unit."""
    unit = f" ({metric.unit})" if metric.unit and metric.unit != metric.name else ""
    return clean(metric.name) + unit


def direction(metric: Metric) -> str:
    """Return which values of a metric are better: "lower", "higher" or ""."""
    return {-1: "lower", 1: "higher", 0: ""}[metric.better]


def _primary_first(comparison: Comparison) -> list[str]:
    return sorted(comparison.metrics, key=lambda key: key != comparison.metric)


def _value(value: float | None, metric: Metric, extra: int = 0) -> str:
    return NONE if value is None else f"{value:.{metric.digits + extra}f}".replace("-", "−")


def _mean_and_sd(stats: SeedStats, metric: Metric) -> str:
    sd = f" ± {_value(stats.sd, metric)}" if stats.sd is not None else ""
    return _value(stats.mean, metric) + sd


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
