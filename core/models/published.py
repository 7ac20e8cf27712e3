"""The files of published weights, by the `name` that a preset gives, and which tokenizer they were
trained with.

In:    a repository of the Hub, or a folder, relative to the project, which begins with ".", "/" or
       "~"
Out:   paths of files; the tokenizer to write, and a refusal of one that cannot be it
State: the Hub library's local cache
"""

from pathlib import Path
from typing import Any

from core.errors import SourceUnavailable, UserError
from core.files import own_path
from core.hf_hub import fetch_file

PROJECT = Path(__file__).resolve().parent.parent.parent


def folder_of(name: str) -> Path | None:
    """Return the folder where a model lies if it is not on the Hub."""
    return own_path(name, PROJECT) if name.startswith((".", "/", "~")) else None


def place_of(name: str) -> str:
    return str(folder_of(name) or "the Hugging Face Hub")


def tokenizer_hint(name: str) -> str:
    """The line of a preset that names the model's own tokenizer."""
    if folder_of(name) is None:
        return f'"tokenizer": "{name}"'
    return f'"tokenizer": {{"type": "file", "path": "{name.rstrip("/")}/tokenizer.json"}}'


def refuse_new_tokenizer(name: str, tokenizer: Any, otherwise: str) -> None:
    """Raises UserError if a preset's tokenizer section cannot be the one that the published weights
    were trained with.

    otherwise   how the preset asks for random weights
    """
    if tokenizer.type in ("bpe", "byte"):
        raise UserError(
            f'the weights of "{name}" mean the tokens of their own tokenizer, and the preset\'s '
            "is a new one, "
            f'"{tokenizer.type}". Write {tokenizer_hint(name)}, or in `model` {otherwise}: random '
            "weights."
        )


def find_file(name: str, file: str, advice: str) -> Path:
    """A file of a published model, from its folder or the Hub. Raises UserError.

    advice   what to do where it cannot be had
    """
    folder = folder_of(name)
    if folder is not None and (folder / file).is_file():
        return folder / file
    try:
        if folder is not None:
            raise SourceUnavailable(f"there is no {folder / file}")
        return fetch_file(name, file)
    except SourceUnavailable as error:
        raise UserError(
            f'{file} of model "{name}" could not be loaded from {place_of(name)}: {error}\n{advice}'
        ) from None
