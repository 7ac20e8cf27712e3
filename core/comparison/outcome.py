"""The outcome of one trial, read from its log: final metrics, curves, speed, memory, samples.

In:    a Trial, whose folder may hold a metrics.jsonl
Out:   an Outcome
State: none
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from core.comparison.trials import Trial
from core.metrics.events import LOG, read_events
from core.metrics.table import HEAD, HELD_OUT, LOSS, READ
from core.preset.settings import NEXT_TOKEN

NOT_METRICS = {"step", "tokens", "time", "seconds", "eval_tokens", "run", "run_step", "run_tokens"}
CURVE_POINTS = 200
"""A training curve is averaged into so many points: more could not be told apart in a figure, and
would swell the report."""

HUGE = 1e100
"""A larger number is no measurement, and its statistics would overflow."""

Curve = list[tuple[int, float]]  # (tokens, value)


@dataclass
class Outcome:
    """A trial and the numbers in its log; those of a trial that waits are empty.

    metrics             finite numbers of the last evaluation, which was made at `tokens`
    curves              metric -> all evaluations
    training            cross-entropy (else the loss) of the steps, each point the mean over a
                        stretch
    trained_by_loss     True where `training` is the loss
    tokens_per_second   median over the steps
    memory_mb           peak, from the last step
    seconds             between the first and the last event, without pauses between runs
    samples             (prompt, text) of the last evaluation
    receipt             fingerprint of the data the trial consumed, in order
    init_from           the weights it began with, where the preset names some
    causal              True where no position sees a later one
    objective           next_token or masked_tokens; None before the trial has begun
    """

    trial: Trial
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    training: Curve = field(default_factory=list)
    tokens_per_second: float | None = None
    memory_mb: float | None = None
    seconds: float | None = None
    samples: list[tuple[str, str]] = field(default_factory=list)
    skipped: int | None = None
    parameters: int | None = None
    device: str | None = None
    receipt: str | None = None
    init_from: str | None = None
    causal: bool = True
    objective: str | None = None
    trained_by_loss: bool = False

    @property
    def finished(self) -> bool:
        return self.trial.status == "finished"


def read_outcome(trial: Trial) -> Outcome:
    """Read a trial's log, as far as it has come."""
    reader = _LogReader(trial)
    for event in read_events(trial.folder / LOG):
        reader.read(event)
    return reader.finish()


class _LogReader:
    """Takes the events of a trial's log, in order, and makes an Outcome of them."""

    def __init__(self, trial: Trial):
        self._outcome = Outcome(trial)
        self._training: Curve = []
        self._speeds: list[float] = []
        self._shares: dict[str, float] = {}  # of the sources, at the last step
        self._trained_tokens: int | None = None
        self._sampled_step: int | None = None
        # unix times of the first and the last event of a run; seconds of the runs before it
        self._begun: float | None = None
        self._seconds = self._last = 0.0

    def read(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self._read_time(kind, _number(event.get("time")))
        if kind == "run_start":
            self._outcome.parameters = event.get("parameters")
            self._outcome.device = event.get("device")
            self._outcome.init_from = event.get("init_from")
            self._outcome.causal = event.get("causal", True)
            self._outcome.objective = event.get("objective", NEXT_TOKEN)
        elif kind == "step":
            self._read_step(event)
        elif kind == "eval":
            self._read_evaluation(event)
        elif kind == "sample":
            if event.get("step") != self._sampled_step:
                self._sampled_step, self._outcome.samples = event.get("step"), []
            sample = str(event.get("prompt", "")), str(event.get("text", ""))
            self._outcome.samples.append(sample)
        elif kind == "run_end":
            self._outcome.receipt = event.get("receipt")

    def finish(self) -> Outcome:
        outcome = self._outcome
        trained = self._trained_tokens
        if outcome.finished and trained is not None and outcome.tokens != trained:
            # its last evaluation failed: the one before is of less training than the others'
            outcome.metrics = {}
        outcome.training = _thinned(self._training)
        outcome.tokens_per_second = statistics.median(self._speeds) if self._speeds else None
        if self._begun is not None:
            outcome.seconds = self._seconds + self._last - self._begun
        return outcome

    def _read_time(self, kind: str, time: float | None) -> None:
        """Count the time between events; pauses between runs are left out."""
        if time is None:
            return
        if kind == "run_start" and self._begun is not None:
            self._seconds += self._last - self._begun
            self._begun = time
        if self._begun is None:
            self._begun = time
        self._last = time

    def _read_step(self, event: dict[str, Any]) -> None:
        outcome, tokens = self._outcome, event.get("tokens")
        cross_entropy = _number(_dict(event.get("losses")).get("cross_entropy"))
        outcome.trained_by_loss, self._trained_tokens = cross_entropy is None, tokens
        loss = _number(event.get("loss")) if cross_entropy is None else cross_entropy
        if loss is not None and isinstance(tokens, int):
            self._training.append((tokens, loss))
        if (speed := _number(event.get("tokens_per_second"))) is not None:
            self._speeds.append(speed)
        if (memory := _number(event.get("memory_mb"))) is not None:
            outcome.memory_mb = memory
        if (skipped := event.get("skipped")) is not None:
            outcome.skipped = skipped
        self._shares = _source_shares(event)

    def _read_evaluation(self, event: dict[str, Any]) -> None:
        outcome = self._outcome
        outcome.metrics, outcome.tokens = _metrics(event) | self._shares, event.get("tokens")
        for name, value in outcome.metrics.items():
            if outcome.tokens is not None:
                outcome.curves.setdefault(name, []).append((outcome.tokens, value))


def _metrics(event: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of an `eval` event, with its losses as "loss: <name>", those of
    heads as "head: <name>", and the loss of each source as "held out of: <source>"."""
    groups = [(prefix, event.get(key)) for prefix, key in ((LOSS, "losses"), (HEAD, "heads"))]
    named = {
        prefix + name: value
        for prefix, group in groups
        if isinstance(group, dict)
        for name, value in group.items()
    }
    named |= {
        f"{HELD_OUT}{name}": _dict(each).get("loss")
        for name, each in _dict(event.get("sources")).items()
    }
    values = {
        key: _number(value) for key, value in (event | named).items() if key not in NOT_METRICS
    }
    return {key: value for key, value in values.items() if value is not None}


def _source_shares(event: dict[str, Any]) -> dict[str, float]:
    """Return the sources' shares of the tokens so far as "read of: <source>"; {} with one
    source."""
    tokens = {
        name: _number(_dict(each).get("tokens")) or 0
        for name, each in _dict(event.get("sources")).items()
    }
    total = sum(tokens.values())
    if len(tokens) < 2 or not total:
        return {}
    return {f"{READ}{name}": count / total for name, count in tokens.items()}


def _thinned(points: Curve) -> Curve:
    """Average neighbouring points; each mean stands at the tokens of its last point."""
    n = len(points)
    if n <= CURVE_POINTS:
        return points
    edges = [n * i // CURVE_POINTS for i in range(CURVE_POINTS + 1)]
    return [
        (points[b - 1][0], statistics.fmean(value for _, value in points[a:b]))
        for a, b in zip(edges, edges[1:])
    ]


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < HUGE else None  # False for NaN
