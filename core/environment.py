"""Keys to other people's services: taken from the environment or from `.env`, and kept out of
everything that is written.

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
"""All that is taken from `.env`: no file decides about the rest of a process."""

_LINE = re.compile(
    r"""\s*(?:export\s+)?(?P<key>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*
        (?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>(?:[^\s'"\#][^\s]*)?))\s*(?:(?<=\s)\#.*|(?<=['"=])\#.*)?""",
    re.VERBOSE,
)
# not a name inside a path
_HUB_TOKEN = re.compile(r"(?<![\w/-])hf_(?:oauth_|jwt_|app_)?[A-Za-z0-9]{8,}[\w.-]*")


def read_dotenv(path: Path) -> list[str]:
    """Puts the keys of a `.env` that the environment lacks into it. Returns what a person should
    know: never a line's content."""
    if not os.path.lexists(path) or path.is_dir():  # a folder of this name is a virtual environment
        return []
    try:
        lines = read_text(path, "utf-8-sig").split("\n")
    except UnicodeDecodeError:
        return [f"{path} is no UTF-8 text; save it as UTF-8. The keys in it are not used"]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror}); the keys in it are not used"]
    found, malformed = {}, []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if (match := _LINE.fullmatch(line)) is None or not line.replace("\t", " ").rstrip(
            "\r"
        ).isprintable():
            malformed.append(str(number))
        else:
            found[match["key"]] = match["single"] or match["double"] or match["bare"] or ""
    for key in SECRETS:
        if found.get(key):
            os.environ.setdefault(key, found[key])
    which = (
        f"line {malformed[0]} is" if len(malformed) == 1 else f"lines {', '.join(malformed)} are"
    )
    return [f"{path}: {which} passed over; a line is KEY=VALUE"] if malformed else []


def redacted(text: str) -> str:
    """The text without the keys in the environment, and without whatever looks like a token of the
    Hub."""
    for key in SECRETS:
        # less than that is none, and part of many words
        if len(secret := os.environ.get(key, "").strip()) > 5:
            text = text.replace(secret, f"<{key}>")
    return _HUB_TOKEN.sub("<HF_TOKEN>", text)
