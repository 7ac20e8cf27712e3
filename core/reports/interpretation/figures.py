"""The figures of an interpretation.

In:    an Interpretation
Out:   PNG files by name
State: none

L num_layers, F neurons of a layer, K activations
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from core.interpretation.results import Interpretation, Spread
from core.interpretation.routing import THRESHOLD
from core.reports.interpretation.palette import (
    CATEGORY_COLOURS,
    COLOURS,
    HATCH_INKS,
    HATCHES,
    UNDECIDED,
    short,
    title_of,
)
from core.reports.style import DASHES, INK, MARKERS, PAPER, drawing, dress

WIDTH, DPI = 10.0, 130  # inches, dots per inch
COLUMNS = 1024
"""Neurons that a figure has room for; of more neurons, evenly spaced ones are drawn."""
NARROWEST = 0.05
"""Nats that an axis of entropies spans at least, so that smaller differences look alike."""


def figures(results: Interpretation) -> dict[str, bytes]:
    """Draw every figure. Return PNGs by file name, in the order of the page."""
    functions: dict[str, Callable[[Interpretation], Any]] = {
        "entropy_per_layer.png": entropy_per_layer,
        "entropy_histogram.png": entropy_histogram,
        "layer_distribution.png": layer_distribution,
        "neurotransmitter_heatmap.png": neurotransmitter_heatmap,
        "dynamic_routing_comparison.png": dynamic_routing_comparison,
        "routing_shift_summary.png": routing_shift_summary,
    }
    with drawing(**{"text.parse_math": False, "hatch.linewidth": 0.7}):
        return {name: _png(figure(results)) for name, figure in functions.items()}


# entropies ----------------------------------------------------------------------------------------


def entropy_per_layer(results: Interpretation) -> Any:
    """Draw static and dynamic entropy of each layer and category; on the right at the model's
    temperature."""
    figure = _figure(3.6)
    free, tempered = figure.subplots(1, 2)
    layers = np.arange(len(results.static.entropy))
    static = results.static.entropy.mean(1)
    look = {
        "color": "0.55",
        "linewidth": 2.6,
        "marker": "_",
        "markersize": 13,
        "markeredgewidth": 2.6,
    }
    free.plot(layers, static, **look, label="by themselves")
    shown: dict[Any, list[np.ndarray]] = {free: [static], tempered: []}
    for i, category in enumerate(results.categories):
        for axes, spread in ((free, category.entropy), (tempered, category.tempered)):
            _curve(axes, i, len(results.categories), layers, spread, short(category.name))
            shown[axes] += [
                each for each in (spread.mean, spread.low, spread.high) if each is not None
            ]
    for axes, title in (
        (free, "without temperature"),
        (tempered, f"at the model's temperature, {results.tau:.3g}"),
    ):
        axes.axhline(results.static.max_entropy, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        _entropy_limits(axes.set_ylim, np.concatenate(shown[axes]), results.static.max_entropy)
        axes.set_title(title, loc="left", fontsize=10)
        _layers(axes, len(layers))
    free.set_ylabel("entropy (nats)")
    where = {
        "xytext": (-2, 2),
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "ha": "right",
    }
    free.annotate(
        f"even: ln {len(results.activations)}", (1, results.static.max_entropy), **where, fontsize=8
    )
    _legend(figure, free)
    return figure


def entropy_histogram(results: Interpretation) -> Any:
    """Draw how undecided single neurons are."""
    figure = _figure(3.2)
    axes = figure.subplots()
    static, dynamic = results.static.entropy.ravel(), results.mean("of_neurons").ravel()
    low, _ = _entropy_limits(
        axes.set_xlim, np.concatenate([static, dynamic]), results.static.max_entropy
    )
    # a float32 may say a little more than there can be
    bins = np.linspace(low, results.static.max_entropy * (1 + 1e-6), 61)
    share = np.full(static.size, 100 / static.size)
    grey = {"color": "0.75", "edgecolor": INK, "linewidth": 0.4, "hatch": "////"}
    axes.hist(static, bins, weights=share, **grey, label="by themselves")
    axes.hist(
        dynamic,
        bins,
        weights=share,
        histtype="step",
        color=COLOURS[1],
        linewidth=2.2,
        label="given text",
    )
    axes.axvline(results.static.max_entropy, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlabel("entropy of a neuron's choice (nats); the dotted line is an even mix")
    axes.set_ylabel("% of all neurons")
    dress(axes)
    _legend(figure, axes)
    return figure


def _entropy_limits(setter: Any, values: np.ndarray, top: float) -> tuple[float, float]:
    """Set limits from the lowest entropy that was seen to the highest one possible. Return them.

    setter   of the axis
    """
    low = max(0.0, min(float(values.min()), top - NARROWEST))
    margin = 0.05 * (top - low)
    setter(max(0.0, low - margin), top + margin)
    return max(0.0, low - margin), top + margin


# which activation ---------------------------------------------------------------------------------


def layer_distribution(results: Interpretation) -> Any:
    """Draw for each layer how many neurons have their largest alpha at each activation, and how
    much weight each activation really has."""
    layers = len(results.static.entropy)
    figure = _figure(1.4 + max(1.2, 0.22 * layers))
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, results.static.distribution, results)
    left.set_xlabel("% of neurons by their largest alpha")
    _bars(right, 100 * results.mean("weights"), results)
    right.set_xlabel(f"% of the weight given text, temperature {results.tau:.3g}")
    left.set_ylabel("layer")
    left.set_yticks(_ticks(layers))
    left.set_ylim(layers - 0.5, -0.5)
    _legend(figure, left)
    return figure


def _bars(axes: Any, shares: np.ndarray, results: Interpretation) -> None:
    """Draw stacked bars of shares (L, K)."""
    rows, begin = np.arange(len(shares)), np.zeros(len(shares))
    for k, name in enumerate(results.activations):
        axes.barh(rows, shares[:, k], left=begin, height=0.82, **_fill(k), label=title_of(name))
        begin += shares[:, k]
    axes.set_xlim(0, 100)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def neurotransmitter_heatmap(results: Interpretation) -> Any:
    """Draw a map of layers x neurons: the activation of the largest alpha, and below only where
    neurons have a preference."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    static, (layers, neurons) = results.static, results.static.preferred.shape
    figure = _figure(1.6 + 2 * max(0.7, 0.13 * layers))
    every = -(-neurons // COLUMNS)
    colours = ListedColormap([*COLOURS, UNDECIDED])
    decided = np.where(static.decided, static.preferred, len(results.activations))
    look: dict[str, Any] = {
        "cmap": colours,
        "vmin": -0.5,
        "vmax": len(COLOURS) + 0.5,
        "aspect": "auto",
        "interpolation": "nearest",
    }
    look["extent"] = (-0.5, neurons - 0.5, layers - 0.5, -0.5)
    for axes, shown in zip(figure.subplots(2, 1, sharex=True), (static.preferred, decided)):
        axes.imshow(shown[:, ::every], **look)
        axes.set_yticks(_ticks(layers, 14))
        axes.set_ylabel("layer")
    top, bottom = figure.axes
    top.set_title("largest alpha, by however little", loc="left", fontsize=10)
    title = f"the same where it is ahead by more than {THRESHOLD:g} of probability"
    bottom.set_title(title, loc="left", fontsize=10)
    if not static.decided.any():
        _write_in_middle(bottom, "no neuron has a preference")
    drawn = f" (of {neurons:,}, every {_ordinal(every)} is drawn)" if every > 1 else ""
    bottom.set_xlabel(f"neuron{drawn}")
    looks = [*zip(COLOURS, map(title_of, results.activations)), (UNDECIDED, "no preference")]
    patches = [
        Patch(facecolor=colour, edgecolor=INK, linewidth=0.5, label=label)
        for colour, label in looks
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
    return figure


# the effect of text -------------------------------------------------------------------------------


def dynamic_routing_comparison(results: Interpretation) -> Any:
    """Draw the gate net's output for each category, one panel for each activation."""
    figure = _figure(5.4)
    panels = figure.subplots(
        2, -(-len(results.activations) // 2), sharex=True, sharey=True, squeeze=False
    ).ravel()
    layers = np.arange(len(results.static.entropy))
    for k, (axes, name) in enumerate(zip(panels, results.activations)):
        for i, category in enumerate(results.categories):
            gates = _of_activation(category.gates, k)
            _curve(axes, i, len(results.categories), layers, gates, short(category.name))
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(title_of(name), loc="left", fontsize=10)
        _layers(axes, len(layers))
        axes.label_outer()
    for axes in panels[::2]:
        axes.set_ylabel("gate output f")
    _legend(figure, panels[0])
    return figure


def routing_shift_summary(results: Interpretation) -> Any:
    """Draw the highest minus the lowest category of the mean gate output, and the same for shuffled
    texts."""
    figure = _figure(3.6)
    axes = figure.subplots()
    dress(axes)
    layers, shift = np.arange(len(results.static.entropy)), results.shift
    if shift is None:
        axes.set_axis_off()
        _write_in_middle(axes, "one category: there is nothing to compare")
        return figure
    width = 0.84 / len(results.activations)
    highest = max(shift.value.max(), 0 if shift.noise is None else shift.noise.max(), 1e-9)
    axes.set_ylim(0, 1.1 * highest)
    for k, name in enumerate(results.activations):
        at = layers + (k - (len(results.activations) - 1) / 2) * width
        axes.bar(at, shift.value[:, k], 0.92 * width, **_fill(k, edge=INK), label=title_of(name))
        if shift.noise is not None:
            unit = results.unit if k == 0 else ""
            _noise_marks(axes, at, 0.5 * width, shift.value[:, k], shift.noise[:, k], unit)
    axes.set_ylabel("highest − lowest category, gate output f")
    _layers(axes, len(layers), grid=False)
    axes.set_xlim(-0.55, len(layers) - 0.45)
    _legend(figure, axes)
    return figure


def _noise_marks(
    axes: Any, at: np.ndarray, half: float, value: np.ndarray, noise: np.ndarray, unit: str
) -> None:
    """Draw the height of noise, and a star over each bar that is higher.

    unit   what is shuffled, for the legend; "" without one
    """
    # a dark mark on a pale one is visible on bars and beside them
    for colour, thickness in ((PAPER, 3.6), (INK, 1.8)):
        label = f"noise: shuffled {unit}" if unit and colour == INK else None
        axes.hlines(noise, at - half, at + half, color=colour, linewidth=thickness, label=label)
    above = np.where(value > noise, value + 0.035 * axes.get_ylim()[1], np.nan)
    star = {"linestyle": "none", "marker": "*", "markersize": 6, "color": INK}
    axes.plot(at, above, **star, label="beyond noise" if unit else None)


def _of_activation(gates: Spread, k: int) -> Spread:
    """Return one activation's column (layers,) of gate outputs (layers, activations)."""
    low = None if gates.low is None else gates.low[:, k]
    high = None if gates.high is None else gates.high[:, k]
    return Spread(mean=gates.mean[:, k], low=low, high=high)


# pieces -------------------------------------------------------------------------------------------


def _curve(axes: Any, i: int, of: int, layers: np.ndarray, spread: Spread, name: str) -> None:
    """Draw one category's line over the layers, with its intervals as bars.

    i, of   its place among the categories, and their number: lines are shifted to lie side by side
    """
    at = layers + (i - (of - 1) / 2) * min(0.18, 0.6 / of)
    look: dict[str, Any] = {
        "color": CATEGORY_COLOURS[i % len(CATEGORY_COLOURS)],
        "linestyle": DASHES[i % len(DASHES)],
    }
    look |= {"linewidth": 1.4, "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
    look |= {"markeredgecolor": INK, "markeredgewidth": 0.5}
    if spread.low is None or spread.high is None:
        axes.plot(at, spread.mean, **look, label=name)
        return
    reach = np.maximum(0.0, np.stack([spread.mean - spread.low, spread.high - spread.mean]))
    bars = axes.errorbar(at, spread.mean, reach, **look, elinewidth=1.1, capsize=1.8, label=name)
    for line in bars[2]:
        line.set_linestyle("solid")


def _fill(k: int, edge: str | None = None) -> dict[str, Any]:
    """Return the look of an activation's bar. Hatches have the colour of the edge."""
    k %= len(COLOURS)
    return {
        "facecolor": COLOURS[k],
        "hatch": HATCHES[k],
        "edgecolor": edge or HATCH_INKS[k],
        "linewidth": 0.6,
    }


def _layers(axes: Any, layers: int, grid: bool = True) -> None:
    dress(axes)
    if not grid:
        axes.grid(False, axis="x")
    axes.set_xlabel("layer")
    axes.set_xticks(_ticks(layers, 16))
    axes.set_xlim(-0.5, layers - 0.5)


def _ticks(layers: int, room: int = 32) -> list[int]:
    return list(range(0, layers, -(-layers // room)))


def _write_in_middle(axes: Any, message: str) -> None:
    centre = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, message, **centre, fontsize=11)


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(6, len(labels)),
        columnspacing=1.4,
        frameon=False,
    )


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
