"""How far a run is, and how long it will still take.

In:    the events of a run, in order
Out:   fraction done, seconds left, what is counted
State: sums of progress and of training time that fade with a time constant of one minute
"""

import math

from core.ui import text

FADE_SECONDS = 60.0
FINISHED = ("budget", "max_steps", "max_epochs")
NEARLY = 0.999


class Progress:
    """Progress towards the end of the run by tokens or by steps, whichever comes first."""

    def __init__(self, start: dict):
        self.budget_tokens = start.get("end_tokens") or start.get("budget_tokens") or 0
        # where epochs end a run, that is known about only
        self._about = self.budget_tokens != start.get("budget_tokens")
        self._over = False
        self.max_steps = start.get("max_steps")
        self.tokens = start.get("run_tokens") or 0
        self.steps = start.get("run_step") or 0
        per_step = start.get("tokens_per_step") or 0
        self.by_steps = bool(self.max_steps) and (
            not self.budget_tokens or not per_step or self.max_steps * per_step < self.budget_tokens
        )
        self._per_step, self._every = per_step, start.get("eval_every_tokens") or 0
        # of the last evaluation, and after which tokens of the run
        self._evaluation_seconds, self._evaluated = 0.0, -1
        compiled = start.get("compile_from_step")
        # with that step behind it, a run has its speed
        self._compiles_at = 0 if compiled is None else compiled + 1
        # the first step of a process is no guide: it may compile, and waits for the first data
        self._warm = False
        self._done = self._spent = 0.0

    def update(self, event: dict) -> None:
        """Time is taken from the step's own tokens per second, which leaves evaluations and saving
        out, not from the clock."""
        self._over = event.get("event") == "run_end" and event.get("reason") in FINISHED
        if event.get("event") == "eval":
            self._evaluation_seconds, self._evaluated = event.get("seconds") or 0.0, self.tokens
        if event.get("event") != "step":
            return
        fraction, tokens = self.fraction, self.tokens
        self.tokens, self.steps = event.get("run_tokens") or 0, event.get("run_step") or 0
        speed = event.get("tokens_per_second")
        compiles = (event.get("step") or self._compiles_at + 1) <= self._compiles_at
        if self._warm and not compiles and speed and self.tokens > tokens:
            spent = (self.tokens - tokens) / speed
            fade = math.exp(-spent / FADE_SECONDS)
            self._done = self._done * fade + self.fraction - fraction
            self._spent = self._spent * fade + spent
        self._warm = True

    @property
    def fraction(self) -> float:
        done, whole = (
            (self.steps, self.max_steps) if self.by_steps else (self.tokens, self.budget_tokens)
        )
        if self._over:
            return 1.0
        return (
            min(NEARLY if self._about and not self.by_steps else 1.0, done / whole)
            if whole
            else 0.0
        )

    @property
    def seconds_left(self) -> float | None:
        """With the evaluations still to come, as long as the last one took. None until two steps
        have shown a rate."""
        if self.fraction >= 1.0:
            return self._evaluations_left * self._evaluation_seconds
        if self._done <= 0:
            return None
        return (
            1.0 - self.fraction
        ) * self._spent / self._done + self._evaluations_left * self._evaluation_seconds

    @property
    def _evaluations_left(self) -> int:
        """At every so many tokens, and one at the end."""
        if (
            not self._every
            or self._over
            or (self.fraction >= 1.0 and self._evaluated == self.tokens)
        ):
            return 0
        end = (
            self.tokens + (self.max_steps - self.steps) * self._per_step
            if self.by_steps
            else self.budget_tokens
        )
        return max(1, math.ceil(end / self._every) - self.tokens // self._every)

    @property
    def percent(self) -> str:
        # Never "100.0 %" before the end: floor, not round.
        return f"{math.floor(self.fraction * 1000) / 10:.1f} %"

    @property
    def counted(self) -> str:
        if self.by_steps:
            return f"step {self.steps:,} of {self.max_steps:,}"
        return f"{text.count(self.tokens)} of {text.count(self.budget_tokens)} tokens"
