"""From sources to rows, in an order that is a pure function of seed and position.

                       draw i goes to lane i mod L               row n comes from lane n mod L
    sources ──► Mixer ──────────┬──► lane 0: objective ──► Packer ──┐
                (global order)  ├──► lane 1: ...                    ├──► rows, global order ──► Loader
                                └──► lane L-1                       ┘

L lanes are fixed; ranks and workers share them out, each tokenizing only its own lanes' documents. So the rows, and their
order, are the same for any number of ranks and workers.

In:    opened sources, a tokenizer, a position
Out:   rows of this reader's lanes, in global order
State: carried by the rows: each says where its lane stands after it, and brings the mixer's snapshots
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.data.documents import Source
from core.data.mixing import Draw, Mixer, MixSettings
from core.data.objectives import next_token
from core.data.packing import Packer, Row
from core.data.tokenizer import Tokenizer
from core.data.validation import HoldOut

SNAPSHOT_EVERY = 256  # draws; a resume re-reads at most so many documents (and tokenizes none of them twice)
READ_AHEAD = 32  # documents tokenized together: enough for the tokenizer's own threads, few enough to stay near


@dataclass(frozen=True)
class PipelineSettings:
    """Everything that fixes the order and content of rows."""

    mix: MixSettings
    lanes: int
    seq_length: int
    packing: str  # "documents" or "padding"
    min_text_length: int


@dataclass
class Position:
    """Where a run stands in its data: JSON, the same on any number of ranks once merged."""

    rows: int  # global rows consumed
    lanes: dict[int, tuple[int, int]]  # lane -> (document index, position in it)
    snapshot: dict[str, Any] | None  # the mixer, at an index no lane has yet to read before
    drops: dict[str, int]  # failed sources, and from which draw on they are gone


def share_of_lanes(lanes: int, readers: int, reader: int) -> list[int]:
    """The lanes of one rank (or of one worker among a rank's lanes)."""
    return [lane for lane in range(lanes) if lane % readers == reader]


class Pipeline:
    """The rows of some lanes, from a position on. Endless, unless the mix ends: then padding rows without any target."""

    def __init__(
        self,
        sources: list[Source],
        tokenizer: Tokenizer,
        hold_out: HoldOut,
        settings: PipelineSettings,
        position: Position,
        lanes: list[int],
    ):
        self.settings, self.tokenizer, self.hold_out = settings, tokenizer, hold_out
        self.lanes = lanes
        self._next_row = position.rows
        self._mixer = Mixer(sources, settings.mix, position.drops, position.snapshot)
        self._names = [source.name for source in sources]
        self._packers = {
            lane: Packer(lane, settings.seq_length, tokenizer.eos_id, settings.packing, position.lanes.get(lane, (0, 0)))
            for lane in lanes
        }
        self._snapshots: list[dict[str, Any]] = [self._mixer.snapshot()]
        self._ended = False

    def __iter__(self) -> Iterator[Row]:
        own = set(self.lanes)
        n = self._next_row
        while True:
            lane = n % self.settings.lanes
            if lane in own:
                packer = self._packers[lane]
                while not packer.ready and not self._ended:
                    self._read_ahead()
                row = packer.row()
                row.snapshots, self._snapshots = self._snapshots, []
                yield row
            n += 1

    def _read_ahead(self) -> None:
        """Read, tokenize and hand out the next documents of own lanes."""
        draws: list[Draw] = []
        while len(draws) < READ_AHEAD:
            draw = next(self._mixer, None)
            if draw is None:
                self._ended = True
                break
            if self._mixer.index % SNAPSHOT_EVERY == 0:
                self._snapshots.append(self._mixer.snapshot())
            if self._wanted(draw):
                draws.append(draw)
        texts = [draw.document.text for draw in draws if draw.document]
        for draw, ids in zip(draws, self.tokenizer.encode_batch(texts)):
            inputs, labels = next_token(ids, self.tokenizer.eos_id)
            self._packers[draw.index % self.settings.lanes].add(draw.index, draw.source, inputs, labels)

    def _wanted(self, draw: Draw) -> bool:
        packer = self._packers.get(draw.index % self.settings.lanes)
        if packer is None or draw.document is None or not packer.wants(draw.index):
            return False
        if len(draw.document.text) < self.settings.min_text_length:
            return False
        return not self.hold_out.holds(self._names[draw.source], draw.document)
