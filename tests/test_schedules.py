"""Schedules, and the budget that tells them where a run stands."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from core.losses.harmonic import HarmonicSettings
from core.preset.settings import RUN_TOKENS
from core.schedules import Schedule, learning_rate_schedule, value_at
from core.training.progress import Budget, Progress, begin_next_run


def schedule(value: Any) -> Any:
    return TypeAdapter(Schedule).validate_python(value)


@pytest.mark.parametrize("progress", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_a_number_stays_what_it_is(progress: float) -> None:
    assert value_at(schedule(0.25), progress) == 0.25 and value_at(schedule(3), progress) == 3.0


def test_a_piece_reaches_both_ends_exactly() -> None:
    """-12 at the first update and exactly -4 at the last: no rounding at the ends, and clamped
    beyond them."""
    piece = schedule({"from": -12, "to": -4})
    assert [value_at(piece, p) for p in (-0.1, 0.0, 0.5, 1.0, 1.1)] == [
        -12.0,
        -12.0,
        -8.0,
        -4.0,
        -4.0,
    ]


def test_a_piece_holds_before_and_after_its_stretch() -> None:
    piece = schedule({"from": 1.0, "to": 3.0, "begin": 0.2, "end": 0.6})
    assert [value_at(piece, p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx(
        [1.0, 1.0, 2.0, 3.0, 3.0]
    )


def test_cosine_is_half_way_in_the_middle_and_flat_at_the_ends() -> None:
    piece = schedule({"from": 0.0, "to": 1.0, "shape": "cosine"})
    assert value_at(piece, 0.5) == pytest.approx(0.5)
    assert value_at(piece, 0.25) == pytest.approx(0.1464466)
    assert value_at(piece, 0.01) < 0.001 and value_at(piece, 0.99) > 0.999


def test_constant_ignores_its_end_value() -> None:
    piece = schedule({"from": 2.0, "to": 9.0, "shape": "constant"})
    assert [value_at(piece, p) for p in (0.0, 0.7, 1.0)] == [2.0, 2.0, 2.0]


def test_pieces_follow_each_other_and_hold_in_gaps() -> None:
    """First 80 % then anneal; the value before the first piece and in a gap is the nearest one
    reached."""
    pieces = schedule(
        [
            {"from": 1.0, "to": 2.0, "begin": 0.1, "end": 0.2},
            {"from": 5.0, "shape": "constant", "begin": 0.4, "end": 0.8},
            {"from": 5.0, "to": 0.0, "begin": 0.8, "end": 1.0},
        ]
    )
    seen = [value_at(pieces, p) for p in (0.0, 0.15, 0.3, 0.4, 0.79, 0.9, 1.0)]
    assert seen == pytest.approx([1.0, 1.5, 2.0, 5.0, 5.0, 2.5, 0.0])


def test_a_jump_happens_at_the_border() -> None:
    pieces = schedule(
        [
            {"from": 1.0, "shape": "constant", "end": 0.5},
            {"from": 3.0, "shape": "constant", "begin": 0.5},
        ]
    )
    assert [value_at(pieces, p) for p in (0.4999, 0.5)] == [1.0, 3.0]


@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_learning_rate_shapes(warmup: float, floor: float) -> None:
    """Warm-up from 0 to 1 in all three; wsd is level and then falls in a line, cosine falls at
    once, constant never."""
    wsd = learning_rate_schedule("wsd", warmup, 0.2, floor)
    cosine = learning_rate_schedule("cosine", warmup, 0.2, floor)
    constant = learning_rate_schedule("constant", warmup, 0.2, floor)
    for shape in (wsd, cosine, constant):
        assert value_at(shape, warmup / 2) == pytest.approx(0.5 if warmup else 1.0)
        assert value_at(shape, warmup) == pytest.approx(1.0)
    middle = (1 + warmup) / 2
    assert value_at(wsd, 0.8) == pytest.approx(1.0) and value_at(wsd, 0.9) == pytest.approx(
        (1 + floor) / 2
    )
    assert value_at(cosine, middle) == pytest.approx((1 + floor) / 2)
    assert value_at(wsd, 1.0) == value_at(cosine, 1.0) == floor
    assert value_at(constant, middle) == value_at(constant, 1.0) == 1.0


def test_wsd_without_a_decay_stays_level() -> None:
    assert value_at(learning_rate_schedule("wsd", 0.1, 0.0, 0.0), 1.0) == 1.0


# the budget --------------------------------------------------------------------------------------


def updates(budget: Budget, done: Progress, step_tokens: list[int]) -> list[tuple[float, float]]:
    """(progress, middle) of each update of one run; the steps' sizes are used in turn, as the
    trainer counts them."""
    seen = []
    while budget.end(done) is None:
        tokens = step_tokens[len(seen) % len(step_tokens)]
        seen.append((budget.progress(done, tokens), budget.middle(done, tokens)))
        done.step, done.run_step, done.horizon_step = (
            done.step + 1,
            done.run_step + 1,
            done.horizon_step + 1,
        )
        done.run_tokens += tokens
        done.horizon_tokens += tokens
    return seen


HORIZONS = {
    "tokens, exact": (Budget(1000, 1000), [50]),
    "tokens, last step reaches beyond": (Budget(1000, 1000), [49]),
    "tokens, last step reaches far beyond": (Budget(1000, 1000), [333]),
    "steps": (Budget(10**9, 10**9, 20, 20), [50]),
    "steps and tokens, tokens first": (Budget(1000, 1000, 500, 500), [30]),
    "one step": (Budget(100, 100), [100]),
}


@pytest.mark.parametrize("name", HORIZONS)
def test_a_schedule_starts_at_0_and_ends_at_exactly_1(name: str) -> None:
    """0 at the first update, exactly 1 at the last, never backwards; one update alone is a first
    one."""
    budget, step_tokens = HORIZONS[name]
    progress = [p for p, _ in updates(budget, Progress(), step_tokens)]
    assert progress[0] == 0.0 and progress == sorted(progress)
    if len(progress) > 1:
        assert progress[-1] == 1.0 and progress[-2] < 1.0


def test_a_schedule_ends_at_exactly_1_with_steps_of_any_size() -> None:
    """Padding makes steps uneven."""
    sizes = random.Random(5)
    for _ in range(50):
        steps = [sizes.randint(20, 90) for _ in range(30)]
        progress = [p for p, _ in updates(Budget(1000, 1000), Progress(), steps)]
        assert (
            progress[0] == 0.0
            and progress[-1] == 1.0
            and max(progress[:-1]) < 1.0
            and progress == sorted(progress)
        )


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("name", HORIZONS)
def test_no_update_is_wasted_on_a_learning_rate_of_0(name: str, kind: str) -> None:
    """Neither the first (warm-up from 0) nor the last (decay to 0), even when the last step reaches
    beyond the end."""
    budget, step_tokens = HORIZONS[name]
    shape = learning_rate_schedule(kind, 0.1, 0.2, 0.0)
    factors = [value_at(shape, middle) for _, middle in updates(budget, Progress(), step_tokens)]
    assert min(factors) > 0.0 and max(factors) <= 1.0


def test_a_chain_of_runs_shares_one_budget() -> None:
    """Each run ends a little beyond its budget; the last run must not pay for all of them with a
    learning rate of 0."""
    runs, step = 5, 7_300_000
    budget, done = Budget(RUN_TOKENS, runs * RUN_TOKENS), Progress()
    seen = []
    for run in range(runs):
        seen += updates(budget, done, [step])
        done.horizon_runs += 1
        if run + 1 < runs:
            begin_next_run(done, runs)
    shape = learning_rate_schedule("wsd", 0.02, 0.2, 0.0)
    progress, factors = [p for p, _ in seen], [value_at(shape, middle) for _, middle in seen]
    assert progress[0] == 0.0 and progress[-1] == 1.0 and max(progress[:-1]) < 1.0
    assert min(factors) > 0.0 and done.run == runs
    begin_next_run(done, runs)
    assert (done.horizon_runs, done.horizon_tokens, done.horizon_step, done.run) == (
        0,
        0,
        0,
        runs + 1,
    )


@pytest.mark.parametrize(
    "key, decay",
    [("lr_mult_WSD_warmup10_decay20_T20", 0.2), ("lr_mult_orig_code_warmup10pct_cosine_T20", 0.9)],
)
def test_harmonic_sft_decays_along_a_cosine(key: str, decay: float) -> None:
    """Specification 000: WSD as its plan says, and, with a decay over all that is left, as its
    authors' code has it."""
    expected = json.loads(
        (Path(__file__).parent / "golden" / "harmonic" / "expected.json").read_text()
    )[key]
    factors = learning_rate_schedule("wsd", 0.1, decay, 0.0, "cosine")
    assert [value_at(factors, step / 20) for step in range(21)] == pytest.approx(
        expected, abs=1e-12
    )


def test_the_harmonic_exponent_ends_where_it_shall() -> None:
    expected = json.loads(
        (Path(__file__).parent / "golden" / "harmonic" / "expected.json").read_text()
    )
    exponents = [value_at(HarmonicSettings().h_exp, step / 19) for step in range(20)]
    assert exponents == pytest.approx(
        expected["h_exp_anneal_step_over_total_minus_1_N20"], abs=1e-12
    )
    assert exponents[0] == -12.0 and exponents[-1] == -4.0
