"""The page of an interpretation: every figure, how to read it, and what it shows.

In:    an Interpretation, its figures
Out:   index.html
State: none
"""

import json
from base64 import b64encode
from collections.abc import Iterable

from core.interpretation.results import Interpretation
from core.reports.interpretation import content
from core.reports.page import html_lines, html_page, html_table, html_text


def interpretation_page(results: Interpretation, figures: dict[str, bytes]) -> str:
    """Return the whole page.

    figures   PNG by file name, one for each of content.CAPTIONS
    """
    return html_page(f"{results.about['preset']}: interpretation", _body(results, figures))


def _body(results: Interpretation, figures: dict[str, bytes]) -> Iterable[str]:
    about = results.about
    yield f"<h1>{html_text(about['preset'])}: what its neurons choose</h1>"
    if about["description"]:
        yield f'<p class="soft">{html_text(about["description"])}</p>'
    findings = "".join(f"<li>{html_text(line)}</li>" for line in content.findings(results))
    yield f'<ul class="answer">{findings}</ul>'
    for warning in content.warnings(results):
        yield f'<p class="warn"><b>Caution.</b> {html_text(warning)}</p>'
    yield f"<p>{html_text(content.facts(results))}</p>"
    for name, png in figures.items():
        yield _figure(results, name, png)
    yield f"<h2>Categories</h2>{html_table(content.category_table(results))}"
    yield f"<h2>Layers</h2>{html_table(content.layer_table(results))}"
    yield (
        '<p class="note">Entropies in nats. prefer: neurons that prefer an activation. shift: '
        "of the mean gate output.</p>"
    )
    yield "<h2>Method</h2>"
    yield from (f"<p>{html_text(paragraph)}</p>" for paragraph in content.method(results))
    yield (
        "<details><summary>What was looked "
        f"at</summary><pre>{html_lines(json.dumps(about, indent=2))}</pre></details>"
    )
    yield '<p class="note">All numbers: interpret.json and entropy_stats.json beside this page.</p>'


def _figure(results: Interpretation, name: str, png: bytes) -> str:
    caption = content.CAPTIONS[name]
    how, here = html_text(caption.how.format(unit=results.unit)), html_text(caption.here(results))
    causal = " <b>Not causal.</b>" if caption.of_text and not results.causal else ""
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    return (
        f'<h2>{html_text(caption.title)}</h2><figure class="wide">'
        f'<div class="scroll"><img src="{source}" alt="{html_text(caption.title)}"></div>'
        f"<figcaption><p><b>How to read it:</b> {how}</p><p><b>Here:</b> "
        f"{here}{causal}</p></figcaption></figure>"
    )
