"""From sources to rows, in an order that is a pure function of seed and position. The whole way is
drawn in core/data/__init__.py.

L lanes are fixed; ranks and workers share them out, each tokenizing only its own lanes' documents.
So the rows, and their order, are the same for any number of ranks and workers.

In:    opened sources, a tokenizer, a position
Out:   rows of this reader's lanes, in global order
State: carried by the rows: each says where its lane stands after it, and brings the mixer's
       snapshots
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.data.documents import Document, Encoded, Source, shorter_than
from core.data.encoding import MemoizedEncoder, encode_each
from core.data.mixing import Draw, Mixer, MixSettings, SourceFailed
from core.data.objectives import build_objective
from core.data.packing import PACKERS, LanePosition, Packer, Row, first_piece
from core.data.position import Position
from core.data.sources.skips import at_least
from core.data.tokenizer import Tokenizer
from core.data.validation import HoldOut, may_train
from core.environment import redacted
from core.errors import SourceUnavailable
from core.preset.settings import NEXT_TOKEN
from core.randomness import derive_seed

# draws; a resume re-reads at most so many documents (and tokenizes none of them twice)
SNAPSHOT_EVERY = 256
# documents tokenized together: enough for the tokenizer's own threads (docs/LOG.md), few enough to
# stay near
READ_AHEAD = 128


@dataclass(frozen=True)
class PipelineSettings:
    """All settings that fix the order and content of rows."""

    mix: MixSettings
    lanes: int
    seq_length: int
    packing: str  # a key of PACKERS
    min_text_length: int
    objective: str = NEXT_TOKEN
    mask_fraction: float = 0.0  # of the tokens, where masked ones are learned


class Dealer:
    """Deals draws to lanes: each L consecutive draws go to the L lanes, in a random order that
    follows from the seed.

    The order is random because sources take turns as well: a lane that met only the source with the
    longest documents would pile them up without end.
    """

    def __init__(self, lanes: int, seed: int):
        self._lanes, self._seed = lanes, derive_seed(seed, "lanes")
        self._block, self._order = -1, list(range(lanes))

    def lane(self, index: int) -> int:
        """Return the lane of a draw."""
        block, place = divmod(index, self._lanes)
        if block != self._block:
            self._block, self._order = block, list(range(self._lanes))
            random.Random(derive_seed(self._seed, block)).shuffle(self._order)
        return self._order[place]


def share_of_lanes(lanes: int, readers: int, reader: int) -> list[int]:
    """Return the lanes of one rank (or of one worker among a rank's lanes)."""
    return [lane for lane in range(lanes) if lane % readers == reader]


class Pipeline:
    """The rows of some lanes, from a position on. It never ends: once the mix has ended, it gives
    rows of padding, without any target."""

    def __init__(
        self,
        sources: list[Source],
        tokenizer: Tokenizer,
        encode: MemoizedEncoder,
        hold_out: HoldOut,
        settings: PipelineSettings,
        position: Position,
        lanes: list[int],
    ):
        self.settings, self.tokenizer, self._encode = settings, tokenizer, encode
        self.lanes = lanes
        self._next_row = position.rows
        self._hold_out = hold_out
        self._objective = build_objective(
            settings.objective, tokenizer, settings.mask_fraction, settings.mix.seed
        )
        self._mixer = Mixer(sources, settings.mix, self._wanted, position)
        self._dealer = Dealer(settings.lanes, settings.mix.seed)
        self._packers: dict[int, Packer] = {}
        for lane in lanes:
            at = position.lanes.get(lane, LanePosition())
            packer = PACKERS[settings.packing](lane, settings.seq_length, tokenizer.eos_id, at)
            self._packers[lane] = packer
        self._snapshots: list[dict[str, Any]] = [self._mixer.snapshot()]
        # source: the first text that is too short, and how many are
        self._short: dict[str, tuple[str, int]] = {}
        # (source, file, why): whether a row has told it
        self._skipped: dict[tuple[str, str, str], bool] = {}
        self._ended = False
        self._failure: SourceFailed | None = None

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
                row.draws, self._mixer.made = self._mixer.made, {}
                row.skipped = self._newly_skipped()
                yield row
            n += 1

    def _wanted(self, document: Document) -> bool:
        ready = document.encoded
        largest = int(ready.ids.max()) if ready is not None and len(ready.ids) else -1
        if largest >= self.tokenizer.vocab_size:
            raise SourceUnavailable(
                f"{document.key} holds token {largest}, beyond this preset's vocabulary of "
                f"{self.tokenizer.vocab_size}: it was made with another tokenizer; name that one "
                'in "tokenizer"'
            )
        if document.is_shorter_than(self.settings.min_text_length):
            source, epoch = self._mixer.reading
            first, count = self._short.get(source, (document.key, 0))
            self._short[source] = first, count + (epoch == 0)  # the next one has the same
        return may_train(self._hold_out, self.settings.min_text_length, document)

    def _newly_skipped(self) -> list[tuple[str, str, str]]:
        new = [each for each, told in self._skipped.items() if not told]
        self._skipped.update(dict.fromkeys(new, True))
        return new

    def _read_ahead(self) -> None:
        """Read, tokenize and hand out the next documents of own lanes."""
        if self._failure is not None:
            raise self._failure
        ahead = self._draw_documents()
        self._note_skipped()
        for (packer, draw, _), document in zip(ahead, self._encoded(ahead)):
            if document is None:
                packer.lose(draw.index)
                continue
            inputs, labels = self._objective(document, draw.index)
            packer.add(
                draw.index,
                draw.source,
                document.digest,
                draw.opens_epoch,
                inputs,
                labels,
                first=self._first_piece(draw, document),
            )

    def _first_piece(self, draw: Draw, document: Encoded) -> int:
        seed = self.settings.mix.seed
        return first_piece(seed, draw.epoch, document.digest, self.settings.seq_length)

    def _draw_documents(self) -> list[tuple[Packer, Draw, Document]]:
        """Draw until there are READ_AHEAD documents for own lanes, or nothing is left."""
        ahead: list[tuple[Packer, Draw, Document]] = []
        while len(ahead) < READ_AHEAD:
            try:
                draw = next(self._mixer, None)
            except SourceFailed as failure:
                self._failure = failure  # raised once what was read before it is used
                break
            if draw is None:
                self._ended = True
                break
            if self._mixer.index % SNAPSHOT_EVERY == 0:
                self._snapshots.append(self._mixer.snapshot())
            packer = self._packers.get(self._dealer.lane(draw.index))
            if packer is not None and packer.wants(draw.index):
                if draw.document is None:
                    packer.lose(draw.index)
                else:
                    ahead.append((packer, draw, draw.document))
        return ahead

    def _note_skipped(self) -> None:
        """Collect what the sources left out so far, and the texts that are too short."""
        for source in self._mixer.sources:
            for file, why in getattr(source, "skipped", list)():
                self._skipped.setdefault((source.name, file, why), False)
        for name, (first, count) in self._short.items():
            if count:
                why = f"{at_least(count, 'text')}: {shorter_than(self.settings.min_text_length)}"
                self._skipped.setdefault((name, first, why), False)

    def _encoded(self, ahead: list[tuple[Packer, Draw, Document]]) -> list[Encoded | None]:
        """Tokenize documents; None for one that the tokenizer cannot encode: it is left out, and
        noted as skipped."""
        encoded: list[Encoded | None] = []
        results = encode_each(self._encode, [document for _, _, document in ahead])
        for (_, draw, document), each in zip(ahead, results):
            if isinstance(each, BaseException):
                why = redacted(f"cannot be tokenized: {type(each).__name__}: {each}")
                self._skipped.setdefault(
                    (self._mixer.sources[draw.source].name, document.key, why), False
                )
            encoded.append(None if isinstance(each, BaseException) else each)
        return encoded
