"""Runs that predict masked tokens: resumed, chained, run from the outside, and refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from core.data.tokenizer_build import build_tokenizer
from core.errors import UserError
from core.preset.settings import TokenizerSettings
from tests.parallel.test_ddp import assert_ended
from tests.project import Project, differences, merged
from tests.training.masked import PRESET, masked_run, of_kind, write_texts
from tests.training.runs import finish, session


@pytest.mark.slow
@pytest.mark.parametrize("head", ["distance", "decoder"])
def test_resuming_equals_not_stopping(head: str, tmp_path: Path) -> None:
    """Weights, optimizer, data and every number told, to the bit; prototypes are on the sphere; the
    evaluation at the start is made once."""
    preset = PRESET
    if head == "decoder":
        model = {"head": "decoder", "keep_decoder": False}
        preset = merged(PRESET, {"model": model, "losses": [{"type": "cross_entropy"}]})
    for name in ("whole", "halves"):
        write_texts(tmp_path / name)
    finish(session(tmp_path / "whole", **preset))
    half = session(tmp_path / "halves", **preset)
    half.trainer.should_stop = lambda: half.trainer.progress.step == 3
    assert finish(half) == "interrupted"
    assert [event["step"] for event in of_kind(tmp_path / "halves", "eval")] == [0]
    rest = session(tmp_path / "halves", **preset)
    assert rest.trainer.progress.step == 3
    assert finish(rest) == "max_steps"
    whole, halves = (Project(tmp_path / name) for name in ("whole", "halves"))
    assert differences(whole.checkpoint(), halves.checkpoint()) == []
    assert [event["step"] for event in halves.events("eval")] == [0, 4, 8]
    for kind in ("step", "eval", "sample", "neighbors"):
        changing = ("time", "seconds", "tokens_per_second", "data_seconds", "memory_mb")
        one, other = (
            [{k: v for k, v in e.items() if k not in changing} for e in each.events(kind)]
            for each in (whole, halves)
        )
        assert one == other, kind
    if head == "distance":
        lengths = whole.checkpoint()["model"]["dist_head.weight"].double().norm(dim=-1)
        assert float((lengths - 1.0).abs().max()) < 1e-6


@pytest.mark.slow
def test_the_next_run_begins_without_an_evaluation_of_its_own(tmp_path: Path) -> None:
    """eval_at_start is of the lineage's beginning: the second run's weights were just evaluated."""
    train = {"max_steps": 2, "eval_every_tokens": 10_000}
    for _ in range(2):
        masked_run(tmp_path, train=train)
    assert [event["step"] for event in of_kind(tmp_path, "eval")] == [0, 2, 4]


@pytest.mark.slow
def test_from_the_outside(make_project: Callable[..., Project]) -> None:
    """A run by its name with its pictures, then the jobs that refuse it: exit code 2, no
    traceback."""
    jobs = {job: {**PRESET, "job": job, "init_from": "t"} for job in ("evaluate", "interpret")}
    project = make_project({"t": PRESET, **jobs})
    write_texts(project.folder)
    assert_ended(project.run("t"))
    saved = {path.name for path in (project.folder / "logs" / "t").iterdir()}
    assert saved == {"metrics.jsonl", "preset.json", "run.json", "loss.png", "masked.png"}
    for job in jobs:
        result = project.run(job)
        assert_ended(result, 2)
        assert "t_current.pth holds a neobert, which" in result.err


def test_a_step_in_which_chance_masks_nothing_is_passed_over(tmp_path: Path) -> None:
    """Short rows, one at a time, and few masked tokens: some steps have none, and the run goes on
    to its end all the same."""
    few = {
        "train": {"per_gpu_batch_size": 1, "max_steps": 30, "eval_tokens": 0},
        "data": {"mask_fraction": 0.05},
    }
    events = masked_run(tmp_path, model={"seq_length": 8}, **few)
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 30 and all(event["loss"] > 0 for event in steps)
    assert Project(tmp_path).checkpoint()["data"]["rows"] > 60, (
        "most rows of eight tokens have none masked"
    )


def test_a_tokenizer_without_a_mask_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TokenizerSettings(type="bpe", vocab_size=300), ["some text"])
    (tmp_path / "made").mkdir()
    tokenizer.save(tmp_path / "made" / "tokenizer.json")
    with pytest.raises(UserError, match=r"no \[MASK\] among its special tokens"):
        masked_run(tmp_path, tokenizer={"type": "file", "path": "made/tokenizer.json"})
    assert not (tmp_path / "logs").exists() and not (tmp_path / "checkpoints").exists()
