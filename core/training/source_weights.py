"""Each source's share of the mix as a run goes on: its weight, and, where a preset adapts them, a
factor on it.

    each source's loss over an interval ──► over their mean, clipped ──► smoothed ──► the factor
    (specification 003, tier 1)

In:    each source's summed loss and targets of every step, and the tokens of the step, over all
       ranks
Out:   once an interval is full, a factor for each source; the loader makes the mix follow
State: the factors, and the sums since they last changed; `state()` is all of it
"""

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

from core.checkpoint.state import AdaptiveState
from core.errors import UserError
from core.preset.base import PresetBase
from core.preset.settings import AuxiliarySettingsBase
from core.schedules import Schedule, value_at

DIGITS = 3
"""Digits of a factor that is handed on: runs whose losses differ in their last bits, as on one rank
and on two, draw the same."""


class SourceLoss(NamedTuple):
    """A source's part of a step, over all ranks."""

    name: str
    total: float  # summed loss: nats, or the first loss's unit
    targets: float


class SourceWeights:
    """The weights of the sources in a mix. Without `enable_adaptive_sources` there are no factors,
    and nothing is counted.

    schedules   {name: weight}
    saved       `state()` of an earlier start: sources are found by their names, new ones begin at
                1, absent ones are kept
    """

    def __init__(
        self,
        schedules: dict[str, Schedule],
        settings: AuxiliarySettingsBase,
        saved: AdaptiveState | None = None,
    ):
        saved = saved or AdaptiveState()
        self._schedules, self._settings = schedules, settings
        self._exact: dict[str, float] = dict.fromkeys(schedules, 1.0) | saved.get("factors", {})
        self._sums: dict[str, float] = dict(saved.get("sums", {}))
        self._counts: dict[str, int] = dict(saved.get("counts", {}))
        self._tokens: int = saved.get("tokens", 0)

    @property
    def factors(self) -> dict[str, float]:
        """The factors on the weights since the last change; none where they are not adapted."""
        names = self._schedules if self._settings.enable_adaptive_sources else ()
        return {name: float(f"{self._exact[name]:.{DIGITS}g}") for name in names}

    def shares(self, progress: float, gone: Collection[str]) -> dict[str, dict[str, float]]:
        """Return the "weight" of each source, which is its share among those that are left, and
        its "factor" where there are factors.

        gone   sources from which nothing more is read
        """
        factors = self.factors
        weights = {
            name: value_at(schedule, progress) * factors.get(name, 1.0)
            for name, schedule in self._schedules.items()
        }
        weights |= {name: 0.0 for name in weights if name in gone}
        total = sum(weights.values()) or 1.0
        shares = {name: {"weight": weight / total} for name, weight in weights.items()}
        for name, factor in factors.items():
            shares[name]["factor"] = factor
        return shares

    def after_step(self, by_source: Iterable[SourceLoss], tokens: int) -> dict[str, float] | None:
        """Count a step; where that fills an interval, change the factors.

        Returns the mean losses (nats, or the first loss's unit) that changed them; None where the
        interval goes on. A loss that is not finite is left out: an update that was skipped says
        nothing about a source."""
        if not self._settings.enable_adaptive_sources:
            return None
        self._tokens += tokens
        for name, total, targets in by_source:
            if targets and math.isfinite(total):
                self._sums[name] = self._sums.get(name, 0.0) + total
                self._counts[name] = self._counts.get(name, 0) + int(targets)
        if self._tokens < self._settings.adaptive_interval_tokens:
            return None
        losses = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._exact |= adapted(self._exact, losses, self._settings)
        self._sums, self._counts = {}, {}
        self._tokens %= self._settings.adaptive_interval_tokens
        return losses

    def state(self) -> AdaptiveState:
        """Return the whole state as JSON, the same on every rank; empty where weights are not
        adapted."""
        if not self._settings.enable_adaptive_sources:
            return {}
        return {
            "factors": dict(self._exact),
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "tokens": self._tokens,
        }


def adapted(
    factors: dict[str, float], losses: dict[str, float], settings: AuxiliarySettingsBase
) -> dict[str, float]:
    """Return new factors for the sources that have a loss (specification 003, tier 1).

    w = clip(loss / mean of the losses, min, max); factor = smoothing * old + (1 - smoothing) * w.
    Empty where all losses are 0."""
    mean = sum(losses.values()) / len(losses) if losses else 0.0
    if mean <= 0:
        return {}
    low, high = settings.adaptive_min_weight, settings.adaptive_max_weight
    keep = settings.adaptive_smoothing
    return {
        name: keep * factors[name] + (1 - keep) * min(max(loss / mean, low), high)
        for name, loss in losses.items()
    }


def check_adaptive(preset: PresetBase) -> list[str]:
    """Return notes on what adapting means for a preset's sources. Raises UserError where its mix
    has no weights to adapt."""
    if not preset.auxiliary.enable_adaptive_sources:
        return []
    strategy, count = preset.data.mix_strategy, len(preset.data.sources)
    if strategy != "weighted":
        raise UserError(
            "auxiliary.enable_adaptive_sources adapts data.source_weights, which "
            f'data.mix_strategy "{strategy}" does not use. Set it to "weighted", with weights to '
            f'begin with, such as "source_weights": {[1] * count}; or set enable_adaptive_sources '
            "to false."
        )
    if count == 1:
        return ["auxiliary.enable_adaptive_sources changes nothing: there is one source only"]
    return []
