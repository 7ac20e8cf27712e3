"""Conversations: rows of local files, or of a dataset on the Hub.

In:    a column of messages: [{"role": "user", "content": "..."}, ...], ShareGPT's [{"from": "human", "value": "..."}, ...],
       or either of them as a JSON string
Out:   one document per conversation in which an assistant says something
State: none of its own (files.py, hf.py)
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from core.data.documents import ASSISTANT, ROLES, Document
from core.data.sources.hf import HfSource
from core.data.sources.tables import TABLES
from core.data.sources.text import TextSource, named_by, path_name
from core.settings import Settings

SHAREGPT = {"human": "user", "gpt": ASSISTANT}
"""Other names for roles."""


class ChatSettings(Settings):
    type: Literal["chat"] = "chat"
    """Conversations. What assistants say in them is learned, the rest is only read."""
    path: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Files, folders or patterns, relative to the project: .jsonl .json .csv .tsv .parquet, and .gz .bz2 .xz .zst of any but the
    last. This or `dataset`."""
    dataset: str | None = Field(None, min_length=1)
    """Repository on the Hugging Face Hub, or a local dataset folder. This or `path`."""
    config: str | None = None
    """Configuration (subset) of the dataset, where it has several."""
    split: str = "train"
    """Split of the dataset."""
    messages_field: str = "messages"
    """The column that holds the messages."""
    name: str = ""
    """Name in logs and weights; left out, the file's, the folder's or the dataset's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return named_by(data, lambda d: path_name(d["path"]) if d.get("path") else _dataset_name(d))

    @model_validator(mode="after")
    def _one_origin(self) -> "ChatSettings":
        if (self.path is None) == (self.dataset is None):
            raise ValueError('a chat source has either a "path" (local files) or a "dataset" (on the Hub); give one of them')
        if self.path is not None and (self.config is not None or self.split != "train"):
            raise ValueError('"config" and "split" choose from a "dataset"; local files of a "path" have none')
        return self

    @property
    def columns(self) -> list[str]:
        return [self.messages_field]


class _Chat:
    """What makes a source of rows one of conversations."""

    column_hint = 'set "messages_field" to one of them'

    def document(self, values: tuple, key: str) -> Document | None:
        return conversation(values[0], key)


class ChatFiles(_Chat, TextSource):
    """Conversations in local files."""

    readable = TABLES


class ChatDataset(_Chat, HfSource):
    """Conversations in a dataset."""

    def nothing(self, order: list[int]) -> str:
        return f"no row of it holds a conversation in {self.columns[0]}"


def chat_source(settings: ChatSettings, root: Path, seed: int) -> ChatFiles | ChatDataset:
    return (ChatFiles if settings.dataset is None else ChatDataset)(settings, root, seed)


def conversation(value: Any, key: str) -> Document | None:
    """The document of one row; None when it is no conversation, or one without anything to learn."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list):
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        # a table gives every message all columns, so the keys of the other form may be there, empty
        role, content = message.get("role"), message.get("content")
        if role is None:
            role, content = message.get("from"), message.get("value")
        if not isinstance(role, str):
            return None
        role = SHAREGPT.get(role, role)
        if role not in ROLES:  # calls of tools and the like: what they hold need not even be text
            continue
        if not isinstance(content, str):
            return None
        messages.append((role, content))
    if not any(role == ASSISTANT and content.strip() for role, content in messages):
        return None
    return Document("\n".join(content for _, content in messages), key, messages=tuple(messages))


def _dataset_name(data: dict) -> str:
    return "-".join(str(data[key]) for key in ("dataset", "config") if data.get(key)).lstrip("./")
