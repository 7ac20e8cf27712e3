"""Where a lineage stands, and how far its run and its schedules go.

In:    tokens and steps, as the trainer counts them
Out:   the progress that schedules are asked with; why a run is over
State: Progress, kept in the checkpoint
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from core.preset.settings import RUN_TOKENS


@dataclass
class Progress:
    """Where a lineage stands. `step` and `tokens` count its whole life; a horizon is what the
    schedules span."""

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
        """From a checkpoint. Older ones counted the sources' tokens only; newer ones may count
        more."""
        counted = {
            name: {"tokens": count} for name, count in saved.get("source_tokens", {}).items()
        }
        known = {each.name for each in fields(cls)}
        return cls(
            **{"ledger": counted, **{key: value for key, value in saved.items() if key in known}}
        )

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
    """How far a run and its schedules go."""

    run_tokens: int
    schedule_tokens: int
    run_steps: int | None = None
    schedule_steps: int | None = None

    def progress(self, done: Progress, step_tokens: int) -> float:
        """Progress of this update through the horizon: 0 at the first, exactly 1 at the last."""
        by_tokens = done.horizon_tokens / max(self.schedule_tokens - step_tokens, 1)
        by_steps = (
            done.horizon_step / max(self.schedule_steps - 1, 1) if self.schedule_steps else 0.0
        )
        return min(max(by_tokens, by_steps), 1.0)

    def middle(self, done: Progress, step_tokens: int) -> float:
        """The middle of this update, for the learning rate: neither the first nor the last update
        is wasted on a zero."""
        # the last update may reach beyond the end
        left = min(step_tokens, self.schedule_tokens - done.horizon_tokens)
        by_tokens = (done.horizon_tokens + left / 2) / self.schedule_tokens
        by_steps = (done.horizon_step + 0.5) / self.schedule_steps if self.schedule_steps else 0.0
        return min(max(by_tokens, by_steps), 1.0)

    def run_end(self, done: Progress) -> int:
        """Tokens at which this run ends, as far as is known: where the horizon does, if that is
        before its budget."""
        return max(
            1, min(self.run_tokens, self.schedule_tokens - done.horizon_tokens + done.run_tokens)
        )

    def end(self, done: Progress) -> str | None:
        """Why the run is over, or None."""
        if done.run_tokens >= self.run_tokens:
            return "budget"
        return (
            "max_steps" if self.run_steps is not None and done.run_step >= self.run_steps else None
        )


def begin_next_run(progress: Progress, runs: int) -> None:
    """Count on: a run of its own, and a horizon of its own unless `runs` of them share one."""
    progress.run += 1
    progress.run_step = progress.run_tokens = 0
    progress.finished = progress.evaluation_due = False
    if progress.horizon_runs >= runs or runs == 1:
        progress.horizon_step = progress.horizon_tokens = progress.horizon_runs = 0
    # each run ends a little beyond its budget; added up, the last updates of a long chain would
    # find no learning rate left
    progress.horizon_tokens = min(progress.horizon_tokens, progress.horizon_runs * RUN_TOKENS)
