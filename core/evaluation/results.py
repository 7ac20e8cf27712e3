"""The results of an evaluation: kept in a file after each task, so that an interrupted evaluation
goes on where it was; shown as tables.

In:    the harness's results of each task, numbers of each source
Out:   evaluate.json, evaluate.md, and the same tables for a terminal
State: evaluate.json
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from core.files import read_json, write_file

NOT_CAUSAL = (
    "not causal: every position of this model sees the whole row, so its probability of a token "
    "depends on the tokens after it, "
    "the scored answer included. Such numbers cannot be compared with a language model's."
)
TASK_HEADER = ["task", "metric", "value", "±", "examples", "shots", "version"]
SOURCE_HEADER = ["source", "nats/token", "perplexity", "bits/byte", "accuracy", "tokens"]


# what is measured ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricValue:
    """One number of a task.

    filter   how an answer was taken out of the text; None where the text is the answer
    value    a number, as a rule: a task may return whatever it likes
    stderr   of the mean over the examples, where the harness can tell
    """

    metric: str
    filter: str | None
    value: Any
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskScore:
    """A task or a group of tasks, as the harness measured it. `part_of` names its group."""

    metrics: list[MetricValue]
    examples: int | None
    num_fewshot: int | None
    version: Any  # the harness takes anything that a task's file says
    part_of: str | None


@dataclass(frozen=True)
class TaskMeasurement:
    """All that one requested name stands for.

    made_from    a fingerprint of model, data and settings: with any of it changed, it is measured
                 anew
    not_causal   why its numbers are not a language model's; None where they are
    """

    made_from: str
    date: str
    seconds: float
    not_causal: str | None
    notes: list[str]
    results: dict[str, TaskScore]


@dataclass(frozen=True)
class SourceMeasurement:
    """The held-out documents of one source; `made_from` and `not_causal` as above.

    cross_entropy    in nats per token; perplexity is its exponential
    bits_per_byte    of text
    tokens           how many were measured
    """

    made_from: str
    date: str
    not_causal: str | None
    cross_entropy: float | None
    perplexity: float | None
    bits_per_byte: float | None
    token_accuracy: float | None
    tokens: int


@dataclass(frozen=True)
class EvaluatedModel:
    """The model of an evaluation. `tokens`: that it was trained on; `fingerprint`: of its
    weights."""

    weights: str
    step: int | None
    tokens: int | None
    type: str
    parameters: int
    context: int
    settings: dict[str, Any]
    causal: bool
    fingerprint: str


@dataclass(frozen=True)
class About:
    """The facts of an evaluation: the model and the settings. `settings`: the preset's section
    `evaluate`."""

    preset: str
    lineage: str
    model: EvaluatedModel
    not_causal: str | None
    precision: str
    device: str
    harness: dict[str, str] | None
    date: str
    settings: dict[str, Any]
    notes: list[str]


@dataclass
class EvaluationResults:
    """All results of one preset's evaluation."""

    tasks: dict[str, TaskMeasurement] = field(default_factory=dict)
    sources: dict[str, SourceMeasurement] = field(default_factory=dict)


# evaluate.json ------------------------------------------------------------------------------------

M = TypeVar("M")


def read_results(folder: Path) -> EvaluationResults:
    """Return what is in evaluate.json; whatever is not a whole measurement is left out."""
    try:
        content = read_json(folder / "evaluate.json")
    except (OSError, ValueError):
        return EvaluationResults()
    if not isinstance(content, dict):
        return EvaluationResults()
    return EvaluationResults(
        tasks=_measurements(content.get("tasks"), TypeAdapter(TaskMeasurement)),
        sources=_measurements(content.get("domain_perplexity"), TypeAdapter(SourceMeasurement)),
    )


def _measurements(section: Any, adapter: TypeAdapter[M]) -> dict[str, M]:
    valid: dict[str, M] = {}
    for name, entry in section.items() if isinstance(section, dict) else ():
        try:
            valid[name] = adapter.validate_python(entry)
        except ValidationError:
            continue
    return valid


def write_results(about: About, results: EvaluationResults, folder: Path) -> None:
    """Write evaluate.json and evaluate.md, each as a whole. Raises OSError."""
    content = {
        **dataclasses.asdict(about),
        "tasks": {name: dataclasses.asdict(task) for name, task in results.tasks.items()},
        "domain_perplexity": {
            name: dataclasses.asdict(source) for name, source in results.sources.items()
        },
    }
    write_file(folder / "evaluate.json", json.dumps(plain(content), indent=2) + "\n")
    write_file(folder / "evaluate.md", markdown(about, results) + "\n")


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: the harness gives numbers of numpy, functions and values
    that are no number."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in value]
    if callable(item := getattr(value, "item", None)):
        return plain(item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def task_scores(results: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Return, for each task and group in the harness's results, what is kept of them."""
    scores: dict[str, TaskScore] = {}
    groups = results.get("group_subtasks", {})
    for name, numbers in {**results["results"], **results.get("groups", {})}.items():
        scores[name] = TaskScore(
            metrics=_metric_values(numbers, results["higher_is_better"].get(name, {})),
            examples=plain(numbers.get("sample_len")),
            num_fewshot=plain(results["n-shot"].get(name)),
            version=plain(results["versions"].get(name)),
            part_of=next((group for group, parts in groups.items() if name in parts), None),
        )
    return scores


def _metric_values(
    numbers: Mapping[str, Any], higher_is_better: Mapping[str, bool]
) -> list[MetricValue]:
    """Collect the metrics from the harness's keys: "acc,none", "acc_stderr,none", "sample_len"."""
    metrics = []
    for key, value in numbers.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = numbers.get(f"{metric}_stderr,{how}")
        finite = isinstance(error, float) and math.isfinite(error)
        metrics.append(
            MetricValue(
                metric=metric,
                filter=None if how == "none" else how,
                value=plain(value),
                stderr=plain(error) if finite else None,
                higher_is_better=plain(higher_is_better.get(metric)),
            )
        )
    return metrics


def files_of(folder: Path | None) -> list[list[Any]]:
    """Return the files of a folder, or a file, with sizes and dates: changed tasks are run anew."""
    files = []
    for path in _sorted_files(folder) if folder else ():
        status = path.stat()
        files.append([str(path), status.st_size, status.st_mtime_ns])
    return files


def _sorted_files(folder: Path) -> Iterable[Path]:
    if folder.is_file():
        return [folder]
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return sorted(path for path in paths if path.is_file())


# tables -------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of text."""

    header: list[str]
    rows: list[list[str]]


def task_table(about: About, results: EvaluationResults) -> Table:
    """Return a row for each metric; groups stand before their parts."""
    rows = []
    for task in results.tasks.values():
        groups_first = sorted(task.results.items(), key=lambda item: item[1].part_of is not None)
        for name, score in groups_first:
            rows += _score_rows(name, score)
    return _marked(about, TASK_HEADER, rows)


def _score_rows(name: str, score: TaskScore) -> list[list[str]]:
    """Return a row for each metric; only the first says of which task."""
    rows = []
    label = f"  {name}" if score.part_of else name
    facts = [_text(score.examples), _text(score.num_fewshot), _text(score.version)]
    for each in score.metrics:
        metric = f"{each.metric} ({each.filter})" if each.filter else each.metric
        rows.append([label, metric, _number(each.value), _number(each.stderr), *facts])
        label, facts = "", ["", "", ""]
    return rows


def source_table(about: About, results: EvaluationResults) -> Table:
    """Return a row for each source."""
    rows = []
    for name, source in results.sources.items():
        numbers = (
            source.cross_entropy,
            source.perplexity,
            source.bits_per_byte,
            source.token_accuracy,
        )
        rows.append([name, *map(_number, numbers), f"{source.tokens:,}"])
    return _marked(about, SOURCE_HEADER, rows)


def markdown(about: About, results: EvaluationResults) -> str:
    """Return both tables, and what they are of, as Markdown."""
    lines = [f"# {about.preset}", ""]
    lines += [f"- {key}: {value}" for key, value in _facts(about).items() if value is not None]
    if about.not_causal:
        lines += ["", f"**{about.not_causal}**"]
    tables = {
        "Tasks": task_table(about, results),
        "Held-out documents": source_table(about, results),
    }
    for title, table in tables.items():
        if table.rows:
            rule = ["---"] * len(table.header)
            lines += ["", f"## {title}", "", *map(_line, [table.header, rule, *table.rows])]
    notes = [*about.notes, *(note for task in results.tasks.values() for note in task.notes)]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in dict.fromkeys(notes))]
    return "\n".join(lines)


def _facts(about: About) -> dict[str, str | None]:
    model, limit = about.model, about.settings["limit"]
    step = "" if model.step is None else f", step {model.step:,}"
    harness = about.harness
    shape = f"{model.type}, {model.parameters:,} parameters, context of {model.context:,} tokens"
    return {
        "weights": model.weights + step,
        "trained on": None if model.tokens is None else f"{model.tokens:,} tokens",
        "model": shape,
        "precision": about.precision,
        "device": about.device,
        "harness": None if harness is None else f"{harness['package']} {harness['version']}",
        "limit": None if limit is None else f"{limit} examples of each task",
        "date": about.date,
    }


def _marked(about: About, header: list[str], rows: list[list[str]]) -> Table:
    """Mark each number of a model that is not causal."""
    if not about.not_causal:
        return Table(header, rows)
    return Table([*header, "note"], [[*row, "not causal"] for row in rows])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return _text(value)
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
