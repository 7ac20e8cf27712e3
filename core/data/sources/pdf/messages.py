"""What the processes that read PDFs and their parent say to each other.

In:    JSON objects, each behind 4 bytes of length
Out:   the same
State: none
"""

import json
import struct
from typing import Any, BinaryIO

GOOD, CRASH, SLOW, LARGE = "", "crash", "slow", "large"
EMPTY, ENCRYPTED, DAMAGED, PAGELESS, SCANNED = (
    "empty",
    "encrypted",
    "damaged",
    "pageless",
    "textless (scanned?)",
)
"""What can come of reading a file: text, or the kind of file it is in the notes."""

CACHEABLE = frozenset((GOOD, EMPTY, ENCRYPTED, DAMAGED, PAGELESS, SCANNED))
TRANSIENT = frozenset((CRASH, SLOW, LARGE))
"""Outcomes that follow from the file alone; and others: time and memory run out on one machine and
not on another."""


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end of the stream, or where what comes is no message."""
    head = stream.read(4)
    if len(head or b"") < 4:
        return None
    length = struct.unpack(">I", head)[0]
    data = stream.read(length)
    if len(data) < length:
        return None
    try:
        message = json.loads(data)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
