"""What one trial's log says of it: final metrics, curves, speed, memory, samples.

In:    a Trial, whose folder may hold a metrics.jsonl
Out:   an Outcome
State: none
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from core.comparison.trials import Trial
from core.metrics.log import LOG, read_events
from core.metrics.table import HEAD, HELD_OUT, LOSS, READ
from core.preset.settings import NEXT_TOKEN

NOT_METRICS = {"step", "tokens", "time", "seconds", "eval_tokens", "run", "run_step", "run_tokens"}
CURVE_POINTS = 200
"""A training curve is averaged into so many points: more are not seen in a picture, and would swell
the report."""

HUGE = 1e100
"""A number beyond this is no measurement, and its statistics would overflow."""

Curve = list[tuple[int, float]]  # (tokens, value)


@dataclass
class Outcome:
    """A trial, and what its log says; a trial that waits has an empty one.

    metrics             of the last evaluation, at `tokens`; only finite numbers
    curves              metric -> all evaluations
    training            cross-entropy (else the loss) of the steps, each point the mean over a
                        stretch
    trained_by_loss     whether that is the loss
    tokens_per_second   median over the steps
    memory_mb           peak, as the last step told it
    seconds             between the first and the last event; pauses between runs are not counted
    samples             (prompt, text) of the last evaluation
    receipt             fingerprint of the data the trial consumed, in order
    init_from           the weights it began with, where a preset names some
    causal              whether no position sees a later one
    objective           what is predicted from what; None before the trial has begun
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
    out = Outcome(trial)
    training: Curve = []
    speeds: list[float] = []
    begun = last = trained = None
    seconds, sampled_at = 0.0, None
    read: dict[str, float] = {}
    for event in read_events(trial.folder / LOG):
        kind, time, tokens = event["event"], _number(event.get("time")), event.get("tokens")
        if time is not None:
            if kind == "run_start" and begun is not None:
                seconds, begun = seconds + last - begun, time
            begun, last = time if begun is None else begun, time
        if kind == "run_start":
            out.parameters, out.device, out.init_from = (
                event.get("parameters"),
                event.get("device"),
                event.get("init_from"),
            )
            out.causal, out.objective = (
                event.get("causal", True),
                event.get("objective", NEXT_TOKEN),
            )
        elif kind == "step":
            loss = _number(_dict(event.get("losses")).get("cross_entropy"))
            out.trained_by_loss, trained = loss is None, tokens
            loss = _number(event.get("loss")) if loss is None else loss
            if loss is not None and isinstance(tokens, int):
                training.append((tokens, loss))
            if (speed := _number(event.get("tokens_per_second"))) is not None:
                speeds.append(speed)
            out.memory_mb = _either(_number(event.get("memory_mb")), out.memory_mb)
            read = _read(event)
            out.skipped = _either(event.get("skipped"), out.skipped)
        elif kind == "eval":
            out.metrics, out.tokens = _metrics(event) | read, tokens
            for name, value in out.metrics.items():
                out.curves.setdefault(name, []).append((tokens, value))
        elif kind == "sample":
            if event.get("step") != sampled_at:
                sampled_at, out.samples = event.get("step"), []
            out.samples.append((str(event.get("prompt", "")), str(event.get("text", ""))))
        elif kind == "run_end":
            out.receipt = event.get("receipt")
    if trial.status == "finished" and trained is not None and out.tokens != trained:
        # its last evaluation failed: the one before is of less training than the others'
        out.metrics = {}
    out.training = _thinned(training)
    out.tokens_per_second = statistics.median(speeds) if speeds else None
    out.seconds = None if begun is None else seconds + last - begun
    return out


def _metrics(event: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of an `eval` event, with its losses as "loss: <name>", what heads measure
    as "head: <name>", and the loss of each source as "held out of: <source>"."""
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
    found = {
        key: _number(value) for key, value in (event | named).items() if key not in NOT_METRICS
    }
    return {key: value for key, value in found.items() if value is not None}


def _read(event: dict[str, Any]) -> dict[str, float]:
    """Of a `step` event, the shares of the tokens so far as "read of: <source>", where there are
    several sources."""
    tokens = {
        name: _number(_dict(each).get("tokens")) or 0
        for name, each in _dict(event.get("sources")).items()
    }
    total = sum(tokens.values())
    return (
        {f"{READ}{name}": count / total for name, count in tokens.items()}
        if len(tokens) > 1 and total
        else {}
    )


def _thinned(points: Curve) -> Curve:
    """Means over neighbouring points, each at its last point's tokens."""
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
    return float(value) if abs(value) < HUGE else None  # not so for NaN


def _either(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
