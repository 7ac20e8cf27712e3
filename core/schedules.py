"""Any hyperparameter over the run: one small language for learning rate, temperatures, exponents
and weights.

In:    what a preset says: `0.5`, `{"from": -12, "to": -4, "shape": "linear", "begin": 0.0, "end":
       1.0}`, or a list of such pieces
Out:   a function of progress, the fraction of the run's horizon: 0 at the first update, exactly 1
       at the last
State: none
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from core.bounds import Bounded


class Piece(Bounded):
    """One stretch of a schedule: from one value to another between two fractions of the run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True
    )

    start: float = Field(alias="from", description="Value at `begin`.")
    to: float | None = Field(
        None, description="Value at `end`; left out, the value stays at `from`."
    )
    shape: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How it gets there. constant: stays at `from`."
    )
    begin: float = Field(
        0.0, ge=0.0, le=1.0, description="Fraction of the run at which this piece starts."
    )
    end: float = Field(
        1.0, ge=0.0, le=1.0, description="Fraction of the run at which `to` is reached."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Piece":
        if self.end < self.begin:
            raise ValueError(
                f"ends at {self.end:g}, before it begins at {self.begin:g}; swap begin and end"
            )
        if self.shape != "constant" and self.to is None:
            raise ValueError(
                f'shape "{self.shape}" needs a "to"; add one, or use "shape": "constant"'
            )
        return self

    def at(self, progress: float) -> float:
        """Return the value at `progress`; that of the nearer end outside the stretch."""
        last = self.start if self.shape == "constant" or self.to is None else self.to
        if progress >= self.end:
            return last
        if progress <= self.begin:
            return self.start
        x = (progress - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            x = 0.5 - 0.5 * math.cos(math.pi * x)
        return self.start + (last - self.start) * x


def _kind(value: object) -> str | None:
    """Return the form of a schedule, as the tags below name it; None: it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return "number"
    kinds: dict[type, str] = {dict: "piece", Piece: "piece", list: "pieces"}
    return kinds.get(type(value))


def _in_order(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces. Raises ValueError where one begins before the end of the one before."""
    for before, after in zip(pieces, pieces[1:]):
        if after.begin < before.end:
            raise ValueError(
                f"a piece begins at {after.begin:g}, before the one before it ends at "
                f"{before.end:g}"
            )
    return pieces


_Number = Annotated[float, Tag("number")]
_Piece = Annotated[Piece, Tag("piece")]
_Pieces = Annotated[list[Piece], Field(min_length=1), AfterValidator(_in_order), Tag("pieces")]
_wrong_kind = {
    "custom_error_type": "schedule",
    "custom_error_message": 'a schedule is a number, a piece like {"from": 0, "to": 1}, or a list '
    "of pieces",
}
Schedule = Annotated[_Number | _Piece | _Pieces, Discriminator(_kind, **_wrong_kind)]
"""The type of a preset field that may change over the run. In a list, the first piece's first value
holds before it, and the last value reached holds in a gap and at the end."""


def value_at(schedule: Schedule, progress: float) -> float:
    """Return the value of a schedule at `progress` in [0, 1]; clamped outside."""
    progress = min(max(progress, 0.0), 1.0)
    if isinstance(schedule, Piece):
        return schedule.at(progress)
    if isinstance(schedule, list):
        started = [piece for piece in schedule if piece.begin <= progress]
        return (started[-1] if started else schedule[0]).at(progress)
    return float(schedule)


def changes(value: object) -> bool:
    """Tell whether a setting is a schedule that is more than a number."""
    pieces = value if isinstance(value, list) else [value]
    return bool(pieces) and all(isinstance(piece, Piece) for piece in pieces)


def turns(schedule: Schedule) -> list[float]:
    """Return the moments between which a schedule only rises or only falls."""
    pieces = schedule if isinstance(schedule, list) else [schedule]
    return [moment for p in pieces if isinstance(p, Piece) for moment in (p.begin, p.end)]


def values_at_turns(schedules: Sequence[Schedule]) -> list[tuple[float, list[float]]]:
    """Return the moments between which none of the schedules turns, with all their values there."""
    moments = {0.0, 1.0, *(moment for schedule in schedules for moment in turns(schedule))}
    return [(at, [value_at(schedule, at) for schedule in schedules]) for at in sorted(moments)]


def limits(schedule: Schedule) -> tuple[float, float]:
    """Return the lowest and the highest value that a schedule takes."""
    values = [value_at(schedule, moment) for moment in (0.0, 1.0, *turns(schedule))]
    return min(values), max(values)


def learning_rate_schedule(
    kind: str,
    warmup: float,
    decay: float,
    floor: float,
    decay_shape: Literal["linear", "cosine"] = "linear",
) -> list[Piece]:
    """Make one of the three usual shapes, in factors of the peak learning rate.

    kind     "wsd" warm-up, stable, decay (arXiv 2405.18392); "cosine" warm-up, cosine decay;
             "constant" warm-up, then 1
    warmup   fraction of the run that warms up linearly from 0 (the trainer asks at the middle of a
             step, so never quite 0)
    decay    fraction of the run that decays, in the shape of `decay_shape` (wsd only)
    floor    the factor reached at the end
    """
    pieces = [Piece(start=0.0, to=1.0, begin=0.0, end=warmup)] if warmup > 0 else []
    if kind == "wsd":
        decays = max(warmup, 1.0 - decay)  # 1.0 - 0.9 is a little less than 0.1
        pieces += [Piece(start=1.0, shape="constant", begin=warmup, end=decays)]
        if decay > 0:
            pieces.append(Piece(start=1.0, to=floor, shape=decay_shape, begin=decays, end=1.0))
    elif kind == "cosine":
        pieces += [Piece(start=1.0, to=floor, shape="cosine", begin=warmup, end=1.0)]
    else:
        pieces += [Piece(start=1.0, shape="constant", begin=warmup, end=1.0)]
    return pieces
