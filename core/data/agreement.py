"""Whether all ranks would read the same: with other files on one machine, the data would come in
another order there, unseen.

In:    each rank's corpus
Out:   what stands for the files of each source; or the difference, as an error on every rank
State: none
"""

import hashlib
from itertools import islice
from typing import Any

from core.data.sources.files import FileSource
from core.errors import SourceUnavailable, UserError

FIRST_DOCUMENTS = 64
"""Documents of each local source that are compared by content; files, all by name and size."""
NAMES_SHOWN = 3


def agreed_contents(corpus: Any, parallel: Any) -> dict[str, str]:
    """`corpus.contents()`, the same on every rank. Raises UserError, on all of them, where one
    would read something else."""
    contents = corpus.contents()
    if parallel.world_size == 1:
        return contents
    everyones = parallel.gather({s.name: (contents[s.name], _beginning(s)) for s in corpus.sources})
    wrong = [
        (rank, name)
        for rank, found in enumerate(everyones)
        for name in contents
        if found.get(name) != everyones[0].get(name)
    ]
    if not wrong:
        return contents
    rank, name = wrong[0]
    files = parallel.gather(
        _files(next(source for source in corpus.sources if source.name == name))
    )
    raise UserError(
        f"the processes would not read the same data: source {name} is another on rank {rank} "
        "than on rank 0"
        f"{_difference(files[0], files[rank])}. Give every machine the same files, such as one "
        "shared folder, and start again."
    )


def _beginning(source: Any) -> str:
    """Stands for the content of a local source's first documents."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        for document in islice(source.stream({}), FIRST_DOCUMENTS) if source.finite else ():
            digest.update(document.digest.to_bytes(8, "big"))
    except SourceUnavailable:  # training will meet the same error, and drop the source on all ranks
        pass
    return digest.hexdigest()


def _files(source: Any) -> dict[str, int | None]:
    return (
        {unit.key: source.size(unit) for unit in source.shards()}
        if isinstance(source, FileSource)
        else {}
    )


def _difference(first: dict[str, int | None], other: dict[str, int | None]) -> str:
    """Of two lists of files, in words."""
    found = [
        ("lacks", [key for key in first if key not in other]),
        ("has besides", [key for key in other if key not in first]),
        (
            "has with another size",
            [key for key in first if key in other and first[key] != other[key]],
        ),
    ]
    told = [
        f"it {how} {', '.join(keys[:NAMES_SHOWN])}{' ...' * (len(keys) > NAMES_SHOWN)}"
        for how, keys in found
        if keys
    ]
    return f" ({'; '.join(told)})" if told else " (the same files hold other text)" if first else ""
