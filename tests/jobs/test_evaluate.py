"""The evaluate job: which weights, what is measured anew and what is kept, what is told, and how it
is stopped."""

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.data.corpus import open_corpus, open_held_out
from core.errors import Interrupted, MissingPackage, NoData, UserError
from core.evaluation.harness import library
from core.jobs import JOBS
from core.jobs.evaluate import evaluate
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from core.ui.evaluate import EvaluateView
from tests.documents import GUIDE, block_of, files_named
from tests.evaluation.harness.tiny import SEQUENCE
from tests.jobs.test_tokenize_shown import Terminal
from tests.project import ROOT, Project, merged, tiny_preset, train_here

pytest.importorskip("lm_eval")
MODEL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "seq_length": 96}
TRAINED = tiny_preset(model=MODEL, train={"max_steps": 3, "eval_tokens": 400, "precision": "fp32"})
WANTED = {"tasks": ["python_facts", "small_sums"], "task_path": "tasks", "limit": 4}


def asked(**changes: Any) -> Any:
    """A preset that evaluates the lineage "t"."""
    preset = merged({**TRAINED, "job": "evaluate", "init_from": "t", "evaluate": WANTED}, changes)
    return decode_preset(preset, Preset, "e", "e")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lineage "t" has been trained for three steps; nobody may change it."""
    root = tmp_path_factory.mktemp("trained")
    train_here(TRAINED, root)
    shutil.copytree(ROOT / "benchmarks" / "tasks", root / "tasks")
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "project"))


def run(
    root: Path, preset: Any | None = None, stream: io.StringIO | None = None
) -> tuple[str, dict[str, Any]]:
    """What is told, and evaluate.json."""
    stream = stream or io.StringIO()
    evaluate(preset or asked(), detect_runtime(), Single(), root, 0.0, stream)
    return stream.getvalue(), json.loads((root / "logs" / "e" / "evaluate.json").read_text())


def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is measured from here on, by name."""
    seen: list[str] = []
    start = EvaluateView.start
    monkeypatch.setattr(
        EvaluateView, "start", lambda self, name: seen.append(name) or start(self, name)
    )
    return seen


def assert_reported(root: Path, told: str, bits_per_byte: str) -> None:
    """On the screen and in evaluate.md."""
    report = (root / "logs" / "e" / "evaluate.md").read_text()
    for text in (told, report):
        assert (
            "python_facts" in text
            and "exact_match (first-number)" in text
            and bits_per_byte in text
        )
    assert (
        "- trained on: " in report
        and "lm_eval" in report
        and told.endswith("report: logs/e/evaluate.md\n")
    )


def test_everything_is_measured_once_and_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks and held-out text; the numbers of training's own evaluation; again only what has
    changed since."""
    seen = turns(monkeypatch)
    told, found = run(root)
    everything = ["python_facts", "small_sums", "held-out documents of texts"]
    assert seen == everything
    assert set(found["tasks"]) == {"python_facts", "small_sums"} and found["not_causal"] is None
    about = found["model"]
    assert (about["weights"], about["step"], about["type"], about["causal"]) == (
        "t_current.pth",
        3,
        "simple_lm",
        True,
    )
    assert found["precision"] == "fp32" and found["harness"] == {
        "package": "lm_eval",
        "version": library.version(),
    }
    facts = found["tasks"]["python_facts"]["results"]["python_facts"]
    assert facts["examples"] == 4 and {m["metric"] for m in facts["metrics"]} == {"acc", "acc_norm"}
    last = [event for event in Project(root).events("eval")][-1]
    texts = found["domain_perplexity"]["texts"]
    assert texts["tokens"] == last["eval_tokens"]
    for key in ("cross_entropy", "perplexity", "bits_per_byte", "token_accuracy"):
        assert texts[key] == pytest.approx(last[key], rel=1e-5), key
    assert all(
        (root / name).exists()
        for name in files_named(block_of(GUIDE, "logs/<lineage>/evaluate.md"), lineage="e")
    )
    assert_reported(root, told, f"{texts['bits_per_byte']:.4f}")

    told, again = run(root)
    assert (
        seen == everything
        and "all of it was measured already; delete logs/e/evaluate.json to measure anew" in told
    )
    assert (
        again["tasks"] == found["tasks"]
        and again["domain_perplexity"] == found["domain_perplexity"]
    )
    run(root, asked(evaluate={"batch_size": 3}))
    assert seen == everything, "the size of a batch changes no number"
    run(root, asked(evaluate={"limit": 5}))
    assert seen == [*everything, "python_facts", "small_sums"]
    (root / "tasks" / "python_facts.yaml").touch()
    run(root, asked(evaluate={"limit": 5, "tasks": ["python_facts"]}, train={"eval_tokens": 300}))
    assert seen[5:] == ["python_facts", "held-out documents of texts"]
    os.replace(root / "checkpoints" / "t_current.pth", root / "checkpoints" / "t_prev.pth")
    train_here(merged(TRAINED, {"train": {"seed": 7}}), root)
    run(root)
    assert seen[7:] == everything, "other weights"


def test_what_is_interrupted_keeps_what_is_done(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C amid the second task: the first one's numbers stay, and the next start goes on with
    the second."""
    seen, before = turns(monkeypatch), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:

        def press(self: EvaluateView, done: int, total: int) -> None:
            if seen[-1] == "small_sums":
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(EvaluateView, "update", press)
        with pytest.raises(Interrupted, match="after 1 measurements; they are kept") as stopped:
            run(root)
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    kept = json.loads((root / "logs" / "e" / "evaluate.json").read_text())
    assert list(kept["tasks"]) == ["python_facts"] and not kept["domain_perplexity"]
    _, found = run(root)
    assert seen == ["python_facts", "small_sums", "small_sums", "held-out documents of texts"]
    assert (
        list(found["tasks"]) == ["python_facts", "small_sums"]
        and found["tasks"]["python_facts"] == kept["tasks"]["python_facts"]
    )


def test_numbers_of_a_model_that_is_not_causal_say_so(tmp_path: Path) -> None:
    """In every row of both tables, in every entry of the file, and in one sentence."""
    model = {
        "type": "polychromatic",
        "num_kv_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "routing": SEQUENCE,
    }
    preset = merged(TRAINED, {"model": {**MODEL, **model}})
    train_here(preset, tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "tasks", tmp_path / "tasks")
    preset = {**preset, "job": "evaluate", "init_from": "t", "evaluate": {**WANTED, "limit": 2}}
    told, found = run(tmp_path, decode_preset(preset, Preset, "e", "e"))
    assert (
        "every position of this model sees the whole row" in found["not_causal"]
        and found["not_causal"] in told
    )
    entries = [*found["tasks"].values(), *found["domain_perplexity"].values()]
    assert len(entries) == 3 and all(
        entry["not_causal"] == found["not_causal"] for entry in entries
    )
    report = (tmp_path / "logs" / "e" / "evaluate.md").read_text()
    assert f"**{found['not_causal']}**" in report
    rows = [
        line
        for line in report.splitlines()
        if line.startswith("|") and "---" not in line and "| note |" not in line
    ]
    assert len(rows) == 4 and all(line.endswith("| not causal |") for line in rows)
    assert len([line for line in told.splitlines() if line.endswith("not causal")]) == 4


def test_a_terminal_gets_a_bar_and_framed_tables(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    told, _ = run(root, stream=terminal)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told)
    assert (
        "┃ task" in drawn
        and "│ python_facts" in drawn
        and told.count("\x1b[?25l") == told.count("\x1b[?25h") > 0
    )


def test_progress_is_told_in_rows_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    lines = io.StringIO()
    with EvaluateView(lines, clock=lambda: now[0]) as view:
        view.start("mmlu")
        for second in range(1, 12):
            now[0] = float(second)
            view.update(100 * second, 2000)
        view.table(
            "numbers",
            ["task", "metric", "value"],
            [["mmlu", "acc", "0.25"], ["", "acc_norm", "0.5"]],
        )
    assert lines.getvalue().splitlines() == [
        "mmlu  500 of 2,000  15s left",
        "mmlu  1,000 of 2,000  10s left",
        "numbers",
        "  task  metric    value",
        "  mmlu  acc        0.25",
        "        acc_norm    0.5",
    ]


# weights and data ---------------------------------------------------------------------------------


def test_held_out_documents_are_those_of_the_training(root: Path) -> None:
    """Files that came later change nothing, and a preset that holds out more gets only what
    training held out."""
    state = open_corpus(asked(), root, Single()).hold_out.state()
    for number in range(160):
        (root / "texts" / f"zz{number}.txt").write_text(
            f"A later story, number {number}: nobody has read it yet, and it is long enough."
        )
    before = state["held"]["texts"]
    corpus, _ = open_held_out(asked(), root, Single(), None, state)
    assert corpus.hold_out.state()["held"]["texts"] == before
    fresh, _ = open_held_out(asked(), root, Single(), None, None)
    assert fresh.hold_out.state()["held"]["texts"] != before
    more, trained = (
        asked(data={"validation_fraction": 0.3}),
        {"data": {"validation_fraction": 0.02}},
    )
    # a checkpoint that does not keep the fraction
    older = {key: state[key] for key in ("held", "released")}
    corpus, notes = open_held_out(more, root, Single(), trained, older)
    assert (
        corpus.hold_out.fraction == 0.02
        and "validation_fraction is 0.02, as in training" in notes[0]
    )
    corpus, _ = open_held_out(more, root, Single(), trained, state)  # which was begun with less
    assert (
        corpus.hold_out.fraction == state["fraction"] == 0.01
        and "0.01, as before" in corpus.notes[-1]
    )


def test_what_cannot_be_evaluated_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nothing to evaluate: name some"):
        run(root, asked(evaluate={"tasks": [], "domain_perplexity": False}))
    with pytest.raises(UserError, match=r"absent_current.pth is not there"):
        run(root, asked(init_from="absent"))
    with pytest.raises(NoData, match=r"(?s)nothing could be measured.*eval_tokens is 0"):
        run(root, asked(evaluate={"tasks": []}, train={"eval_tokens": 0}))
    gone = {"data": {"sources": [{"type": "text", "path": "gone"}]}}
    with pytest.raises(NoData, match="no source of preset e could be opened"):
        run(root, asked(evaluate={"tasks": []}, **gone))
    told, found = run(root, asked(evaluate={"tasks": ["python_facts"]}, **gone))
    assert (
        "note  no held-out documents: no source" in told
        and found["notes"]
        and set(found["tasks"]) == {"python_facts"}
    )

    def absent(name: str) -> str:
        raise library.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(library.metadata, "version", absent)
    with pytest.raises(MissingPackage, match=r"lm_eval is missing: pip install"):
        run(root)


def test_the_other_ranks_have_nothing_to_do(root: Path) -> None:
    other = Single()
    other.rank = 1
    evaluate(asked(), detect_runtime(), other, root, 0.0, io.StringIO())
    assert not (root / "logs" / "e").exists()


def test_the_menu_says_which_weights_and_what(root: Path) -> None:
    preview = JOBS["evaluate"].preview
    assert preview(asked(), root) == [
        "evaluates t_current.pth, step 3",
        "on the tasks python_facts, small_sums (at most 4 examples of each); held-out documents "
        "of texts",
        "writes logs/e/evaluate.md and evaluate.json",
    ]
    assert preview(asked(init_from="absent"), root)[0].startswith(
        "cannot start yet: checkpoints/absent_current.pth is not there"
    )
    assert preview(asked(evaluate={"tasks": []}), root)[1] == "on held-out documents of texts"


# from the outside ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_through_main_without_a_network(make_project: Callable[..., Project]) -> None:
    """All of it; and a task whose data are on the Hub ends with exit code 3 and no traceback."""
    evaluation = merged(TRAINED, {"job": "evaluate", "init_from": "t", "evaluate": WANTED})
    far = merged(evaluation, {"evaluate": {"tasks": ["far"]}})
    project = make_project({"e": evaluation, "f": far})
    train_here(TRAINED, project.folder)
    shutil.copytree(ROOT / "benchmarks" / "tasks", project.folder / "tasks")
    (project.folder / "tasks" / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\ndoc_to_text: "
        "q\ndoc_to_target: a\n"
    )
    result = project.run("e")
    assert result.code == 0 and result.err == "", result.text
    assert "small_sums" in result.out and "report: logs/e/evaluate.md" in result.out
    result = project.run("f")
    assert result.code == 3 and "Traceback" not in result.text, result.text
    assert (
        "task far needs a data set of the Hugging Face Hub" in result.err
        and "127.0.0.1" in result.err
    )
