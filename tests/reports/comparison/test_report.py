"""The report: one safe file, the same numbers everywhere, at any time."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from core.comparison.results import Comparison
from core.comparison.trials import Trial
from core.comparison.verdict import Amount
from core.reports.comparison import write_report
from core.reports.style import VARIABLES
from core.ui.text import clean
from tests.comparison.logs import NASTY, compared, preset, trials

FINALS = {
    "CE": {1: 3.0, 2: 3.1, 3: 3.2},
    "mix": {1: 3.11, 2: 3.2, 3: 3.31},
    NASTY: {1: 2.9, 2: 3.05, 3: 3.1},
}
ALL = {
    "embedding_cosine": 0.5,
    "max_probability": 0.4,
    "entropy": 2.5,
    "table_cosine": 0.1,
    "losses": {"cross_entropy": 3.0, "cosine": 0.4, NASTY: 1.0},
}


class Page(HTMLParser):
    """Tags in order, the text outside of <style>, every attribute; fails on tags that do not
    match."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):  # these are never closed
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("report")
    made = trials(folder, FINALS, extra=ALL, text=f"tree\n{NASTY}")
    made = [Trial(t.variant, t.seed, preset(t.seed, note=NASTY), t.folder, t.status) for t in made]
    comparison = compared(made, name=NASTY, description=NASTY)
    write_report(comparison, folder / "new" / "out")
    return comparison, folder / "new" / "out"


def test_three_files_and_nothing_else(report) -> None:
    assert sorted(path.name for path in report[1].iterdir()) == [
        "metrics.json",
        "report.html",
        "report.md",
    ]


def test_the_page_needs_nothing_else_and_runs_nothing(report) -> None:
    text = (report[1] / "report.html").read_text()
    page = Page(text)
    assert "://" not in text and "url(data" not in text and "@import" not in text
    assert not {"script", "link", "img", "iframe", "object", "image", "foreignobject"} & set(
        page.tags
    )
    pointing = [
        value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")
    ]
    assert pointing and all(value.startswith("#") for value in pointing)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_what_people_and_models_wrote_is_text(report) -> None:
    folder = report[1]
    page = Page((folder / "report.html").read_text())
    shown = clean(NASTY)
    assert page.text.count(shown) > 10  # title, variant, loss, samples, presets
    assert page.text.count(f"tree\n{shown} 40") == 3
    markdown = (folder / "report.md").read_text()
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in outside and "\x1b" not in markdown
    assert all(
        line.count(" | ") == line.replace(r"\|", "").count(" | ") for line in outside.splitlines()
    )
    assert (
        "````\ntree" in markdown and json.loads((folder / "metrics.json").read_text())["name"] != ""
    )


def test_figures_are_themed_and_their_names_are_their_own(report) -> None:
    text = (report[1] / "report.html").read_text()
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    # curves; accuracy, cosine, probability, entropy, table, two losses beside CE; intervals
    assert len(figures) == 3 + 7 + 1
    identifiers = re.findall(r'\bid="([^"]*)"', "".join(figures))
    assert len(identifiers) == len(set(identifiers))
    assert (
        not [colour for colour in VARIABLES if colour in "".join(figures)]
        and "var(--s1)" in figures[0]
    )


def test_numbers_agree_in_all_three(report) -> None:
    comparison, folder = report
    page, markdown = (
        Page((folder / "report.html").read_text()).text,
        (folder / "report.md").read_text(),
    )
    numbers = json.loads((folder / "metrics.json").read_text())
    assert (
        numbers["format"] == 1
        and numbers["metric"] == "cross_entropy"
        and len(numbers["trials"]) == 9
    )
    for variant in comparison.variants[1:]:
        difference = variant.differences["cross_entropy"]
        stored = next(
            d
            for d in numbers["differences"]
            if (d["variant"], d["metric"]) == (variant.name, "cross_entropy")
        )
        assert (stored["mean"], stored["low"], stored["p"]) == (
            difference.mean,
            difference.low,
            difference.p,
        )
        assert stored["values"] == pytest.approx(
            [FINALS[variant.name][s] - FINALS["CE"][s] for s in (1, 2, 3)]
        )
        shown = Amount(comparison.primary, difference)
        for text in (shown.number(difference.mean), shown.signed_span()):
            assert text in page and text in markdown
    for verdict, stored in zip(comparison.verdicts, numbers["verdicts"]):
        assert (
            stored["word"] == verdict.word
            and stored["sentence"] == verdict.sentence
            and clean(verdict.sentence) in page
        )
    assert "3.100 ± 0.100" in page and "3.100 ± 0.100" in markdown
    assert next(v for v in numbers["variants"] if v["name"] == "CE")["metrics"]["cross_entropy"][
        "sd"
    ] == pytest.approx(0.1)


def write_and_read(made: list[Trial], folder: Path, **options) -> tuple[str, str]:
    """(text of the page, Markdown); JSON is read strictly."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    write_report(compared(made, **options), folder)
    json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)
    return Page((folder / "report.html").read_text()).text, (folder / "report.md").read_text()


def test_before_anything_ran(tmp_path) -> None:
    made = [Trial(variant, 1, preset(1), tmp_path / "none", "waiting") for variant in ("CE", "mix")]
    page, markdown = write_and_read(made, tmp_path / "out")
    for text in (page, markdown):
        assert (
            "0 of 2 trials are finished, 2 are still to come" in text
            and "mix cannot be compared with CE" in text
        )


def test_while_it_runs(tmp_path) -> None:
    """The baseline runs, nothing is finished: its curve is drawn, and no number claims anything."""
    made = trials(tmp_path, {"CE": {1: 3.0}})
    made = [
        Trial("CE", 1, made[0].preset, made[0].folder, "running"),
        Trial("mix", 1, preset(1), tmp_path / "none", "waiting"),
    ]
    page, _ = write_and_read(made, tmp_path / "out")
    assert "Curves" in page and "CE, seed 1: running" in page


def test_one_seed_and_a_diverged_variant(tmp_path) -> None:
    made = trials(tmp_path, {"CE": {1: 3.0}, "mix": {1: 3.1}, "bad": {1: 9.0}}, evals=1)
    made[2] = Trial("bad", 1, made[2].preset, made[2].folder, "diverged", "the loss is not finite")
    page, markdown = write_and_read(made, tmp_path / "out")
    for text in (page, markdown):
        assert "mix has a cross-entropy 0.10 nats per token higher than CE" in text.replace(
            "0.100", "0.10"
        )
        assert (
            "bad, seed 1: diverged (the loss is not finite)" in text
            and "Not counted: seed 1 (bad: diverged)." in text
        )
    assert "2 of 3 trials are finished." in page


def test_metrics_that_some_logs_lack(tmp_path) -> None:
    made = trials(tmp_path / "a", {"CE": {1: 3.0, 2: 3.1}}, extra={"embedding_cosine": None})
    made += trials(
        tmp_path / "b",
        {"mix": {1: 3.1, 2: 3.2}},
        extra={"embedding_cosine": 0.4, "bits_per_byte": None},
    )
    made += trials(
        tmp_path / "c",
        {"odd": {1: 3.1, 2: 3.3}},
        extra={"cross_entropy": float("nan"), "own": 1e300, "other": 7.5},
    )
    page, _ = write_and_read(made, tmp_path / "out")
    assert (
        "odd cannot be compared with CE" in page and "embedding cosine" in page and "other" in page
    )
    page, _ = write_and_read(made, tmp_path / "asked", metric="no_such_metric")
    assert "no seed is finished in both with a no such metric" in page


def test_one_variant_alone(tmp_path) -> None:
    page, _ = write_and_read(trials(tmp_path, {"CE": {1: 3.0, 2: 3.1}}), tmp_path / "out")
    assert "nothing to compare" in page


def test_a_failed_write_leaves_the_report_before(tmp_path, monkeypatch) -> None:
    made = trials(tmp_path, {"CE": {1: 3.0}})
    write_report(compared(made), tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("core.files.os.replace", full)
    with pytest.raises(OSError):
        write_report(compared(made, name="other"), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp")) + list((tmp_path / "out").glob(".*.tmp"))
