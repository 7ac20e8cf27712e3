"""Events as plain lines: for pipes, files, cluster logs and terminals that cannot be drawn on.

In:    events
Out:   lines on a text stream, each flushed
State: when the last step line was written, the step not yet shown, and the evaluation before
"""

import re
import time
from collections.abc import Callable
from typing import TextIO

from core.metrics.table import SCORES
from core.preset.settings import MASKED_TOKENS
from core.terminal import write_line
from core.ui import text
from core.ui.progress import Progress

STEP_SECONDS = 5.0
NOT_CAUSAL = "not causal: sees later tokens"
"""Said beside the numbers of a model whose positions see later ones: they are not a language
model's."""
IS_MASKED = "masked tokens"
"""Said beside the numbers of a model that is to see both sides."""


class PlainLines:
    """One compact line for an event; of steps the first, the last, and one about every five
    seconds."""

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        step_seconds: float = STEP_SECONDS,
    ):
        self.stream, self.clock, self._step_seconds = stream, clock, step_seconds
        self._progress = Progress({})
        self._shown_at: float | None = None
        self._pending: dict | None = None
        self._eval: dict = {}

    def update(self, event: dict) -> None:
        kind = event.get("event")
        if kind == "run_start":
            self._progress, self._shown_at, self._pending = Progress(event), None, None
        else:
            self._progress.update(event)
        if kind == "step":
            self._pending = event
            if self._shown_at is None or self.clock() - self._shown_at >= self._step_seconds:
                self._show_step()
            return
        if kind == "run_end":
            self._show_step()
        for line in describe(event, self._eval):
            self._write(line)
        if kind == "eval":
            self._eval = event

    def close(self) -> None:
        self._show_step()

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show_step(self) -> None:
        if self._pending is None:
            return
        event, self._pending, self._shown_at = self._pending, None, self.clock()
        parts = [f"step {event['step']:,}", f"{self._progress.counted} ({self._progress.percent})"]
        parts += [
            f"loss {text.number(event.get('loss'))}",
            f"learning rate {text.number(event.get('learning_rate'))}",
        ]
        parts += [
            f"grad norm {text.number(event.get('grad_norm'), 2)}",
            f"{text.count(event.get('tokens_per_second'))} tokens/s",
        ]
        if event.get("skipped"):
            parts.append(f"skipped {event['skipped']}")
        if (left := self._progress.seconds_left) is not None:
            parts.append(f"{text.duration(left)} left")
        self._write("  ".join(parts))

    def _write(self, line: str) -> None:
        write_line(self.stream, line)


def describe(event: dict, previous_eval: dict) -> list[str]:
    """The lines that tell of one event; none for events that have no words (steps, kinds not known
    here)."""
    kind = event.get("event")
    if kind == "run_start":
        about = [
            text.clean(event.get("preset")),
            f"lineage {text.clean(event.get('lineage'))}",
            f"run {event.get('run')}",
            machine(event),
        ]
        lines = ["  ".join(about)]
        if event.get("resumed_from"):
            lines.append(f"resumed from {text.clean(event['resumed_from'])}")
        if event.get("sources"):
            lines.append("sources  " + ", ".join(text.clean(name) for name in event["sources"]))
        return lines + [f"note  {text.clean(note)}" for note in event.get("notes") or []]
    if kind == "eval":
        return [
            f"{evaluation_title(event)}  "
            + "  ".join(f"{k} {v}" for k, v in scores(event, previous_eval))
        ]
    if kind == "sample":
        return [f"sample  {text.clean(event.get('prompt'))}│{text.clean(event.get('text'))}"]
    if kind == "neighbors":
        return [f"near {text.clean(event.get('word'))}  {neighbors(event)}"]
    if kind == "checkpoint":
        return [
            f"checkpoint  {text.clean(event.get('path'))}  "
            f"({text.number(event.get('seconds'), 1)}s)"
        ]
    if kind == "warning":
        return [f"warning  {text.clean(event.get('message'))}"]
    if kind == "skipped":
        return [f"skipped  {left_out(event)}"]
    if kind == "reweighted":
        return [f"sources reweighted  {reweighted(event)}"]
    if kind == "run_end":
        return [summary(event)]
    return []


def left_out(event: dict) -> str:
    """ "pdf: thesis.pdf (encrypted)" """
    return (
        f"{text.clean(event.get('source'))}: {text.clean(event.get('file'))} "
        f"({text.clean(event.get('reason'))})"
    )


def reweighted(event: dict) -> str:
    """ "code 61.2 % (×1.200, loss 5.201), prose 38.8 % (×0.800, loss 3.422)" """

    def told(name: str, each: dict) -> str:
        share = text.number((each.get("weight") or 0.0) * 100, 1)
        return (
            f"{text.clean(name)} {share} % (×{text.number(each.get('factor'))}, loss "
            f"{text.number(each.get('loss'))})"
        )

    return ", ".join(told(name, each) for name, each in (event.get("sources") or {}).items())


REASONS = {
    "budget": "finished: the token budget is used up",
    "max_steps": "finished: max_steps reached",
    "max_epochs": "finished: max_epochs reached",
    "interrupted": "interrupted; start again to go on from here",
    "no_data": "stopped: no source is left to read from",
    "diverged": "stopped: training diverged",
    "failed": "stopped by an error; the next start goes on from what is saved",
}


def remark(event: dict) -> str:
    """What has to be said beside the numbers of a run, if anything. That an encoder sees both sides
    is by design."""
    if event.get("objective") == MASKED_TOKENS:
        return IS_MASKED
    return "" if event.get("causal", True) else NOT_CAUSAL


def evaluation_title(event: dict) -> str:
    title = f"evaluation at {text.count(event.get('tokens'))} tokens"
    return f"{title}, {said}" if (said := remark(event)) else title


def neighbors(event: dict) -> str:
    """ "queen 0.71, prince 0.69" """
    return ", ".join(
        f"{text.clean(word)} {text.number(cosine, 2)}"
        for word, cosine in event.get("neighbors") or []
    )


def summary(event: dict) -> str:
    reason = str(event.get("reason"))
    said = REASONS.get(reason, f"stopped: {text.clean(reason)}")
    return f"{said} (step {event['step']:,}, {text.count(event.get('tokens'))} tokens)"


def machine(event: dict) -> str:
    """ "12.3M parameters  cuda ×8  bf16  compiled" """
    world = event.get("world_size") or 1
    parts = [
        f"{text.count(event.get('parameters'))} parameters",
        text.clean(event.get("device") or "") + (f" ×{world}" if world > 1 else ""),
    ]
    parts += [text.clean(event.get(key)) for key in ("precision",) if event.get(key)]
    parts.append(remark(event))
    if event.get("compile"):  # "not compiled: and why"; the reason is among the notes
        parts.append(re.split("[:;]", text.clean(event["compile"]))[0])
    return "  ".join(part for part in parts if part)


def scores(event: dict, before: dict) -> list[tuple[str, str]]:
    """Return names and values of what an evaluation measured, losses and likelihoods with the
    change against the evaluation before."""
    masked = event.get("objective") == MASKED_TOKENS
    metrics = [metric for metric in SCORES if metric.key in event]
    if masked:  # first what logits and distances have on one scale
        metrics.sort(key=lambda metric: not metric.masked)
    return [
        (metric.screen_name(masked), _score(metric.key, event[metric.key], before.get(metric.key)))
        for metric in metrics
    ]


def _score(key: str, value: float | None, before: float | None) -> str:
    if key.endswith("accuracy"):
        return f"{value * 100:.1f} %" if value is not None else text.number(value)
    if "perplexity" in key:
        return text.number(value, 1)
    difference = text.change(value, before)
    return text.number(value) + (f" ({difference})" if difference else "")
