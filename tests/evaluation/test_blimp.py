"""BLiMP: the pairs of a folder, a zip or the Hub; which of them are right; in training and in the
evaluate job."""

import io
import json
import math
import statistics
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import UserError
from core.evaluation.blimp import (
    FIELD_OF,
    HUB_FILE,
    REPOSITORY,
    Pairs,
    blimp_notes,
    blimp_scores,
    load_pairs,
    mean_accuracy,
    score_pairs,
)
from core.evaluation.blimp_paradigms import PARADIGMS
from core.evaluation.harness.scoring import Scorer
from core.jobs.evaluate import evaluate
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from tests.evaluation.harness.tiny import CONTEXT, build, by_hand, byte_tokenizer
from tests.project import Project, merged, tiny_preset, train_here

PER_PARADIGM = 3


def made_up(name: str, number: int) -> dict[str, str]:
    """A pair, of words of its own; the bad one of every third is the good one: a tie."""
    good = f"{name[:4]} {number} sees it."
    return {
        "sentence_good": good,
        "sentence_bad": good if number % 3 == 2 else f"it sees {name[:4]} {number}.",
        "UID": name,
    }


def write(folder: Path, left_out: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for name in FIELD_OF:
        rows = [made_up(name, number) for number in range(PER_PARADIGM)]
        if name not in left_out:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def zipped(folder: Path) -> Path:
    """As it is published: in a folder, beside what macOS leaves in archives."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for each in sorted(folder.glob("*.jsonl")):
            archive.write(each, f"data/{each.name}")
            archive.writestr(f"__MACOSX/data/._{each.name}", b"\xb0\x00")
    return path


def test_there_are_67_paradigms_in_12_fields() -> None:
    sizes = {field: len(names) for field, names in PARADIGMS.items()}
    assert len(FIELD_OF) == sum(sizes.values()) == 67 and len(sizes) == 12
    assert sizes["argument_structure"] == 9 and sizes["ellipsis"] == 2


def test_a_folder_a_zip_and_the_hub_hold_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    from core.evaluation import blimp

    folder = write(tmp_path / "blimp")
    zipped(folder)
    asked = []

    def fetch(repo: str, file: str, kind: str) -> Path:
        asked.append((repo, file, kind))
        name = file.split("/")[0]
        rows = [made_up(name, number) for number in range(PER_PARADIGM)]
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    monkeypatch.setattr(blimp, "fetch_file", fetch)
    found = [load_pairs(path, tmp_path) for path in ("blimp", "blimp.zip", None)]
    assert found[0] == found[1] == found[2] and list(found[0]) == list(FIELD_OF)
    assert found[0]["causative"][1] == ("caus 1 sees it.", "it sees caus 1.")
    assert asked == [(REPOSITORY, HUB_FILE.format(name), "datasets/") for name in FIELD_OF]
    assert {len(each) for each in load_pairs("blimp", tmp_path, limit=2).values()} == {2}


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere.zip", "cannot be read"),
        ("partly", "lacks 2 of BLiMP's 67 paradigms"),
        ("damaged", "line 2 of passive_1.jsonl in .* is no pair"),
        ("no.zip", "cannot be read"),
    ],
)
def test_what_is_not_there_is_told(path: str, told: str, tmp_path: Path) -> None:
    write(tmp_path / "partly", ("passive_1", "wh_island"))
    damaged = write(tmp_path / "damaged") / "passive_1.jsonl"
    damaged.write_text(damaged.read_text().splitlines()[0] + '\n{"sentence_good": 3}\n')
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match=f"(?s)blimp_path: .*{told}"):
        load_pairs(path, tmp_path)


def some_pairs() -> Pairs:
    return {
        name: [
            (row["sentence_good"], row["sentence_bad"])
            for row in (made_up(name, number) for number in range(PER_PARADIGM))
        ]
        for name in FIELD_OF
    }


@pytest.mark.parametrize("kind", ["simple_lm", "qwen3"])
def test_a_pair_is_right_where_the_good_sentence_is_likelier(kind: str) -> None:
    """Token by token, in float64; the same for any size of a batch."""
    tokenizer = byte_tokenizer()
    model = build(kind, tokenizer.vocab_size)
    pairs = {name: each for name, each in list(some_pairs().items())[:9]}

    def sum_of(sentence: str) -> float:
        ids = tokenizer.encode_batch([sentence])[0].tolist()
        assert len(ids) < CONTEXT
        return by_hand(model, [tokenizer.eos_id], ids)[0]

    expected = {
        name: statistics.fmean(sum_of(good) > sum_of(bad) for good, bad in each)
        for name, each in pairs.items()
    }
    assert len(set(expected.values())) > 1  # or the test shows nothing
    for rows in (1, 7, 64):
        assert score_pairs(pairs, Scorer(model, CONTEXT, rows), tokenizer) == expected


def test_a_tie_is_wrong() -> None:
    """Also for a model that finds everything equally likely."""
    tokenizer = byte_tokenizer()
    model = build("simple_lm", tokenizer.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    pairs = {"causative": [("same long", "long same"), ("one", "one")]}
    assert score_pairs(pairs, Scorer(model, CONTEXT, 4), tokenizer) == {"causative": 0.0}


def test_the_report_has_fields_paradigms_an_interval_and_the_anchors() -> None:
    accuracies = {name: (number % 10) / 10 for number, name in enumerate(FIELD_OF)}
    scores = blimp_scores(accuracies, some_pairs())
    assert len(scores) == 1 + 12 + 67
    (overall,), (ellipsis,) = scores["blimp"].metrics, scores["blimp: ellipsis"].metrics
    values = list(accuracies.values())
    assert overall.value == pytest.approx(statistics.fmean(values)) == mean_accuracy(accuracies)
    assert overall.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(67))
    assert scores["blimp"].examples == 67 * PER_PARADIGM
    assert ellipsis.value == statistics.fmean(accuracies[n] for n in PARADIGMS["ellipsis"])
    assert scores["ellipsis_n_bar_1"].part_of == "blimp: ellipsis"
    interval, anchors = blimp_notes(scores)
    half = 196.0 * (overall.stderr or 0.0)
    assert f"{100 * overall.value - half:.1f} to {100 * overall.value + half:.1f} %" in interval
    assert "64.4 %" in anchors and "71.7 %" in anchors


# in the program -----------------------------------------------------------------------------------

TRAIN = {"max_steps": 4, "eval_tokens": 400, "precision": "fp32", "eval_tasks": ["blimp"]}
TRAIN |= {"blimp_path": "blimp", "eval_task_limit": None}
MODEL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "seq_length": 96}


def test_it_is_a_curve_of_training_and_a_task_of_the_evaluate_job(tmp_path: Path) -> None:
    """Both give the same number; the second time nothing is measured anew."""
    write(tmp_path / "blimp")
    preset = tiny_preset(model=MODEL, train={**TRAIN, "eval_at_start": True})
    train_here(preset, tmp_path)
    evals = Project(tmp_path).events("eval")
    assert [event["step"] for event in evals] == [0, 4]
    assert all(0 < event["blimp_accuracy"] < 1 for event in evals)

    def evaluated() -> tuple[str, dict[str, Any]]:
        section = {"tasks": ["blimp"], "blimp_path": "blimp", "domain_perplexity": False}
        asked = merged({**preset, "job": "evaluate", "init_from": "t"}, {"evaluate": section})
        stream = io.StringIO()
        wanted = decode_preset(asked, Preset, "e", "e")
        evaluate(wanted, detect_runtime(), Single(), tmp_path, 0.0, stream)
        return stream.getvalue(), json.loads((tmp_path / "logs/e/evaluate.json").read_text())

    told, found = evaluated()
    results = found["tasks"]["blimp"]["results"]
    assert found["harness"] is None and len(results) == 80
    assert results["blimp"]["metrics"][0]["value"] == pytest.approx(evals[-1]["blimp_accuracy"])
    assert "blimp: island_effects" in told
    assert "71.7 %" in (tmp_path / "logs/e/evaluate.md").read_text()
    assert "all of it was measured already" in evaluated()[0]
    (tmp_path / "blimp/causative.jsonl").write_text(json.dumps(made_up("causative", 2)) + "\n")
    again = evaluated()[1]["tasks"]["blimp"]["results"]
    assert again["causative"]["metrics"][0]["value"] == 0.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"blimp_path": "elsewhere"}}, "blimp_path: .*elsewhere cannot be read"),
        ({"model": {"type": "neobert", "intermediate_size": 64}}, "fills in masked tokens"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    write(tmp_path / "blimp")
    preset = merged(tiny_preset(train=TRAIN), changes)
    if "model" in changes:
        preset["tokenizer"] = {"type": "bpe", "vocab_size": 300}
    with pytest.raises(UserError, match=told):
        train_here(preset, tmp_path)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())
    assert not list((tmp_path / "logs").rglob("metrics.jsonl"))
