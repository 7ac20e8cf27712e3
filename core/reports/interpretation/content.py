"""The content of an interpretation's report: sentences and tables of plain text, for the page and
for the terminal.

In:    an Interpretation
Out:   strings, not escaped, and tables
State: none
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.interpretation.noise import DRAWS, FEWEST
from core.interpretation.results import Interpretation
from core.interpretation.routing import THRESHOLD
from core.reports.interpretation.palette import NEUROTRANSMITTERS, title_of
from core.reports.page import ReportTable
from core.ui.text import clean

FEW = 0.05
"""Share of neurons with a preference below which the static map is called noise."""
NONE = "–"


@dataclass(frozen=True)
class Caption:
    """The text below a figure."""

    title: str
    how: str  # how to read it; {unit}: what intervals and noise are over
    here: Callable[[Interpretation], str]  # what it shows of this model
    of_text: bool = True  # False where nothing in it depends on the text that was read


# the answer ---------------------------------------------------------------------------------------


def findings(results: Interpretation) -> list[str]:
    """Return the most important results, in a few sentences."""
    return [_preferences(results), _entropies(results), _shift(results)]


def warnings(results: Interpretation) -> list[str]:
    """Return the reasons to doubt the results."""
    reasons = []
    if not results.causal:
        reasons.append(
            "Not causal: this model pools the whole text, what comes later included, and every "
            "number here that depends on text is of texts that the routing has seen to their end. "
            "Where it continues a text, it has seen only the beginning."
        )
    if (share := float(results.static.decided.mean())) < FEW:
        reasons.append(
            f"The static map is noise: alpha begins at exactly 0, and in {_percent(1 - share)} of "
            f"the neurons no activation is ahead by more than {THRESHOLD:g} of probability. Read "
            "the figures of what text does instead."
        )
    if few := [category for category in results.categories if category.documents < FEWEST]:
        names = ", ".join(f"{clean(category.name)} has {category.documents}" for category in few)
        reasons.append(
            f"Few held-out documents: {names}. With fewer than {FEWEST}, noise is taken from rows, "
            "and rows of one document are alike: what is beyond noise is then a difference "
            "between these documents, and need not be one between categories. Add documents to "
            "the source."
        )
    return reasons


def facts(results: Interpretation) -> str:
    """Describe the model that was examined."""
    about, (layers, neurons) = results.about, results.static.preferred.shape
    step = "" if about["step"] is None else f", step {about['step']:,}"
    return (
        f"Weights: {clean(about['weights'])}{step}. {layers} layers of {neurons:,} neurons, "
        f"temperature {results.tau:.3g}, "
        f'pool "{about["pool"]}".'
    )


def _preferences(results: Interpretation) -> str:
    return (
        f"By themselves, {_percent(results.static.decided.mean())} of the neurons prefer an "
        f"activation: its probability is ahead of the next one's by more than {THRESHOLD:g}. The "
        f"mean lead is {results.static.margin.mean():.4f}."
    )


def _entropies(results: Interpretation) -> str:
    top, static = results.static.max_entropy, results.static.entropy.mean()
    parts = [
        f"{100 * each / top:.2f} %"
        for each in (static, results.mean("entropy").mean(), results.mean("tempered").mean())
    ]
    return (
        f"Of the entropy of an even mix, {top:.3f} nats, the neurons have {parts[0]} by "
        f"themselves, {parts[1]} given text, and {parts[2]} at the temperature they compute with."
    )


def _shift(results: Interpretation) -> str:
    shift = results.shift
    if shift is None:
        return "There is one category, so nothing to compare."
    if shift.noise is None:
        return (
            "Whether categories are routed differently cannot be told: there is too little text "
            "of one of them."
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
        clean(results.categories[c].name) for c in (shift.highest[layer, k], shift.lowest[layer, k])
    )
    who = "categories" if results.unit == "documents" else "the documents read of the categories"
    return (
        f"At {count} of {of} pairs of layer and activation, {who} lie apart by more than noise. "
        f"The largest such shift is {shift.value[layer, k]:.3f}, noise up to "
        f"{shift.noise[layer, k]:.3f}: layer {layer}, {results.activations[k]}, highest in {high} "
        f"and lowest in {low}."
    )


# captions -----------------------------------------------------------------------------------------


def _neurons(results: Interpretation) -> str:
    static, dynamic = np.median(results.static.entropy), np.median(results.mean("of_neurons"))
    return (
        f"Half of the neurons are above {static:.4f} nats by themselves, and above {dynamic:.4f} "
        "nats given text."
    )


def _weights(results: Interpretation) -> str:
    share, weights = float(results.static.decided.mean()), results.mean("weights").mean(0)
    most, least = int(weights.argmax()), int(weights.argmin())
    trust = "on the left only they mean something"
    if share < FEW:
        trust = "the left side means little"
    elif share == 1:
        trust = "all count"
    return (
        f"{_percent(share)} of the neurons have a preference; {trust}. Given text, "
        f"{title_of(results.activations[most])} has most weight, {_percent(weights[most])}, and "
        f"{title_of(results.activations[least])} least, {_percent(weights[least])}."
    )


def _map(results: Interpretation) -> str:
    share = results.static.decided.mean(1)
    if share.max() == share.min():
        return f"{_percent(share[0])} of the neurons of every layer have a preference."
    return (
        f"{_percent(share.mean())} of the neurons have a preference, from {_percent(share.min())} "
        f"in layer {share.argmin()} to {_percent(share.max())} in layer {share.argmax()}."
    )


def _gates(results: Interpretation) -> str:
    means = np.stack([category.gates.mean for category in results.categories])
    within = float(np.mean([category.gate_sd for category in results.categories]))
    low, high = (f"{value:.3f}".replace("-", "−") for value in (means.min(), means.max()))
    of = "tokens" if results.causal else "rows"
    return (
        f"The means lie between {low} and {high}. Inside a category, the {of} have a standard "
        f"deviation of {within:.3f}."
    )


CAPTIONS = {
    "entropy_per_layer.png": Caption(
        "Entropy of the choice, layer by layer",
        "A mark is the mean over a layer's neurons: on the dotted line all activations weigh the "
        "same, at 0 one has all the weight. The wide grey line is of the neurons by themselves, "
        "the others are of what they choose given text of each category, with 95 % intervals "
        "over {unit}. Left without temperature, as specification 001 measures it; right as the "
        "model computes.",
        _entropies,
    ),
    "entropy_histogram.png": Caption(
        "Entropy of single neurons",
        "The further left a neuron stands, the clearer its choice; a spike at the dotted line is "
        "an even mix. Grey: by itself. Outline: given text, mean over categories, without "
        "temperature.",
        _neurons,
    ),
    "layer_distribution.png": Caption(
        "Which activations each layer uses",
        "A bar is a layer, a colour an activation. Left, each neuron counts for its largest "
        "alpha, by however little. Right is what the layer computes with: the weight of each "
        "activation, mean over neurons, tokens and categories.",
        _weights,
    ),
    "neurotransmitter_heatmap.png": Caption(
        "Preferred activation of every neuron",
        "A row is a layer, a column a neuron; the order of neurons means nothing. Above, each "
        "has the colour of its largest alpha. Below, those without a clear lead are white: what "
        "is white below is noise above.",
        _map,
        of_text=False,
    ),
    "dynamic_routing_comparison.png": Caption(
        "What the gate net says to each category",
        "f, times beta, is added to the neurons' own preferences: the higher, the more of this "
        "activation, everywhere in the layer. Bars are 95 % intervals over {unit}, each for "
        "itself; the next figure says what is beyond noise.",
        _gates,
    ),
    "routing_shift_summary.png": Caption(
        "Routing shift between categories",
        "A bar is by how much the highest category's mean f exceeds the lowest's. The black "
        "marks are noise: with the {unit} shuffled among categories, in 95 of 100 shuffles no "
        "bar anywhere crosses its mark. A bar that does, with a star, is a difference between "
        "the categories' texts, in what they say or in how long they are; a bar that does not "
        "says nothing.",
        _shift,
    ),
}

CAUTION = (
    "Routing is alpha, what a neuron prefers by itself, plus beta times f, what the gate net "
    "makes of the text. Training adds noise and divides by a temperature; what is called static "
    "or dynamic entropy is without both, so that it can be compared over a training run. That "
    "categories are routed differently does not say that it is of use: for that, train a model "
    "without and compare. The names of neurotransmitters are the specification's, and say nothing "
    "about brains."
)


# tables -------------------------------------------------------------------------------------------


def layer_table(results: Interpretation) -> ReportTable:
    """Return a row for each layer: the activation with most weight, preferences, entropies, and the
    largest shift."""
    weights, shift = results.mean("weights"), results.shift
    free, tempered = results.mean("entropy"), results.mean("tempered")
    rows = []
    for i, static in enumerate(results.static.entropy.mean(1)):
        k = int(weights[i].argmax())
        cells = [
            str(i),
            f"{results.activations[k]} {_percent(weights[i, k])}",
            _percent(results.static.decided[i].mean()),
        ]
        cells += [f"{value:.4f}" for value in (static, free[i], tempered[i])]
        largest = int(shift.value[i].argmax()) if shift else 0
        name = results.activations[largest]
        cells.append(f"{name} {shift.value[i, largest]:.3f}" if shift else NONE)
        noise = shift.noise if shift else None
        cells.append(f"{noise[i, largest]:.3f}" if noise is not None else NONE)
        rows.append(cells)
    head = [
        "layer",
        "most weight",
        "prefer",
        "static",
        "dynamic",
        f"tau {results.tau:.3g}",
        "largest shift",
        "its noise",
    ]
    return ReportTable(head, rows, words=2)


def category_table(results: Interpretation) -> ReportTable:
    """Return a row for each category: how much of it was read, and its entropies."""
    rows = [
        [
            clean(category.name),
            f"{category.documents:,}",
            f"{category.tokens:,}",
            f"{category.entropy.mean.mean():.4f}",
            f"{category.tempered.mean.mean():.4f}",
        ]
        for category in results.categories
    ]
    return ReportTable(
        ["category", "documents", "tokens", "dynamic entropy", f"at tau {results.tau:.3g}"], rows
    )


def method(results: Interpretation) -> list[str]:
    """Return paragraphs on the text that was read, and on the measurements."""
    about = results.about
    pooled = (
        "A token is routed by the mean over its text up to it, so the first tokens are routed by "
        "little: categories of short documents differ from those of long ones by that alone."
        if results.causal
        else "A row is routed as one, by the mean over all of it: it holds one document, nothing "
        "else and no padding, though in training a row may hold several."
    )
    names = ", ".join(title_of(name) for name in results.activations if name in NEUROTRANSMITTERS)
    return [
        "Of each data source, the documents that training holds out are read, up to "
        f"{about['tokens_per_category']:,} tokens, in rows of at most {about['seq_length']:,}: "
        "first the beginning of every document, then more of each where a source has no more of "
        f"them. {pooled} The model is in evaluation mode, without noise.",
        "Means of f are over all tokens; what is over neurons, too, is taken at up to "
        f"{about['positions_per_row']} places of each row. Intervals are percentiles of {DRAWS:,} "
        f"draws of {results.unit} with replacement. Where one number is of all categories, each "
        "counts as much as the others.",
        f"{CAUTION} Activations: {names}." if names else CAUTION,
    ]


def _percent(share: float) -> str:
    value = 100 * float(share)
    if 0 < value < 0.1:
        return "less than 0.1 %"
    return f"{value:.0f} %" if value in (0.0, 100.0) or 10 <= value < 99.5 else f"{value:.1f} %"
