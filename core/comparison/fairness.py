"""Reasons to doubt a comparison: settings that differ beside the idea, and numbers of one name that
mean different things.

In:    resolved presets, outcomes
Out:   changed settings, the metric that decides, warnings in words
State: none
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.comparison.outcome import Outcome
from core.comparison.trials import FREE_KEYS
from core.metrics.table import LOSS, PER_TOKEN
from core.preset.settings import NEXT_TOKEN

NAMES = ("name", "description", "lineage", "train.seed")
"""Keys that differ between trials anyway."""
TOKENS_APART = 0.01
"""Share of the tokens by which final evaluations may lie apart without a warning."""


def changes(base: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that a variant changes: {dotted path: (value in the base, value in the
    variant)}, None for a key that one of them lacks."""
    before, after = _flat(base), _flat(variant)
    paths = [path for path in {**before, **after} if path not in NAMES]
    return {
        path: (before.get(path), after.get(path))
        for path in paths
        if before.get(path) != after.get(path)
    }


def tokenizers_differ(presets: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the presets cut the same text into different tokens."""
    return len({_tokenizer(preset) for preset in presets}) > 1


def unfairness(
    presets: Mapping[str, Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    requested: str,
    metric: str,
) -> list[str]:
    """Return every reason to doubt the comparison, one sentence each.

    presets     one of each variant, the baseline first
    requested   the metric that the preset names
    metric      the metric that decides
    """
    all_presets = list(presets.values())
    warnings = []
    if tokenizers_differ(all_presets):
        instead = ""
        if metric != requested:
            instead = (
                f"bits per byte is the primary metric instead of {requested.replace('_', ' ')}."
            )
        warnings.append(
            "The variants have different tokenizers. What is counted per token is not on one "
            f"scale then: {instead} Differences in cross-entropy, perplexity and token accuracy "
            "say nothing."
        )
    changed = {path for preset in all_presets[1:] for path in changes(all_presets[0], preset)}
    parts = sorted(path for path in changed if path.startswith("data.") and path not in FREE_KEYS)
    if parts:
        warnings.append(
            f"The variants have different data ({', '.join(parts)}): trials of one seed did not "
            "see the same data, so pairing removes less noise, and the held-out documents may "
            "differ, too."
        )
    if "train.eval_tokens" in changed:
        warnings.append(
            "The variants are evaluated on different numbers of held-out tokens "
            "(train.eval_tokens)."
        )
    warnings += _different_loss_settings(all_presets)
    warnings += _different_curves(outcomes)
    warnings += _chosen_rows(presets)
    warnings += _different_objectives(outcomes)
    warnings += _not_causal(outcomes)
    warnings += _different_beginnings(outcomes)
    warnings += [] if parts else _different_data(outcomes)
    return warnings + _different_ends(outcomes) + _different_devices(outcomes)


def primary(requested: str, presets: Sequence[Mapping[str, Any]]) -> str:
    """Return the metric that decides: the requested one, unless different tokenizers make it
    meaningless."""
    if requested == f"{LOSS}cross_entropy":
        requested = "cross_entropy"
    per_token = requested in PER_TOKEN or requested.startswith(LOSS)
    return "bits_per_byte" if per_token and tokenizers_differ(presets) else requested


def _different_loss_settings(presets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Find losses of one name whose settings, apart from the weight, differ."""
    settings: dict[str, set[str]] = {}
    for preset in presets:
        for loss in preset.get("losses") or []:
            rest = {key: value for key, value in loss.items() if key not in ("weight", "name")}
            settings.setdefault(str(loss.get("name") or loss.get("type")), set()).add(
                repr(sorted(rest.items()))
            )
    mixed = sorted(name for name, ways in settings.items() if len(ways) > 1)
    return [
        f"The loss “{name}” has other settings in some variants: its values are not on one scale."
        for name in mixed
    ]


def _different_curves(outcomes: Sequence[Outcome]) -> list[str]:
    """Find training curves of cross-entropy beside curves of something else."""
    begun = [outcome for outcome in outcomes if outcome.training]
    names = dict.fromkeys(outcome.trial.variant for outcome in begun if outcome.trained_by_loss)
    if not names or len(names) == len({outcome.trial.variant for outcome in begun}):
        return []
    return [
        f"There is no cross-entropy of {', '.join(names)}: the training curves show the loss "
        "instead, with all terms that change over the run, on another scale than the other curves."
    ]


def _chosen_rows(presets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Find training curves of rows that were chosen by their loss beside curves of all rows."""
    curricula = {
        name: (preset.get("train") or {}).get("curriculum") for name, preset in presets.items()
    }
    names = [name for name, curriculum in curricula.items() if curriculum]
    if not names or len({repr(curriculum) for curriculum in curricula.values()}) < 2:
        return []
    return [
        f"The training curves of {', '.join(names)} show the rows that a curriculum chose by "
        "their loss: lower may only mean easier. Compare the evaluations instead. Speed counts "
        "the tokens that were trained on, not those that were only scored."
    ]


def _different_objectives(outcomes: Sequence[Outcome]) -> list[str]:
    """Find variants that predict different things."""
    names: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        if outcome.objective is not None:
            names.setdefault(outcome.objective.replace("_", " "), {})[outcome.trial.variant] = None
    if len(names) < 2:
        return []
    groups = "; ".join(f"{name}: {', '.join(variants)}" for name, variants in names.items())
    return [
        f"The variants have different objectives ({groups}). Predicting a token from both sides is "
        "a different task than predicting it from one, so likelihoods, perplexities and accuracies "
        "of the two cannot be compared."
    ]


def _not_causal(outcomes: Sequence[Outcome]) -> list[str]:
    """Find models that read what they are to predict. A model that predicts masked tokens may see
    both sides: it does not see what is masked."""
    not_causal = [
        outcome for outcome in outcomes if not outcome.causal and outcome.objective == NEXT_TOKEN
    ]
    names = dict.fromkeys(outcome.trial.variant for outcome in not_causal)
    return [
        f"{name} is not causal: its positions see later ones, so its cross-entropy, perplexity "
        "and accuracy are not a language model's, and lower ones are no better."
        for name in names
    ]


def _different_data(outcomes: Sequence[Outcome]) -> list[str]:
    """Find seeds whose trials read different data although their settings are the same."""
    receipts: dict[int, set[str]] = {}
    for outcome in outcomes:
        if outcome.finished and outcome.receipt is not None:
            receipts.setdefault(outcome.trial.seed, set()).add(outcome.receipt)
    seeds = [str(seed) for seed, different in receipts.items() if len(different) > 1]
    if not seeds:
        return []
    return [
        f"Trials of one seed consumed different data (seed {', '.join(seeds)}): pairing removes "
        "less noise there."
    ]


def _different_beginnings(outcomes: Sequence[Outcome]) -> list[str]:
    """Find trials of one `init_from` that began with different weights: these were trained further
    between two trials."""
    weights: dict[str, set[str]] = {}
    for outcome in outcomes:
        if outcome.init_from is not None:
            weights.setdefault(str(outcome.trial.preset.get("init_from")), set()).add(
                outcome.init_from
            )
    return [
        f"Trials did not begin with the same weights of {origin} ({'; '.join(sorted(different))}): "
        "it was trained further meanwhile."
        for origin, different in weights.items()
        if len(different) > 1
    ]


def _different_ends(outcomes: Sequence[Outcome]) -> list[str]:
    ends = [outcome.tokens for outcome in outcomes if outcome.finished and outcome.tokens]
    if not ends or max(ends) - min(ends) <= TOKENS_APART * max(ends):
        return []
    return [
        f"Finished trials were not trained on equally many tokens: between {min(ends):,} and "
        f"{max(ends):,}."
    ]


def _different_devices(outcomes: Sequence[Outcome]) -> list[str]:
    devices = sorted({str(outcome.device) for outcome in outcomes if outcome.device})
    if len(devices) < 2:
        return []
    return [f"Trials ran on different devices ({', '.join(devices)}): speeds do not compare."]


def _tokenizer(preset: Mapping[str, Any]) -> str:
    """Return what decides how text is cut: a trained tokenizer also depends on the text that it is
    trained on."""
    tokenizer = preset.get("tokenizer") or {}
    trained = tokenizer.get("type") == "bpe" if isinstance(tokenizer, dict) else False
    sources = (preset.get("data") or {}).get("sources") if trained else None
    return repr((_flat(tokenizer) if isinstance(tokenizer, dict) else tokenizer, sources))


def _flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the leaves by dotted path; a list is a leaf."""
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            leaves |= _flat(item, f"{path}{key}.")
        else:
            leaves[f"{path}{key}"] = item
    return leaves
