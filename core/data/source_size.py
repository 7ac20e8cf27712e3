"""The size of a source: the tokens of one pass over it, and how often a run would read it over.

In:    opened sources, a tokenizer, what may be trained on
Out:   tokens; warnings for sources that would be read too often; samples of a source
State: none

A source is counted for a few seconds. If it is larger than that, what was counted is taken as a
part of the whole: of the rows where the files say how many they have (Parquet), of the bytes
elsewhere. Counting goes in order, so the result depends on the content alone."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from core.data.documents import Cursor, Document, Encoded, Source
from core.data.encoding import encode, encode_each
from core.data.sources.shards import ShardSource
from core.data.tokenizer import Tokenizer
from core.errors import SourceUnavailable

Count = Callable[[list[Document]], float]
"""Documents to their tokens, of those that may be trained on."""

COUNTED_TOKENS = 4_000_000
"""After so many tokens, seconds of tokenizing, a source's size is estimated where that is
possible."""
UNKNOWN_TOKENS = 25_000_000
"""A stream of unknown size is given up after so many tokens."""
SIZED_SHARDS = 16
"""Shards whose sizes are asked for; the others are taken to be as large as these."""
AT_ONCE = 128
MANY_EPOCHS = 10
"""Passes over the same text beyond which a run learns little from it but the text itself (arXiv
2305.16264)."""
SECONDS, FEW_SHARDS, SAMPLE = 3.0, 4, 32
"""How long a source is read to estimate how often a run would read it; only streams of so few
shards are read, as others are large; and how many documents give its tokens per character and per
document."""
STREAM_DOCUMENT = 800.0
"""Tokens per document assumed for the streams that are not read."""
RATE_DOCUMENTS, RATE_FILES, RATE_STREAMS = 256, 64, 4
"""What is read of a source to measure its tokens per character: so many documents, spread over so
many files, or, of what comes over a network, so many shards. Neighbours are alike: the first 256
documents of source code were 6 % off (docs/LOG.md)."""


def tokens_of_pass(
    source: Source,
    count: Count,
    limit: float,
    counted: float = COUNTED_TOKENS,
    seconds: float | None = None,
) -> float | None:
    """Return the tokens that one pass over a source gives, `limit` at most; None if unknown.

    counted   tokens after which the size is estimated from a part
    seconds   time limit
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
            if (total >= counted or late) and (part := _part_read(source, stream.cursor())):
                return min(limit, max(total, (total if source.size_is_positions else whole) / part))
            if late or (not source.finite and total >= UNKNOWN_TOKENS):
                return None
    except SourceUnavailable:  # training will meet the same error, and drop the source
        pass
    return total


def counter(
    tokenizer: Tokenizer, may_train: Callable[[Document], bool], ends: int
) -> Callable[[list[Document]], int]:
    """Return a function from documents to the tokens that training reads of them.

    ends   tokens of each document that do not come from its text
    """

    def count(documents: list[Document]) -> int:
        trained = [document for document in documents if may_train(document)]
        encoded = encode_each(partial(encode, tokenizer), trained)
        return sum(len(each.ids) + ends for each in encoded if isinstance(each, Encoded))

    return count


@dataclass(frozen=True)
class Shares:
    """The shares of a run's tokens among its sources."""

    weights: list[float] | None  # None: sources are read one after the other
    of_tokens: bool  # else of documents
    advice: str = ""  # how a source is read less, where that is possible


def repetition_warnings(
    sources: list[Source],
    shares: Shares,
    tokenizer: Tokenizer,
    may_train: Callable[[Document], bool],
    tokens: int,
) -> Iterator[str]:
    """Yield a warning for each source that a run of `tokens` reads more than MANY_EPOCHS times."""
    readable = [source.finite or len(source.order(0)) <= FEW_SHARDS for source in sources]
    samples = [
        _sample_rates(source, tokenizer) if reads else (0.0, STREAM_DOCUMENT)
        for source, reads in zip(sources, readable)
    ]
    parts = [1.0] * len(sources)
    if shares.weights is not None:
        parts = [
            weight if shares.of_tokens else weight * mean
            for weight, (_, mean) in zip(shares.weights, samples)
        ]
        parts = [part / (sum(parts) or 1.0) for part in parts]
    passes: list[float | None] = []
    for source, reads, (rate, _), part in zip(sources, readable, samples, parts):

        def count(documents: list[Document], rate: float = rate) -> float:
            return sum(1 + rate * document.size for document in documents if may_train(document))

        counted = float("inf") if source.finite else COUNTED_TOKENS / 20
        limit = tokens * part / MANY_EPOCHS
        passes.append(tokens_of_pass(source, count, limit, counted, SECONDS) if reads else None)
    whole = sum(size or 0.0 for size in passes)
    for source, size, part in zip(sources, passes, parts):
        if not size or (shares.weights is None and None in passes):
            continue
        epochs = tokens / whole if shares.weights is None else tokens * part / size
        if epochs > 1.05 * MANY_EPOCHS:
            yield (
                f"{source.name} would be read about {epochs:,.0f} times: one pass over it is about "
                f"{size:,.0f} tokens, this run takes {epochs * size:,.0f} of it. Beyond about "
                f"{MANY_EPOCHS} passes little is learned but the text itself: {shares.advice}"
                "add text, or shorten the run with train.max_epochs or train.max_steps"
            )


def sampled_documents(source: Source) -> list[Document]:
    """Read some documents from all over a source."""
    if not isinstance(source, ShardSource):
        return list(islice(source.stream({}), RATE_DOCUMENTS))
    order = source.order(0)
    step = max(1, len(order) // (RATE_FILES if source.finite else RATE_STREAMS))
    per_shard = max(1, RATE_DOCUMENTS * step // len(order))
    documents: list[Document] = []
    for shard in order[::step]:
        try:
            documents += [document for _, document in islice(source.read(shard, 0), per_shard)]
        except Exception:  # training will meet the same error, and say what it means
            continue
    return documents


def _sample_rates(source: Source, tokenizer: Tokenizer) -> tuple[float, float]:
    """Return tokens per character, and per document, of a source's first documents."""
    try:
        documents = list(islice(source.stream({}), SAMPLE))
    except SourceUnavailable:
        documents = []
    tokens = sum(len(each.ids) for each in encode(tokenizer, documents))
    characters = sum(document.size for document in documents)
    return tokens / max(characters, 1), 1 + tokens / max(len(documents), 1)


def _part_read(source: Source, cursor: Cursor) -> float | None:
    """Return the part of a source that lies before a cursor, or, where sizes are not counted in
    positions, before its shard; None if unknown."""
    order = source.order(0)
    unit, piece = cursor.get("unit", 0), cursor.get("piece", 0)
    step = max(1, len(order) // SIZED_SHARDS)
    numbers = {*range(0, len(order), step), *range(min(unit + 1, len(order)))}
    sizes = {number: source.size(order[number]) or 0 for number in numbers}
    if not all(sizes.values()):
        return None
    mean = sum(sizes.values()) / len(sizes)
    behind = sum(sizes[number] for number in range(unit))
    behind += piece if source.size_is_positions else 0
    return behind / (mean * (len(order) - len(sizes)) + sum(sizes.values()))
