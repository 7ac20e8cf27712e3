"""How much a source holds: the tokens of one pass over it, and how often a run would read it over.

In:    opened sources, a tokenizer, what may be trained on
Out:   tokens; sentences for sources that would be read too often
State: none

A source is counted as far as that takes seconds. Beyond, what was counted is taken for a part of
the whole: of rows where the files say how many they have (Parquet), of bytes elsewhere. It is
counted in order: the outcome is a function of the content."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from core.data.documents import Document, Encoded, Source
from core.data.encoding import encode, encode_each
from core.data.tokenizer import Tokenizer
from core.errors import SourceUnavailable

COUNTED_TOKENS = 4_000_000
"""Beyond so many a source's size is told from this part of it, where it can be: seconds of
tokenizing."""
UNKNOWN_TOKENS = 25_000_000
"""So many are counted of a stream whose size nobody knows, before it is given up."""
SIZED_SHARDS = 16
"""Whose sizes are asked for; of more the others are taken to be as large as these."""
AT_ONCE = 128
MANY_EPOCHS = 10
"""Passes over the same text beyond which a run learns little from it but the text itself (arXiv
2305.16264)."""
SECONDS, FEW_SHARDS, SAMPLE = 3.0, 4, 32
"""How long a source is looked through to tell how often it would be read; of a stream only one of
so few shards, as others are large. From how many documents its tokens per character and per
document are told."""
STREAM_DOCUMENT = 800.0
"""Tokens of a document of the streams that are not looked into, about."""


def tokens_of_pass(
    source: Source,
    count: Callable[[list[Document]], float],
    limit: float,
    counted: float = COUNTED_TOKENS,
    seconds: float | None = None,
) -> float | None:
    """Tokens that one pass over a source gives, `limit` at most; None where that cannot be told.

    count     documents -> their tokens, of those that may be trained on
    counted   from so many on the size is told from a part
    seconds   as many as that may take
    """
    total = whole = 0.0  # tokens read, and those of them in shards that were read to their end
    unit, begun = 0, time.monotonic()
    stream = source.stream({})
    try:
        while documents := [
            (stream.cursor().get("unit", 0), document) for document in islice(stream, AT_ONCE)
        ]:
            last = documents[-1][0]
            total += count([document for number, document in documents if number < last])
            if last > unit:
                whole, unit = total, last
            total += count([document for number, document in documents if number == last])
            if total >= limit:
                return limit
            late = seconds is not None and time.monotonic() - begun > seconds
            if (total >= counted or late) and (part := _part_behind(source, stream.cursor())):
                return min(limit, max(total, (total if source.size_is_positions else whole) / part))
            if late or (not source.finite and total >= UNKNOWN_TOKENS):
                return None
    except SourceUnavailable:  # training will meet the same error, and drop the source
        pass
    return total


def counter(
    tokenizer: Tokenizer, may_train: Callable[[Document], bool], ends: int
) -> Callable[[list[Document]], int]:
    """Documents -> the tokens that training reads of them; `ends` of each are not of its text."""

    def count(documents: list[Document]) -> int:
        encoded = encode_each(
            partial(encode, tokenizer), [document for document in documents if may_train(document)]
        )
        return sum(len(each.ids) + ends for each in encoded if isinstance(each, Encoded))

    return count


def too_often(
    sources: list[Source],
    weights: list[float] | None,
    of_tokens: bool,
    tokenizer: Tokenizer,
    may_train: Callable[[Document], bool],
    tokens: int,
    advice: str = "",
) -> Iterator[str]:
    """A sentence for each source that a run of so many tokens reads more than MANY_EPOCHS times.

    weights     shares of the documents, or `of_tokens`; None: sources are read through one after
                the other
    advice      how a source is read less, where it can be
    """
    looked = [
        source if source.finite or len(source.order(0)) <= FEW_SHARDS else None
        for source in sources
    ]  # type: ignore
    samples = [
        _sampled(source, tokenizer) if source is not None else (0.0, STREAM_DOCUMENT)
        for source in looked
    ]
    shares = [1.0] * len(sources)
    if weights is not None:
        shares = [
            weight if of_tokens else weight * mean for weight, (_, mean) in zip(weights, samples)
        ]
        shares = [share / (sum(shares) or 1.0) for share in shares]
    passes: list[float | None] = []
    for source, (rate, _), share in zip(looked, samples, shares):

        def count(documents: list[Document], rate: float = rate) -> float:
            return sum(1 + rate * document.size for document in documents if may_train(document))

        how = (
            tokens * share / MANY_EPOCHS,
            float("inf") if source is not None and source.finite else COUNTED_TOKENS / 20,
            SECONDS,
        )
        passes.append(tokens_of_pass(source, count, *how) if source is not None else None)
    whole = sum(held or 0.0 for held in passes)
    for name, held, share in zip((source.name for source in sources), passes, shares):
        if not held or (weights is None and None in passes):
            continue
        epochs = tokens / whole if weights is None else tokens * share / held
        if epochs > 1.05 * MANY_EPOCHS:
            yield (
                f"{name} would be read about {epochs:,.0f} times: one pass over it is about "
                f"{held:,.0f} tokens, this run takes "
                f"{epochs * held:,.0f} of it. Beyond about {MANY_EPOCHS} passes little is learned "
                f"but the text itself: {advice}"
                "add text, or shorten the run with train.max_epochs or train.max_steps"
            )


def _sampled(source: Source, tokenizer: Tokenizer) -> tuple[float, float]:
    """Tokens per character, and per document, of a source's first documents."""
    try:
        documents = list(islice(source.stream({}), SAMPLE))
    except SourceUnavailable:
        documents = []
    tokens = sum(len(each.ids) for each in encode(tokenizer, documents))
    return tokens / max(sum(document.size for document in documents), 1), 1 + tokens / max(
        len(documents), 1
    )


def _part_behind(source: Any, cursor: dict[str, Any]) -> float | None:
    """The part of a source that lies before a cursor, or, where sizes are not counted in positions,
    before its shard; if it can be told."""
    order = source.order(0)
    unit, piece = cursor.get("unit", 0), cursor.get("piece", 0)
    step = max(1, len(order) // SIZED_SHARDS)
    sizes = {
        number: source.size(order[number])
        for number in {*range(0, len(order), step), *range(min(unit + 1, len(order)))}
    }
    if not all(sizes.values()):
        return None
    mean = sum(sizes.values()) / len(sizes)
    behind = sum(sizes[number] for number in range(unit)) + (
        piece if source.size_is_positions else 0
    )
    return behind / (mean * (len(order) - len(sizes)) + sum(sizes.values()))
