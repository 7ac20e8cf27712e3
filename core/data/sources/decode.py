"""Decode the bytes of a file into lines and text: compression, encodings, and bounds on what is
held in memory.

    file ──► unpacked (.gz .bz2 .xz .zst) ──► as_utf8 (UTF-16 and UTF-32, by their mark) ──► lines,
    or blocks ──► decoded

In:    an open file, or pieces of one
Out:   iterators of bytes; text, and how much of it is replacement characters
State: none
"""

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from core.data.sources.skips import CutShort, Damaged
from core.optional_packages import need

PIECE = 1 << 18
"""Bytes read at once."""
PACKED_PIECE = 1 << 11
"""Packed bytes that are unpacked at once: zstd may make 30,000 times as many of them."""
UNPACKED_PIECE = 1 << 14
"""Bytes that are lost at most before damage, or a block of bzip2 or zstd."""
RECORD_BYTES = 32 << 20
"""A row or line longer than this is passed over: reading and tokenizing it takes ten times as much
memory."""

BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, ""),
)
CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
MOST_DAMAGE = 0.1
"""Largest share of control and replacement characters; with more, it is no text."""
MOST_ACCENTS = 0.3
"""Largest share of bytes beyond ASCII in a text that may be Windows-1252, a language of Western
Europe."""


class Decoded(NamedTuple):
    """A text, and how it was decoded."""

    text: str
    replaced: int = 0  # replacement characters, which stand for bytes that are no text
    other: bool = False  # whether it was Windows-1252


# compression --------------------------------------------------------------------------------------


class _Gzip:
    """zlib's reader of one member, with the interface of the readers of bz2 and lzma."""

    def __init__(self) -> None:
        self._reader = zlib.decompressobj(31)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._reader.decompress(self._reader.unconsumed_tail + data, most)

    @property
    def needs_input(self) -> bool:
        return not self._reader.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._reader.eof

    @property
    def unused_data(self) -> bytes:
        return self._reader.unused_data


class _Zstd:
    """A reader of one frame of zstd, with windows as long as `--long=31` makes them."""

    needs_input = True

    def __init__(self) -> None:
        self._reader = (
            need("zstandard", "zstandard").ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        )

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._reader.decompress(data)

    @property
    def eof(self) -> bool:
        return self._reader.eof

    @property
    def unused_data(self) -> bytes:
        return self._reader.unused_data


READERS: dict[str, Callable[[], Any]] = {
    ".gz": _Gzip,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _Zstd,
}
COMPRESSIONS = tuple(READERS)


def compression(name: str) -> str:
    """Return the suffix of a compressed file; "" for any other."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


def unpacked(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file, with all its members or frames. Raises CutShort or
    Damaged after all that is whole."""
    if not suffix:
        while data := file.read(PIECE):
            yield data
        return
    any_given = False
    data = file.read(PACKED_PIECE)
    while data:
        reader, ended = READERS[suffix](), False
        while not reader.eof:
            try:
                piece = reader.decompress(data, UNPACKED_PIECE)
            except Exception:  # each library has an error of its own
                raise (CutShort() if any_given else Damaged("damaged")) from None
            if piece:
                any_given = True
                yield piece
            elif ended and not reader.eof:  # the file is over, the member is not
                raise CutShort() if any_given else Damaged("damaged")
            data = b""
            if reader.needs_input and not reader.eof:
                data = file.read(PACKED_PIECE)
                ended = not data
        data = reader.unused_data
        # padding between members, or after them
        while not data.strip(b"\0") and (more := file.read(PACKED_PIECE)):
            data = more
        data = data.lstrip(b"\0")


# encodings ----------------------------------------------------------------------------------------


def wide_encoding(head: bytes) -> str:
    """Return the encoding that the mark at a file's beginning names; "" without a mark."""
    return next((name for mark, name in BOMS if head.startswith(mark)), "")


def as_utf8(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Convert a text with a byte-order mark to UTF-8 without one; pass on anything else
    unchanged."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 4:
            break
    mark, name = next(((mark, name) for mark, name in BOMS if head.startswith(mark)), (b"", ""))
    rest = chain([head[len(mark) :]], pieces)
    if not name:
        yield from rest
        return
    decoder = codecs.getincrementaldecoder(name)("zeroarg.damage")
    for piece in rest:
        yield decoder.decode(piece).encode(errors="surrogateescape")
    yield decoder.decode(b"", True).encode(errors="surrogateescape")


def _mark_damage(error: UnicodeError) -> tuple[str, int]:
    """Replace what is no UTF-16 with a byte that is text neither in UTF-8 nor in Windows-1252, so
    that it is counted."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc81", error.end


codecs.register_error("zeroarg.damage", _mark_damage)


def decoded(data: bytes) -> Decoded:
    """Decode UTF-8; or Windows-1252 (and so Latin-1) where it looks like that; or else UTF-8 with
    replacement characters."""
    try:
        return Decoded(data.decode())  # a replacement character that the file itself holds is text
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
    replaced = text.count("\ufffd") - data.count("\ufffd".encode())
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    accents = len(data) - len(data.decode("ascii", "ignore"))
    if (
        beyond_ascii - replaced < replaced
        and accents <= MOST_ACCENTS * len(data) + 4
        and not controls(data)
    ):
        try:
            return Decoded(data.decode("cp1252"), 0, True)
        except UnicodeDecodeError:  # five bytes mean nothing in Windows-1252
            pass
    return Decoded(text, replaced)


def controls(data: bytes) -> int:
    """Count the control characters, NUL among them, in bytes of UTF-8."""
    return len(data) - len(data.translate(None, CONTROLS))


def is_mostly_damage(data: bytes, result: Decoded) -> bool:
    """Return whether bytes are no text: a picture or a program under another name, UTF-16 without a
    mark, the encoding of another alphabet."""
    return controls(data) + result.replaced > MOST_DAMAGE * len(result.text)


# lines and blocks ---------------------------------------------------------------------------------


def lines(pieces: Iterator[bytes]) -> Iterator[bytes | None]:
    """Yield each line without its end; None for a line longer than RECORD_BYTES, which is not
    kept."""
    begun: list[bytes] = []
    size = 0
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            size += len(part)
            yield b"".join([*begun, part]) if size <= RECORD_BYTES else None
            begun, size = [], 0
        size += len(rest)
        begun.append(rest)
        if size > RECORD_BYTES:
            begun.clear()
    if size:
        yield b"".join(begun) if size <= RECORD_BYTES else None


def blocks(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes in blocks of at most `size`. A block ends with a line, or with a character
    where the line is too long. Damage is raised after what precedes it."""
    held, damage = bytearray(), None
    try:
        for piece in pieces:
            held += piece
            while len(held) > size:
                cut = held.rfind(b"\n", 0, size) + 1 or first_of_character(held, size)
                yield bytes(held[:cut])
                del held[:cut]
    except Damaged as error:
        damage = error
    if held:
        yield bytes(held)
    if damage is not None:
        raise damage


def first_of_character(data: bytes | bytearray, at: int) -> int:
    """Return `at`; or, where `at` is inside a character of UTF-8, the character's beginning."""
    begin = at
    while begin > max(0, at - 4) and begin < len(data) and data[begin] & 0xC0 == 0x80:
        begin -= 1
    return begin if begin < len(data) and data[begin] & 0xC0 != 0x80 else at
