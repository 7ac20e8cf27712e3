"""The curriculum: which rows a step trains, that nothing else of training changes, and that what is
counted is true."""

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.data.loader import StepRows
from core.errors import PresetError, UserError
from core.models import build_model
from core.preset.decode import decode_preset
from core.preset.train import CurriculumSettings, TrainSettings
from core.registry import Preset
from core.runtime import detect_runtime
from core.training.curriculum import Curriculum, buckets_of, choose
from core.training.machine import Machine
from tests.data.corpus import LANES, SEQ_LENGTH, make_factory, make_loader, start, write_corpus
from tests.data.ranks import Ranks
from tests.project import Project, merged, tiny_preset, train_here
from tests.training.runs import UPHILL, equal, events, finish, session, weights

ANY = np.ones((3, 2), dtype=bool)


def curriculum(candidates: int, *bucket_weights: Any) -> dict:
    return {"candidates": candidates, "bucket_weights": list(bucket_weights)}


# choosing -----------------------------------------------------------------------------------------


def test_buckets_are_percentiles_of_the_loss() -> None:
    """Equal sizes, the easiest first; of equal losses the earlier is easier, no number is hardest,
    no target is not counted."""
    losses = np.array([[5.0, 1.0], [np.nan, 3.0], [3.0, 9.0]])
    assert buckets_of(losses, ANY, 3).tolist() == [[1, 0], [2, 0], [1, 2]]
    assert buckets_of(losses, ANY, 6).tolist() == [[3, 0], [5, 1], [2, 4]]
    learned = ~np.isin(losses, [1.0, 9.0])
    assert buckets_of(losses, learned, 4)[learned].tolist() == [2, 3, 0, 1]
    assert buckets_of(losses, ~ANY, 4).shape == (3, 2), "nothing is learned: any answer will do"


def test_each_candidate_is_taken_as_often_as_its_bucket_weighs() -> None:
    """Three candidates of buckets 2, 0 and 1, exact on an even grid of draws; equal chances where
    all weigh nothing."""
    groups = 6000
    draws = (np.arange(groups) + 0.5) / groups
    buckets = np.repeat([[2], [0], [1]], groups, axis=1)

    def shares(weights: list[float], learned: tuple[bool, ...] = (True, True, True)) -> list[float]:
        taken = choose(
            buckets, np.repeat(np.array(learned)[:, None], groups, axis=1), weights, draws
        )
        return (np.bincount(taken, minlength=3) / groups).tolist()

    assert shares([1, 2, 3]) == pytest.approx([1 / 2, 1 / 6, 1 / 3], abs=1e-3)
    assert shares([0, 0.5, 0]) == [0, 0, 1]
    assert shares([0, 0, 0]) == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=1e-3)
    assert shares([9, 1, 1], learned=(True, False, True)) == pytest.approx(
        [1 / 2, 0, 1 / 2], abs=1e-3
    )
    assert shares([9, 0, 0], learned=(True, False, False)) == [1, 0, 0]
    assert shares([0, 0, 9], learned=(True, False, False)) == [1, 0, 0], (
        "rather weightless than without a target"
    )
    assert shares([1, 2, 3], learned=(False, False, False)) == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3], abs=1e-3
    )


def test_equal_weights_leave_it_to_chance(tmp_path: Path) -> None:
    """Chi-squared over the buckets of all trained rows; every step has draws of its own."""
    built = session(
        tmp_path, train={"max_steps": 40, "per_gpu_batch_size": 8, "curriculum": {"candidates": 3}}
    )
    seen = record(built)
    finish(built)
    # (steps, 4) rows
    taken = np.array([event["curriculum"]["buckets"] for event in events(tmp_path, "step")]) * 8
    # chi-squared: once in a thousand above
    assert taken.sum() == 40 * 8 and ((taken.sum(0) - 80) ** 2 / 80).sum() < 16.3
    assert len({tuple(rows.numbers) for rows in seen[1::2]}) == 40


def test_the_rows_of_lowest_mean_loss_are_chosen(tmp_path: Path) -> None:
    """Against plain arithmetic: with weight on the easier half only, whoever stands alone in it is
    trained. Rows are padded, so that sums would order them otherwise; dropout would, too."""
    train = {"max_steps": 1, "per_gpu_batch_size": 16, "curriculum": curriculum(2, 1, 0)}
    built = session(
        tmp_path,
        model={"dropout": 0.5},
        train=train,
        data={"packing": "padding", "min_text_length": 10},
    )
    model, seen = copy.deepcopy(built.trainer.model).eval(), record(built)
    finish(built)
    (read, trained) = seen
    output = model(read.batch)
    each = F.cross_entropy(
        output.readout(output.hidden).flatten(0, 1), read.batch.labels.flatten(), reduction="none"
    )
    count = (read.batch.labels >= 0).sum(1)
    losses = each.view(read.batch.labels.shape).sum(1) / count
    easy = (losses < losses.median()) | (losses == losses.median())
    groups = torch.arange(16)
    alone = easy[:16] != easy[16:]
    expected = torch.where(easy[:16], groups, groups + 16)[alone]
    assert count.unique().numel() > 1
    assert alone.sum() > 3
    assert set(expected.tolist()) <= set(trained.numbers)
    assert {number % 16 for number in trained.numbers} == set(range(16)), "one of each group"
    assert torch.equal(trained.batch.input_ids, read.batch.input_ids[trained.numbers])
    (told,) = [event["curriculum"] for event in events(tmp_path, "step")]
    assert told["candidates_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert told["loss"] == pytest.approx(losses[trained.numbers].mean().item(), rel=1e-5)
    assert told["loss"] < told["candidates_loss"]


def record(built: Any) -> list[StepRows]:
    """The rows of each step, before and after the choice, as they come."""
    seen: list[StepRows] = []
    chosen = built.trainer.curriculum.choose

    def choosing(model: Any, rows: StepRows, *others: Any) -> StepRows:
        seen.extend([rows, chosen(model, rows, *others)])
        return seen[-1]

    built.trainer.curriculum.choose = choosing
    return seen


def test_a_schedule_goes_from_easy_to_hard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first the rows that are trained are easier than what is read, in the end harder. The
    schedule spans the budget."""
    monkeypatch.setattr("core.assembly.reading.RUN_TOKENS", 40 * 8 * 32)
    train = {"max_steps": None, "per_gpu_batch_size": 8, "curriculum": UPHILL}
    assert finish(session(tmp_path, train=train)) == "budget"
    told = [event["curriculum"] for event in events(tmp_path, "step")]
    gaps = [each["loss"] - each["candidates_loss"] for each in told]
    assert sum(gaps[:8]) < 0 < sum(gaps[-8:])
    assert [each["weights"][2] for each in told] == pytest.approx([step / 39 for step in range(40)])
    easiest = [each["buckets"][0] for each in told]
    assert np.mean(easiest[:8]) > 0.6 > 0.4 > np.mean(easiest[-8:])


class OneByOne(Curriculum):
    """Ranks are threads here, and the compiler's stance that scoring takes is the whole
    process's."""

    lock = threading.Lock()

    def _losses(self, *arguments: Any) -> torch.Tensor:
        with self.lock:
            return super()._losses(*arguments)


def test_any_number_of_ranks_trains_the_same_rows(tmp_path: Path) -> None:
    """One, two, three and six ranks, step after step, with padding at the end of the data: the same
    rows and the same counts."""
    sections = write_corpus(tmp_path, {"a": 60, "b": 30})
    train = TrainSettings(
        curriculum=CurriculumSettings(candidates=3, bucket_weights=[1.0, 0.0, 0.0])
    )
    preset = decode_preset(tiny_preset(), Preset, "t", "t")
    model = build_model(preset, 257)
    rows_per_step = 2 * LANES

    def job(parallel: Any) -> list[StepRows]:
        own = copy.deepcopy(model)
        machine = Machine(detect_runtime(), parallel, torch.float32)
        chooser, found = OneByOne(train, len(sections), machine), []
        factory = make_factory(tmp_path, sections, packing="padding", max_epochs=1)
        loader = make_loader(factory, start(), 3 * rows_per_step, parallel, fill=False)
        while (rows := loader.next_step()) is not None:
            found.append(chooser.choose(own, rows, [rows.batch], 0.0, len(found)))
        loader.close()
        return found

    (alone,) = Ranks(1).run(job)
    assert len(alone) > 5
    assert alone[0].batch.labels.shape == (rows_per_step, SEQ_LENGTH)
    assert alone[-1].num_tokens
    for world_size in (2, 3, 6):
        shares = Ranks(world_size).run(job)
        for step, whole in enumerate(alone):
            parts = [share[step] for share in shares]
            assert all(len(part.numbers) == rows_per_step // world_size for part in parts)
            assert sorted(number for part in parts for number in part.numbers) == whole.numbers
            for part in parts:
                places = [whole.numbers.index(number) for number in part.numbers]
                assert torch.equal(part.batch.input_ids, whole.batch.input_ids[places])
                counts = ("num_targets", "num_tokens", "source_tokens", "documents", "epochs")
                assert all(getattr(part, name) == getattr(whole, name) for name in counts)
            assert whole.num_targets == int((whole.batch.labels >= 0).sum())
            assert sum(whole.source_tokens) == whole.num_tokens


# nothing else changes -----------------------------------------------------------------------------

MIXING = {"type": "polychromatic", "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 64}


@pytest.mark.parametrize("model", [{"dropout": 0.1}, MIXING], ids=["simple_lm", "polychromatic"])
def test_choosing_touches_training_only_through_the_rows(model: dict, tmp_path: Path) -> None:
    """The rows it chose, given to a run without it: the same bits, for all dropout, routing noise
    and auxiliary heads."""
    heads = {"enable_policy": True, "enable_value": True}
    settings: dict = {
        "model": model,
        "train": {"max_steps": 4, "accumulation_steps": 2},
        "auxiliary": heads,
    }
    on = session(tmp_path / "on", **merged(settings, {"train": {"curriculum": UPHILL}}))
    seen = record(on)
    finish(on)
    off = session(tmp_path / "off", **settings)
    chosen = iter(seen[1::2])
    off.trainer.loader.next_step = lambda *_: next(chosen)
    assert off.trainer.curriculum is None
    finish(off)
    assert equal(weights(on), weights(off))
    told, plain = events(tmp_path / "on", "step"), events(tmp_path / "off", "step")
    assert [event["losses"] for event in told] == [event["losses"] for event in plain]
    assert told[-1]["losses"]["policy"] > 0


def test_off_it_is_not_there(tmp_path: Path) -> None:
    """No curriculum, no more rows read than are trained, nothing in the log."""
    built = session(tmp_path)
    finish(built)
    assert built.trainer.curriculum is None and built.trainer.loader.position.rows == 5 * 4
    assert not any("curriculum" in event for event in events(tmp_path, "step"))


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once(tmp_path: Path) -> None:
    """Scoring, another mode without gradients, runs beside the compiled training step and never has
    it compiled anew."""
    from torch._dynamo.utils import counters

    found = {}
    for compiled in (False, True):
        root = tmp_path / f"{compiled}"
        built = session(root, train={"max_steps": 6, "learning_rate": 1e-4, "curriculum": UPHILL})
        if compiled:
            counters.clear()
            built.trainer.model.compile(backend="eager", dynamic=False)
        finish(built)
        found[compiled] = [event["loss"] for event in events(root, "step")]
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


# what is counted ----------------------------------------------------------------------------------


def test_the_budget_counts_what_is_trained(tmp_path: Path) -> None:
    """Tokens of the run and of the ledger are of trained rows, the sources' schedules span them;
    what was passed over is told."""
    (tmp_path / "other").mkdir(parents=True)
    (tmp_path / "other" / "text.txt").write_text(
        "\n\n".join(f"Number {i} is not {i + 1}." for i in range(4000))
    )
    first, second = ({"from": x, "to": 1 - x, "begin": 0.5, "end": 0.51} for x in (1, 0))
    data = {
        "sources": [{"type": "text", "path": "texts"}, {"type": "text", "path": "other"}],
        "mix_strategy": "weighted",
        "source_weights": [first, second],
        "weights_of": "tokens",
    }
    train = {"max_steps": 60, "per_gpu_batch_size": 8, "curriculum": curriculum(2, 1, 1)}
    built = session(tmp_path, train=train, data=data)
    assert built.start_event["tokens_per_step"] == 8 * 32
    assert built.trainer.curriculum.note in built.notes
    finish(built)
    steps, progress = events(tmp_path, "step"), built.trainer.progress
    assert [event["tokens"] for event in steps] == [8 * 32 * n for n in range(1, 61)]
    assert progress.run_tokens == 60 * 8 * 32
    assert all(event["curriculum"]["passed_over_tokens"] == 8 * 32 for event in steps)
    assert sum(account["tokens"] for account in progress.ledger.values()) == progress.tokens
    assert built.trainer.loader.position.rows == 60 * 16
    trained = np.diff(
        [[0, 0], *([s["tokens"] for s in event["sources"].values()] for event in steps)], axis=0
    )
    assert trained[:24, 1].sum() == 0 and trained[-20:, 0].sum() == 0, (
        "the mix turns in the middle of the run"
    )


def test_max_epochs_ends_with_what_is_read(tmp_path: Path) -> None:
    """One pass reads everything once and trains half of it; the schedules span what is trained."""
    preset = tiny_preset(
        train={
            "max_steps": None,
            "max_epochs": 1,
            "per_gpu_batch_size": 32,
            "curriculum": curriculum(2, 1, 1),
        }
    )
    found = train_here(preset, tmp_path)
    steps = [event for event in found if event["event"] == "step"]
    passed_over = sum(event["curriculum"]["passed_over_tokens"] for event in steps)
    assert found[-1]["reason"] == "max_epochs"
    assert passed_over == pytest.approx(steps[-1]["tokens"], rel=0.1)
    plain = train_here(
        merged(preset, {"train": {"curriculum": None}, "lineage": "plain"}), tmp_path
    )
    assert steps[-1]["tokens"] + passed_over == plain[-1]["tokens"]
    assert found[-1]["receipt"] == plain[-1]["receipt"]
    assert steps[-1]["learning_rate"] < 0.2 * 0.003
    assert Project(tmp_path).checkpoint()["progress"]["fraction"] > 0.95


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"candidates": 1}, r"train\.curriculum\.candidates  1: .*greater than or equal to 2"),
        (curriculum(2, 1), r"train\.curriculum\.bucket_weights  \[1\]: .*at least 2 items"),
        (
            curriculum(2, 1, -1),
            r"train\.curriculum .*must not be negative, and not all zero; at 0 they are \[1\.0, "
            r"-1\.0\]",
        ),
        (
            curriculum(2, {"from": 1, "to": 0}, 0),
            r"train\.curriculum .*at 1 they are \[0\.0, 0\.0\]",
        ),
    ],
)
def test_mistakes_in_a_preset(section: dict, told: str) -> None:
    with pytest.raises(PresetError, match=told):
        decode_preset(tiny_preset(train={"curriculum": section}), Preset, "t", "t")


def test_masked_tokens_are_refused(tmp_path: Path) -> None:
    """Before anything is written: which tokens are hidden is chance, and so is a row's loss."""
    masked = {"model": {"type": "neobert"}, "tokenizer": {"type": "bpe", "vocab_size": 300}}
    with pytest.raises(UserError, match=r"train\.curriculum .* this model predicts masked tokens"):
        train_here(tiny_preset(**masked, train={"curriculum": {}}), tmp_path)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "logs").exists()
