"""The harness itself, run on local tasks: its numbers are those of scoring the same strings by
hand; and its rules of text."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.data.tokenizer import Tokenizer
from core.errors import MissingPackage, NoData, UserError
from core.evaluation.harness import tasks as tasks_module
from core.evaluation.harness.library import harness
from core.evaluation.harness.scoring import Scorer
from core.evaluation.harness.tasks import open_tasks, run_task
from core.evaluation.harness.wrapper import as_harness_model, sampling_params
from core.evaluation.harness.writing import Writer
from core.evaluation.results import EvaluationResults, TaskScore, read_results, task_scores
from core.generation.engine import TextGenerator
from core.generation.sampling import SamplingParams
from tests.evaluation.harness.tiny import (
    CONTEXT,
    EXACT,
    OF_TEXT,
    bpe_tokenizer,
    build,
    by_hand,
    byte_tokenizer,
    continue_by_hand,
    logs_of,
)
from tests.project import ROOT

pytest.importorskip("lm_eval")
SHIPPED = ROOT / "benchmarks" / "tasks"


def quiet(done: int, total: int) -> None:
    pass


def wrapped(model: Any, tokenizer: Tokenizer, batch_size: int = 4, context: int = CONTEXT) -> Any:
    return as_harness_model(
        Scorer(model, context, batch_size),
        Writer(TextGenerator(model, tokenizer, context), batch_size),
        tokenizer,
        quiet,
    )


def asked(*arguments: Any) -> Any:
    """A request of the harness."""
    return SimpleNamespace(args=arguments)


# its rules of text --------------------------------------------------------------------------------


def test_contexts_and_continuations_become_tokens_by_its_rule() -> None:
    """White space at the end of a context belongs to the continuation; both are tokenized together;
    nothing is never read."""
    tokenizer = bpe_tokenizer()
    pair = wrapped(build("simple_lm", tokenizer.vocab_size), tokenizer)._pair
    ids = lambda text: tokenizer.encode_batch([text])[0].tolist()  # noqa: E731
    assert pair("the river", " of the") == (ids("the river"), ids(" of the"))
    assert pair("the river ", "of the") == pair("the river", " of the")
    assert len(pair("the river", " of")[1]) == 1
    assert pair("", "the river") == ([tokenizer.eos_id], ids("the river"))
    assert pair("  ", "the") == ([tokenizer.eos_id], ids("  the"))
    assert ids("In") == ids("In year")[:1] and len(ids("I")) == 1
    assert pair("I", "n") == (ids("I"), ids("n")), "one token spans both: they are tokenized apart"


@pytest.mark.parametrize("kind", OF_TEXT)
def test_loglikelihoods_are_those_of_the_strings(kind: str) -> None:
    tokenizer = byte_tokenizer()
    model = build(kind, tokenizer.vocab_size)
    ids = lambda text: tokenizer.encode_batch([text])[0].tolist()  # noqa: E731
    cases = [
        ("In year", " 31"),
        ("In year ", "31"),
        ("", "river"),
        ("x" * 50, " end"),
        ("a", "b"),
        (" ", "b"),
    ]
    contexts = [
        ids("In year"),
        ids("In year"),
        [tokenizer.eos_id],
        ids("x" * 50),
        ids("a"),
        [tokenizer.eos_id],
    ]
    scored = [ids(" 31"), ids(" 31"), ids("river"), ids(" end"), ids("b"), ids(" b")]
    expected = [by_hand(model, *pair) for pair in zip(contexts, scored)]
    for batch_size in (1, 16):
        found = wrapped(model, tokenizer, batch_size).loglikelihood(
            [asked(*case) for case in cases]
        )
        assert found == [(pytest.approx(value, abs=EXACT), greedy) for value, greedy in expected]
        assert all(type(value) is float and type(greedy) is bool for value, greedy in found)


@pytest.mark.parametrize("kind", ["simple_lm", "not causal"])
def test_rolling_scores_every_token_once_in_the_harness_windows(kind: str) -> None:
    """The first follows the end-of-document token, and the last window is as full as the first."""
    tokenizer = byte_tokenizer()
    model = build(kind, tokenizer.vocab_size)
    texts = [
        "",
        "a",
        "The captain met a river in the garden of the winter, and nobody wrote it down.",
        "x" * CONTEXT,
    ]
    expected = []
    for text in texts:
        ids = [tokenizer.eos_id, *tokenizer.encode_batch([text])[0].tolist()]
        width = CONTEXT if model.is_causal else CONTEXT - 1
        total, done = 0.0, 1
        while done < len(ids):
            end = min(done + width, len(ids))
            window = ids[max(0, end - width - 1) : end]
            logs = logs_of(model, window[:-1] if model.is_causal else window)
            for place in range(len(window) - (end - done), len(window)):
                total += float(logs[place - 1, window[place]])
            done = end
        expected.append(total)
    found = wrapped(model, tokenizer).loglikelihood_rolling([asked(text) for text in texts])
    assert found == [pytest.approx(value, abs=EXACT) for value in expected]
    assert found[0] == 0.0 and all(type(value) is float for value in found)


def test_what_a_task_wants_of_a_text() -> None:
    notes: list[str] = []
    assert sampling_params(
        {"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}, notes
    ) == SamplingParams(("\n",), 5)
    assert sampling_params({"until": ["a", "b"], "max_new_tokens": "9"}, notes) == SamplingParams(
        ("a", "b"), 9
    )
    assert sampling_params({}, notes) == SamplingParams() and sampling_params(
        {"temperature": 0.5}, notes
    ) == SamplingParams(temperature=0.5)
    assert sampling_params({"do_sample": True, "top_p": 0.9}, notes) == SamplingParams(
        temperature=1.0, top_p=0.9
    )
    assert notes == []
    assert (
        sampling_params({"num_beams": 4}, notes)
        == sampling_params({"num_beams": 2}, notes)
        == SamplingParams()
    )
    assert len(notes) == 1 and "num_beams" in notes[0]
    with pytest.raises(UserError, match="limit of tokens"):
        sampling_params({"max_gen_toks": 0}, notes)


# whole tasks --------------------------------------------------------------------------------------


def write_task(folder: Path, name: str, rows: list[dict], **config: Any) -> None:
    """A task file, which is YAML and so may be JSON, and its data beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(
        json.dumps({"task": name, **data, "metadata": {"version": 3}, **config})
    )


def run(
    model: Any, tokenizer: Tokenizer, folder: Path, name: str, context: int = CONTEXT, **how: Any
) -> TaskScore:
    loaded = open_tasks([name], folder, lambda line: None)[name]
    found = run_task(
        wrapped(model, tokenizer, context=context), loaded, how.get("limit"), how.get("num_fewshot")
    )
    return task_scores(found)[name]


@pytest.mark.parametrize("kind", OF_TEXT)
def test_a_multiple_choice_task_is_scored_as_by_hand(kind: str, tmp_path: Path) -> None:
    """Accuracy, and accuracy by length, of answers longer and shorter than the context; the
    standard error of a mean."""
    tokenizer = byte_tokenizer()
    model = build(kind, tokenizer.vocab_size)
    choices = ["stone", "winter", "a", "the garden"]
    rows = [
        {
            "q": f"In year {31 * i} the {'river ' * (i % 4)}met",
            "answers": choices[i % 2 :],
            "right": i % 3,
        }
        for i in range(9)
    ]
    config = {"doc_to_text": "{{q}}", "doc_to_choice": "{{answers}}", "doc_to_target": "{{right}}"}
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ]
    write_task(
        tmp_path, "choice", rows, output_type="multiple_choice", metric_list=metrics, **config
    )
    found = run(model, tokenizer, tmp_path, "choice")

    hits = {"acc": [], "acc_norm": []}
    for row in rows:
        context, logs = tokenizer.encode_batch([row["q"]])[0].tolist(), []
        for answer in row["answers"]:
            logs.append(
                by_hand(model, context, tokenizer.encode_batch([f" {answer}"])[0].tolist())[0]
            )
        best = max(range(len(logs)), key=lambda i: logs[i])
        by_length = max(range(len(logs)), key=lambda i: logs[i] / len(row["answers"][i]))
        hits["acc"].append(best == row["right"])
        hits["acc_norm"].append(by_length == row["right"])
    for metric in found.metrics:
        own = hits[metric.metric]
        mean = sum(own) / len(own)
        assert metric.value == pytest.approx(mean) and metric.higher_is_better is True
        assert metric.stderr == pytest.approx((mean * (1 - mean) / (len(own) - 1)) ** 0.5)
    assert (found.examples, found.num_fewshot, found.version) == (9, 0, 3) and len(
        found.metrics
    ) == 2


@pytest.mark.parametrize("kind", OF_TEXT)
def test_a_generation_task_is_written_as_by_hand(kind: str, tmp_path: Path) -> None:
    """Exact matches of what is said up to a stop string; `limit` takes the first examples."""
    tokenizer = byte_tokenizer()
    model = build(kind, tokenizer.vocab_size)
    rows, expected = [], []
    for i in range(6):
        prompt = f"{'year ' * (i % 3)}{i} ="
        said = tokenizer.decode(
            continue_by_hand(
                model, tokenizer.encode_batch([prompt])[0].tolist(), 6, tokenizer.eos_id
            )
        )
        stop = said[2:4]
        cut = said[: said.find(stop)]
        rows.append({"q": prompt, "a": cut if i % 2 else "never", "stop": stop})
        expected.append(float(i % 2))
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    for i, row in enumerate(rows):  # what stops is the same for a whole task, so each has one
        config = {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": metrics}
        kwargs = {"until": [row["stop"]], "max_gen_toks": 6, "do_sample": False}
        write_task(
            tmp_path,
            f"say{i}",
            [row, row, row],
            output_type="generate_until",
            generation_kwargs=kwargs,
            **config,
        )
    names = [f"say{i}" for i in range(6)]
    loaded = open_tasks(names, tmp_path, lambda line: None)
    values = []
    for name in names:
        found = task_scores(run_task(wrapped(model, tokenizer), loaded[name], 2, None))[name]
        assert found.examples == 2
        values.append(found.metrics[0].value)
    assert values == expected


def test_the_shipped_tasks_run(tmp_path: Path) -> None:
    """Whole, with their own settings: as many examples as there are, and the answers that are there
    are right."""
    tokenizer = byte_tokenizer()
    model = build("simple_lm", tokenizer.vocab_size, context=128).float()
    facts = run(model, tokenizer, SHIPPED, "python_facts", context=128)
    sums = run(model, tokenizer, SHIPPED, "small_sums", context=128, num_fewshot=1, limit=5)
    assert facts.examples == len((SHIPPED / "python_facts.jsonl").read_text().splitlines()) == 48
    assert (sums.examples, sums.num_fewshot, sums.metrics[0].filter) == (
        5,
        1,
        "first-number",
    )
    for line in (SHIPPED / "small_sums.jsonl").read_text().splitlines():
        row = json.loads(line)
        a, sign, b = row["question"].split()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    questions = [
        json.loads(line)["question"]
        for line in (SHIPPED / "python_facts.jsonl").read_text().splitlines()
    ]
    assert len(set(questions)) == len(questions)


def test_a_group_of_tasks_is_told_with_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    config = {
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["a", "b"],
        "doc_to_target": 0,
        "output_type": "multiple_choice",
    }
    for name, count in (("one", 2), ("two", 4)):
        write_task(tmp_path, name, [{"q": f"{name} {i}"} for i in range(count)], **config)
    group = {"group": "both", "task": ["one", "two"], "metadata": {"version": 1}}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    without_its_own(monkeypatch)
    loaded = open_tasks(["both"], tmp_path, lambda line: None)["both"]
    found = task_scores(
        run_task(wrapped(build("simple_lm", tokenizer.vocab_size), tokenizer), loaded, None, None)
    )
    assert {name: each.part_of for name, each in found.items()} == {
        "one": "both",
        "two": "both",
        "both": None,
    }
    values = {
        name: next(m.value for m in each.metrics if m.metric == "acc")
        for name, each in found.items()
    }
    assert values["both"] == pytest.approx((2 * values["one"] + 4 * values["two"]) / 6)


# what cannot be run -------------------------------------------------------------------------------


def without_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without the thousands of tasks it brings, which take seconds to look through."""
    manager = harness("tasks").TaskManager
    monkeypatch.setattr(
        harness("tasks"),
        "TaskManager",
        lambda include_path, **_: manager(None, include_path, False),
    )


def test_what_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown names, with the nearest; a folder that is not there; data that is not; packages that
    are not."""
    without_its_own(monkeypatch)
    reasons: list[str] = []
    monkeypatch.setattr(tasks_module, "_why_unreachable", lambda: reasons[0] if reasons else "")
    config = {"doc_to_text": "{{q}}", "doc_to_target": "x"}
    write_task(tmp_path, "gsm8k_local", [{"q": "1"}], **config)
    write_task(tmp_path, "no_data", [{"q": "1"}], **config)
    (tmp_path / "no_data.jsonl").unlink()
    write_task(tmp_path, "far", [], dataset_path="nobody/nothing", dataset_kwargs={}, **config)
    (tmp_path / "lacking.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "lacking.yaml").write_text(
        "task: lacking\ndataset_path: json\ntest_split: test\ndoc_to_text: !function "
        "lacking.text\ndoc_to_target: x\n"
    )
    write_task(tmp_path, "unsafe", [{"q": "1"}], unsafe_code=True, **config)
    tell: list[str] = []
    with pytest.raises(
        UserError,
        match=r"(?s)evaluate.tasks.*gsm8k_locl: did you mean gsm8k_local\?.*qqq: known ones",
    ):
        open_tasks(["gsm8k_locl", "qqq"], tmp_path, tell.append)
    with pytest.raises(UserError, match=r"evaluate.task_path: there is no folder .*absent"):
        open_tasks(["gsm8k_local"], tmp_path / "absent", tell.append)
    with pytest.raises(
        UserError, match=r"task no_data cannot be loaded: FileNotFoundError.*no_data.jsonl"
    ) as caught:
        open_tasks(["no_data"], tmp_path, tell.append)
    assert caught.value.exit_code == 2
    reasons.append("cannot reach huggingface.co: no such host")
    with pytest.raises(
        NoData, match=r"(?s)task far needs a data set.*cannot reach huggingface.co.*task_path"
    ) as lost:
        open_tasks(["far", "gsm8k_local"], tmp_path, tell.append)
    assert lost.value.exit_code == 3
    with pytest.raises(
        MissingPackage,
        match=r"(?s)task lacking needs more packages.*a_package_that_is_not_there.*pip install",
    ):
        open_tasks(["lacking"], tmp_path, tell.append)
    loaded = open_tasks(["unsafe"], tmp_path, tell.append)
    with pytest.raises(UserError, match="task unsafe runs code"):
        run_task(wrapped(build("simple_lm", 257), byte_tokenizer()), loaded["unsafe"], None, None)


def test_the_tasks_of_the_presets_are_the_harness_own() -> None:
    """Names of its files; looking through all of them takes too long for a test."""
    folder = Path(harness("tasks").__file__).parent
    wanted = json.loads((ROOT / "configs" / "25_polychromatic_evaluate.json").read_text())[
        "evaluate"
    ]["tasks"]
    for name, kind, file in zip(
        wanted,
        ("task", "task", "group"),
        ("gsm8k/gsm8k.yaml", "minerva_math/minerva_math500.yaml", "mmlu/default/_mmlu_stem.yaml"),
        strict=True,
    ):
        assert f"{kind}: {name}" in (folder / file).read_text().splitlines()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 100_000, '{"tasks": [], "domain_perplexity": {}}', '{"tasks": {"a": 5}}'],
)
def test_findings_that_are_none_are_measured_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluate.json").write_text(content)
    assert read_results(tmp_path) == EvaluationResults()
