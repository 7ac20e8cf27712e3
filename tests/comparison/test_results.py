"""From logs to a comparison."""

import math
from pathlib import Path

import pytest

from core.comparison.outcome import CURVE_POINTS, read_outcome
from core.comparison.trials import Trial
from core.metrics.log import MetricsLog
from core.metrics.table import PER_TOKEN, metric_of
from tests.comparison.logs import PRESET, compared, preset, trials, write_log

FINALS = {
    "CE": {1: 3.0, 2: 3.1, 3: 3.2},
    "mix": {1: 3.11, 2: 3.2, 3: 3.31},
    "fast": {1: 3.0, 2: 3.11, 3: 3.19},
}


@pytest.mark.skips_updates
def test_an_outcome_is_what_the_log_says(tmp_path) -> None:
    extra = {
        "embedding_cosine": None,
        "entropy": 2.5,
        "losses": {"cross_entropy": 3.0, "cosine": 0.4},
        "note": "x",
        "ok": True,
    }
    write_log(tmp_path, 3.0, steps=40, extra=extra, skipped=1)
    out = read_outcome(Trial("CE", 1, PRESET, tmp_path, "finished"))
    assert out.metrics == pytest.approx(
        {
            "cross_entropy": 3.0,
            "perplexity": math.exp(3),
            "bits_per_byte": 1.0,
            "token_accuracy": 0.35,
            "entropy": 2.5,
            "loss: cross_entropy": 3.0,
            "loss: cosine": 0.4,
        }
    )
    assert out.tokens == 4000 and [tokens for tokens, _ in out.curves["cross_entropy"]] == [
        1000,
        2000,
        3000,
        4000,
    ]
    assert len(out.training) == 40 and out.training[-1] == (4000, pytest.approx(3.0))
    assert (out.tokens_per_second, out.memory_mb, out.skipped, out.parameters) == (
        1000.0,
        500.0,
        1,
        1234,
    )
    assert out.samples == [("Once", "a tree 40")] and out.receipt == "r" and out.seconds >= 0


def test_pauses_between_runs_are_not_counted(tmp_path, monkeypatch) -> None:
    clock = iter([100.0, 110.0, 500.0, 520.0])
    monkeypatch.setattr("core.metrics.log.time.time", lambda: next(clock))
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step, event in enumerate(("run_start", "step", "run_start", "step")):
            log.emit(event, step=step, tokens=step, loss=float(step))
    out = read_outcome(Trial("CE", 1, PRESET, tmp_path, "running"))
    assert out.seconds == 30.0
    assert out.training == [(1, 1.0), (3, 3.0)]  # no cross-entropy among the losses: the loss


def test_long_curves_are_averaged_and_keep_their_end(tmp_path) -> None:
    write_log(tmp_path, 3.0, steps=1000)
    out = read_outcome(Trial("CE", 1, PRESET, tmp_path, "finished"))
    assert len(out.training) == CURVE_POINTS and out.training[-1][0] == 100_000
    assert out.training[0][1] == pytest.approx(
        sum(3 + 2 * math.exp(-i / 200) - 2 * math.exp(-5) for i in range(1, 6)) / 5
    )


def test_variants_are_compared_with_the_first_by_seed(tmp_path) -> None:
    found = compared(trials(tmp_path, FINALS))
    assert [variant.name for variant in found.variants] == [
        "CE",
        "mix",
        "fast",
    ] and found.baseline.differences == {}
    assert found.baseline.metrics["cross_entropy"].mean == pytest.approx(3.1)
    assert found.baseline.metrics["cross_entropy"].sd == pytest.approx(0.1)
    mix = found.variants[1].differences["cross_entropy"]
    assert mix.values == pytest.approx((0.11, 0.1, 0.11)) and mix.p < 0.01
    assert [verdict.word for verdict in found.verdicts] == ["worse", "not distinguishable"]
    assert found.verdicts[0].adjusted == pytest.approx(2 * mix.p)
    assert (
        found.metrics == ("cross_entropy", "perplexity", "bits_per_byte", "token_accuracy")
        and not found.warnings
    )


def test_sources_are_told_apart_and_what_was_read_of_them_where_it_differs(tmp_path) -> None:
    """The loss held out of each; its share of the training, which is told only where it is not the
    same for all variants."""

    def log(folder: Path, share: float) -> Path:
        with MetricsLog(folder / "metrics.jsonl") as found:
            found.emit(
                "step",
                step=1,
                tokens=100,
                sources={"a": {"tokens": 100 * share}, "b": {"tokens": 100 - 100 * share}},
            )
            found.emit(
                "eval",
                step=1,
                tokens=100,
                cross_entropy=2.0,
                sources={"a": {"loss": 1.5}, "b": {"loss": 2.5 - share}},
            )
        return folder

    for shares in ({"off": 0.5, "on": 0.5}, {"off": 0.5, "on": 0.75}):
        root = tmp_path / str(shares["on"])
        of = [
            (name, seed, log(root / f"{name}{seed}", share))
            for name, share in shares.items()
            for seed in (1, 2)
        ]
        found = compared(
            [Trial(name, seed, preset(seed), folder, "finished") for name, seed, folder in of]
        )
        told = {"read of: a", "read of: b"} if shares["on"] != 0.5 else set()
        assert set(found.metrics) == {"cross_entropy", "held out of: a", "held out of: b"} | told
    on = found.variants[1]
    assert on.metrics["read of: a"].mean == 0.75 and on.differences[
        "held out of: b"
    ].mean == pytest.approx(-0.25)
    assert metric_of("held out of: b").better == -1 and metric_of("read of: b").better == 0


def test_speed_and_memory_are_ratios_by_seed(tmp_path) -> None:
    made = trials(tmp_path / "a", {"CE": {1: 3.0, 2: 3.1}}, speed=1000.0, memory=400.0)
    made += trials(tmp_path / "b", {"mix": {1: 3.0, 2: 3.1}}, speed=900.0, memory=800.0)
    mix = compared(made).variants[1]
    assert (mix.speed.n, mix.speed.mean, mix.speed.low, mix.memory.mean) == pytest.approx(
        (2, 0.9, 0.9, 2.0)
    )


def test_only_finished_trials_count_and_what_is_lost_is_said(tmp_path) -> None:
    made = trials(tmp_path, FINALS)
    made[4] = Trial("mix", 2, preset(2), made[4].folder, "diverged", "loss is NaN")
    made[6] = Trial("fast", 1, preset(1), tmp_path / "nowhere", "waiting")
    found = compared(made)
    mix, fast = found.variants[1:]
    assert mix.differences["cross_entropy"].seeds == (1, 3) and fast.differences[
        "cross_entropy"
    ].seeds == (2, 3)
    assert "Not counted: seed 2 (mix: diverged)." in found.verdicts[0].sentence
    assert "Not counted" not in found.verdicts[1].sentence


@pytest.mark.parametrize("status", ["waiting", "running"])
def test_nothing_finished_is_no_error(tmp_path, status: str) -> None:
    made = [Trial(variant, 1, preset(1), tmp_path / variant, status) for variant in ("CE", "mix")]
    found = compared(made)
    assert [verdict.word for verdict in found.verdicts] == [
        "no common seed"
    ] and found.metrics == ()


# fairness -----------------------------------------------------------------------------------------


def with_preset(made: list[Trial], variant: str, **sections) -> list[Trial]:
    return [
        Trial(t.variant, t.seed, {**t.preset, **sections}, t.folder, t.status)
        if t.variant == variant
        else t
        for t in made
    ]


def test_other_tokenizers_are_compared_by_bytes(tmp_path) -> None:
    made = with_preset(trials(tmp_path, FINALS), "mix", tokenizer={"type": "hub", "name": "gpt2"})
    found = compared(made)
    assert (found.requested, found.metric) == ("cross_entropy", "bits_per_byte")
    assert (
        "different tokenizers" in found.warnings[0]
        and "bits per byte is the primary metric" in found.warnings[0]
    )
    assert "bits per byte" in found.verdicts[0].sentence
    assert compared(made, metric="table_cosine").metric == "table_cosine"
    assert (
        compared(trials(tmp_path / "b", FINALS), metric="loss: cross_entropy").metric
        == "cross_entropy"
    )


def test_a_trained_tokenizer_differs_with_its_sources(tmp_path) -> None:
    bpe, other = {"type": "bpe", "vocab_size": 512}, {"sources": [{"type": "text", "path": "./b"}]}
    made = trials(tmp_path, FINALS)
    made = [
        Trial(t.variant, t.seed, {**t.preset, "tokenizer": bpe}, t.folder, t.status) for t in made
    ]
    assert compared(made).metric == "cross_entropy"
    assert compared(with_preset(made, "mix", data=other)).metric == "bits_per_byte"


def test_what_makes_comparing_unfair_is_said(tmp_path) -> None:
    made = with_preset(trials(tmp_path, FINALS), "mix", data={**PRESET["data"], "workers": 3})
    assert not compared(made).warnings
    made = with_preset(made, "mix", data={"sources": [], "packing": "padding"})
    said = " ".join(compared(made).warnings)
    assert "different data (data.packing, data.sources)" in said and "tokenizers" not in said
    short = trials(tmp_path / "s", {"CE": {1: 3.0}}) + trials(
        tmp_path / "t", {"mix": {1: 3.0}}, steps=20, receipt="q"
    )
    said = " ".join(compared(short).warnings)
    assert "between 2,000 and 4,000" in said and "consumed different data (seed 1)" in said
    losses = [{"type": "cosine", "temperature": t, "weight": t} for t in (1.0, 0.5)]
    two = with_preset(with_preset(short, "CE", losses=losses[:1]), "mix", losses=losses[1:])
    assert "“cosine” has other settings" in " ".join(compared(two).warnings)
    named = [
        {"type": "sharpness", "name": penalty, "penalty": penalty}
        for penalty in ("non_max_sum", "neg_entropy")
    ]
    same = with_preset(
        with_preset(short, "CE", losses=named),
        "mix",
        losses=[{**loss, "weight": 0.1} for loss in named],
    )
    assert "other settings" not in " ".join(compared(same).warnings)
    easy = {**PRESET["train"], "curriculum": {"candidates": 2, "bucket_weights": [1, 0]}}
    one = with_preset(trials(tmp_path / "u", {"CE": {1: 3.0}, "mix": {1: 3.0}}), "mix", train=easy)
    (said,) = compared(one).warnings
    assert "The training curves of mix show the rows that a curriculum chose" in said
    assert not compared(with_preset(one, "CE", train=easy)).warnings


MASKED = {"objective": "masked_tokens", "causal": False}


def test_who_sees_what_it_is_to_predict_is_warned_of_and_an_encoder_is_not(tmp_path) -> None:
    made = trials(tmp_path / "a", {"CE": {1: 3.0}}) + trials(
        tmp_path / "b", {"mix": {1: 2.0}}, start={"causal": False}
    )
    (said,) = compared(made).warnings
    assert said.startswith("mix is not causal") and "different objectives" not in said
    both = [trials(tmp_path / name, {name: {1: 3.0}}, start=MASKED) for name in ("c", "d")]
    assert not compared([*both[0], *both[1]]).warnings


def test_different_objectives_are_warned_of_once_they_are_known(tmp_path) -> None:
    made = trials(tmp_path / "a", {"CE": {1: 3.0, 2: 3.1}}) + trials(
        tmp_path / "b", {"MLM": {1: 2.0, 2: 2.1}}, start=MASKED
    )
    (said,) = compared(made).warnings
    assert said.startswith(
        "The variants have different objectives (next token: CE; masked tokens: MLM)"
    )
    waiting = [Trial("later", 1, preset(1), tmp_path / "nowhere", "waiting"), *made[2:]]
    assert not compared(waiting).warnings
    assert (
        read_outcome(waiting[0]).objective is None
        and read_outcome(made[2]).objective == "masked_tokens"
    )
    assert read_outcome(made[0]).objective == "next_token"  # logs from before there was another one


def test_masked_runs_are_judged_by_their_own_numbers(tmp_path) -> None:
    def masked(name: str, nll: float) -> list[Trial]:
        made = []
        for seed in (1, 2, 3):
            own = {
                "nll_h12": nll + seed / 10 + 0.001 * (seed % 2),
                "nll_h4": nll,
                "top5_accuracy": 0.5,
                "prototype_cosine": 0.1,
            }
            lacking = dict.fromkeys(("cross_entropy", "perplexity", "bits_per_byte"))
            made += trials(
                tmp_path / f"{name}{seed}", {name: {seed: 3.0}}, start=MASKED, extra=own | lacking
            )
        return made

    made = masked("base", 5.0) + masked("other", 4.5)
    found = compared(made, metric="nll_h12")
    assert found.metrics == (
        "token_accuracy",
        "top5_accuracy",
        "nll_h12",
        "nll_h4",
        "prototype_cosine",
    )
    assert found.metric == "nll_h12" and not found.warnings
    assert found.variants[1].differences["nll_h12"].mean == pytest.approx(-0.5)


def test_what_a_variant_sets(tmp_path) -> None:
    made = with_preset(
        trials(tmp_path, FINALS),
        "mix",
        model={"type": "simple_lm"},
        lineage="other",
        extra={"a": {"b": 1}},
    )
    changes = compared(made).variants[1].changes
    assert changes == {"model.hidden_size": (64, None), "extra.a.b": (None, 1)}


def test_directions() -> None:
    keys = [
        "cross_entropy",
        "perplexity",
        "bits_per_byte",
        "loss: cosine",
        "token_accuracy",
        "embedding_cosine",
        "entropy",
    ]
    assert [metric_of(key).better for key in keys] == [-1, -1, -1, -1, 1, 1, 0]
    assert [
        metric_of(key).better for key in ("max_probability", "table_cosine", "something_new")
    ] == [0, 0, 0]
    masked = [
        "top5_accuracy",
        "nll_h12",
        "nll_h4",
        "pseudo_perplexity",
        "pseudo_perplexity_h12",
        "pseudo_perplexity_h4",
    ]
    assert [metric_of(key).better for key in masked] == [1, -1, -1, -1, -1, -1]
    decoder = [
        "decoder_accuracy",
        "decoder_top5_accuracy",
        "decoder_cross_entropy",
        "decoder_pseudo_perplexity",
    ]
    assert [metric_of(key).better for key in decoder] == [1, 1, -1, -1]
    prototypes = ["prototype_cosine", "prototype_spread", "prototype_dimensions", "prototype_drift"]
    assert [metric_of(key).better for key in prototypes] == [0, 0, 0, 0]
    assert (
        not {*prototypes, "bits_per_byte", "table_cosine"} & PER_TOKEN
        and {
            *masked,
            *decoder,
        }
        <= PER_TOKEN
    )
    assert metric_of("something_new").name == "something new"


def test_training_curves_of_different_losses_are_told_apart(tmp_path) -> None:
    """A variant that reports no cross-entropy shows its own loss in the panel of the others'
    cross-entropy."""
    made = trials(tmp_path, {"base": {1: 3.0}, "distances": {1: 3.1}})
    assert not any("training curve" in warning for warning in compared(made).warnings)
    log = made[1].folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('"losses": {"cross_entropy"', '"losses": {"harmonic"'))
    (said,) = [warning for warning in compared(made).warnings if "training curve" in warning]
    assert said.startswith("There is no cross-entropy of distances") and "another scale" in said


def test_a_log_of_odd_lines_is_read_past(tmp_path) -> None:
    """Whatever somebody has put into it: what is whole counts, the rest is passed over."""
    write_log(tmp_path, 3.0)
    whole = read_outcome(Trial("CE", 1, PRESET, tmp_path, "finished"))
    odd = [
        b'{"event": "eval"}',
        b"\0\0\0",
        b"[" * 100_000,
        b'{"event": "step", "step": "1", "tokens": 1}',
        b'["event"]',
    ]
    odd += [
        b'{"event": "step", "step": 41, "tokens": 4000, "losses": [1], "sources": {"a": 5, "b": '
        b'{"tokens": "x"}}}'
    ]
    odd += [
        b'{"event": "step", "step": 41, "tokens": 4000, "losses": "x", "sources": 7, '
        b'"tokens_per_second": "fast"}'
    ]
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join(odd) + b"\n")
    out = read_outcome(Trial("CE", 1, PRESET, tmp_path, "finished"))
    assert (out.metrics, out.curves, out.samples) == (whole.metrics, whole.curves, whole.samples)
