"""Makes the pipeline of some lanes, in a thread of the trainer or in a worker process.

In:    what fixes the rows: sections of sources, a tokenizer, the hold-out, PipelineSettings
Out:   a Pipeline from any position on; a fingerprint of the rows' order
State: the opened sources and the tokenizer, made once per process
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.data.documents import Source
from core.data.encoding import MemoizedEncoder
from core.data.mixing import SourceFailed
from core.data.pipeline import Pipeline, PipelineSettings
from core.data.position import Position
from core.data.shuffle import ShuffledSource
from core.data.sources import build_source
from core.data.sources.hf import HfSource
from core.data.sources.shards import ShardSource, ShardView
from core.data.token_cache import cached_sources
from core.data.tokenizer import Tokenizer
from core.data.validation import HoldOut
from core.errors import SourceUnavailable
from core.preset.settings import NEXT_TOKEN, SourceSettings


@dataclass
class PipelineFactory:
    """Makes a Pipeline, here or in a worker process.

    Opened sources and the tokenizer are not sent to workers: each worker makes its own.
    """

    sections: list[SourceSettings]
    root: Path
    seed: int
    tokenizer_state: dict[str, Any]
    hold_out: HoldOut
    settings: PipelineSettings
    shuffle: str = "shards"  # or "documents"
    cache_gigabytes: float = 0.0
    sources: list[Source] | None = None
    tokenizer: Tokenizer | None = None
    encode: MemoizedEncoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sources": None, "tokenizer": None, "encode": None}

    def __call__(self, position: Position, lanes: list[int]) -> Pipeline:
        """Open the sources if need be, and return the pipeline of these lanes from a position on.

        Raises SourceFailed.
        """
        if self.sources is None or self.tokenizer is None:
            self.sources = [
                build_source(section, self.root, self.seed) for section in self.sections
            ]
            for source in self.sources:
                if isinstance(source, HfSource):
                    source.patient = True  # a Hub that is away for a moment costs no source
                try:
                    source.open()
                except SourceUnavailable as error:
                    # a dropped one is only asked for turns it can no longer take
                    if source.name not in position.drops:
                        raise SourceFailed(source.name, str(error)) from None
            self.tokenizer = Tokenizer.from_state(self.tokenizer_state)
        sources = cached_sources(self.sources, self.root, self.cache_gigabytes, self.tokenizer)
        if self.shuffle == "documents":
            sources = [
                ShuffledSource(s, self.seed) if isinstance(s, ShardSource | ShardView) else s
                for s in sources
            ]
        self.encode = self.encode or MemoizedEncoder(self.tokenizer)
        return Pipeline(
            sources, self.tokenizer, self.encode, self.hold_out, self.settings, position, lanes
        )

    def fingerprint(self) -> str:
        """Return a hash that is equal exactly when the order and content of rows are, as long as
        the sources' contents are."""
        mix = replace(self.settings.mix, rates=(), horizon_tokens=0)  # kept in the checkpoint
        order = asdict(self.settings) | {"mix": mix}
        if order["objective"] == NEXT_TOKEN:
            del order["objective"], order["mask_fraction"]
        described = [
            f"PipelineSettings({', '.join(f'{key}={value!r}' for key, value in order.items())})",
            [section.model_dump(mode="json") for section in self.sections],
            self.hold_out.fraction,
            self.shuffle,
            hashlib.sha256(self.tokenizer_state["json"].encode()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
