"""Checks that all ranks read the same data: with other files on one machine, the documents would
silently come in another order there.

In:    each rank's corpus
Out:   a hash of each source's files; or the difference, as an error on every rank
State: none
"""

import hashlib
from itertools import islice

from core.data.corpus import Corpus
from core.data.documents import Source
from core.data.sources.files import FileSource
from core.errors import SourceUnavailable, UserError
from core.parallel.protocol import Parallel

FIRST_DOCUMENTS = 64
"""Documents of each local source that are compared by content; all files are compared by name and
size."""
NAMES_SHOWN = 3

Sizes = dict[str, int | None]
"""Files of a source, by name."""


def agreed_contents(corpus: Corpus, parallel: Parallel) -> dict[str, str]:
    """Return `corpus.contents()` after comparing it over the ranks. Raises UserError, on all of
    them, if one would read something else."""
    contents = corpus.contents()
    if parallel.world_size == 1:
        return contents
    by_rank = parallel.gather({s.name: (contents[s.name], _beginning(s)) for s in corpus.sources})
    differing = [
        (rank, name)
        for rank, of_rank in enumerate(by_rank)
        for name in contents
        if of_rank.get(name) != by_rank[0].get(name)
    ]
    if not differing:
        return contents
    rank, name = differing[0]
    source = next(source for source in corpus.sources if source.name == name)
    files = parallel.gather(_files(source))
    raise UserError(
        f"the processes would not read the same data: source {name} is another on rank {rank} "
        f"than on rank 0{_difference(files[0], files[rank])}. Give every machine the same files, "
        "such as one shared folder, and start again."
    )


def _beginning(source: Source) -> str:
    """Return a hash of the content of a local source's first documents."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        for document in islice(source.stream({}), FIRST_DOCUMENTS) if source.finite else ():
            digest.update(document.digest.to_bytes(8, "big"))
    except SourceUnavailable:  # training will meet the same error, and drop the source on all ranks
        pass
    return digest.hexdigest()


def _files(source: Source) -> Sizes:
    if not isinstance(source, FileSource):
        return {}
    return {unit.key: source.size(unit) for unit in source.shards()}


def _difference(first: Sizes, other: Sizes) -> str:
    """Describe how the files of two ranks differ."""
    resized = [key for key in first if key in other and first[key] != other[key]]
    differences = {
        "lacks": [key for key in first if key not in other],
        "has besides": [key for key in other if key not in first],
        "has with another size": resized,
    }
    parts = [
        f"it {how} {', '.join(keys[:NAMES_SHOWN])}{' ...' * (len(keys) > NAMES_SHOWN)}"
        for how, keys in differences.items()
        if keys
    ]
    if parts:
        return f" ({'; '.join(parts)})"
    return " (the same files hold other text)" if first else ""
