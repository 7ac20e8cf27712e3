"""The one table of metrics: what it promises to the code that computes them, and to whoever shows
them."""

from core.losses.token_stats import TOKEN_STATS
from core.metrics.table import BESIDE, METRICS, OF_HEADS, SCORES, metric_of, ordered


def test_every_metric_stands_there_once() -> None:
    listed = [metric.key for metric in (*SCORES, *BESIDE, *OF_HEADS)]
    assert len(set(listed)) == len(listed) and list(METRICS) == listed


def test_statistics_of_tokens_are_metrics_that_such_readouts_give() -> None:
    """Both ways: a statistic without a line is shown nowhere, and a line says who gives it."""
    for provides, statistics in TOKEN_STATS.items():
        for key in statistics:
            assert METRICS[key].given_by in ("every model", provides)
    of_logits = {metric.key for metric in (*SCORES, *BESIDE) if metric.given_by == "logits"}
    assert of_logits <= TOKEN_STATS["logits"].keys()


def test_what_heads_measure_is_told_apart_by_its_prefix() -> None:
    assert all(
        metric.key.startswith("head: ") == (metric in OF_HEADS) == (metric.given_by == "heads")
        for metric in METRICS.values()
    )


def test_names_on_the_screen_are_short_and_differ() -> None:
    """A name is a cell of the dashboard's grid; of masked tokens some have another."""
    shown = [*SCORES, *BESIDE]
    for masked in (False, True):
        names = [metric.screen_name(masked) for metric in shown]
        assert len(set(names)) == len(names) and max(map(len, names)) <= 25
    assert [metric_of("token_accuracy").screen_name(masked) for masked in (False, True)] == [
        "accuracy",
        "top-1",
    ]


def test_the_order_is_the_tables_then_losses_heads_and_others() -> None:
    keys = ["new", "head: value", "loss: b", "entropy", "loss: a", "cross_entropy"]
    assert ordered(set(keys)) == [
        "cross_entropy",
        "entropy",
        "loss: a",
        "loss: b",
        "head: value",
        "new",
    ]
