"""Conversations: rows of local files, or of a dataset on the Hub.

In:    a column of messages: [{"role": "user", "content": "..."}, ...], ShareGPT's [{"from":
       "human", "value": "..."}, ...], Gemini's [{"role": "model", "parts": [{"text": "..."}]},
       ...], or any of them as a JSON string
Out:   one document per conversation in which an assistant says something that is learned; for any
       other row, the reason
State: none of its own (files.py, hf.py)

A conversation is read whole or not at all: an answer to something that is left out is nothing to
learn."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from core.data.documents import ASSISTANT, Document, SkipRow
from core.data.sources.hf import HfSource
from core.data.sources.tables import TABLES
from core.data.sources.text import Paths, TextSource, named_by, path_name
from core.preset.settings import SourceSettings

ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    ASSISTANT: (ASSISTANT, "gpt", "model", "bot", "chatbot", "ai"),
}
"""Names of the roles in other programs, in letters of any case."""
TOOLS = (
    "tool",
    "tools",
    "tool_call",
    "tool_response",
    "function",
    "function_call",
    "function_response",
    "observation",
    "ipython",
)
CALLS = ("tool_calls", "function_call")
CONTENT = ("content", "value", "parts", "text")
"""Keys of a message that may hold its text; a table gives every message the keys of all messages,
empty where a message lacks them."""
WEIGHTS = ("weight", "train", "training")
"""Keys that say whether an assistant's message is learned: 1 or true, or 0 or false (OpenAI's,
Mistral's and Axolotl's)."""
WRAPPERS = ("messages", "conversations", "conversation")


class ChatSettings(SourceSettings):
    type: Literal["chat"] = "chat"
    """Conversations. What assistants say in them is learned, the rest is only read."""
    path: Paths | None = None
    """Files, folders or patterns, relative to the project: .jsonl .json .csv .tsv .parquet, and .gz
    .bz2 .xz .zst of any but the last. This or `dataset`."""
    dataset: str | None = Field(None, min_length=1)
    """Repository on the Hugging Face Hub, or a local dataset folder. This or `path`."""
    config: str | None = None
    """Configuration (subset) of the dataset, where it has several."""
    split: str = "train"
    """Split of the dataset."""
    messages_field: str = "messages"
    """The column that holds the messages."""
    system_field: str | None = Field(None, min_length=1)
    """A column that holds the system message of a conversation, where it is not among the
    messages."""
    name: str = ""
    """Name in logs and weights; left out, the file's, the folder's or the dataset's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return named_by(data, lambda d: path_name(d["path"]) if d.get("path") else _dataset_name(d))

    @model_validator(mode="after")
    def _one_origin(self) -> "ChatSettings":
        if (self.path is None) == (self.dataset is None):
            raise ValueError(
                'a chat source has either a "path" (local files) or a "dataset" (on the Hub); '
                "give one of them"
            )
        if self.path is not None and (self.config is not None or self.split != "train"):
            raise ValueError(
                '"config" and "split" choose from a "dataset"; local files of a "path" have none'
            )
        return self

    @property
    def columns(self) -> list[str]:
        return [
            self.messages_field,
            *([self.system_field] if self.system_field is not None else []),
        ]


class _Chat:
    """Makes conversations of the rows of a source."""

    column_hint = (
        'set "messages_field" to one of them; a question and its answer in columns of their own '
        "are text for a source "
        'of type "hf" with "fields" and "format"'
    )

    def document(self, values: tuple, key: str) -> Document:
        return conversation(values[0], key, *values[1:])


class ChatFiles(_Chat, TextSource):
    """Conversations in local files."""

    readable = TABLES


class ChatDataset(_Chat, HfSource):
    """Conversations in a dataset."""

    def nothing(self, order: list[int]) -> str:
        return f"no row of it holds a conversation in {self.columns[0]}" + "".join(
            f"; {note}" for note in self.notes
        )


def chat_source(settings: ChatSettings, root: Path, seed: int) -> ChatFiles | ChatDataset:
    """Build the source for the section's origin: local files, or a dataset."""
    if settings.dataset is None:
        return ChatFiles(settings, root, seed)
    return ChatDataset(settings, root, seed)


def conversation(value: Any, key: str, system: Any = None) -> Document:
    """Make the document of one row. Raises SkipRow where it is no conversation, or has nothing to
    learn.

    system   the system message from a column of its own; None or blank: none
    """
    if not isinstance(system, str | None):
        raise SkipRow("its system message is no text")
    first = [{"role": "system", "content": system}] if system and system.strip() else []
    messages: list[tuple[str, str]] = []
    read_only: list[int] = []
    any_answer = any_learned = False
    for number, message in enumerate([*first, *_messages(value)]):
        role, content = _role(message), _content(message)
        messages.append((role, content))
        if role == ASSISTANT:
            is_learned = _is_learned(message)
            if not is_learned:
                read_only.append(number)
            any_answer |= bool(content.strip())
            any_learned |= bool(content.strip()) and is_learned
    if not any_answer:
        raise SkipRow("no assistant says anything in it")
    if not any_learned:
        raise SkipRow("all that the assistant says has weight 0")
    text = "\n".join(content for _, content in messages)
    return Document(text, key, tuple(messages), read_only=tuple(read_only))


def _messages(value: Any) -> list[dict]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise SkipRow("it is text, not a list of messages") from None
    if isinstance(value, dict):
        value = next((value[name] for name in WRAPPERS if name in value), value)
    if value is None or value == []:
        raise SkipRow("it has no messages")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise SkipRow("it is no list of messages with a role and a content each")
    return value


def _role(message: dict) -> str:
    name = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    if not isinstance(name, str):
        raise SkipRow("a message has no role")
    name = name.strip().lower()
    if name in TOOLS or any(message.get(key) for key in CALLS):
        raise SkipRow("an assistant calls tools in it, which are not read")
    role = next((role for role, names in ROLE_NAMES.items() if name in names), None)
    if role is None:
        raise SkipRow(
            f"a message has a role that is none of {', '.join(ROLE_NAMES)}, nor another name for "
            "one"
        )
    return role


def _content(message: dict) -> str:
    content = next((message[key] for key in CONTENT if message.get(key) is not None), None)
    if content is None:
        raise SkipRow("a message has no content (null)")
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise SkipRow("a message holds something else than text, such as an image")
        texts.append(text)
    return "".join(texts)


def _is_learned(message: dict) -> bool:
    """Return whether an assistant's message is learned."""
    weights = [message[key] for key in WEIGHTS if message.get(key) is not None]
    if not all(isinstance(weight, int | float) and weight in (0, 1) for weight in weights):
        raise SkipRow("a message has a weight that is neither 0 nor 1")
    return all(weights)


def _dataset_name(data: dict) -> str:
    return "-".join(str(data[key]) for key in ("dataset", "config") if data.get(key)).lstrip("./")
