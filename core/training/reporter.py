"""The events of a run, each with the step and the tokens at which it happened.

In:    the metrics log, the run's progress, the loader
Out:   events in the log
State: none
"""

from typing import Any

from core.data.loader import Loader
from core.metrics.log import MetricsLog
from core.training.progress import Progress


class Reporter:
    """Writes a run's events to its log. Only rank 0 has a log that keeps them."""

    def __init__(self, log: MetricsLog, progress: Progress):
        self._log, self._progress = log, progress

    def emit(self, event: str, **fields: Any) -> None:
        """Log an event of interface `metrics.jsonl` (docs/guide.md)."""
        self._log.emit(event, step=self._progress.step, tokens=self._progress.tokens, **fields)

    def warn(self, message: str) -> None:
        self.emit("warning", message=message)

    def sync(self) -> None:
        """Bring what was logged to the disk."""
        self._log.sync()

    def report_reading(self, loader: Loader) -> None:
        """Log the loader's news since the last report: sources that failed, files that cannot be
        read, and warnings."""
        while loader.warnings:
            self.warn(loader.warnings.pop(0))
        while loader.dropped:
            name, reason = loader.dropped.pop(0)
            self.warn(f"source {name} dropped, the others go on: {reason}")
        if (warning := loader.unlearned.warning) is not None:
            loader.unlearned.warning = None
            self.warn(warning)
        for (source, file, reason), is_logged in loader.skipped.items():
            if not is_logged:
                self.emit("skipped", source=source, file=file, reason=reason)
                loader.skipped[source, file, reason] = True
