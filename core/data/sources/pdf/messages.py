"""The messages between the processes that read PDFs and their parent.

In:    JSON objects, each behind 4 bytes of length
Out:   the same
State: none
"""

import json
import struct
from typing import IO, Any

GOOD, CRASH, SLOW, LARGE = "", "crash", "slow", "large"
EMPTY, ENCRYPTED, DAMAGED, PAGELESS, SCANNED = (
    "empty",
    "encrypted",
    "damaged",
    "pageless",
    "textless (scanned?)",
)
"""The kinds of result of reading a file: text, or the name that the notes give to its kind."""

CACHEABLE = frozenset((GOOD, EMPTY, ENCRYPTED, DAMAGED, PAGELESS, SCANNED))
TRANSIENT = frozenset((CRASH, SLOW, LARGE))
"""Results that follow from the file alone; and results that depend on the machine: time and memory
may run out on one and not on another."""


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """Return the next message; None at the end of the stream, or where no message follows."""
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
