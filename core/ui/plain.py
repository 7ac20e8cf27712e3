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
from core.ui.progress import RunProgress

STEP_SECONDS = 5.0
NOT_CAUSAL = "not causal: sees later tokens"
"""Shown beside the numbers of a model whose positions see later ones: they are not those of a
language model."""
IS_MASKED = "masked tokens"
"""Shown beside the numbers of a model that sees both sides by design."""


class PlainLines:
    """One compact line for each event; for steps the first, the last, and one about every five
    seconds."""

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        step_seconds: float = STEP_SECONDS,
    ):
        self.stream, self.clock, self._step_seconds = stream, clock, step_seconds
        self._progress = RunProgress({})
        self._shown_at: float | None = None
        self._pending: dict | None = None
        self._eval: dict = {}

    def update(self, event: dict) -> None:
        kind = event.get("event")
        if kind == "run_start":
            self._progress = RunProgress(event)
            self._shown_at = self._pending = None
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
        parts = [
            f"step {event['step']:,}",
            f"{self._progress.counted} ({self._progress.percent})",
            f"loss {text.number(event.get('loss'))}",
            f"learning rate {text.number(event.get('learning_rate'))}",
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
    """Return the lines for one event; none for steps and for kinds that are not known here.

    previous_eval   the last `eval` event; {} before there is one
    """
    kind = event.get("event")
    if kind == "run_start":
        return _describe_start(event)
    if kind == "eval":
        values = [f"{name} {value}" for name, value in scores(event, previous_eval)]
        return ["  ".join([evaluation_title(event), *values])]
    if kind == "sample":
        return [f"sample  {text.clean(event.get('prompt'))}│{text.clean(event.get('text'))}"]
    if kind == "neighbors":
        return [f"near {text.clean(event.get('word'))}  {neighbors(event)}"]
    if kind == "checkpoint":
        path, seconds = text.clean(event.get("path")), text.number(event.get("seconds"), 1)
        return [f"checkpoint  {path}  ({seconds}s)"]
    if kind == "warning":
        return [f"warning  {text.clean(event.get('message'))}"]
    if kind == "skipped":
        return [f"skipped  {skipped_file(event)}"]
    if kind == "reweighted":
        return [f"sources reweighted  {reweighted(event)}"]
    if kind == "run_end":
        return [summary(event)]
    return []


def _describe_start(event: dict) -> list[str]:
    parts = [
        text.clean(event.get("preset")),
        f"lineage {text.clean(event.get('lineage'))}",
        f"run {event.get('run')}",
        machine(event),
    ]
    lines = ["  ".join(parts)]
    if event.get("resumed_from"):
        lines.append(f"resumed from {text.clean(event['resumed_from'])}")
    if event.get("sources"):
        lines.append("sources  " + ", ".join(text.clean(name) for name in event["sources"]))
    return lines + [f"note  {text.clean(note)}" for note in event.get("notes") or []]


def skipped_file(event: dict) -> str:
    """Describe a `skipped` event: "pdf: thesis.pdf (encrypted)"."""
    source, file, reason = (text.clean(event.get(key)) for key in ("source", "file", "reason"))
    return f"{source}: {file} ({reason})"


def reweighted(event: dict) -> str:
    """Describe a `reweighted` event: "code 61.2 % (×1.200, loss 5.201), prose 38.8 % ..."."""
    parts = []
    for name, source in (event.get("sources") or {}).items():
        share = text.number((source.get("weight") or 0.0) * 100, 1)
        factor, loss = text.number(source.get("factor")), text.number(source.get("loss"))
        parts.append(f"{text.clean(name)} {share} % (×{factor}, loss {loss})")
    return ", ".join(parts)


ENDINGS = {
    "budget": "finished: the token budget is used up",
    "max_steps": "finished: max_steps reached",
    "max_epochs": "finished: max_epochs reached",
    "interrupted": "interrupted; start again to go on from here",
    "no_data": "stopped: no source is left to read from",
    "diverged": "stopped: training diverged",
    "failed": "stopped by an error; the next start goes on from the newest checkpoint, if any",
}


def remark(event: dict) -> str:
    """Return what has to be shown beside the numbers of a run; "" for a causal language model."""
    if event.get("objective") == MASKED_TOKENS:
        return IS_MASKED
    return "" if event.get("causal", True) else NOT_CAUSAL


def evaluation_title(event: dict) -> str:
    """Return the heading of an evaluation: when it was made, and the remark on its model."""
    title = f"evaluation at {text.count(event.get('tokens'))} tokens"
    return f"{title}, {remark(event)}" if remark(event) else title


def neighbors(event: dict) -> str:
    """Describe a `neighbors` event: "queen 0.71, prince 0.69"."""
    return ", ".join(
        f"{text.clean(word)} {text.number(cosine, 2)}"
        for word, cosine in event.get("neighbors") or []
    )


def summary(event: dict) -> str:
    """Return why and where a run ended."""
    reason = str(event.get("reason"))
    ending = ENDINGS.get(reason, f"stopped: {text.clean(reason)}")
    return f"{ending} (step {event['step']:,}, {text.count(event.get('tokens'))} tokens)"


def machine(event: dict) -> str:
    """Describe model and machine of a run: "12.3M parameters  cuda ×8  bf16  compiled"."""
    world_size = event.get("world_size") or 1
    parts = [
        f"{text.count(event.get('parameters'))} parameters",
        text.clean(event.get("device") or "") + (f" ×{world_size}" if world_size > 1 else ""),
        text.clean(event.get("precision") or ""),
        remark(event),
    ]
    if event.get("compile"):  # "not compiled: why"; the reason is among the notes
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
