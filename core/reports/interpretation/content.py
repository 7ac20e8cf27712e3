"""What an interpretation says: sentences and tables of plain text, for the page and for the
terminal.

In:    an Interpretation
Out:   strings, not escaped, and Tables
State: none
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.interpretation.noise import DRAWS, FEWEST
from core.interpretation.results import Interpretation
from core.interpretation.routing import THRESHOLD
from core.reports.interpretation.palette import NEUROTRANSMITTERS, title_of
from core.reports.page import Table
from core.ui.text import clean

FEW = 0.05
"""Share of neurons with a preference below which the static map is called noise."""
NONE = "–"


@dataclass(frozen=True)
class Caption:
    """What stands below a figure."""

    title: str
    how: str  # to read it; {unit}: what intervals and noise are over
    here: Callable[[Interpretation], str]  # what it shows of this model
    of_text: bool = True  # whether any of it depends on what was read


# the answer ---------------------------------------------------------------------------------------


def findings(found: Interpretation) -> list[str]:
    """What to know, in a few sentences."""
    return [_preferences(found), _entropies(found), _shift(found)]


def warnings(found: Interpretation) -> list[str]:
    """What to know before any of it is believed."""
    told = []
    if not found.causal:
        told.append(
            "Not causal: this model pools the whole text, what comes later included, and every "
            "number here that depends on "
            "text is of texts that the routing has seen to their end. Where it continues a text, "
            "it has seen only the "
            "beginning."
        )
    if (share := float(found.static.decided.mean())) < FEW:
        told.append(
            f"The static map is noise: alpha begins at exactly 0, and in {_percent(1 - share)} of "
            "the neurons no activation is "
            f"ahead by more than {THRESHOLD:g} of probability. Read the figures of what text does "
            "instead."
        )
    if few := [category for category in found.categories if category.documents < FEWEST]:
        names = ", ".join(f"{clean(category.name)} has {category.documents}" for category in few)
        told.append(
            f"Few held-out documents: {names}. With fewer than {FEWEST}, noise is taken from "
            "rows, and rows of one document are "
            "alike: what is beyond noise is then a difference between these documents, and need "
            "not be one between categories. "
            "Add documents to the source."
        )
    return told


def facts(found: Interpretation) -> str:
    """What was looked at."""
    about, (layers, neurons) = found.about, found.static.preferred.shape
    step = "" if about["step"] is None else f", step {about['step']:,}"
    return (
        f"Weights: {clean(about['weights'])}{step}. {layers} layers of {neurons:,} neurons, "
        f"temperature {found.tau:.3g}, "
        f'pool "{about["pool"]}".'
    )


def _preferences(found: Interpretation) -> str:
    return (
        f"By themselves, {_percent(found.static.decided.mean())} of the neurons prefer an "
        "activation: its probability is ahead "
        f"of the next one's by more than {THRESHOLD:g}. The mean lead is "
        f"{found.static.margin.mean():.4f}."
    )


def _entropies(found: Interpretation) -> str:
    top, static = found.static.max_entropy, found.static.entropy.mean()
    parts = [
        f"{100 * each / top:.2f} %"
        for each in (static, found.mean("entropy").mean(), found.mean("tempered").mean())
    ]
    return (
        f"Of the entropy of an even mix, {top:.3f} nats, the neurons have {parts[0]} by "
        f"themselves, {parts[1]} given text, and "
        f"{parts[2]} at the temperature they compute with."
    )


def _shift(found: Interpretation) -> str:
    shift = found.shift
    if shift is None:
        return "There is one category, so nothing to compare."
    if shift.noise is None:
        return (
            "Whether categories are routed differently cannot be told: there is too little "
            "text of one of them."
        )
    count, of = int(shift.real.sum()), shift.real.size
    if not count:
        return (
            f"No shift between categories is beyond noise, at none of {of} pairs of layer and "
            "activation."
        )
    lead = np.where(shift.real, shift.value, -np.inf)
    layer, k = np.unravel_index(int(lead.argmax()), lead.shape)
    high, low = (
        clean(found.categories[c].name) for c in (shift.highest[layer, k], shift.lowest[layer, k])
    )
    who = "categories" if found.unit == "documents" else "the documents read of the categories"
    return (
        f"At {count} of {of} pairs of layer and activation, {who} lie apart by more than noise. "
        "The largest such shift is "
        f"{shift.value[layer, k]:.3f}, noise up to {shift.noise[layer, k]:.3f}: layer {layer}, "
        f"{found.activations[k]}, highest "
        f"in {high} and lowest in {low}."
    )


# captions -----------------------------------------------------------------------------------------


def _neurons(found: Interpretation) -> str:
    static, dynamic = np.median(found.static.entropy), np.median(found.mean("of_neurons"))
    return (
        f"Half of the neurons are above {static:.4f} nats by themselves, and above "
        f"{dynamic:.4f} nats given text."
    )


def _weights(found: Interpretation) -> str:
    share, weights = float(found.static.decided.mean()), found.mean("weights").mean(0)
    most, least = int(weights.argmax()), int(weights.argmin())
    trust = (
        "the left side means little"
        if share < FEW
        else "on the left only they mean something"
        if share < 1
        else "all count"
    )
    return (
        f"{_percent(share)} of the neurons have a preference; {trust}. Given text, "
        f"{title_of(found.activations[most])} has most "
        f"weight, {_percent(weights[most])}, and {title_of(found.activations[least])} least, "
        f"{_percent(weights[least])}."
    )


def _map(found: Interpretation) -> str:
    share = found.static.decided.mean(1)
    if share.max() == share.min():
        return f"{_percent(share[0])} of the neurons of every layer have a preference."
    return (
        f"{_percent(share.mean())} of the neurons have a preference, from {_percent(share.min())} "
        f"in layer {share.argmin()} to "
        f"{_percent(share.max())} in layer {share.argmax()}."
    )


def _gates(found: Interpretation) -> str:
    means = np.stack([category.gates.mean for category in found.categories])
    within = float(np.mean([category.gate_sd for category in found.categories]))
    low, high = (f"{value:.3f}".replace("-", "−") for value in (means.min(), means.max()))
    of = "tokens" if found.causal else "rows"
    return (
        f"The means lie between {low} and {high}. Inside a category, the {of} have a standard "
        f"deviation of {within:.3f}."
    )


CAPTIONS = {
    "entropy_per_layer.png": Caption(
        "Entropy of the choice, layer by layer",
        "A mark is the mean over a layer's neurons: on the dotted line all activations weigh the "
        "same, at 0 one has all the "
        "weight. The wide grey line is of the neurons by themselves, the others are of what they "
        "choose given text of each "
        "category, with 95 % intervals over {unit}. Left without temperature, as specification "
        "001 measures it; right as the "
        "model computes.",
        _entropies,
    ),
    "entropy_histogram.png": Caption(
        "Entropy of single neurons",
        "The further left a neuron stands, the clearer its choice; a spike at the dotted line is "
        "an even mix. Grey: by itself. "
        "Outline: given text, mean over categories, without temperature.",
        _neurons,
    ),
    "layer_distribution.png": Caption(
        "Which activations each layer uses",
        "A bar is a layer, a colour an activation. Left, each neuron counts for its largest "
        "alpha, by however little. Right is "
        "what the layer computes with: the weight of each activation, mean over neurons, tokens "
        "and categories.",
        _weights,
    ),
    "neurotransmitter_heatmap.png": Caption(
        "Preferred activation of every neuron",
        "A row is a layer, a column a neuron; the order of neurons means nothing. Above, each has "
        "the colour of its largest "
        "alpha. Below, those without a clear lead are white: what is white below is noise above.",
        _map,
        of_text=False,
    ),
    "dynamic_routing_comparison.png": Caption(
        "What the gate net says to each category",
        "f, times beta, is added to the neurons' own preferences: the higher, the more of this "
        "activation, everywhere in the "
        "layer. Bars are 95 % intervals over {unit}, each for itself; the next figure says what "
        "is beyond noise.",
        _gates,
    ),
    "routing_shift_summary.png": Caption(
        "Routing shift between categories",
        "A bar is by how much the highest category's mean f exceeds the lowest's. The black marks "
        "are noise: with the {unit} "
        "shuffled among categories, in 95 of 100 shuffles no bar anywhere crosses its mark. A bar "
        "that does, with a star, is a "
        "difference between the categories' texts, in what they say or in how long they are; a "
        "bar that does not says nothing.",
        _shift,
    ),
}

CAUTION = (
    "Routing is alpha, what a neuron prefers by itself, plus beta times f, what the gate net "
    "makes of the text. Training adds "
    "noise and divides by a temperature; what is called static or dynamic entropy is without "
    "both, so that it can be compared "
    "over a training run. That categories are routed differently does not say that it is of use: "
    "for that, train a model "
    "without and compare. The names of neurotransmitters are the specification's, and say nothing "
    "about brains."
)


# tables -------------------------------------------------------------------------------------------


def layer_table(found: Interpretation) -> Table:
    """Layer by layer: the activation with most weight, preferences, entropies, and the largest
    shift."""
    weights, free, tempered, shift = (
        found.mean("weights"),
        found.mean("entropy"),
        found.mean("tempered"),
        found.shift,
    )
    rows = []
    for i, static in enumerate(found.static.entropy.mean(1)):
        k = int(weights[i].argmax())
        cells = [
            str(i),
            f"{found.activations[k]} {_percent(weights[i, k])}",
            _percent(found.static.decided[i].mean()),
        ]
        cells += [f"{value:.4f}" for value in (static, free[i], tempered[i])]
        largest = int(shift.value[i].argmax()) if shift else 0
        cells.append(
            f"{found.activations[largest]} {shift.value[i, largest]:.3f}" if shift else NONE
        )
        cells.append(
            f"{shift.noise[i, largest]:.3f}" if shift and shift.noise is not None else NONE
        )
        rows.append(cells)
    head = [
        "layer",
        "most weight",
        "prefer",
        "static",
        "dynamic",
        f"tau {found.tau:.3g}",
        "largest shift",
        "its noise",
    ]
    return Table(head, rows, words=2)


def category_table(found: Interpretation) -> Table:
    rows = [
        [
            clean(each.name),
            f"{each.documents:,}",
            f"{each.tokens:,}",
            f"{each.entropy.mean.mean():.4f}",
            f"{each.tempered.mean.mean():.4f}",
        ]
        for each in found.categories
    ]
    return Table(
        ["category", "documents", "tokens", "dynamic entropy", f"at tau {found.tau:.3g}"], rows
    )


def method(found: Interpretation) -> list[str]:
    """Paragraphs: what was read, and how."""
    about = found.about
    pooled = (
        "A token is routed by the mean over its text up to it, so the first tokens are routed by "
        "little: categories of short "
        "documents differ from those of long ones by that alone."
        if found.causal
        else "A row is routed as one, by the mean over all of it: it holds one document, nothing "
        "else and no padding, though in "
        "training a row may hold several."
    )
    names = ", ".join(title_of(name) for name in found.activations if name in NEUROTRANSMITTERS)
    return [
        "Of each data source, the documents that training holds out are read, up to "
        f"{about['tokens_per_category']:,} tokens, "
        f"in rows of at most {about['seq_length']:,}: first the beginning of every document, then "
        "more of each where a source "
        f"has no more of them. {pooled} The model is in evaluation mode, without noise.",
        "Means of f are over all tokens; what is over neurons, too, is taken at up to "
        f"{about['positions_per_row']} places of "
        f"each row. Intervals are percentiles of {DRAWS:,} draws of {found.unit} with "
        "replacement. Where one number is of all "
        "categories, each counts as much as the others.",
        f"{CAUTION} Activations: {names}." if names else CAUTION,
    ]


def _percent(share: float) -> str:
    value = 100 * float(share)
    if 0 < value < 0.1:
        return "less than 0.1 %"
    return f"{value:.0f} %" if value in (0.0, 100.0) or 10 <= value < 99.5 else f"{value:.1f} %"
