"""One global order of documents over all sources: which source each draw goes to, and where every
source stands.

In:    opened sources
Out:   Draw(index, source, document), index 0, 1, 2 ... : the same on every rank and worker
State: `snapshot()`: the next index, each source's cursor and what was drawn of it, as JSON; the
       random numbers follow from the index, and need no state
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.data.documents import Cursor, Document, DocumentStream, Source
from core.data.position import Position
from core.errors import SourceUnavailable
from core.preset.settings import RUN_TOKENS
from core.randomness import derive_seed, uniform
from core.schedules import Schedule, limits, value_at

NEVER = 1 << 62
USUAL_RATE = 0.25
"""Tokens per character, where nobody has measured them."""


class SourceFailed(Exception):
    """A source failed for good during a run, at a draw. The loader drops it on all ranks at
    once."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason
        super().__init__(f"{name}: {reason}")

    def __reduce__(self) -> tuple:
        return SourceFailed, (self.name, self.reason)


@dataclass(frozen=True, slots=True)
class Draw:
    """One document of the global order; `document` is None where a dropped source lost its
    turn."""

    index: int
    source: int
    document: Document | None
    opens_epoch: bool = False  # whether an epoch of its source begins with it
    epoch: int = 0  # of its source


@dataclass(frozen=True)
class MixSettings:
    """The shares of the sources in the draws."""

    strategy: str  # "round_robin", "sequential" or "weighted"
    # one per source (weighted), over the fraction of the schedules that has been drawn
    weights: tuple[Schedule, ...]
    seed: int
    max_epochs: int | None = None
    unit: str = "documents"  # what weights are shares of: "documents" or "tokens"
    horizon_tokens: int = RUN_TOKENS
    # tokens per character of each source: what counts how far the schedules have been drawn
    rates: tuple[float, ...] = ()


class Mixer:
    """Iterates over the global order from a position's snapshot on.

    wanted     whether a document may be drawn; one that may not is passed over and takes no draw
    position   besides the snapshot:
               drops: failed sources take no draw from that index on, and their turns before it are
               lost where they can no longer be read
               draws: made before; those of a dropped source count as they did then
               renewals and factors, which change the weights

    A reader tokenizes the documents of its own lanes only. So the number of tokens drawn is
    estimated from characters, which every reader sees alike.
    """

    def __init__(
        self,
        sources: list[Source],
        settings: MixSettings,
        wanted: Callable[[Document], bool],
        position: Position,
    ):
        snapshot = position.snapshot or {}
        cursors = snapshot.get("cursors", {})
        self.sources, self.settings, self._wanted = sources, settings, wanted
        self.index: int = snapshot.get("index", 0)
        self._cursors: dict[str, Cursor] = {s.name: cursors.get(s.name, {}) for s in sources}
        # sources not in this mix
        self._parked = {name: at for name, at in cursors.items() if name not in self._cursors}
        # documents behind its cursor that were drawn before
        self._passed: dict[str, int] = dict(snapshot.get("passed", {}))
        self._ended: set[str] = set(snapshot.get("ended", []))
        if settings.max_epochs is not None:  # also where the mix begins anew
            self._ended |= {
                name
                for name, at in self._cursors.items()
                if at.get("epoch", 0) >= settings.max_epochs
            }
        # the source being read through (sequential)
        self._current: int = snapshot.get("current", 0)
        # documents, tokens
        self._drawn: list[list[int]] = [
            list(snapshot.get("drawn", {}).get(s.name, (0, 0))) for s in sources
        ]
        self._origin: int = snapshot.get("origin", 0)  # tokens drawn before these schedules
        self._renewals = frozenset(position.renewals)
        # of weights; 1 where none is named
        self._changes, self._factors = position.factors or {}, dict(snapshot.get("factors", {}))
        self._drop_at = [position.drops.get(s.name, NEVER) for s in sources]
        self._streams: dict[int, DocumentStream] = {}
        self._fresh: set[int] = set()  # sources of which this epoch has not given a document yet
        # dropped sources found unreadable: not tried (with all their retries) at every turn
        self._dead: set[int] = set()
        self._known = position.draws or {}
        # draws made since the reader last emptied it
        self.made: dict[int, tuple[int, ...]] = {}
        self._seed = derive_seed(settings.seed, "mix")
        self._given_rates = settings.rates or (USUAL_RATE,) * len(sources)
        # as they were when these schedules began
        self._rates = tuple(snapshot.get("rates", self._given_rates))
        self._horizon_tokens: int = snapshot.get("horizon_tokens", settings.horizon_tokens)
        self._levels = list(settings.weights) if settings.strategy == "weighted" else []
        self._fixed = all(isinstance(weight, int | float) for weight in self._levels)
        # now; a schedule's are set at every draw
        self._shares = [float(limits(weight)[1]) for weight in self._levels]

    def snapshot(self) -> dict[str, Any]:
        """Return everything needed to go on from the next draw, as JSON."""
        cursors = {
            s.name: self._streams[i].cursor() if i in self._streams else self._cursors[s.name]
            for i, s in enumerate(self.sources)
        }
        return {
            "index": self.index,
            "cursors": {**self._parked, **cursors},
            "passed": {name: count for name, count in self._passed.items() if count},
            "current": self._current,
            "ended": sorted(self._ended),
            "drawn": {s.name: list(drawn) for s, drawn in zip(self.sources, self._drawn)},
            "origin": self._origin,
            "rates": list(self._rates),
            "horizon_tokens": self._horizon_tokens,
            "factors": self._factors,
        }

    @property
    def reading(self) -> tuple[str, int]:
        """The source being read, and its epoch: of the document that `wanted` is asked about."""
        name = self.sources[self._current].name
        return name, self._cursors[name].get("epoch", 0)

    def __iter__(self) -> "Mixer":
        return self

    def __next__(self) -> Draw:
        if self.index in self._renewals:
            self._origin = sum(tokens for _, tokens in self._drawn)
            self._rates, self._horizon_tokens = self._given_rates, self.settings.horizon_tokens
        self._factors = self._changes.get(self.index, self._factors)
        while (choice := self._choose()) is not None:
            if choice in self._dead:
                drawn, tokens = self._known.get(self.index, (choice, 0))[:2]
                if drawn == choice:
                    return self._draw(choice, None, tokens)
                self._ended_before(choice)
                continue
            try:
                document = self._read(choice)
            except SourceUnavailable as error:
                if self._drop_at[choice] == NEVER:
                    raise SourceFailed(self.sources[choice].name, str(error)) from None
                self._dead.add(choice)
                continue
            # else the source has just ended: this draw is another source's
            if document is not None:
                return self._draw(choice, document, self._tokens_of(choice, document))
        raise StopIteration

    def _draw(self, choice: int, document: Document | None, tokens: int) -> Draw:
        self._drawn[choice][0] += 1
        self._drawn[choice][1] += tokens
        epoch = self._cursors[self.sources[choice].name].get("epoch", 0)
        self.made[self.index] = (choice, tokens, epoch)
        opens = document is not None and choice in self._fresh
        self._fresh.discard(choice)
        self.index += 1
        return Draw(self.index - 1, choice, document, opens, epoch)

    def _ended_before(self, choice: int) -> None:
        """Record that a source which can no longer be read had ended here: its turn was another
        one's."""
        self._current = choice + 1
        if self.settings.strategy != "sequential":
            self._ended.add(self.sources[choice].name)

    def _tokens_of(self, choice: int, document: Document) -> int:
        encoded = document.encoded
        characters = len(document.text) if encoded is None else encoded.size
        if encoded is not None and not characters:
            return 1 + len(encoded.ids)
        return 1 + round(characters * self._rates[choice])

    def _choose(self) -> int | None:
        """Return the source that the draw `self.index` goes to; None when nothing is left."""
        active = [
            i
            for i, s in enumerate(self.sources)
            if self.index < self._drop_at[i] and s.name not in self._ended
        ]
        if self.settings.strategy == "weighted":
            active = [i for i in active if limits(self._levels[i])[1] > 0]
        if not active:
            return None
        if self.settings.strategy == "sequential":
            return next((i for i in active if i >= self._current), active[0])
        if self.settings.strategy == "round_robin":
            return active[self.index % len(active)]
        shares = self._shares_now(active)
        point = uniform(self._seed, self.index) * sum(shares)
        for i, share in zip(active, shares):
            point -= share
            if point < 0:
                return i
        return active[-1]

    def _shares_now(self, active: list[int]) -> list[float]:
        """Return this draw's share for each active source; never all zero."""
        if not self._fixed:
            drawn = sum(tokens for _, tokens in self._drawn) - self._origin
            progress = min(drawn / max(self._horizon_tokens, 1), 1.0)
            self._shares = [value_at(level, progress) for level in self._levels]
        shares = [self._shares[i] * self._factors.get(self.sources[i].name, 1.0) for i in active]
        if self.settings.unit == "tokens":  # a source of long documents is drawn less often
            shares = [share / self._mean_tokens(i) for i, share in zip(active, shares)]
        # those with a share just now may all have been dropped
        return shares if sum(shares) > 0 else [1.0] * len(active)

    def _mean_tokens(self, choice: int) -> float:
        documents, tokens = self._drawn[choice]
        if documents:
            return tokens / documents
        everything = [sum(column) for column in zip(*self._drawn)]
        return everything[1] / everything[0] if everything[0] else 1.0

    def _read(self, choice: int) -> Document | None:
        """Return a source's next document that was not drawn before the mix began anew; None as
        `_next_of` does."""
        name = self.sources[choice].name
        while (document := self._next_of(choice)) is not None and self._passed.get(name, 0) > 0:
            self._passed[name] -= 1
            self._fresh.discard(choice)
        return document

    def _next_of(self, choice: int) -> Document | None:
        """Return a source's next document, going on into its next epoch; None when it has ended
        for good."""
        name = self.sources[choice].name
        fresh = False
        while True:
            if choice not in self._streams:
                cursor = self._cursors[name]
                fresh = set(cursor) <= {"epoch"}
                self._streams[choice] = self.sources[choice].stream(cursor)
                if is_beginning(cursor):
                    self._fresh.add(choice)
            self._current = choice
            for document in self._streams[choice]:
                if self._wanted(document):
                    return document
            if fresh:
                raise SourceUnavailable(
                    "it has no document to train on: all are shorter than data.min_text_length, "
                    "or held out"
                )
            epoch = self._cursors[name].get("epoch", 0) + 1
            self._cursors[name] = {"epoch": epoch}
            self._passed.pop(name, None)  # of the epoch behind: fewer are left of it now
            del self._streams[choice]
            if self.settings.max_epochs is not None and epoch >= self.settings.max_epochs:
                self._ended.add(name)
                return None
            # its turn is over: the next source, or around again
            if self.settings.strategy == "sequential":
                self._current = choice + 1
                return None


def is_beginning(cursor: dict[str, Any]) -> bool:
    """Return whether a cursor stands before the first document of its epoch."""
    return not any(value for key, value in cursor.items() if key != "epoch")
