"""
A schema whose answers end, for a server that holds schemas and not our grammars.

It is the client's own; only texts and lists without an end get one, of the size that
`gateway.policy.grammar` gives them.  What fits it fits the client's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.policy.shapes import ENDLESS, portions

Json = Any

#: Keywords that hold schemas by name, and in a list.
_BY_NAME: Final = ("properties", "$defs", "definitions")
_LISTED: Final = ("anyOf", "allOf", "oneOf")

#: What ends a text by itself; servers differ in what they make of a length beside it.
_ENDS: Final = ("pattern", "format", "enum", "const")


def bounded(schema: Json, room: int) -> Json:
    """
    `schema`, its texts and lists sized for answers of about so many characters.

    Args:
        schema: one that `gateway.policy.schema.read` took.
        room: characters of an answer; one of many texts may have more.
    """
    items, characters = portions(room, 1, ENDLESS)
    bounds = {
        "string": ("minLength", "maxLength", characters),
        "array": ("minItems", "maxItems", items),
    }

    def bound(schema: Json) -> Json:
        if not isinstance(schema, Mapping):
            return schema
        found = dict(schema)
        for name in _BY_NAME:
            if name in found:
                found[name] = {key: bound(each) for key, each in found[name].items()}
        for name in _LISTED:
            if name in found:
                found[name] = [bound(each) for each in found[name]]
        if "items" in found:
            found["items"] = bound(found["items"])
        said = found.get("type", ())
        if not any(name in found for name in _ENDS):
            for kind in (said,) if isinstance(said, str) else said:
                if kind in bounds:
                    least, most, size = bounds[kind]
                    found[most] = min(found.get(most, ENDLESS), max(found.get(least, 0), size))
        return found

    return bound(schema)
