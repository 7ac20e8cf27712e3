"""The report as Markdown: verdicts, tables, method. The curves are in report.html.

In:    a Comparison
Out:   report.md
State: none
"""

import json
import re
from itertools import groupby

from core.comparison.results import Comparison
from core.reports.comparison import content
from core.reports.page import ReportTable
from core.ui.text import clean


def markdown_report(comparison: Comparison) -> str:
    """Return the whole report."""
    name, baseline = _text(comparison.name), comparison.baseline
    state = f"{_text(content.state(comparison))} Baseline: {_text(baseline.name)}."
    parts = [
        f"# {name}",
        _text(comparison.description),
        "\n".join(f"- {_text(verdict.sentence)}" for verdict in comparison.verdicts),
        f"{state} Curves: [report.html](report.html)",
        "\n".join(f"- {_text(line)}" for line in content.unfinished(comparison)),
        *(f"**Warning.** {_text(warning)}" for warning in comparison.warnings),
        f"## Verdict: paired differences in {_text(comparison.primary.name)}",
        _table(content.verdict_table(comparison)),
        "## Final metrics",
        "Mean ± standard deviation over seeds.",
        _table(content.final_table(comparison)),
        "## Paired differences to the baseline, every metric",
        _table(content.difference_table(comparison)),
        "## Speed and memory",
        "Medians over seeds.",
        _table(content.cost_table(comparison)),
        "## Every trial",
        _table(content.trial_table(comparison)),
        *_samples(comparison),
        "## Method",
        *(_text(paragraph) for paragraph in content.method(comparison)),
        "## Presets",
        _table(content.changes_table(comparison)),
        f"The baseline, {_text(baseline.name)}, in full:",
        _code(json.dumps(baseline.preset, indent=2, ensure_ascii=False), "json"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _samples(comparison: Comparison) -> list[str]:
    seed, rows = content.samples(comparison)
    if seed is None:
        return []
    parts = [f"## Samples (seed {seed})"]
    for prompt, texts in rows:
        parts.append(f"### {_text(prompt)}")
        for variant, text in zip(comparison.variants, texts):
            parts += [f"{_text(variant.name)}:", _code(text)]
    return parts


def _table(table: ReportTable) -> str:
    if not table.rows:
        return ""
    rule = ["---" if i < table.words else "---:" for i in range(len(table.head))]
    rows = [[_text(cell) for cell in row] for row in (table.head, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _text(text: str) -> str:
    """Escape any text, so that markup of Markdown or HTML in it has no effect."""
    escaped = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", escaped)


def _code(text: str, language: str = "") -> str:
    """Return a block of code whose fence is longer than any in the text."""
    lines = "\n".join(clean(line) for line in text.split("\n"))
    longest = max((len(list(run)) for tick, run in groupby(lines) if tick == "`"), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{lines}\n{fence}"
