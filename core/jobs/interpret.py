"""The `interpret` job: show which activations the neurons of a PolyGLU model choose, by themselves
and given text of each data source.

In:    a preset: its `init_from` or its lineage's newest checkpoint, its data, its section
       `interpret`
Out:   logs/<lineage>/interpret/: figures, numbers, and a page that gathers them; a table on the
       screen
State: none

    weights --> alpha: what neurons prefer --------------------------------> figures, page
            --> held-out documents, source by source --> gates, entropies -->

Under torchrun rank 0 does it alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from core.checkpoint.weights import preview_weights
from core.contracts import plain_batch
from core.data.corpus import open_held_out
from core.errors import Interrupted, UserError
from core.files import cause
from core.interpretation.results import Interpretation, interpret_routing
from core.interpretation.routing import Reading, Router, static_routing
from core.models.polyglu import NAMES
from core.parallel.protocol import Parallel
from core.parallel.single import Single
from core.preset.base import PresetBase
from core.preset.settings import Settings
from core.reports.interpretation import write_interpretation
from core.reports.interpretation.content import findings, layer_table, warnings
from core.runtime import Runtime, uncompiled
from core.signals import StopRequest
from core.trained import Trained, load_trained
from core.ui.evaluate import EvaluateView

FOLDER = "interpret"


class InterpretSettings(Settings):
    """The interpret job: what the neurons of a PolyGLU model choose, by themselves and given
    held-out text of each source."""

    tokens_per_category: int = Field(50_000, ge=1)
    """Held-out tokens read of each source: more give narrower intervals."""
    positions_per_row: int = Field(8, ge=1, le=1_000_000)
    """Places of a row at which every neuron is looked at; what does not depend on neurons is taken
    from every token."""


class InterpretPreset(PresetBase):
    """A preset, as the interpret job reads it."""

    interpret: InterpretSettings = InterpretSettings()
    """The amount of text that the interpret job reads."""


def interpret(
    preset: InterpretPreset,
    runtime: Runtime,
    parallel: Parallel,
    root: Path,
    started: float,
    console: TextIO,
) -> None:
    """Examine the model and write the report. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP,
    with nothing written."""
    if parallel.rank != 0:  # without waiting for rank 0: a collective operation would time out
        return
    with StopRequest() as stop, EvaluateView(console) as view:
        _interpret(preset, runtime, root, view, stop)


def preview_interpret(preset: InterpretPreset, root: Path) -> list[str]:
    """Return what the menu shows before the job is chosen."""
    try:
        weights = preview_weights(preset.init_from or preset.lineage, root)
    except UserError as error:
        return [f"cannot start yet: {error}"]
    return [
        f"looks into {weights}",
        f"with held-out documents of {', '.join(source.name for source in preset.data.sources)}",
        f"writes logs/{preset.lineage}/{FOLDER}/index.html",
    ]


def _interpret(
    preset: InterpretPreset,
    runtime: Runtime,
    root: Path,
    view: EvaluateView,
    stop: Callable[[], bool],
) -> None:
    trained = load_trained(preset, root, runtime)
    _refuse(trained)
    notes = [*trained.notes, *_switch_noise_off(trained)]
    corpus, held_out_notes = open_held_out(
        trained.preset, root, Single(), trained.made_with, trained.held_out
    )
    corpus.check_tokenizer(trained.tokenizer)
    reader = RoutingReader(trained, runtime, view, stop)
    readings = {
        name: reader.read(name, documents)
        for name, documents in corpus.held_out_inputs(trained.tokenizer).items()
    }
    notes += held_out_notes
    for name in [name for name, reading in readings.items() if not reading.rows]:
        notes.append(f"{name} holds no document out, and is left out")
        del readings[name]
    for note in notes:
        view.tell(f"note  {note}")
    if not readings:
        raise UserError(
            "no source holds a document out, so there is no text to route: add documents to one "
            "of data.sources"
        )
    results = _results(trained, reader.router, readings, notes)
    folder = root / "logs" / preset.lineage / FOLDER
    try:
        write_interpretation(results, folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {cause(error, folder / 'index.html')} Then start again."
        ) from None
    table = layer_table(results)
    view.table("entropy in nats, and shift between categories", table.head, table.rows)
    for line in findings(results):
        view.tell(line)
    for warning in warnings(results):
        view.tell(f"caution  {warning}")
    view.tell(f"page: {(folder / 'index.html').relative_to(root)}")


def _refuse(trained: Trained) -> None:
    """Raise UserError if the model does not route."""
    if not getattr(trained.model, "routes", False):
        raise UserError(
            f"{trained.where} holds a {_named(trained.preset.model)}, which routes nothing: only "
            'models of type polychromatic, with feed_forward "polyglu", can be interpreted. Name '
            'one by "init_from".'
        )


def _switch_noise_off(trained: Trained) -> list[str]:
    """Switch off the noise that a model may draw in evaluation, as published. Return a note on how
    it is evaluated, if that is not by soft weights anyway."""
    evaluate = trained.preset.model.routing.evaluate
    if evaluate == "argmax":
        return [
            'routing.evaluate is "argmax": the model takes the likeliest activation alone, of the '
            "weights that are shown here"
        ]
    if evaluate == "soft":
        return []
    for block in trained.model.model_core:  # type: ignore[union-attr]
        block.polyglu.routing = block.polyglu.routing.model_copy(update={"evaluate": "soft"})
    return ['routing.evaluate is "sample"; here it is "soft", as noise would be in every number']


def _named(model: Any) -> str:
    feed_forward = getattr(model, "feed_forward", None)
    return f"{model.type} with {feed_forward}" if feed_forward else model.type


def _results(
    trained: Trained, router: Router, readings: dict[str, Reading], notes: list[str]
) -> Interpretation:
    preset, settings = trained.preset, trained.preset.interpret
    about = {
        "preset": preset.name,
        "description": preset.description,
        "lineage": preset.lineage,
        "weights": trained.where,
        "step": trained.step,
        "trained_tokens": trained.tokens,
        "pool": preset.model.routing.pool,
        "evaluate": preset.model.routing.evaluate,
        "seq_length": preset.model.seq_length,
        "tokens_per_category": settings.tokens_per_category,
        "positions_per_row": settings.positions_per_row,
        "notes": notes,
    }
    causal, static = bool(trained.model.is_causal), static_routing(router.alpha)
    return interpret_routing(about, NAMES, router.tau, causal, static, readings)


# reading ------------------------------------------------------------------------------------------


@dataclass
class RoutingReader:
    """Sends held-out documents through the model, each in rows of its own, so that neither other
    text nor padding is pooled with it."""

    trained: Trained
    runtime: Runtime
    view: EvaluateView
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        layers = [block.polyglu for block in self.trained.model.model_core]  # type: ignore[union-attr]
        alpha = torch.stack([layer.alpha.detach().float() for layer in layers])
        beta = torch.stack([layer.beta.detach().float() for layer in layers])
        self.router = Router(alpha, beta, float(self.trained.model.tau))  # type: ignore[arg-type]

    def read(self, name: str, documents: Iterator[np.ndarray]) -> Reading:
        """Route one category's documents: arrays of tokens (n,). Raises Interrupted."""
        preset = self.trained.preset
        settings, most = preset.interpret, preset.interpret.tokens_per_category
        reading, tokens = Reading(), 0
        self.view.start(name)
        for document, row in rows_of(self._stoppable(documents), preset.model.seq_length, most):
            sums, neurons = self.router.read(self._gates(row), len(row), settings.positions_per_row)
            reading.add(document, sums, neurons)
            tokens += len(row)
            self._stop_if_asked()
            self.view.update(tokens, max(tokens, most))
        self.view.end()
        return reading

    @torch.no_grad()
    def _gates(self, row: np.ndarray) -> Tensor:
        """Return the gate outputs f of every layer, (L, T or 1, K), for a row of tokens (T,)."""
        device = self.runtime.device
        dtype = self.runtime.compute_dtype(self.trained.preset.train.precision)
        batch = plain_batch(torch.from_numpy(row).long().to(device)[None])
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        # rows have many lengths, and a compiled model would be compiled anew for each
        with uncompiled(device), autocast:
            self.trained.model(batch)
        return self.trained.model.gates[:, 0]  # type: ignore[index]

    def _stoppable(self, documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for document in documents:
            self._stop_if_asked()
            yield document

    def _stop_if_asked(self) -> None:
        if self.stop():
            raise Interrupted("interrupted before anything was written; start again to begin anew")


def rows_of(
    documents: Iterator[np.ndarray], seq_length: int, tokens: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the document, row of at most seq_length tokens) until there are so many
    tokens. First comes the beginning of every document, so that as many as possible are read; then
    the second row of each, and so on."""
    read: list[np.ndarray] = []
    taken = 0
    for number, document in enumerate(documents):
        read.append(document)
        yield number, document[:seq_length]
        taken += min(len(document), seq_length)
        if taken >= tokens:
            return
    for start in range(seq_length, max(map(len, read), default=0), seq_length):
        for number, document in enumerate(read):
            if len(row := document[start : start + seq_length]):
                yield number, row
                taken += len(row)
                if taken >= tokens:
                    return
