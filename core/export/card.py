"""The model card of an export: README.md, in the form of the Hub.

In:    a Trained, the proof, the logs of its lineage
Out:   Markdown with what is known of the model; nothing is guessed
State: none
"""

import json
from pathlib import Path
from typing import Any

from core.evaluation.results import read_results
from core.export.proof import Proof
from core.files import read_json
from core.reports.run_card import read_card
from core.trained import Trained

HUB_DATA = "https://huggingface.co/datasets/"
MEASURED = {
    "cross_entropy": "cross-entropy, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "accuracy of the likeliest token",
}
"""Numbers of a run's last evaluation that the card gives."""


def model_card(
    name: str,
    trained: Trained[Any],
    proof: Proof,
    left_out: list[str],
    root: Path,
    architecture: str | None,
) -> str:
    """Write the card.

    name           of the export
    left_out       what the trained model has and the export has not
    architecture   the library's name of it; None where weights alone were exported
    """
    parts = [
        _front_matter(trained, architecture),
        f"# {name}",
        _use(architecture, trained),
        _made(trained, left_out),
        _data(trained),
        _numbers(trained, root),
        _proof(proof, architecture),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(trained: Trained[Any], architecture: str | None) -> str:
    lines = ["---", "tags:", "- zeroarg"]
    if architecture is not None:
        lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", *lines[1:]]
    model = trained.preset.model
    if model.type == "hub" and model.published and model.folder is None:
        lines.append(f"base_model: {model.name}")
    datasets = [source["dataset"] for source in _sources(trained) if _is_of_hub(source)]
    if datasets:
        lines += ["datasets:", *(f"- {dataset}" for dataset in dict.fromkeys(datasets))]
    return "\n".join([*lines, "---"])


def _use(architecture: str | None, trained: Trained[Any]) -> str:
    if architecture is None:
        return (
            "Weights under the names of zeroarg's "
            f"model `{trained.preset.model.type}`, which no architecture of the transformers "
            "library computes. `preset.json` has the settings it was made with."
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'prompt = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))\n```\n\n"
        "A document began with the token `bos_token` in training. A marker such as this one in a "
        "text is read as that token, unless the tokenizer is called with "
        "`split_special_tokens=True`."
    )


def _made(trained: Trained[Any], left_out: list[str]) -> str:
    made, model = trained.made_with or {}, trained.preset.model
    rows = {
        "trained by": "zeroarg, preset " + repr(made.get("name", trained.preset.name)),
        "lineage": made.get("lineage", "not known"),
        "began with": trained.init_from or getattr(model, "published", None) or "random weights",
        "checkpoint": trained.where,
        "steps": _count(trained.step),
        "tokens": _count(trained.tokens),
        "receipt of the data": trained.receipt or "not known",
        "parameters": _count(sum(p.numel() for p in trained.model.parameters())),
        "context": f"{model.seq_length:,} tokens",
        "losses": ", ".join(
            f"{loss.get('name') or loss['type']} × {json.dumps(loss['weight'])}"
            for loss in made.get("losses", [])
        ),
    }
    lines = ["| | |", "|---|---|", *(f"| {key} | {_cell(v)} |" for key, v in rows.items() if v)]
    missing = "".join(f"\n- {each}" for each in left_out)
    return "\n".join(["## The model\n", *lines]) + (f"\n\nNot in it:\n{missing}" if missing else "")


def _data(trained: Trained[Any]) -> str:
    """Name the sources, each with its licence as far as that is known: the Hub knows it of its
    datasets, whoever owns the files of theirs."""
    lines = ["## Data\n", "| source | what it is | licence |", "|---|---|---|"]
    for source in _sources(trained):
        if _is_of_hub(source):
            what, licence = source["dataset"], f"on [its page]({HUB_DATA}{source['dataset']})"
        else:
            what, licence = f"local files ({source['type']})", "not known: that of the files"
        lines.append(f"| {_cell(source['name'])} | {_cell(what)} | {licence} |")
    known = _sources(trained)
    return "\n".join(lines) if known else "## Data\n\nNot known: the file of the weights has none."


def _sources(trained: Trained[Any]) -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = (trained.made_with or {}).get("data", {}).get("sources", [])
    return sources


def _is_of_hub(source: dict[str, Any]) -> bool:
    return bool(source.get("dataset")) and not str(source["dataset"]).startswith((".", "/", "~"))


def _numbers(trained: Trained[Any], root: Path) -> str:
    """Tell the run's last evaluation, if it is of this step, and what evaluate jobs have measured
    of this checkpoint."""
    lines: list[str] = []
    lineage = (trained.made_with or {}).get("lineage")
    last = read_card(root / "logs" / lineage).get("last_eval") if lineage else None
    if isinstance(last, dict) and last.get("step") == trained.step:
        lines += [
            f"| held-out text | {text} | {last[key]:.4g} |"
            for key, text in MEASURED.items()
            if isinstance(last.get(key), int | float)
        ]
    for path in sorted((root / "logs").glob("**/evaluate.json")):
        if _is_about(path, trained):
            for measured in read_results(path.parent).tasks.values():
                lines += [
                    f"| {_cell(task)} | {_cell(metric.metric)} | {metric.value:.4g} |"
                    for task, score in measured.results.items()
                    for metric in score.metrics
                    if isinstance(metric.value, int | float)
                ]
    head = "## Evaluations\n\n| on | measure | value |\n|---|---|---|\n"
    return head + "\n".join(lines) if lines else "## Evaluations\n\nNone of this checkpoint."


def _is_about(path: Path, trained: Trained[Any]) -> bool:
    try:
        model = read_json(path)["model"]
        return bool((model["weights"], model["step"]) == (trained.where, trained.step))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _proof(proof: Proof, architecture: str | None) -> str:
    if architecture is None:
        return (
            "## Proof\n\nThe tensors were read back equal to the bit; `AutoTokenizer` makes the "
            f"same tokens of {proof.tokens:,} tokens of {proof.text}."
        )
    lines = [
        f"## Proof\n\nLoaded as `{architecture}` in a fresh process, on {proof.tokens:,} tokens of "
        f"{proof.text}: the same tokens; logits within {proof.max_difference:.2g} of the trained "
        f"model's; the same greedy text, {proof.said} tokens."
    ]
    lines += [f"- `{name}`: {sentence}" for name, sentence in proof.gguf.items()]
    return "\n".join(lines)


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
