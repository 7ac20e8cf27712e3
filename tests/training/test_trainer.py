"""The loop: what an update is made of, what happens when one goes wrong, what a checkpoint brings
back, what evaluation says.

Every trainer here is assembled from a preset, as main.py does it; trouble is brought in through
hooks on the model."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.assembly.session import TrainingSession
from core.errors import CheckpointError, Diverged, NoData, UserError
from tests.project import (
    Project,
    differences,
    tiny_preset,
    train_here,
)
from tests.training.runs import (
    SAME,
    UPHILL,
    assert_close,
    equal,
    events,
    finish,
    limit_rows,
    session,
    weights,
)

# one update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["padding", "documents"])
def test_accumulation_does_not_change_the_update(packing: str, tmp_path: Path) -> None:
    """8 rows at once, 4 x 2 and 8 x 1: the same gradient, loss and weights, though rows have
    unequal numbers of targets."""
    trained, losses, norms = [], [], []
    for rows, accumulation in ((8, 1), (2, 4), (1, 8)):
        root = tmp_path / f"{rows}"
        train = {
            "per_gpu_batch_size": rows,
            "accumulation_steps": accumulation,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "eps": 1e-5,  # see below
        }
        built = session(root, train=train, data={"packing": packing, "min_text_length": 10})
        finish(built)
        trained.append(weights(built))
        losses.append([event["loss"] for event in events(root, "step")])
        norms.append([event["grad_norm"] for event in events(root, "step")])
    assert_close(trained[0], trained[1], SAME)
    assert_close(trained[0], trained[2], SAME)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_padded_rows_do_have_unequal_numbers_of_targets(tmp_path: Path) -> None:
    """Or the test above would prove nothing: averaging the means of micro-batches would pass it,
    too."""
    built = session(
        tmp_path,
        data={"packing": "padding", "min_text_length": 10},
        train={"per_gpu_batch_size": 8},
    )
    found = [built.trainer.loader.next_step().batch.labels for _ in range(4)]
    built.trainer.loader.close()
    built.log.close()
    counts = [(labels >= 0).view(4, -1).sum(1) for labels in found]  # of four micro-batches
    assert any(count.max() > 1.2 * count.min() for count in counts)


def test_the_gradient_is_that_of_the_mean_over_the_whole_step(tmp_path: Path) -> None:
    """Against plain autograd on all rows of the step, and clipped to max_grad_norm before the
    update."""
    built = session(
        tmp_path,
        data={"packing": "padding"},
        train={"accumulation_steps": 4, "max_steps": 1, "max_grad_norm": 0.1},
    )
    seen: dict[str, Tensor] = {}
    trainer, before = built.trainer, weights(built)
    step = trainer.optimizer.step
    rows = trainer.loader.next_step

    def keep_rows(should_stop: Any) -> Any:
        seen["rows"] = rows(should_stop)
        return seen["rows"]

    def keep_gradients(factor: float) -> None:
        seen["gradients"] = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        step(factor)

    trainer.loader.next_step, trainer.optimizer.step = keep_rows, keep_gradients
    finish(built)
    model = built.trainer.model
    model.load_state_dict(before | {"lm_head.weight": before["embedding.weight"]})
    model.zero_grad()
    batch = seen["rows"].batch
    output = model(batch)
    loss = F.cross_entropy(
        output.readout(output.hidden).flatten(0, 1), batch.labels.flatten(), ignore_index=-100
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert_close(seen["gradients"], {name: p.grad for name, p in model.named_parameters()}, 1e-6)
    (event,) = events(tmp_path, "step")
    assert event["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert event["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert event["tokens"] == int((batch.labels >= 0).sum()) and norm > 0.1


def test_hooks_of_the_model_are_called(tmp_path: Path) -> None:
    """set_progress before each step, from exactly 0 to exactly 1; after_optimizer_step after each
    update."""
    built = session(tmp_path)
    told: list[Any] = []
    built.trainer.model.set_progress = told.append
    built.trainer.model.after_optimizer_step = lambda: told.append("updated")
    finish(built)
    assert told == [
        0.0,
        "updated",
        0.25,
        "updated",
        0.5,
        "updated",
        0.75,
        "updated",
        1.0,
        "updated",
    ]


def test_the_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    """Warm-up and decay at the middle of each step: neither end is 0."""
    train = {
        "max_steps": 10,
        "learning_rate": 1.0e-3,
        "schedule": {"type": "wsd", "warmup": 0.2, "decay": 0.4},
    }
    finish(session(tmp_path, train=train))
    rates = [event["learning_rate"] for event in events(tmp_path, "step")]
    assert rates == pytest.approx(
        [2.5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 8.75e-4, 6.25e-4, 3.75e-4, 1.25e-4]
    )


# memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "fits", "curriculum"), [(8, 8, None), (5, 4, None), (3, 2, UPHILL), (1, 1, None)]
)
def test_too_large_micro_batches_are_halved_and_the_update_stays(
    most: int, fits: int, curriculum: dict | None, tmp_path: Path
) -> None:
    """Accumulation grows as the micro-batch shrinks, so the step's rows, its gradient and the
    weights are the same. The rows that a curriculum scores have to fit, too."""
    train = {
        "per_gpu_batch_size": 8,
        "accumulation_steps": 2,
        "max_steps": 3,
        "curriculum": curriculum,
        "eps": 1e-5,  # below it, rounding of a tiny gradient would decide over an update's sign
    }
    settings: dict = {"train": train, "data": {"packing": "padding"}}
    plain, small = session(tmp_path / "plain", **settings), session(tmp_path / "small", **settings)
    finish(plain)
    limit_rows(small, most)
    finish(small)
    assert small.trainer.passes.rows_at_once == fits
    assert_close(weights(plain), weights(small), SAME)
    norms = [
        [event["grad_norm"] for event in events(tmp_path / name, "step")]
        for name in ("plain", "small")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    told = [event["message"] for event in events(tmp_path / "small", "warning")]
    assert len(told) == int(math.log2(8 / fits))
    assert all("out of memory" in message for message in told)


def test_looking_for_what_fits_leaves_no_trace(tmp_path: Path) -> None:
    """The trial forward and backward change neither gradient nor dropout: bit for bit the same
    run."""
    settings: dict = {"model": {"dropout": 0.2}, "train": {"max_steps": 3}}
    plain, tried = session(tmp_path / "plain", **settings), session(tmp_path / "tried", **settings)
    finish(plain)
    limit_rows(tried, 100)
    finish(tried)
    assert equal(weights(plain), weights(tried))


def test_a_device_too_small_for_one_row_says_so(tmp_path: Path) -> None:
    built = session(tmp_path)
    limit_rows(built, 0)
    with pytest.raises(UserError, match="not even one row fits") as raised:
        finish(built)
    assert not isinstance(raised.value, Diverged), (
        "a comparison would never try it again, on a larger one either"
    )


# stopping and going on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "packing", "curriculum"),
    [("adamw", "documents", None), ("muon", "padding", UPHILL)],
)
def test_resuming_equals_not_stopping(
    optimizer: str, packing: str, curriculum: dict | None, tmp_path: Path
) -> None:
    """Stopped twice: weights, optimizer, progress and place in the data are bit for bit the
    uninterrupted run's."""
    train = {"max_steps": 15, "optimizer": optimizer, "curriculum": curriculum}
    settings: dict = {"model": {"dropout": 0.1}, "train": train, "data": {"packing": packing}}
    finish(session(tmp_path / "straight", **settings))
    for stop_at in (4, 11, 99):
        built: list[TrainingSession] = []
        reached = partial(
            lambda built, stop: built[0].trainer.progress.step >= stop, built, stop_at
        )
        built.append(session(tmp_path / "stopped", reached, **settings))
        reason = finish(built[0])
        assert reason == ("interrupted" if stop_at < 99 else "max_steps")
        assert built[0].trainer.progress.step == min(stop_at, 15)
    one, other = Project(tmp_path / "straight"), Project(tmp_path / "stopped")
    assert differences(one.checkpoint(), other.checkpoint()) == []
    assert one.steps() == other.steps() == list(range(1, 16))
    assert [e["loss"] for e in one.events("step")] == [e["loss"] for e in other.events("step")]


def test_runs_are_chained(tmp_path: Path) -> None:
    """train.runs: one horizon over all of them, an evaluation and a rotation after each; the next
    start begins a new one."""
    preset = tiny_preset(
        train={"max_steps": 3, "runs": 2, "schedule": {"type": "cosine", "warmup": 0.0}}
    )
    found = train_here(preset, tmp_path)
    assert [e["run"] for e in found if e["event"] == "run_start"] == [1, 2]
    assert [e["reason"] for e in found if e["event"] == "run_end"] == ["max_steps", "max_steps"]
    assert [e["step"] for e in found if e["event"] == "eval"] == [3, 6]
    rates = [e["learning_rate"] for e in found if e["event"] == "step"]
    assert len(rates) == 6 and rates == sorted(rates, reverse=True) and rates[5] < 0.1 * rates[0]
    assert Project(tmp_path).checkpoint("prev")["progress"]["step"] == 3
    found = train_here(preset, tmp_path)
    assert [e["run"] for e in found if e["event"] == "run_start"] == [1, 2, 3, 4]
    assert Project(tmp_path).steps() == list(range(1, 13))
    assert [e["learning_rate"] for e in found if e["event"] == "step"][6:] == pytest.approx(rates)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_max_epochs_ends_a_run_and_the_next_start_reads_again(epochs: int, tmp_path: Path) -> None:
    """The schedule ends with the data; another start is another run over the same data, not one
    that ends at once."""
    preset = tiny_preset(train={"max_steps": None, "max_epochs": epochs, "per_gpu_batch_size": 64})
    found = train_here(preset, tmp_path)
    assert found[-1]["reason"] == "max_epochs"
    steps = Project(tmp_path).steps()
    assert [e["learning_rate"] for e in found if e["event"] == "step"][-1] < 0.001
    found = train_here(preset, tmp_path)
    assert found[-1]["reason"] == "max_epochs" and found[-1]["step"] == 2 * len(steps)
    tokens = [e["tokens"] for e in found if e["event"] == "run_end"]
    assert tokens[1] == 2 * tokens[0]


@pytest.mark.slow
def test_epochs_are_counted_over_chained_runs(tmp_path: Path) -> None:
    """Each run goes on in the epoch of the one before, also after a stop between them; what is read
    ends the chain."""
    preset = tiny_preset(train={"max_steps": None, "max_epochs": 1, "per_gpu_batch_size": 64})
    straight = train_here(preset, tmp_path / "straight")
    budget = [e["tokens"] for e in straight if e["event"] == "step"][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.assembly.reading.RUN_TOKENS", budget)
        preset["train"]["runs"] = 40
        train_here(preset, tmp_path / "chained")
        found = train_here(preset, tmp_path / "chained")
    ends = [(e["reason"], e["tokens"]) for e in found if e["event"] == "run_end"]
    reasons = [reason for reason, _ in ends]
    half = reasons.index("max_epochs") + 1
    assert half > 2 and reasons == (["budget"] * (half - 1) + ["max_epochs"]) * 2
    assert ends[half - 1][1] == straight[-1]["tokens"] and ends[-1][1] == 2 * straight[-1]["tokens"]
    losses = [[e["losses"] for e in events if e["event"] == "step"] for events in (straight, found)]
    assert losses[0] == losses[1][: len(losses[0])]


def test_a_run_that_cannot_save_says_so_and_goes_on(tmp_path: Path) -> None:
    """What gets in the way after the start: warnings at failed saves, an error at the end, for that
    work would be lost."""
    built = session(tmp_path, train={"checkpoint_every_steps": 2})
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(
        CheckpointError,
        match=r"the end of the run could not be saved: .*checkpoints is no folder\. Move it away",
    ):
        finish(built)
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2, 3, 4, 5]
    assert any("checkpoint not saved" in event["message"] for event in events(tmp_path, "warning"))


def test_when_all_data_is_lost_the_run_saves_and_halts(tmp_path: Path) -> None:
    """NoData, with a checkpoint of the last step and the reason in the log."""
    built = session(tmp_path, train={"max_steps": 1000, "per_gpu_batch_size": 16})

    def lose_all() -> None:
        for path in (tmp_path / "texts").iterdir():
            path.unlink()

    built.trainer.model.after_optimizer_step = lose_all
    with pytest.raises(NoData):
        finish(built)
    assert events(tmp_path, "run_end")[-1]["reason"] == "no_data"
    assert Project(tmp_path).checkpoint()["progress"]["step"] == built.trainer.progress.step > 0


def test_the_log_says_what_evaluation_measured(tmp_path: Path) -> None:
    """During the run at each eval_every_tokens, and once at the end; samples follow."""
    train = {"max_steps": 6, "eval_tokens": 200, "eval_every_tokens": 256}
    built = session(tmp_path, train=train, data={"validation_fraction": 0.1})
    finish(built)
    assert [event["step"] for event in events(tmp_path, "eval")] == [2, 4, 6]
    assert [event["prompt"] for event in events(tmp_path, "sample")] == ["The "] * 3
    for event in events(tmp_path, "eval"):
        assert event["perplexity"] == pytest.approx(math.exp(event["cross_entropy"]))
        assert event["eval_tokens"] >= 100
    assert json.dumps(events(tmp_path, "eval"))
