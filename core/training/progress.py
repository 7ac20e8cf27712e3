"""The progress of a lineage, and the budget of its run and its schedules.

In:    tokens and steps, as the trainer counts them
Out:   the fraction that schedules are asked with; the reason that a run is over
State: Progress, kept in the checkpoint
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from core.preset.settings import RUN_TOKENS


@dataclass
class Progress:
    """The progress of a lineage, as its checkpoints keep it.

    `step` and `tokens` count its whole life; those of a run, and of a horizon (what the schedules
    span: one run, or several that share them), begin anew with each."""

    step: int = 0
    tokens: int = 0
    run: int = 1
    run_step: int = 0
    run_tokens: int = 0
    horizon_step: int = 0
    horizon_tokens: int = 0
    horizon_runs: int = 0  # finished runs of the horizon
    fraction: float = 0.0  # how far through its horizon the last update was: where schedules stand
    finished: bool = False  # the run `run` came to its end
    evaluation_due: bool = False  # the one that belongs after the last update is still to be made
    skipped: int = 0
    bad_in_a_row: int = 0  # skipped updates up to the last one
    # source -> tokens, documents, epochs begun, last loss
    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Progress":
        """Read the `progress` section of a checkpoint. Older ones counted the sources' tokens only;
        newer ones may count more."""
        counted = saved.get("source_tokens", {})
        ledger = {name: {"tokens": count} for name, count in counted.items()}
        known = {each.name for each in fields(cls)}
        return cls(**{"ledger": ledger} | {k: v for k, v in saved.items() if k in known})

    def advance(self, fraction: float, tokens: int) -> None:
        """Count one update of `tokens` tokens over all ranks, made at `fraction` of the
        schedules."""
        self.fraction = fraction
        self.step += 1
        self.run_step += 1
        self.horizon_step += 1
        self.tokens += tokens
        self.run_tokens += tokens
        self.horizon_tokens += tokens

    def expose(
        self, source: str, tokens: int, documents: int, epochs: int, loss: float | None
    ) -> dict[str, Any]:
        """Enter in the ledger what a step has read of a source; returns the source's account."""
        account = self.ledger.setdefault(source, {})
        for key, count in (("tokens", tokens), ("documents", documents), ("epochs", epochs)):
            account[key] = account.get(key, 0) + count
        account["loss"] = loss if loss is not None else account.get("loss")
        return account


@dataclass(frozen=True)
class Budget:
    """The tokens, and the steps if they are limited, of a run and of its schedules."""

    run_tokens: int
    schedule_tokens: int
    run_steps: int | None = None
    schedule_steps: int | None = None

    def progress(self, done: Progress, step_tokens: int) -> float:
        """Return how far through the schedules this update is: 0 at the first, exactly 1 at the
        last."""
        by_tokens = done.horizon_tokens / max(self.schedule_tokens - step_tokens, 1)
        by_steps = 0.0
        if self.schedule_steps:
            by_steps = done.horizon_step / max(self.schedule_steps - 1, 1)
        return min(max(by_tokens, by_steps), 1.0)

    def middle(self, done: Progress, step_tokens: int) -> float:
        """Return how far the middle of this update is, for the learning rate: neither the first nor
        the last update is wasted on a zero."""
        # the last update may reach beyond the end
        left = min(step_tokens, self.schedule_tokens - done.horizon_tokens)
        by_tokens = (done.horizon_tokens + left / 2) / self.schedule_tokens
        by_steps = (done.horizon_step + 0.5) / self.schedule_steps if self.schedule_steps else 0.0
        return min(max(by_tokens, by_steps), 1.0)

    def run_end(self, done: Progress) -> int:
        """Return the tokens at which this run ends, as far as is known: where the schedules do, if
        that is before its budget."""
        by_schedules = self.schedule_tokens - done.horizon_tokens + done.run_tokens
        return max(1, min(self.run_tokens, by_schedules))

    def end(self, done: Progress) -> str | None:
        """Return the reason that the run is over; None while it is not."""
        if done.run_tokens >= self.run_tokens:
            return "budget"
        if self.run_steps is not None and done.run_step >= self.run_steps:
            return "max_steps"
        return None


def begin_next_run(progress: Progress, runs: int) -> None:
    """Begin the next run, and a new horizon unless this one has runs left.

    runs   runs that share a horizon
    """
    progress.run += 1
    progress.run_step = progress.run_tokens = 0
    progress.finished = progress.evaluation_due = False
    if progress.horizon_runs >= runs or runs == 1:
        progress.horizon_step = progress.horizon_tokens = progress.horizon_runs = 0
    # each run ends a little beyond its budget; added up, that would leave no learning rate for the
    # last updates of a long chain
    progress.horizon_tokens = min(progress.horizon_tokens, progress.horizon_runs * RUN_TOKENS)
