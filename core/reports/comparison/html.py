"""The report as one HTML file.

In:    a Comparison
Out:   report.html
State: none
"""

import json
from collections.abc import Iterable
from html import escape

from core.comparison.results import Comparison
from core.comparison.verdict import percent
from core.metrics.table import metric_of
from core.reports.comparison import content, figures
from core.reports.page import html_lines, html_page, html_table, html_text
from core.reports.style import DASHES, SERIES
from core.ui.text import clean


def html_report(comparison: Comparison) -> str:
    """Return the whole page."""
    body = [
        *_answer(comparison),
        *_curves(comparison),
        *_verdict(comparison),
        *_tables(comparison),
        *_samples(comparison),
        "<h2>Method</h2>",
        *(f"<p>{html_text(paragraph)}</p>" for paragraph in content.method(comparison)),
        *_presets(comparison),
    ]
    return html_page(comparison.name, body)


# sections -----------------------------------------------------------------------------------------


def _answer(comparison: Comparison) -> Iterable[str]:
    yield f"<h1>{html_text(comparison.name)}</h1>"
    if comparison.description:
        yield f'<p class="soft">{html_text(comparison.description)}</p>'
    lines = [
        f"<li>{_swatch(i)}{html_text(verdict.sentence)}</li>"
        for i, verdict in enumerate(comparison.verdicts, 1)
    ]
    lines = lines or ["<li>There is only one variant: nothing to compare.</li>"]
    yield f'<ul class="answer">{"".join(lines)}</ul>'
    for warning in comparison.warnings:
        yield f'<p class="warn"><b>Warning.</b> {html_text(warning)}</p>'
    yield (
        f"<p>{html_text(content.state(comparison))} Baseline: "
        f"{html_text(comparison.baseline.name)}.</p>"
    )
    if unfinished := content.unfinished(comparison):
        yield f"<ul>{''.join(f'<li>{html_text(line)}</li>' for line in unfinished)}</ul>"


def _curves(comparison: Comparison) -> Iterable[str]:
    primary = comparison.primary
    unit = primary.unit or primary.name
    evaluation = difference = None
    if comparison.metric in comparison.metrics:
        evaluation = figures.evaluation_figure(comparison, comparison.metric, unit)
        difference = figures.difference_figure(comparison, unit)
    training = figures.training_figure(comparison, "nats per token")
    if not (training or evaluation):
        return
    name = _capital(primary.name)
    drawn = [
        _figure(name, "At each evaluation.", evaluation),
        _figure(
            "Difference to the baseline",
            f"{name}, variant − baseline, paired by seed.",
            difference,
        ),
        _figure("Training loss", "Averaged over 5 % of the run.", training),
    ]
    note = "Lines: mean over the finished seeds. Bands: lowest to highest seed. "
    if content.unfinished(comparison):
        note += "Thin lines: single trials that are not finished. "
    note += "What lies far off in the first tenth of the run is cut."
    yield f'<h2>Curves</h2>{_key(comparison)}<p class="note">{note}</p>'
    yield f'<div class="figures">{"".join(drawn)}</div>'
    if others := _other_metrics(comparison):
        yield f"<h2>Other metrics</h2>{_key(comparison)}"
        yield f'<div class="figures">{"".join(others)}</div>'


def _other_metrics(comparison: Comparison) -> list[str]:
    """Draw a curve of every metric that is not the primary one, or the same number again."""
    # perplexity is the exponential of cross-entropy, and bits per byte a multiple of it
    shown = {comparison.metric, "perplexity"}
    shown |= {"bits_per_byte"} if comparison.metric == "cross_entropy" else set()
    drawn = []
    for key in comparison.metrics:
        if key in shown:
            continue
        metric = metric_of(key)
        better = "Neither direction is better."
        if metric.better:
            better = f"{content.direction(metric).capitalize()} is better."
        svg = figures.evaluation_figure(comparison, key, metric.unit or metric.name)
        drawn.append(_figure(_capital(metric.name), better, svg))
    return drawn


def _verdict(comparison: Comparison) -> Iterable[str]:
    table = content.verdict_table(comparison)
    if not table.rows:
        return
    yield f"<h2>Paired differences in {html_text(content.metric_name(comparison.primary))}</h2>"
    caption, svg = figures.forest_caption(comparison), figures.forest_figure(comparison)
    yield f'<div class="figures">{_figure("", caption, svg)}</div>{html_table(table)}'


def _tables(comparison: Comparison) -> Iterable[str]:
    strong = comparison.metric in comparison.metrics
    if comparison.metrics:
        yield "<h2>Final metrics</h2>"
        yield '<p class="note">Mean ± standard deviation over the finished seeds.</p>'
        yield html_table(content.final_table(comparison), strong)
        if len(comparison.variants) > 1:
            yield "<h2>Paired differences, every metric</h2>"
            yield (
                f'<p class="note">Variant − baseline, with {percent(comparison.confidence)} '
                "intervals. Only the first row is judged; the others describe.</p>"
            )
            yield html_table(content.difference_table(comparison), strong)
    yield "<h2>Speed and memory</h2>"
    yield (
        '<p class="note">Medians over finished seeds. × baseline: geometric mean of the ratios of '
        "trials with one seed, lowest to highest.</p>"
    )
    yield html_table(content.cost_table(comparison))
    yield _details("Every trial", html_table(content.trial_table(comparison)))


def _samples(comparison: Comparison) -> Iterable[str]:
    seed, rows = content.samples(comparison)
    if seed is None:
        return
    yield f"<h2>Samples</h2><p class='note'>At the last evaluation, seed {seed}.</p>"
    head = "".join(f"<th>{html_text(variant.name)}</th>" for variant in comparison.variants)
    yield '<div class="scroll"><table class="samples">'
    yield f"<thead><tr><th>prompt</th>{head}</tr></thead><tbody>"
    for prompt, texts in rows:
        cells = "".join(f"<td>{html_lines(text)}</td>" for text in texts)
        yield f"<tr><th>{html_lines(prompt)}</th>{cells}</tr>"
    yield "</tbody></table></div>"


def _presets(comparison: Comparison) -> Iterable[str]:
    yield "<h2>Presets</h2>"
    if (table := content.changes_table(comparison)).rows:
        yield html_table(table)
    baseline, *others = comparison.variants
    yield f"<h3>Baseline in full: {html_text(baseline.name)}</h3>{_preset(baseline.preset)}"
    for variant in others:
        yield _details(f"{html_text(variant.name)} in full", _preset(variant.preset))


# pieces -------------------------------------------------------------------------------------------


def _details(summary: str, body: str) -> str:
    """Return HTML that is folded until it is clicked."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def _figure(title: str, caption: str, svg: str | None) -> str:
    """Return a figure with its caption; "" without a figure."""
    if svg is None:
        return ""
    bold = f"<b>{html_text(title)}.</b> " if title else ""
    label = escape(f"{clean(title)} {clean(caption)}".strip(), quote=True)
    svg = svg.replace("<svg", f'<svg aria-label="{label}"', 1)
    return f"<figure>{svg}<figcaption>{bold}{html_text(caption)}</figcaption></figure>"


def _key(comparison: Comparison) -> str:
    """Return the key of colours and dashes."""
    names = [
        f"<li>{_swatch(i)}{html_text(variant.name)}{'' if i else ' (baseline)'}</li>"
        for i, variant in enumerate(comparison.variants)
    ]
    return f'<ul class="key">{"".join(names)}</ul>'


def _swatch(i: int) -> str:
    """Draw a piece of a variant's line, as the figures do."""
    dashes = DASHES[i % len(DASHES)]
    pattern = ""
    if not isinstance(dashes, str):
        lengths = " ".join(f"{2.2 * length:.1f}" for length in dashes[1])
        pattern = f' stroke-dasharray="{lengths}"'
    line = (
        f'<line x1="0" y1="5" x2="30" y2="5" stroke="var(--s{i % len(SERIES)})" '
        f'stroke-width="2.5"{pattern}/>'
    )
    return f'<svg class="line" width="30" height="10" aria-hidden="true">{line}</svg>'


def _preset(preset: dict) -> str:
    return f"<pre>{html_lines(json.dumps(preset, indent=2, ensure_ascii=False))}</pre>"


def _capital(label: str) -> str:
    return label[:1].upper() + label[1:]
