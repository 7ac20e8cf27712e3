"""A run of masked tokens, as people see it: its picture, its plain lines, its dashboard, its copy
at wandb."""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from core.metrics.table import METRICS
from core.reports import curves_masked as masked
from core.reports.curves_masked import PANELS, MaskedPlot, plot_masked
from core.reports.figure import title_of
from core.reports.wandb_mirror import _values
from core.ui import plain
from core.ui.plain import NOT_CAUSAL, evaluation_title, machine, scores
from tests.reports import masked_stream
from tests.reports.test_curves import colours, written
from tests.ui import stream
from tests.ui.test_dashboard import FORBIDDEN, plain_lines, rendered, state_of

DISTANCES = ["negative log-likelihood", "accuracy", "Pseudo-perplexity", "Prototypes"]


def drawn(monkeypatch: pytest.MonkeyPatch, log: Path, out: Path) -> Any:
    """The figure that is written."""
    kept, save = [], masked.save
    monkeypatch.setattr(
        masked, "save", lambda figure, path: (kept.append(figure), save(figure, path))
    )
    plot_masked(log, out)
    (figure,) = kept
    return figure


def titled(figure: Any) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def legends(figure: Any) -> list[str]:
    return [
        text.get_text()
        for axes in titled(figure).values()
        for text in axes.get_legend().get_texts()
    ]


# the picture --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("distances", "decoder", "evals"),
    [(True, True, 1), (True, False, 50), (False, True, 2), (False, False, 1)],
)
def test_what_there_is_is_drawn(
    tmp_path, monkeypatch, distances: bool, decoder: bool, evals: int
) -> None:
    log, out = tmp_path / "metrics.jsonl", tmp_path / "new" / "masked.png"
    written(log, masked_stream.run(evals, distances, decoder, preset=r"costs $5 \and $x_{ 狐"))
    figure = drawn(monkeypatch, log, out)
    width, height, values = colours(out)
    assert (
        width >= 1200
        and height >= 500
        and values > 100
        and [each.name for each in out.parent.iterdir()] == ["masked.png"]
    )
    assert [
        part for part in DISTANCES if any(part in title for title in titled(figure))
    ] == DISTANCES[: 4 if distances else 3]
    assert (
        figure.get_suptitle().endswith("masked tokens") and NOT_CAUSAL not in figure.get_suptitle()
    )
    said = " ".join(legends(figure))
    assert ("h = −12" in said, "h_exp" in said, "cross-entropy" in said, "decoder" in said) == (
        distances,
        distances,
        not distances,
        decoder,
    )
    assert "top-1   54.1 %" in said  # the last values stand beside the names
    for axes in titled(figure).values():
        assert all(
            len(line.get_xdata()) == evals
            for line in axes.get_lines()
            if not line.get_label().startswith("_")
        )


def test_each_number_is_on_its_axis(tmp_path, monkeypatch) -> None:
    """Counts of directions and exponents would flatten cosines and nats: they have an axis of their
    own, on the right."""
    written(tmp_path / "m.jsonl", masked_stream.run(evals=4))
    figure = drawn(monkeypatch, tmp_path / "m.jsonl", tmp_path / "masked.png")
    others = [axes for axes in figure.axes if not axes.get_title(loc="left")]
    assert [axes.get_ylabel() for axes in others] == [
        "h_exp in training",
        "effective number of directions",
    ]
    exponents, directions = (axes.get_lines()[0] for axes in others)
    assert list(exponents.get_ydata()) == pytest.approx([-12 + 0.08 * now for now in range(1, 101)])
    assert list(directions.get_ydata()) == pytest.approx([447, 492, 537, 582])
    panel = titled(figure)["Pseudo-perplexity: one token masked at a time"]
    assert panel.get_yscale() == "log"
    accuracy = titled(figure)["Masked tokens: accuracy"]
    dashed = {
        line.get_label().split("   ")[0]
        for line in accuracy.get_lines()
        if line.get_linestyle() == "--"
    }
    assert dashed == {"decoder top-5", "decoder top-1"}


def test_a_panel_without_numbers_is_left_out(tmp_path, monkeypatch) -> None:
    """Also where a number is there and not finite."""
    keys = ("event", "step", "tokens", "time", "objective", "causal")
    events = [
        event for event in masked_stream.run(evals=3) if event["event"] in ("run_start", "eval")
    ]
    bare = [
        {k: v for k, v in e.items() if k in keys} | {"token_accuracy": 0.1, "nll_h4": float("nan")}
        for e in events[1:]
    ]
    written(tmp_path / "m.jsonl", [events[0], *bare])
    assert list(titled(drawn(monkeypatch, tmp_path / "m.jsonl", tmp_path / "masked.png"))) == [
        "Masked tokens: accuracy"
    ]


def test_a_lineage_that_went_on_is_one_picture(tmp_path, monkeypatch) -> None:
    log = tmp_path / "m.jsonl"
    written(log, [*masked_stream.run(evals=3), *masked_stream.run(evals=3, run=2)])
    figure = drawn(monkeypatch, log, tmp_path / "masked.png")
    (accuracy,) = (axes for title, axes in titled(figure).items() if "accuracy" in title)
    beginnings = [
        line.get_xdata()[0] for line in accuracy.get_lines() if line.get_linestyle() == ":"
    ]
    assert beginnings == [3_276_800] and len(accuracy.get_lines()[0].get_xdata()) == 6


@pytest.mark.parametrize(
    "content", [None, "", "half a li", '{"event": "step", "step": 1, "tokens": 10, "loss": 2.0}\n']
)
def test_nothing_of_masked_tokens_leaves_what_is_there(tmp_path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    (tmp_path / "masked.png").write_text("the picture before")
    MaskedPlot(tmp_path).update({"event": "run_end"})
    assert (tmp_path / "masked.png").read_text() == "the picture before"


def test_it_is_redrawn_at_evaluations_and_at_the_end_of_a_masked_run(tmp_path, monkeypatch) -> None:
    calls: list[tuple[Path, Path]] = []
    monkeypatch.setattr(masked, "plot_masked", lambda *paths: calls.append(paths))
    view = MaskedPlot(tmp_path)
    for event in masked_stream.run(evals=3):
        view.update(event)
    assert calls == [(tmp_path / "metrics.jsonl", tmp_path / "masked.png")] * 4
    calls.clear()
    other = MaskedPlot(tmp_path)
    for event in stream.run(steps=10):
        other.update(event)
    assert calls == []  # of any other run not even the log is read


@pytest.mark.parametrize(("run", "expected"), [(masked_stream.run, True), (stream.run, False)])
def test_a_view_that_saw_no_beginning_reads_the_log(tmp_path, run: Any, expected: bool) -> None:
    written(tmp_path / "metrics.jsonl", run(steps=20))
    MaskedPlot(tmp_path).update({"event": "run_end"})
    assert (tmp_path / "masked.png").exists() == expected


def test_every_line_of_the_picture_is_a_known_number() -> None:
    assert {line.key for panel in PANELS for line in panel.lines} <= METRICS.keys()


# words --------------------------------------------------------------------------------------------

MASKED = {"objective": "masked_tokens", "causal": False, "tokens": 1_200_000}


def test_masked_tokens_are_by_design_and_seeing_later_ones_is_not() -> None:
    for event in (MASKED, MASKED | {"causal": True}):
        assert evaluation_title(event) == "evaluation at 1.2M tokens, masked tokens"
        assert machine(event).endswith("  masked tokens")
        assert title_of([{"event": "run_start", "lineage": "x", **event}]) == "x · masked tokens"
    for objective in ({}, {"objective": "next_token"}):
        event = {"tokens": 10, "causal": False, **objective}
        assert NOT_CAUSAL in evaluation_title(event) and NOT_CAUSAL in machine(event)
        assert title_of([{"event": "run_start", "lineage": "x", **event}]) == f"x · {NOT_CAUSAL}"
        event["causal"] = True
        assert (
            evaluation_title(event) == "evaluation at 10 tokens"
            and title_of([{"event": "run_start", **event}]) == ""
        )


def test_scores_are_those_that_were_measured() -> None:
    """In an order of their own for masked tokens; what is null was measured, and came to
    nothing."""
    assert scores(
        {"cross_entropy": 3.0, "perplexity": 20.085, "bits_per_byte": 1.0, "token_accuracy": 0.5},
        {},
    ) == [
        ("cross-entropy", "3.000"),
        ("perplexity", "20.1"),
        ("bits/byte", "1.000"),
        ("accuracy", "50.0 %"),
    ]
    assert scores({"token_accuracy": 0.5}, {}) == [("accuracy", "50.0 %")]
    assert scores({"cross_entropy": None, "token_accuracy": None}, {}) == [
        ("cross-entropy", "–"),
        ("accuracy", "–"),
    ]
    event = {
        **MASKED,
        "nll_h12": 8.123,
        "pseudo_perplexity_h12": 3000.0,
        "token_accuracy": 0.312,
        "top5_accuracy": 0.52,
    }
    assert scores(event, {"nll_h12": 8.523, "token_accuracy": 0.1}) == [
        ("top-1", "31.2 %"),
        ("top-5", "52.0 %"),
        ("NLL h -12", "8.123 (−0.400)"),
        ("pseudo-perplexity h -12", "3000.0"),
    ]


def test_plain_lines_of_a_masked_run() -> None:
    lines = plain_lines(masked_stream.run(evals=2))
    assert lines[0].endswith("NVIDIA H100  bf16  masked tokens  compiled")
    (_, last) = [line for line in lines if line.startswith("evaluation")]
    assert last.startswith(
        "evaluation at 3.28M tokens, masked tokens  top-1 54.1 %  top-5 73.9 %  NLL h -12 5.165 "
        "(−1.053)"
    )
    assert (
        "decoder top-1 60.0 %" in last
        and " perplexity" not in last
        and NOT_CAUSAL not in " ".join(lines)
    )
    assert lines.count("near king  queen 0.71, prince 0.69") == 2
    assert sum(line.startswith("near [red]  狐  –, [bold] -4.0e-03") for line in lines) == 2
    assert not FORBIDDEN.search("".join(lines))
    assert plain.describe({"event": "neighbors", "word": "x", "neighbors": []}, {}) == ["near x  "]


@pytest.mark.parametrize(("width", "height"), [(80, 23), (120, 40), (200, 60), (40, 12), (20, 5)])
@pytest.mark.parametrize("until", [2, 30, None])
def test_the_dashboard_fits_the_screen(width: int, height: int, until: int | None) -> None:
    state, now = state_of(list(masked_stream.run(evals=10))[:until])
    lines = rendered(state, now, width, height)
    assert len(lines) <= height and max(cell_len(line) for line in lines) <= width
    assert not FORBIDDEN.search("".join(lines))


@pytest.mark.parametrize(("width", "height"), [(80, 40), (120, 40)])
def test_the_dashboard_shows_what_a_masked_run_is_about(width: int, height: int) -> None:
    state, now = state_of(list(masked_stream.run())[:-1])
    shown = "\n".join(rendered(state, now, width, height))
    for part in (
        "bf16  masked tokens  compiled",
        r"h_exp +-4.000",
        "evaluation at 3.28M tokens, masked tokens",
        r"top-1 +54.1 %",
        r"top-5 +73.9 %",
        r"NLL h -12 +5.165 \(−0.202\)",
        r"pseudo-ppl h -4 +696.3",
        r"decoder cross-entropy 1.950 \(\+0.010\)",
        r"cos of protos +0.110",
        r"spread of cos +0.070",
        r"directions +582.0",
        r"drift +0.120",
        r"  The capital of France is \[MASK\].  paris 41 %, lyon 12 %\n  near king  queen 0.71, "
        r"prince 0.69\n  near \[red\]  狐",
    ):
        assert re.search(part, shown), part
    assert NOT_CAUSAL not in shown and "perplexity" not in shown and "harmonic" not in shown
    assert shown.count("near king") == 1  # those of the evaluation before are gone


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_number_is_cut_off_by_its_name(width: int) -> None:
    """Also beside a loss with a name as long as somebody liked."""
    state, now = state_of([e for e in masked_stream.run() if e["event"] in ("run_start", "eval")])
    state.evals[-1]["losses"] = {"x" * 99: 1.0}
    shown = "\n".join(rendered(state, now, width, 60))
    assert (
        "1.950 (+0.010)" in shown
        and re.search(r"decoder pseudo-ppl +5.5\b", shown)
        and "drift" in shown
    )


def test_neighbours_without_a_sample_have_their_place_too() -> None:
    state, now = state_of(
        event for event in masked_stream.run() if event["event"] in ("run_start", "neighbors")
    )
    shown = "\n".join(rendered(state, now, 80, 24))
    assert "neighbors at 3.28M tokens" in shown and "near king  queen 0.71, prince 0.69" in shown


def test_wandb_gets_numbers_only() -> None:
    events = list(masked_stream.run(evals=1))
    assert all(
        _values(event) == {}
        for event in events
        if event["event"] in ("neighbors", "sample", "run_start")
    )
    (last,) = [_values(event) for event in events if event["event"] == "eval"]
    assert last["eval/prototype_drift"] == pytest.approx(0.12) and "eval/objective" not in last
    step = next(_values(event) for event in events if event["event"] == "step")
    assert step["scheduled/harmonic.h_exp"] == pytest.approx(-11.92)
