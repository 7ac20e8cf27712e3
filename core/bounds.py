"""Bounds of every number in a preset, where a field says nothing narrower: finite, and no larger
than what computes with it can take.

In:    the schema that pydantic makes of a class
Out:   Bounded, the base of every section and of the pieces of schedules: a new field cannot forget
       its bounds
State: none
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

LARGEST_WHOLE = 2**53 - 1
"""The largest whole number that every reader of JSON keeps exactly."""
LARGEST = 1e30
"""Far from any real setting, and a hundred million times it is still finite in fp32."""
BOUNDS: dict[str, dict[str, float]] = {
    "int": {"ge": -LARGEST_WHOLE, "le": LARGEST_WHOLE},
    "float": {"ge": -LARGEST, "le": LARGEST},
}
"""By pydantic's name of a type."""
SAME_SIDE = {"ge": "gt", "le": "lt"}


def _set_bounds(node: Any) -> None:
    """Give every number in a schema the bounds it lacks."""
    if isinstance(node, list | tuple):
        for item in node:
            _set_bounds(item)
    elif isinstance(node, dict):
        for key, bound in BOUNDS.get(str(node.get("type")), {}).items():
            if SAME_SIDE[key] not in node:
                node.setdefault(key, bound)
        for key, value in node.items():
            if key not in ("default", "metadata"):
                _set_bounds(value)


class Bounded(BaseModel):
    """A pydantic class whose numbers have bounds."""

    model_config = ConfigDict(allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        schema = handler(source)
        _set_bounds(schema)
        return schema
