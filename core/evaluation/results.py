"""What an evaluation found: kept in a file after each task, so that a start after an interruption
goes on; told as tables.

In:    the harness's results of each task, numbers of each source
Out:   evaluate.json, evaluate.md, and the same tables for a terminal
State: evaluate.json
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.files import read_json, write_file

NOT_CAUSAL = (
    "not causal: every position of this model sees the whole row, so its probability of a token "
    "depends on the tokens after it, "
    "the scored answer included. Such numbers cannot be compared with a language model's."
)
TASK_HEADER = ["task", "metric", "value", "±", "examples", "shots", "version"]
SOURCE_HEADER = ["source", "nats/token", "perplexity", "bits/byte", "accuracy", "tokens"]

Table = tuple[list[str], list[list[str]]]


@dataclass
class EvaluationResults:
    """Everything that is known of one preset's evaluation."""

    about: dict[str, Any]  # what was evaluated, and how
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def note(self) -> str | None:
        """What makes its numbers other than a language model's."""
        return self.about.get("not_causal")


def read_results(folder: Path, about: dict[str, Any]) -> EvaluationResults:
    """What earlier starts found that still stands: `made_from` says of what model, data and
    settings each number is."""
    try:
        found = read_json(folder / "evaluate.json")
        tasks, sources = (
            {k: v for k, v in found[key].items() if isinstance(v, dict)}
            for key in ("tasks", "domain_perplexity")
        )
        return EvaluationResults(about, tasks, sources)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return EvaluationResults(about)


def write_results(results: EvaluationResults, folder: Path) -> None:
    """Both files; whoever reads one never sees half of it. Raises OSError."""
    whole = {**results.about, "tasks": results.tasks, "domain_perplexity": results.sources}
    for name, text in (
        ("evaluate.json", json.dumps(plain(whole), indent=2)),
        ("evaluate.md", markdown(results)),
    ):
        write_file(folder / name, text + "\n")


def plain(value: Any) -> Any:
    """As JSON can hold it: the harness gives numbers of numpy, functions and values that are no
    number."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in value]
    if callable(item := getattr(value, "item", None)):
        return plain(item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def of_harness(found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the harness's results: for each task and group its metrics, examples, shots
    and version."""
    kept: dict[str, Any] = {}
    for name, numbers in {**found["results"], **found.get("groups", {})}.items():
        metrics = []
        for key, value in numbers.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{how}")
            metrics.append(
                {
                    "metric": metric,
                    "filter": None if how == "none" else how,
                    "value": value,
                    "stderr": error if isinstance(error, float) and math.isfinite(error) else None,
                    "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
                }
            )
        kept[name] = {
            "metrics": metrics,
            "examples": numbers.get("sample_len"),
            "num_fewshot": found["n-shot"].get(name),
            "version": found["versions"].get(name),
            "part_of": next(
                (
                    group
                    for group, parts in found.get("group_subtasks", {}).items()
                    if name in parts
                ),
                None,
            ),
        }
    return plain(kept)


# tables -------------------------------------------------------------------------------------------


def task_table(results: EvaluationResults) -> Table:
    """A row for each metric; groups before their parts."""
    rows = []
    for entry in results.tasks.values():
        for name, found in sorted(
            entry["results"].items(), key=lambda item: item[1]["part_of"] is not None
        ):
            for i, each in enumerate(found["metrics"]):
                label = ("  " if found["part_of"] else "") + name if i == 0 else ""
                how = f" ({each['filter']})" if each["filter"] else ""
                facts = (
                    [found["examples"], found["num_fewshot"], found["version"]]
                    if i == 0
                    else ["", "", ""]
                )
                value, error = each["value"], each["stderr"]
                rows.append(
                    [
                        label,
                        each["metric"] + how,
                        _number(value),
                        _number(error),
                        *map(_shown, facts),
                    ]
                )
    return _marked(results, TASK_HEADER, rows)


def source_table(results: EvaluationResults) -> Table:
    """A row for each source."""
    rows = []
    for name, found in results.sources.items():
        numbers = [
            _number(found[key])
            for key in ("cross_entropy", "perplexity", "bits_per_byte", "token_accuracy")
        ]
        rows.append([name, *numbers, f"{found['tokens']:,}"])
    return _marked(results, SOURCE_HEADER, rows)


def markdown(results: EvaluationResults) -> str:
    """Both tables, and what they are of."""
    about = results.about
    model = about["model"]
    facts = {
        "weights": model["weights"]
        + (f", step {model['step']:,}" if model["step"] is not None else ""),
        "trained on": None if model["tokens"] is None else f"{model['tokens']:,} tokens",
        "model": f"{model['type']}, {model['parameters']:,} parameters, context of "
        f"{model['context']:,} tokens",
        "precision": about["precision"],
        "device": about["device"],
        "harness": about["harness"]
        and f"{about['harness']['package']} {about['harness']['version']}",
        "limit": None
        if about["settings"]["limit"] is None
        else f"{about['settings']['limit']} examples of each task",
        "date": about["date"],
    }
    lines = [
        f"# {about['preset']}",
        "",
        *(f"- {key}: {value}" for key, value in facts.items() if value is not None),
    ]
    lines += ["", f"**{results.note}**"] if results.note else []
    for title, (header, rows) in (
        ("Tasks", task_table(results)),
        ("Held-out documents", source_table(results)),
    ):
        lines += (
            ["", f"## {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, rows)]
            if rows
            else []
        )
    notes = [
        *about["notes"],
        *(note for entry in results.tasks.values() for note in entry["notes"]),
    ]
    lines += ["", "## Notes", "", *(f"- {note}" for note in dict.fromkeys(notes))] if notes else []
    return "\n".join(lines)


def _marked(results: EvaluationResults, header: list[str], rows: list[list[str]]) -> Table:
    """Each number of a model that is not causal says so."""
    if not results.note:
        return header, rows
    return [*header, "note"], [[*row, "not causal"] for row in rows]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return _shown(value)
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
