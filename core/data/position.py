"""The position of a run in its data: written into checkpoints, read from them, and carried over
when the data has changed.

In:    the consumed rows of each rank's lanes; the `data` section of a checkpoint
Out:   the same for any number of ranks
State: Position
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from core.data.packing import LanePosition, Segment


@dataclass
class Position:
    """The position of a run in its data, the same on any number of ranks once merged.

    `of_lanes` and `merged_state` write what `of` reads; core/checkpoint/state.py has its types.
    """

    rows: int = 0  # global rows consumed
    lanes: dict[int, LanePosition] = field(default_factory=dict)
    snapshot: dict[str, Any] | None = None  # the mixer, at an index no lane has yet to read before
    # failed sources, and from which draw on they are gone
    drops: dict[str, int] = field(default_factory=dict)
    # draws at which the schedules of the weights begin anew
    renewals: list[int] = field(default_factory=list)
    # draws from which on sources' weights have other factors
    factors: dict[int, dict[str, float]] = field(default_factory=dict)
    # index: (source, tokens, epoch) since the snapshot
    draws: dict[int, tuple[int, ...]] = field(default_factory=dict)
    # lane -> hash chain of all the segments it has consumed
    receipts: dict[int, str] = field(default_factory=dict)
    passed_over: int = 0  # groups of rows in which no token was learned

    def first_unused(self) -> int:
        """Return the first draw of which no lane known here has used anything."""
        return max((place.next for place in self.lanes.values()), default=0)

    @property
    def gone(self) -> set[str]:
        """Sources that failed, or came to the end of their last epoch: the latter as far as the
        snapshot knows."""
        return {*self.drops, *(self.snapshot or {}).get("ended", [])}

    @property
    def latest_factors(self) -> dict[str, float]:
        """On the sources' weights, from the first unused draw on; 1 where none is named."""
        return (
            self.factors[max(self.factors)]
            if self.factors
            else (self.snapshot or {}).get("factors", {})
        )

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Position":
        """Read the `data` section of a checkpoint."""
        return cls(
            rows=saved["rows"],
            lanes={
                int(lane): LanePosition.from_json(place) for lane, place in saved["lanes"].items()
            },
            snapshot=saved["snapshot"],
            drops=dict(saved["drops"]),
            renewals=list(saved["renewals"]),
            factors=dict(saved.get("factors", [])),
            draws={index: tuple(draw) for index, *draw in saved.get("draws", [])},
            receipts={int(lane): link for lane, link in saved["receipts"].items()},
            passed_over=saved.get("passed_over", 0),
        )

    def of_lanes(self, lanes: list[int]) -> "Position":
        """Return the position with a rank's own lanes only: it knows the lanes of other ranks as
        they were when the run was resumed."""
        return replace(
            self,
            lanes={lane: self.lanes[lane] for lane in lanes if lane in self.lanes},
            receipts={lane: self.receipts[lane] for lane in lanes if lane in self.receipts},
        )


def merged_state(parts: list[Position]) -> dict[str, Any]:
    """Merge what the ranks know of their lanes into the `data` section of a checkpoint, as JSON."""
    snapshots = [part.snapshot for part in parts if part.snapshot]
    lanes = {lane: place for part in parts for lane, place in part.lanes.items()}
    receipts = {str(lane): link for part in parts for lane, link in part.receipts.items()}
    draws = {index: draw for part in parts for index, draw in part.draws.items()}
    factors = {draw: factors for part in parts for draw, factors in part.factors.items()}
    # how far beyond it was read is chance
    used = max((place.next for place in lanes.values()), default=0)
    chain = repr(sorted(receipts.items())).encode()
    return {
        "rows": parts[0].rows,
        "lanes": {
            str(lane): [place.next, [list(waiting) for waiting in place.waiting]]
            for lane, place in lanes.items()
        },
        "snapshot": min(snapshots, key=lambda s: s["index"]) if snapshots else None,
        "drops": dict(parts[0].drops),
        # a rank forgets those behind its own snapshot; the oldest one may still need them
        "renewals": sorted({draw for part in parts for draw in part.renewals}),
        "factors": sorted(factors.items()),
        "draws": sorted({(index, *draw) for index, draw in draws.items() if index < used}),
        "passed_over": parts[0].passed_over,
        "receipts": receipts,
        "receipt": hashlib.blake2b(chain, digest_size=8).hexdigest(),
    }


@dataclass
class DataFacts:
    """The facts that rows follow from besides the position; kept beside it in a checkpoint."""

    fingerprint: str = ""  # of the data section, the tokenizer and the reachable sources
    contents: dict[str, str] = field(default_factory=dict)  # of each source's files
    held_out: dict[str, Any] | None = None  # HoldOut.state
    epoch_tokens: int | None = None  # tokens of one pass, where epochs end a run


def linked(chain: str, segments: list[Segment]) -> str:
    """Add a link to a lane's hash chain: two chains are equal exactly when the same text was
    consumed in the same order."""
    if not segments:
        return chain
    content = repr([(s.draw, s.digest, s.start, s.length) for s in segments])
    return hashlib.blake2b((chain + content).encode(), digest_size=8).hexdigest()


def resumed_position(
    saved: Mapping[str, Any] | None,
    fingerprint: str,
    contents: dict[str, str],
    max_epochs: int | None = None,
) -> tuple[Position, list[str]]:
    """Decide where to go on reading; return it, and notes.

    After a change of the data section the mix begins anew, and each source goes on behind the last
    document that any lane has used: nothing is trained on twice, and what slower lanes still held
    waiting is left out.

    contents  of each source, see Corpus.contents: one whose files have changed begins its next
              epoch, over all of them, where max_epochs leaves it one
    """
    if saved is None:
        return Position(), []
    before = saved.get("contents", {})
    changed = [name for name in contents if name in before and before[name] != contents[name]]
    if saved["fingerprint"] == fingerprint and not changed:
        return Position.of(saved), []
    snapshot = _behind_all_draws(
        saved["snapshot"] or {}, list(before), saved.get("draws", []), list(contents)
    )
    cursors, passed = snapshot["cursors"], snapshot["passed"]
    for name in changed:
        cursors[name] = {"epoch": cursors.get(name, {}).get("epoch", 0) + 1}
        passed.pop(name, None)
    kept = [
        name for name in contents if (cursors.get(name) or passed.get(name)) and name not in changed
    ]
    note = (
        f"files of {', '.join(changed)} have changed"
        if changed
        else "the data section, the tokenizer or the reachable sources have changed"
    )
    note += " since the checkpoint: the mix begins anew"
    for name in kept:
        note += f"; {name} goes on where it was"
    over = [
        name for name in changed if max_epochs is not None and cursors[name]["epoch"] >= max_epochs
    ]
    begin = [name for name in changed if name not in over]
    for name in begin:
        note += f"; {name} begins again, with all its files"
    note += (
        f"; of {', '.join(over)} nothing more is read, as train.max_epochs is {max_epochs}: raise "
        "it for that"
        if over
        else ""
    )
    return Position(snapshot=snapshot), [note]


def _behind_all_draws(
    snapshot: dict[str, Any], names: list[str], draws: list[Any], now: list[str]
) -> dict[str, Any]:
    """Return a mixer's first snapshot, with each source after everything that was drawn from it
    since `snapshot`.

    names   the sources that the draws number
    now     the sources there are now
    """
    cursors, passed = dict(snapshot.get("cursors", {})), dict(snapshot.get("passed", {}))
    current = snapshot.get("current", 0)
    for index, source, _, *epoch in draws:
        if index < snapshot.get("index", 0) or source >= len(names):
            continue
        name, current = names[source], source
        if epoch and epoch[0] > cursors.get(name, {}).get("epoch", 0):
            cursors[name], passed[name] = {"epoch": epoch[0]}, 0
        passed[name] = passed.get(name, 0) + 1
    reading = names[current] if current < len(names) else None
    return {
        "index": 0,
        "cursors": cursors,
        "passed": passed,
        "current": now.index(reading) if reading in now else 0,
    }
