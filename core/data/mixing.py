"""One global order of documents over all sources: which source each draw goes to, and where every source stands.

In:    opened sources
Out:   Draw(index, source, document), index 0, 1, 2 ... : the same on every rank and worker
State: `snapshot()`: the next index and each source's cursor, as JSON; draws themselves are counter-based and keep none
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.data.documents import Document, DocumentStream, Source
from core.errors import SourceUnavailable
from core.randomness import derive_seed, uniform

NEVER = 1 << 62


class SourceFailed(Exception):
    """A source failed for good in mid-run, at a draw. The loader drops it on all ranks at once."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason
        super().__init__(f"{name}: {reason}")

    def __reduce__(self) -> tuple:
        return SourceFailed, (self.name, self.reason)


@dataclass(frozen=True, slots=True)
class Draw:
    """One document of the global order; `document` is None where a dropped source's turn was lost."""

    index: int
    source: int
    document: Document | None


@dataclass(frozen=True)
class MixSettings:
    """How draws are shared out among the sources."""

    strategy: str  # "round_robin", "sequential" or "weighted"
    weights: tuple[float, ...]  # one per source (weighted)
    seed: int
    max_epochs: int | None = None


class Mixer:
    """Iterates over the global order from a snapshot on.

    wanted  (source name, document) -> whether it may be drawn; what is not wanted is passed over and takes no draw
    drops   {source name: index} sources that failed: they take no draw from that index on, and turns of theirs before it
            that can no longer be read are lost
    """

    def __init__(
        self,
        sources: list[Source],
        settings: MixSettings,
        wanted: Callable[[str, Document], bool],
        drops: dict[str, int],
        snapshot: dict[str, Any] | None = None,
    ):
        snapshot = snapshot or {}
        self.sources, self.settings, self._wanted = sources, settings, wanted
        self.index: int = snapshot.get("index", 0)
        self._cursors: dict[str, dict] = {s.name: snapshot.get("cursors", {}).get(s.name, {}) for s in sources}
        self._parked = {k: v for k, v in snapshot.get("cursors", {}).items() if k not in self._cursors}  # sources not in this mix
        self._ended: set[str] = set(snapshot.get("ended", []))
        self._current: int = snapshot.get("current", 0)  # the source being read through (sequential)
        self._drop_at = [drops.get(s.name, NEVER) for s in sources]
        self._streams: dict[int, DocumentStream] = {}
        self._dead: set[int] = set()  # dropped sources found unreadable: not tried (with all their retries) at every turn
        self._seed = derive_seed(settings.seed, "mix")

    def snapshot(self) -> dict[str, Any]:
        """Everything needed to go on from the next draw."""
        cursors = {
            s.name: self._streams[i].cursor() if i in self._streams else self._cursors[s.name] for i, s in enumerate(self.sources)
        }
        return {
            "index": self.index,
            "cursors": {**self._parked, **cursors},
            "current": self._current,
            "ended": sorted(self._ended),
        }

    def __iter__(self) -> "Mixer":
        return self

    def __next__(self) -> Draw:
        while (choice := self._choose()) is not None:
            try:
                document = self._read(choice) if choice not in self._dead else None
            except SourceUnavailable as error:
                if self._drop_at[choice] == NEVER:
                    raise SourceFailed(self.sources[choice].name, str(error)) from None
                self._dead.add(choice)
                document = None
            else:
                if document is None and choice not in self._dead:  # the source has just ended: this draw is another source's
                    continue
            self.index += 1
            return Draw(self.index - 1, choice, document)
        raise StopIteration

    def _choose(self) -> int | None:
        """Which source the draw `self.index` belongs to; None when nothing is left."""
        active = [i for i, s in enumerate(self.sources) if self.index < self._drop_at[i] and s.name not in self._ended]
        if self.settings.strategy == "weighted":
            active = [i for i in active if self.settings.weights[i] > 0]
        if not active:
            return None
        if self.settings.strategy == "sequential":
            return next((i for i in active if i >= self._current), active[0])
        if self.settings.strategy == "round_robin":
            return active[self.index % len(active)]
        total = sum(self.settings.weights[i] for i in active)
        point = uniform(self._seed, self.index) * total
        for i in active:
            point -= self.settings.weights[i]
            if point < 0:
                return i
        return active[-1]

    def _read(self, choice: int) -> Document | None:
        """The next document of a source, going on into its next epoch; None when it has ended for good."""
        name = self.sources[choice].name
        fresh = False
        while True:
            if choice not in self._streams:
                cursor = self._cursors[name]
                fresh = set(cursor) <= {"epoch"}
                self._streams[choice] = self.sources[choice].stream(cursor)
            self._current = choice
            for document in self._streams[choice]:
                if self._wanted(name, document):
                    return document
            if fresh:
                raise SourceUnavailable("it holds no document to train on: all are too short or held out")
            epoch = self._cursors[name].get("epoch", 0) + 1
            self._cursors[name] = {"epoch": epoch}
            del self._streams[choice]
            if self.settings.max_epochs is not None and epoch >= self.settings.max_epochs:
                self._ended.add(name)
                return None
            if self.settings.strategy == "sequential":  # its turn is over: the next source, or around again
                self._current = choice + 1
                return None
