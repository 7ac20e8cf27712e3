"""Checkpoints of a run: when one is due, how it is written, and what is logged of it.

Where the engine shares the state out, checkpoints are written in shares, one by every rank; a run's
end, and every stop, then also as one file, which is all that others need.

In:    the state of the whole run
Out:   slots on the disk, written in the background; events
State: when the last checkpoint was written, and how long to wait for the next
"""

import time
from collections.abc import Callable
from typing import Any

from core.checkpoint.slots import CheckpointStore
from core.preset.train import TrainSettings
from core.training.machine import Machine
from core.training.reporter import Reporter

FIRST_SAVE_SECONDS = 30.0
"""A run is first saved after this, then after twice as long each time, up to the preset's
interval."""


class Saver:
    """Saves a run. Every rank must call every method here.

    state   gives all of it: whole, on rank 0, or as the engine keeps it
    """

    def __init__(
        self,
        store: CheckpointStore,
        state: Callable[[bool], dict[str, Any]],
        settings: TrainSettings,
        machine: Machine,
        reporter: Reporter,
    ):
        self._store, self._state, self._settings = store, state, settings
        self._parallel, self._reporter = machine.parallel, reporter
        self._savers = machine.engine.savers
        self._last_save, self._patience = time.monotonic(), FIRST_SAVE_SECONDS

    def is_due(self) -> bool:
        """Return whether enough time has passed, by the clock of rank 0."""
        limit = min(self._patience, self._settings.checkpoint_every_minutes * 60)
        return self._parallel.rank == 0 and time.monotonic() - self._last_save >= limit

    def is_due_at(self, run_step: int) -> bool:
        """Return whether the preset asks for a checkpoint at this step of the run."""
        every = self._settings.checkpoint_every_steps
        return every is not None and run_step % every == 0

    def save_in_turn(self) -> None:
        """Save because it is due; the next one may take twice as long."""
        self._patience *= 2
        self.save(whole=False)

    def save(self, whole: bool = True) -> dict[str, Any]:
        """Write a checkpoint in the background; returns it.

        whole   in one file, where it could be in shares
        """
        self._store.wait()
        self.report()  # the save before: its outcome is kept no longer than this
        savers = None if whole else self._savers
        state = self._state(savers is None)
        if self._parallel.rank == 0:
            self._reporter.sync()
        if savers is not None:
            self._store.save_shares(state, savers, self._parallel)
        elif self._parallel.rank == 0:
            self._store.save(state)
        self._last_save = time.monotonic()
        return state

    def save_and_wait(self) -> str | None:
        """Write a checkpoint; returns on every rank why it failed, if it did."""
        if self._savers is not None:  # quick: all is safe while the file is gathered
            self.save(whole=False)
        self.save()
        self._store.wait()
        return self._parallel.broadcast(self.report())

    def report(self) -> str | None:
        """Log how a background save went; returns why it failed, if it did."""
        outcome = self._store.outcome() if self._parallel.rank == 0 else None
        if outcome is None:
            return None
        path, seconds, failure = outcome
        if path is None:
            self._reporter.warn(
                f"checkpoint not saved: {failure} The older ones are untouched, training goes on"
            )
            return failure
        if failure:
            self._reporter.warn(f"the checkpoint is saved, but {failure}")
        name = path.relative_to(self._store.folder.parent).as_posix()
        self._reporter.emit("checkpoint", path=name, seconds=seconds)
        return None
