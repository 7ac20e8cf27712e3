"""The `data` section of a preset, but for the kinds of sources, which have a table.

In:    nothing
Out:   DataSettingsBase
State: none
"""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from core.preset.settings import Settings, SourceSettings
from core.schedules import Schedule, values_at_turns


class DataSettingsBase(Settings):
    """Everything of `data` but the sources, whose kinds come from a table."""

    if TYPE_CHECKING:  # the last field of the class that is made from the table
        sources: list[SourceSettings]
    mix_strategy: Literal["round_robin", "sequential", "weighted"] = "round_robin"
    """round_robin: one document from each in turn. sequential: each to its end. weighted: shares of
    `source_weights`."""
    source_weights: list[Schedule] | None = None
    """One number or schedule per source (weighted): its share of what is drawn."""
    weights_of: Literal["documents", "tokens"] = "documents"
    """source_weights are shares of the documents drawn, or of their tokens (a source of long
    documents is drawn less often then)."""
    min_text_length: int = Field(50, ge=1)
    """Texts of fewer characters are left out, and counted; conversations may be as short as they
    are."""
    mask_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of the tokens that are hidden behind [MASK] and predicted, where the model learns that
    (neobert)."""
    packing: Literal["documents", "best_fit", "padding"] = "documents"
    """documents: end to end, attention kept inside each. best_fit: kept whole wherever they fit.
    padding: one piece a row."""
    shuffle: Literal["documents", "shards"] = "documents"
    """Each epoch puts in another order the shards (files) only, or also the documents in stretches
    of 1,024 inside them."""
    validation_fraction: float = Field(0.01, gt=0.0, lt=0.5)
    """Share of the documents held out for evaluation, chosen by a hash of their text."""
    workers: int | None = Field(None, ge=0, le=64)
    """Processes that read and tokenize, per rank; 0: a thread. Left out: a thread on CPU, one
    process on a GPU."""
    cache_gigabytes: float = Field(20.0, ge=0.0, le=1_000_000.0)
    """Disk space for tokens of streams and compressed files, in .cache/ (safe to delete); 0: no
    cache."""
    lanes: int = Field(24, ge=1, le=4096)
    """Parallel lanes the order of documents is laid over. The number of ranks must divide it."""
    train_tokens: int | None = None
    """Accepted for old presets and overridden: one run is always 100,000,000 tokens."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        sources = self.sources
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f'two sources are called {", ".join(twice)}; give one another "name"')
        if self.mix_strategy == "weighted" and self.source_weights is None:
            raise ValueError(
                'mix_strategy "weighted" needs "source_weights", one number per source'
            )
        if self.source_weights is not None:
            if len(self.source_weights) != len(sources):
                raise ValueError(
                    f"{len(self.source_weights)} source_weights for {len(sources)} sources; give "
                    "one each"
                )
            for moment, shares in values_at_turns(self.source_weights):
                if min(shares) < 0 or sum(shares) <= 0:
                    raise ValueError(
                        f"source_weights must not be negative, and not all zero; at {moment:g} "
                        f"they are {shares}"
                    )
            if self.mix_strategy != "weighted":
                raise ValueError(
                    'source_weights need "mix_strategy": "weighted", and it is '
                    f'"{self.mix_strategy}", which does not use them; set it, or leave them out'
                )
        return self
