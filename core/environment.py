"""Keys to other services: taken from the environment or from `.env`, and kept out of everything
that is written.

In:    the process environment; the file .env beside main.py, lines of KEY=VALUE
Out:   HF_TOKEN and WANDB_API_KEY in the environment, where the libraries look for them; texts
       without them
State: the process environment
"""

import os
import re
from pathlib import Path

from core.files import read_text

SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
"""The only keys that are taken from `.env`: a file must not decide about the rest of a process."""

_LINE = re.compile(
    r"""\s*(?:export\s+)?(?P<key>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*
        (?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>(?:[^\s'"\#][^\s]*)?))\s*(?:(?<=\s)\#.*|(?<=['"=])\#.*)?""",
    re.VERBOSE,
)
# not a name inside a path
_HUB_TOKEN = re.compile(r"(?<![\w/-])hf_(?:oauth_|jwt_|app_)?[A-Za-z0-9]{8,}[\w.-]*")


def read_dotenv(path: Path) -> list[str]:
    """Put the keys of a `.env` that the environment lacks into it. Returns notes for a person; they
    never hold a line's content."""
    if not os.path.lexists(path) or path.is_dir():  # a folder of this name is a virtual environment
        return []
    try:
        lines = read_text(path, "utf-8-sig").split("\n")
    except UnicodeDecodeError:
        return [f"{path} is no UTF-8 text; save it as UTF-8. The keys in it are not used"]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror}); the keys in it are not used"]
    values: dict[str, str] = {}
    malformed: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or not line.replace("\t", " ").rstrip("\r").isprintable():
            malformed.append(str(number))
        else:
            values[match["key"]] = match["single"] or match["double"] or match["bare"] or ""
    for key in SECRETS:
        if values.get(key):
            os.environ.setdefault(key, values[key])
    if not malformed:
        return []
    which = (
        f"line {malformed[0]} is" if len(malformed) == 1 else f"lines {', '.join(malformed)} are"
    )
    return [f"{path}: {which} passed over; a line is KEY=VALUE"]


def redacted(text: str) -> str:
    """Return the text without the keys in the environment, and without anything that looks like a
    token of the Hub."""
    for key in SECRETS:
        # a shorter text is no key, and part of many words
        if len(secret := os.environ.get(key, "").strip()) > 5:
            text = text.replace(secret, f"<{key}>")
    return _HUB_TOKEN.sub("<HF_TOKEN>", text)
