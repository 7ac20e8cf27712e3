"""The progress of a run on the screen: the share that is done, and the time that is left.

In:    the events of a run, in order
Out:   fraction done, seconds left, what is counted
State: sums of progress and of training time that fade with a time constant of one minute
"""

import math

from core.ui import text

FADE_SECONDS = 60.0
FINISHED = ("budget", "max_steps", "max_epochs")
NEARLY = 0.999
"""The largest fraction of a run whose number of tokens is only an estimate, as long as it runs."""


class RunProgress:
    """Progress towards the end of the run by tokens or by steps, whichever comes first."""

    def __init__(self, start: dict):
        """Begin with a `run_start` event; {} before there is one."""
        self.tokens: int = start.get("run_tokens") or 0
        self.steps: int = start.get("run_step") or 0
        self.end_tokens: int = start.get("end_tokens") or start.get("budget_tokens") or 0
        self.max_steps: int = start.get("max_steps") or 0
        # where epochs end a run, the number of its tokens is an estimate
        self._is_estimate = self.end_tokens != start.get("budget_tokens")
        self._tokens_per_step: int = start.get("tokens_per_step") or 0
        steps_tokens = self.max_steps * self._tokens_per_step
        self.by_steps = bool(self.max_steps) and (
            not self.end_tokens or not self._tokens_per_step or steps_tokens < self.end_tokens
        )
        self._finished = False
        self._evaluation_tokens: int = start.get("eval_every_tokens") or 0
        # of the last evaluation: its duration, and the run's tokens before it
        self._evaluation_seconds, self._evaluated_at = 0.0, -1
        compiled = start.get("compile_from_step")
        # once this step is done, a run has its speed
        self._compiling_step = 0 if compiled is None else compiled + 1
        # the first step of a process is no guide: it may compile, and waits for the first data
        self._warm = False
        self._recent_fraction = self._recent_seconds = 0.0

    def update(self, event: dict) -> None:
        """Read the next event of the run. Time is computed from a step's own tokens per second,
        which leave out evaluations and saving, not from the clock."""
        kind = event.get("event")
        self._finished = kind == "run_end" and event.get("reason") in FINISHED
        if kind == "eval":
            self._evaluation_seconds = event.get("seconds") or 0.0
            self._evaluated_at = self.tokens
        if kind != "step":
            return
        fraction, tokens = self.fraction, self.tokens
        self.tokens, self.steps = event.get("run_tokens") or 0, event.get("run_step") or 0
        speed = event.get("tokens_per_second")
        compiles = (event.get("step") or self._compiling_step + 1) <= self._compiling_step
        if self._warm and not compiles and speed and self.tokens > tokens:
            seconds = (self.tokens - tokens) / speed
            fade = math.exp(-seconds / FADE_SECONDS)
            self._recent_fraction = self._recent_fraction * fade + self.fraction - fraction
            self._recent_seconds = self._recent_seconds * fade + seconds
        self._warm = True

    @property
    def fraction(self) -> float:
        """Return the share of the run that is done, from 0 to 1."""
        if self._finished:
            return 1.0
        done, whole = self.tokens, self.end_tokens
        if self.by_steps:
            done, whole = self.steps, self.max_steps
        if not whole:
            return 0.0
        return min(NEARLY if self._is_estimate and not self.by_steps else 1.0, done / whole)

    @property
    def seconds_left(self) -> float | None:
        """Return the time that is left, with the evaluations still to come, each as long as the
        last. None until two steps have shown a speed."""
        evaluations = self._evaluations_left * self._evaluation_seconds
        if self.fraction >= 1.0:
            return evaluations
        if self._recent_fraction <= 0:
            return None
        return (1.0 - self.fraction) * self._recent_seconds / self._recent_fraction + evaluations

    @property
    def _evaluations_left(self) -> int:
        """Count the evaluations to come: one after every `eval_every_tokens`, and one at the
        end."""
        evaluated = self.fraction >= 1.0 and self._evaluated_at == self.tokens
        if not self._evaluation_tokens or self._finished or evaluated:
            return 0
        end = self.end_tokens
        if self.by_steps:
            end = self.tokens + (self.max_steps - self.steps) * self._tokens_per_step
        passed = self.tokens // self._evaluation_tokens
        return max(1, math.ceil(end / self._evaluation_tokens) - passed)

    @property
    def percent(self) -> str:
        """Return the fraction as "12.3 %", rounded down: "100.0 %" is shown only at the end."""
        return f"{math.floor(self.fraction * 1000) / 10:.1f} %"

    @property
    def counted(self) -> str:
        """Return "step 12 of 100" or "1.2M of 100M tokens"."""
        if self.by_steps:
            return f"step {self.steps:,} of {self.max_steps:,}"
        return f"{text.count(self.tokens)} of {text.count(self.end_tokens)} tokens"
