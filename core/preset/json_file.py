"""Read JSON that a person wrote: strictly, and with every mistake's place and its remedy.

In:    a path
Out:   what the file says, and what is wrong with it
State: none
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from core.errors import PresetError

MOST_BYTES = 1_000_000
MOST_DIGITS = 400
"""Python reads no whole number of more than 4,300 digits; no setting has a tenth of them."""
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Of the encodings that Windows editors call "Unicode"."""
UNREADABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that no path, prompt or name can hold: NUL, and halves of a surrogate pair."""


class Endless(int):
    """A whole number of too many digits: it counts as one beyond every bound, and remembers how it
    was written."""

    digits: str

    def __new__(cls, digits: str) -> "Endless":
        number = super().__new__(cls, (-1 if digits.startswith("-") else 1) * 10**MOST_DIGITS)
        number.digits = digits
        return number


class _Repeating(dict):
    """An object in which keys stand twice. Of those, JSON readers drop the first value without a
    word."""

    twice: list[str]


def read_json(path: Path) -> tuple[Any, list[str]]:
    """Return what the file says, and the problems with keys and texts in it. Raises PresetError
    for a file that is no JSON."""
    text = _text(path)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
        problems: list[str] = []
        return _checked(value, "", problems), problems
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}: {error.msg}"
        raise PresetError(
            str(path), [f"{where}; the file is not valid JSON. {_advice(text, error)}".rstrip()]
        ) from None
    except RecursionError:
        raise PresetError(str(path), ["cannot be read: its brackets are nested too deep"]) from None


def shown(value: Any) -> str:
    """Return a value as a person should see it again: in JSON, and short."""
    if isinstance(value, Endless):
        return f"{value.digits[:12]}... ({len(value.digits.lstrip('-')):,} digits)"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(path: Path) -> str:
    """Read the file's text. Raises PresetError. Nothing but a plain file is opened: a pipe or a
    device would never end."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            kind = "a folder" if stat.S_ISDIR(about.st_mode) else "no plain file"
            raise PresetError(
                str(path), [f"cannot be read: it is {kind}; move it out of {path.parent.name}/"]
            )
        if about.st_size > MOST_BYTES:
            size = f"{about.st_size:,} bytes are too many for one ({MOST_BYTES:,} at most)"
            raise PresetError(str(path), [f"cannot be read: {size}"])
        content = path.read_bytes()
        return content.decode(BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PresetError(
            str(path), [f"cannot be read: line {line} is no UTF-8 text; save the file as UTF-8"]
        ) from None
    except (OSError, ValueError) as error:
        why = (
            f"it is a link to {os.readlink(path)}, which is not there"
            if path.is_symlink()
            else getattr(error, "strerror", error)
        )
        raise PresetError(str(path), [f"cannot be read: {why}"]) from None


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= MOST_DIGITS else Endless(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) == len(keys):
        return dict(pairs)
    repeating = _Repeating(pairs)
    repeating.twice = sorted({key for key in keys if keys.count(key) > 1})
    return repeating


def _checked(value: Any, path: str, problems: list[str]) -> Any:
    """Return the value with "?" for what no text can hold; add each such place, and each key that
    stands twice, to the problems."""
    if isinstance(value, str):
        if UNREADABLE.search(value):
            problems.append(
                f"{path or 'the preset'}  {shown(value)}: holds NUL or half a character; take it "
                "out"
            )
        return UNREADABLE.sub("?", value)
    if isinstance(value, list):
        return [_checked(item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    under = f"{path}." if path else ""
    for key in getattr(value, "twice", []):
        problems.append(
            f'{under}{UNREADABLE.sub("?", key)}  the key "{key}" stands twice in one object; keep '
            "one of them"
        )
    return {
        UNREADABLE.sub("?", key): _checked(each, f"{under}{key}", problems)
        for key, each in value.items()
    }


def _advice(text: str, error: json.JSONDecodeError) -> str:
    """Guess what a person meant at the place where reading stopped."""
    before, here = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if not text.strip():
        return "It is empty."
    if here.startswith(("//", "/*", "#")):
        return "JSON has no comments: take this one out."
    if (before.endswith(",") and here[:1] in ("}", "]")) or re.match(r",\s*[}\]]", here):
        return "Take out the comma before the closing bracket."
    if here[:1] in "'‘’“”„`" and here:
        return 'Text stands in straight double quotes: "like this".'
    if "escape" in error.msg:
        return "In a text, write \\\\ for a backslash; in a path, / does as well."
    if "control character" in error.msg:
        return "In a text, write \\n for a new line and \\t for a tab."
    if "Unterminated" in error.msg:
        return 'A closing " is missing.'
    if re.match(r"[-+.\d]", here) and "delimiter" not in error.msg:
        return "A number is written like 3, -3, 0.5 or 1e-4."
    if here.startswith("_") and before[-1:].isdigit():
        return "A number has no _ in it."
    if re.match(r"[A-Za-z_]", here):
        return (
            "true, false and null are written so; any other word stands in double quotes: "
            '"like this".'
        )
    if "Extra data" in error.msg:
        return "Something stands behind the closing bracket."
    if not here:
        return "A closing bracket is missing at its end."
    return "A comma is missing here." if "',' delimiter" in error.msg else ""
