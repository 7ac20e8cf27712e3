"""Named randomness: every random choice has a seed of its own, derived from the run's seed and a
name. Needs no torch."""

import hashlib


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one named purpose, such as `derive_seed(42, "order", "wikipedia", epoch)`.
    Stable everywhere."""
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(seed: int, index: int) -> float:
    """The `index`-th draw in [0, 1) of a counter-based generator: no state, any draw can be asked
    for at any time."""
    digest = hashlib.blake2b(
        index.to_bytes(8, "big"), key=seed.to_bytes(8, "big"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") / 2**64
