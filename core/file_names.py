"""Names that become files and folders, on every disk.

In:    what a person calls something
Out:   whether that may be a lineage; a name for a file
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
"""What Windows keeps for devices."""

SLOTS = ("current", "prev", "prev2")
"""What a lineage's checkpoints are called, the newest first."""


def slot_name(lineage: str, slot: str = SLOTS[0]) -> str:
    """The file of a lineage's checkpoint; with "*" a pattern."""
    return f"{lineage}_{slot}.pth"


def is_file_name(name: str) -> bool:
    """Whether a file may be called so everywhere: never hidden, never a way up, never a device."""
    return (
        len(name) <= LONGEST
        and NAME.fullmatch(name) is not None
        and RESERVED.fullmatch(name) is None
    )


def file_name(text: str, longest: int = 60) -> str:
    """The text, where a file may be called so; else what it has of letters, digits and . _ - with a
    hash: two never share one."""
    text = unicodedata.normalize("NFC", text)  # systems write one name in several ways
    if is_file_name(text):
        return text
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:longest].strip("._")
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{kept}-{digest}" if kept else digest
