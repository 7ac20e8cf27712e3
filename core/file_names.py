"""Names that become files and folders, on every disk.

In:    a name that a person chose
Out:   a name for a file; whether a file may be called so
State: none
"""

import hashlib
import re
import unicodedata

LONGEST = 150
"""Characters: a checkpoint that is being written is called .<lineage>_current.pth.<16 digits>.tmp,
and disks take 255 bytes."""
NAME = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices."""

SLOTS = ("current", "prev", "prev2")
"""Names of a lineage's checkpoints, the newest first."""


def slot_name(lineage: str, slot: str = SLOTS[0]) -> str:
    """Return the file name of a lineage's checkpoint; with the slot "*" a pattern of all."""
    return f"{lineage}_{slot}.pth"


def shares_name(lineage: str, slot: str = SLOTS[0]) -> str:
    """Return the name of the folder that a lineage's checkpoint is where every rank has written its
    share of it."""
    return f"{lineage}_sharded/{slot}"


def is_file_name(name: str) -> bool:
    """Tell whether a file may be called so on every system: not hidden, no way up, no device."""
    return (
        len(name) <= LONGEST
        and NAME.fullmatch(name) is not None
        and RESERVED.fullmatch(name) is None
    )


def file_name(text: str, longest: int = 60) -> str:
    """Return the text, where a file may be called so; else its letters, digits and . _ - with a
    hash, so that no two texts share a name."""
    text = unicodedata.normalize("NFC", text)  # systems write one name in several ways
    if is_file_name(text):
        return text
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:longest].strip("._")
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{kept}-{digest}" if kept else digest
