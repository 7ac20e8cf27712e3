"""A JSON Schema validator that knows the words of draft 2020-12 that our schema uses, and no
others."""

import re
from collections.abc import Iterator
from typing import Any

KNOWN = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "type", "const", "enum"),
    *("properties", "required", "additionalProperties", "items", "prefixItems", "anyOf"),
    *("if", "then", "not", "pattern", "minLength", "minItems", "maxItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def problems(value: Any, schema: Any, root: Any = None, where: str = "$") -> list[str]:
    """Everything that a validator would find wrong with a value; `root` has the definitions."""
    root = schema if root is None else root
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        return problems(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, where)
    if "type" in schema and not is_of_type(value, schema["type"]):
        return [f"{where} is no {schema['type']}"]
    found = list(of_value(value, schema, where))
    if isinstance(value, list):
        found += of_list(value, schema, root, where)
    if isinstance(value, dict):
        found += of_object(value, schema, root, where)
    options = schema.get("anyOf")
    if options and all(problems(value, option, root, where) for option in options):
        found.append(f"{where} fits none of the kinds")
    if "not" in schema and not problems(value, schema["not"], root, where):
        found.append(f"{where} is what it must not be")
    if "if" in schema and not problems(value, schema["if"], root, where):
        found += problems(value, schema["then"], root, where)
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_of_type(value: Any, kind: str) -> bool:
    return {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": is_number(value),
        "integer": is_number(value) and float(value).is_integer(),
    }[kind]


def of_value(value: Any, schema: Any, where: str) -> Iterator[str]:
    """What is wrong with a value by itself."""
    if schema.get("const", value) != value:
        yield f"{where} is not {schema['const']}"
    if value not in schema.get("enum", [value]):
        yield f"{where} is none of {schema['enum']}"
    if is_number(value):
        within = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        within &= "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]
        within &= "exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"]
        if not within:
            yield f"{where} is out of range"
    if isinstance(value, str):
        long_enough = len(value) >= schema.get("minLength", 0)
        if not (long_enough and re.search(schema.get("pattern", ""), value)):
            yield f"{where} does not fit"


def of_list(value: list, schema: Any, root: Any, where: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{where} has {len(value)} items"
    items = [*schema.get("prefixItems", []), *[schema.get("items", {})] * len(value)]
    for i, (item, each) in enumerate(zip(value, items)):
        yield from problems(item, each, root, f"{where}[{i}]")


def of_object(value: dict, schema: Any, root: Any, where: str) -> Iterator[str]:
    for key in schema.get("required", []):
        if key not in value:
            yield f"{where}.{key} is missing"
    properties = schema.get("properties", {})
    closed = schema.get("additionalProperties", True) is False
    for key in value:
        if key in properties:
            yield from problems(value[key], properties[key], root, f"{where}.{key}")
        elif closed:
            yield f"{where}.{key} is unknown"
