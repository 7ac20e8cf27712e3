"""Mistakes in a preset, in words: the path, what stands there, and what would be right.

In:    an error of pydantic, what was decoded, the class it was decoded to
Out:   one line
State: none
"""

import difflib
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from core.preset.json_file import shown

ELSEWHERE = {
    "weights": "source_weights",
    "batch_size": "per_gpu_batch_size",
    "lr": "learning_rate",
    "steps": "max_steps",
    "epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "gradient_accumulation_steps": "accumulation_steps",
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "block_size": "seq_length",
    "context_length": "seq_length",
    "max_seq_length": "seq_length",
    "max_new_tokens": "max_tokens",
}
"""Keys of other programs, and ours."""
BOOLEANS = {"yes": "true", "on": "true", "1": "true", "true": "true"}
BOOLEANS |= {"no": "false", "off": "false", "0": "false", "false": "false"}
"""What people write for a truth value, and JSON."""
NUMBER = r"-?(0|[1-9]\d{0,14})(\.\d{1,20})?([eE][+-]?\d\d?)?"
"""As JSON writes one, of no absurd length."""
Location = tuple[int | str, ...]
Node = dict[str, Any]
"""A part of a JSON Schema."""


def explain(error: Mapping[str, Any], data: Any, cls: type[BaseModel]) -> str:
    """Return one line: path, value, what is wrong and what would be right.

    error   one of pydantic's, of decoding `data` to `cls`
    """
    path: list[str] = []
    node, missing = data, error["type"] == "missing"
    for depth, part in enumerate(error["loc"]):  # union tags in loc are not part of the user's path
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            path[-1:] = [f"{path[-1]}[{part}]"]
            node = node[part]
        elif isinstance(node, dict) and part in node:
            path.append(str(part))
            node = node[part]
        elif missing and depth == len(error["loc"]) - 1:
            path.append(str(part))
    where = ".".join(path) or "the preset"
    if missing:
        return f"{where}  is missing; it has no default"
    if error["type"] == "extra_forbidden":
        known = _known_keys(cls, error["loc"][:-1])
        return f"{where}  unknown key; {_meant(str(error['loc'][-1]), known, cls)}"
    message = error["msg"].removeprefix("Value error, ")
    endless = isinstance(node, float) and not math.isfinite(node)
    fix = _limits(cls, error["loc"]) if endless else _fix(error["type"], node)
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", error["msg"])
        near = difflib.get_close_matches(str(node), choices, n=1)
        fix = f'; did you mean "{near[0]}"?' if near else ""
    return f"{where}  {shown(node)}: {message[0].lower() + message[1:]}{fix}"


def _meant(key: str, known: list[str], cls: type[BaseModel]) -> str:
    """Guess the key that was meant: by its name in other programs, by its letters, or by the
    section it belongs to."""
    ours = ELSEWHERE.get(key, key)
    meant = [ours] if ours in known else difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    meant = meant or [
        f"{name}.{ours}" for name in cls.model_fields if ours in _known_keys(cls, (name,))
    ]
    meant = meant or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f'did you mean "{meant[0]}"?' if meant else f"known are {', '.join(known)}"


def _fix(kind: str, value: Any) -> str:
    """Say what to write instead, where that is plain."""
    is_number = isinstance(value, str) and re.fullmatch(NUMBER, value)
    if kind in ("int_type", "float_type") and is_number:
        whole = kind == "int_type" and float(value).is_integer()
        return f"; write {int(float(value)) if whole else value}, without quotes"
    if kind == "bool_type" and str(value).lower() in BOOLEANS:
        quoted = ", without quotes" if isinstance(value, str) else ""
        return f"; write {BOOLEANS[str(value).lower()]}{quoted}"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "list_type" and isinstance(value, str | dict):
        return f"; write [{shown(value)}]"
    return ""


def _known_keys(cls: type[BaseModel], loc: Location) -> list[str]:
    """Return the keys allowed where an unknown one was found."""
    return sorted({key for node in _schema_at(cls, loc) for key in node.get("properties", {})})


def _limits(cls: type[BaseModel], loc: Location) -> str:
    """Say between which numbers the value at a place has to be."""
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    nodes = [node for node in _schema_at(cls, loc) if node.get("type") in ("integer", "number")]
    if not nodes:
        return ""
    limits = [f"{word} {nodes[0][key]:,}" for key, word in words.items() if key in nodes[0]]
    return f", {' and '.join(limits)}" if limits else ""


def _schema_at(cls: type[BaseModel], loc: Location) -> list[Node]:
    """Return what the JSON Schema says of a place: one node for each kind that may stand there."""
    schema = _schema_of(cls)
    nodes = [schema]
    for part in loc:
        inner = [each for node in _resolved(nodes, schema) for each in _step_into(node, part)]
        nodes = inner or nodes
    return _resolved(nodes, schema)


def _step_into(node: Node, part: int | str) -> list[Node]:
    """Return the nodes at a key or an index of a node."""
    if isinstance(part, int):
        items = node.get("prefixItems", [])[part : part + 1]
        return [node["items"]] if "items" in node else items
    properties = node.get("properties", {})
    if part in properties:
        return [properties[part]]
    # a union tag: keep the members of that type
    return [node] if properties.get("type", {}).get("const") in (part, None) else []


@functools.cache
def _schema_of(cls: type[BaseModel]) -> Node:
    return cls.model_json_schema(by_alias=True)


def _resolved(nodes: list[Node], schema: Node) -> list[Node]:
    """Return the nodes with `$ref` followed and unions opened."""
    out: list[Node] = []
    for node in nodes:
        if "$ref" in node:
            out += _resolved([schema["$defs"][node["$ref"].rsplit("/", 1)[1]]], schema)
        elif "oneOf" in node or "anyOf" in node:
            out += _resolved(node.get("oneOf", []) + node.get("anyOf", []), schema)
        else:
            out.append(node)
    return out
