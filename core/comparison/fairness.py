"""Whether comparing is fair: what the variants set, and where their numbers do not mean the same.

In:    resolved presets, outcomes
Out:   differences of presets, warnings in words
State: none
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.comparison.outcome import Outcome
from core.comparison.trials import FREE_KEYS
from core.metrics.table import LOSS, PER_TOKEN
from core.preset.settings import NEXT_TOKEN

NAMES = ("name", "description", "lineage", "train.seed")
"""What differs between trials anyway."""
TOKENS_APART = 0.01
"""Share of the tokens by which final evaluations may lie apart before that is told."""


def changes(base: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a variant sets: {dotted path: (value in the base, value in the variant)}, None where
    there is none."""
    before, after = _flat(base), _flat(variant)
    paths = [path for path in {**before, **after} if path not in NAMES]
    return {
        path: (before.get(path), after.get(path))
        for path in paths
        if before.get(path) != after.get(path)
    }


def tokenizers_differ(presets: Sequence[Mapping[str, Any]]) -> bool:
    return len({_tokenizer(preset) for preset in presets}) > 1


def unfairness(
    presets: Mapping[str, Mapping[str, Any]], outcomes: Sequence[Outcome], asked: str, metric: str
) -> list[str]:
    """Every reason to doubt the comparison, a sentence each. `presets`: one of each variant, the
    baseline first."""
    all_presets = list(presets.values())
    found = []
    if tokenizers_differ(all_presets):
        found.append(
            "The variants have different tokenizers. What is counted per token is not on one "
            "scale then: "
            + (
                f"bits per byte is the primary metric instead of {asked.replace('_', ' ')}."
                if metric != asked
                else ""
            )
            + " Differences in cross-entropy, perplexity and token accuracy say nothing."
        )
    changed = {path for preset in all_presets[1:] for path in changes(all_presets[0], preset)}
    parts = sorted(path for path in changed if path.startswith("data.") and path not in FREE_KEYS)
    if parts:
        found.append(
            f"The variants have different data ({', '.join(parts)}): trials of one seed did not "
            "see the same data, so pairing "
            "removes less noise, and the held-out documents may be others, too."
        )
    if "train.eval_tokens" in changed:
        found.append(
            "The variants are evaluated on different numbers of held-out tokens "
            "(train.eval_tokens)."
        )
    found += _losses_on_other_scales(all_presets) + _other_curves(outcomes) + _chosen_rows(presets)
    found += _other_objectives(outcomes) + _seers(outcomes)
    found += _other_beginnings(outcomes) + ([] if parts else _other_data(outcomes))
    return found + _other_ends(outcomes) + _other_devices(outcomes)


def primary(asked: str, presets: Sequence[Mapping[str, Any]]) -> str:
    """The metric that gives the verdict: what was asked for, unless different tokenizers make it
    meaningless."""
    if asked == f"{LOSS}cross_entropy":
        asked = "cross_entropy"
    per_token = asked in PER_TOKEN or asked.startswith(LOSS)
    return "bits_per_byte" if per_token and tokenizers_differ(presets) else asked


def _losses_on_other_scales(presets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Losses of one name whose settings, beside the weight, are not the same everywhere."""
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


def _other_curves(outcomes: Sequence[Outcome]) -> list[str]:
    """Training curves of cross-entropy beside curves of something else."""
    begun = [outcome for outcome in outcomes if outcome.training]
    names = dict.fromkeys(outcome.trial.variant for outcome in begun if outcome.trained_by_loss)
    if not names or len(names) == len({outcome.trial.variant for outcome in begun}):
        return []
    return [
        f"Of {', '.join(names)} there is no cross-entropy: in the training curves stands the "
        "loss, with whatever of it changes "
        "over the run, on another scale than the others'."
    ]


def _chosen_rows(presets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Training curves of rows that were chosen by their loss beside curves of others."""
    curricula = {
        name: (preset.get("train") or {}).get("curriculum") for name, preset in presets.items()
    }
    names = [name for name, curriculum in curricula.items() if curriculum]
    if not names or len({repr(curriculum) for curriculum in curricula.values()}) < 2:
        return []
    return [
        f"Of {', '.join(names)} the training curves show the rows that a curriculum chose by "
        "their loss: lower may only mean "
        "easier. Evaluations compare. Speed is in tokens that were trained, not in those that "
        "were only scored."
    ]


def _other_objectives(outcomes: Sequence[Outcome]) -> list[str]:
    """Numbers of one name that answer different questions."""
    names: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        if outcome.objective is not None:
            names.setdefault(outcome.objective.replace("_", " "), {})[outcome.trial.variant] = None
    if len(names) < 2:
        return []
    told = "; ".join(f"{objective}: {', '.join(variants)}" for objective, variants in names.items())
    return [
        f"The variants have different objectives ({told}): to predict a token from both sides is "
        "another task than from one, so "
        "no likelihood, perplexity or accuracy of the one compares with one of the other."
    ]


def _seers(outcomes: Sequence[Outcome]) -> list[str]:
    """Models that read what they are to predict. One that predicts masked tokens sees both sides,
    and not what is masked."""
    seeing = [
        outcome for outcome in outcomes if not outcome.causal and outcome.objective == NEXT_TOKEN
    ]
    names = dict.fromkeys(outcome.trial.variant for outcome in seeing)
    return [
        f"{name} is not causal: its positions see later ones, so its cross-entropy, perplexity "
        "and accuracy are not a language "
        "model's, and lower ones are no better."
        for name in names
    ]


def _other_data(outcomes: Sequence[Outcome]) -> list[str]:
    """Same seed, same settings, and still other data: then the pairing is not what it says."""
    receipts: dict[int, set[str]] = {}
    for outcome in outcomes:
        if outcome.finished and outcome.receipt is not None:
            receipts.setdefault(outcome.trial.seed, set()).add(outcome.receipt)
    seeds = [str(seed) for seed, found in receipts.items() if len(found) > 1]
    if not seeds:
        return []
    return [
        f"Trials of one seed consumed different data (seed {', '.join(seeds)}): pairing removes "
        "less noise there."
    ]


def _other_beginnings(outcomes: Sequence[Outcome]) -> list[str]:
    """One `init_from`, and not the same weights: whoever trained them went on between two
    trials."""
    weights: dict[str, set[str]] = {}
    for outcome in outcomes:
        if outcome.init_from is not None:
            weights.setdefault(str(outcome.trial.preset.get("init_from")), set()).add(
                outcome.init_from
            )
    return [
        f"Trials did not begin with the same weights of {origin} ({'; '.join(sorted(found))}): it "
        "was trained further meanwhile."
        for origin, found in weights.items()
        if len(found) > 1
    ]


def _other_ends(outcomes: Sequence[Outcome]) -> list[str]:
    ends = [outcome.tokens for outcome in outcomes if outcome.finished and outcome.tokens]
    if not ends or max(ends) - min(ends) <= TOKENS_APART * max(ends):
        return []
    return [
        f"Finished trials were not trained on equally many tokens: between {min(ends):,} and "
        f"{max(ends):,}."
    ]


def _other_devices(outcomes: Sequence[Outcome]) -> list[str]:
    devices = sorted({str(outcome.device) for outcome in outcomes if outcome.device})
    return (
        [f"Trials ran on different devices ({', '.join(devices)}): speeds do not compare."]
        if len(devices) > 1
        else []
    )


def _tokenizer(preset: Mapping[str, Any]) -> str:
    """What decides how text is cut: a trained tokenizer also depends on the text it is trained
    on."""
    tokenizer = preset.get("tokenizer") or {}
    trained = tokenizer.get("type") == "bpe" if isinstance(tokenizer, dict) else False
    sources = (preset.get("data") or {}).get("sources") if trained else None
    return repr((_flat(tokenizer) if isinstance(tokenizer, dict) else tokenizer, sources))


def _flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; a list is a leaf."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            out |= _flat(item, f"{path}{key}.")
        else:
            out[f"{path}{key}"] = item
    return out
