"""What is looked at between steps: an evaluation, and samples.

In:    a model in training
Out:   events; a failure is a warning, and the run goes on
State: which kinds of failures were told
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from core.contracts import LanguageModel, call_if_defined
from core.data.worker import Stopped
from core.errors import first_line
from core.runtime import uncompiled
from core.training.machine import Machine
from core.training.progress import Progress
from core.training.reporter import Reporter


@dataclass
class Inspection:
    """The evaluation and the samples that are made between steps."""

    # model, fraction of the schedules -> the numbers of an `eval` event
    evaluate: Callable[[LanguageModel, float], dict[str, Any] | None]
    # model, step -> events for people, after each evaluation
    show: Callable[[LanguageModel, int], Iterable[tuple[str, dict[str, Any]]]]


class Inspector:
    """Looks at a model and goes on. Every rank must call it."""

    def __init__(
        self,
        inspection: Inspection,
        model: LanguageModel,
        machine: Machine,
        progress: Progress,
        reporter: Reporter,
    ):
        self.inspection = inspection
        self._model, self._progress, self._reporter = model, progress, reporter
        self._parallel, self._engine = machine.parallel, machine.engine
        self._device = machine.device
        self._told: set[tuple[str, type]] = set()

    def inspect(self) -> None:
        """Log an evaluation and samples. If they fail, a warning is logged; if they are
        interrupted, they stay due."""
        # a run that goes on has made no step yet
        call_if_defined(self._model, "set_progress", self._progress.fraction)
        with uncompiled(self._device):  # other shapes and modes
            self._try_to("evaluation", self._inspect)
            self._model.train()

    def _inspect(self) -> None:
        started, progress = time.monotonic(), self._progress
        with self._engine.whole():  # rank 0 shows samples on its own
            evaluate = self.inspection.evaluate
            numbers = self._try_to("evaluation", lambda: evaluate(self._model, progress.fraction))
            if numbers is not None:
                self._reporter.emit("eval", **numbers, seconds=time.monotonic() - started)
            if self._parallel.rank == 0 and not progress.evaluation_due:
                self._try_to("samples", self._show)
            progress.evaluation_due = self._parallel.broadcast(progress.evaluation_due)

    def _show(self) -> None:
        for event, fields in self.inspection.show(self._model, self._progress.step):
            self._reporter.emit(event, **fields)

    def _try_to(self, what: str, action: Callable[[], Any]) -> Any:
        """Return the result of `action`; None if it fails, with one warning for each kind of
        error."""
        try:
            return action()
        except Stopped:
            self._progress.evaluation_due = True
        except Exception as error:
            if (kind := (what, type(error))) not in self._told:
                self._told.add(kind)
                self._reporter.warn(f"{what} failed, the run goes on without: {first_line(error)}")
        return None
