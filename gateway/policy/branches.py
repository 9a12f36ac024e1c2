"""
Branches of a schema: what is left of it once references are followed and choices multiplied out.

A branch has plain keywords alone, with ``types``, ``values`` and ``closed`` for `type`, `enum` or
`const`, and `additionalProperties`.  `read_plain` makes one of a schema, `merge` one of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import orjson

from gateway.policy import pattern
from gateway.wire.errors import invalid

Json = Any

Branch = dict[str, Json]

#: The most items or characters that a bound may ask for.
_MOST: Final = 64_000

_TYPE_OF: Final = {
    dict: "object",
    list: "array",
    str: "string",
    int: "integer",
    bool: "boolean",
    type(None): "null",
}
TYPES: Final = ("object", "array", "string", "integer", "number", "boolean", "null")

#: Keywords that no grammar holds.
_NOT_HERE: Final = frozenset(
    {
        "not", "if", "then", "else", "contains", "minContains", "maxContains", "prefixItems",
        "patternProperties", "propertyNames", "minProperties", "maxProperties",
        "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems",
        "$dynamicRef", "$recursiveRef",
    }
)  # fmt: skip

#: Keywords that lead to other schemas in the place of this one.
ELSEWHERE: Final = ("$ref", "allOf", "anyOf", "oneOf")

#: Keywords by which a type is meant where none is said.
_MEANT: Final = {
    "object": ("properties", "required", "closed"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def kinds_of(branch: Branch) -> list[str]:
    """The types of values that may fit a branch."""
    if "types" in branch:
        types = branch["types"] - ({"integer"} if "number" in branch["types"] else set())
        return [kind for kind in TYPES if kind in types]
    if "values" in branch:
        return list(dict.fromkeys(_type_of(value) for value in branch["values"]))
    meant = [kind for kind, names in _MEANT.items() if any(name in branch for name in names)]
    return meant or ["string", "number", "boolean", "null"]


def _type_of(value: Json) -> str:
    """The narrowest type of JSON Schema that a value has."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return _TYPE_OF[type(value)]


# --- plain keywords ---------------------------------------------------------------------------


def read_plain(schema: Mapping[str, Json], path: str) -> Branch | None:
    """The keywords of `schema` itself; None where they exclude each other."""
    found: Branch = {}
    for name, value in schema.items():
        if name in ELSEWHERE:
            continue
        if name in _NOT_HERE:
            raise invalid(f"{path}: {name} is not supported here")
        reading = _PLAIN.get(name, _note)  # a word that JSON Schema does not know is a note
        for key, said in reading(value, path).items():
            found[key] = _MERGED[key](found[key], said, path) if key in found else said
    return _possible(found)


def _types(value: Json, _: str) -> Branch:
    return {"types": {value} if isinstance(value, str) else set(value)}


def _listed(value: Json, _: str) -> Branch:
    return {"values": value}


def _const(value: Json, _: str) -> Branch:
    return {"values": [value]}


def _additional(value: Json, path: str) -> Branch:
    if value is False:
        return {"closed": True}
    if value is True or not value:
        return {"open": True}
    raise invalid(
        f"{path}: additionalProperties with a schema is not supported; a list of objects with a"
        " name and a value says the same"
    )


def _bound(name: str, value: float, path: str) -> Branch:
    if name.startswith("min") and name != "minimum" and value > _MOST:
        raise invalid(f"{path}: {name} is above {_MOST}")
    return {name: int(value) if name in _COUNTS else value}


def _multiple(value: float, path: str) -> Branch:
    if value != 1:
        raise invalid(f"{path}: multipleOf is not supported here")
    return {"types": {*TYPES} - {"number"}}


def _unique(value: Json, path: str) -> Branch:
    if value:
        raise invalid(f"{path}: uniqueItems is not supported here")
    return {}


def _note(_: Json, __: str) -> Branch:
    return {}


def _as_it_is(name: str, value: Json, _: str) -> Branch:
    return {name: value}


def _format(value: str, _: str) -> Branch:
    return {"format": value} if value in pattern.FORMATS else {}


_COUNTS: Final = ("minItems", "maxItems", "minLength", "maxLength")
BOUNDS: Final = (*_COUNTS, "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

_PLAIN: Final[Mapping[str, Callable[[Json, str], Branch]]] = {
    "type": _types,
    "enum": _listed,
    "const": _const,
    "properties": partial(_as_it_is, "properties"),
    "required": partial(_as_it_is, "required"),
    "additionalProperties": _additional,
    "items": partial(_as_it_is, "items"),
    "pattern": partial(_as_it_is, "pattern"),
    "format": _format,
    "multipleOf": _multiple,
    "uniqueItems": _unique,
    "unevaluatedProperties": _additional,
    **{name: partial(_bound, name) for name in BOUNDS},
}


# --- two at once ------------------------------------------------------------------------------


def merge(one: Branch, other: Branch, path: str) -> Branch | None:
    """The branch of what fits both; None where nothing does."""
    merged = {**one, **other}
    for name in one.keys() & other.keys():
        merged[name] = _MERGED[name](one[name], other[name], path)
    if "properties" in merged or "closed" in merged:
        merged["properties"] = _members(one, other)
    return _possible(merged)


def _possible(branch: Branch) -> Branch | None:
    """`branch` without listed values of other types; None where its keywords exclude each other."""
    if "types" in branch and "values" in branch:
        types = branch["types"] | ({"integer"} if "number" in branch["types"] else set())
        branch["values"] = [value for value in branch["values"] if _type_of(value) in types]
    return None if branch.get("types") == set() or branch.get("values") == [] else branch


def _members(one: Branch, other: Branch) -> dict[str, Json]:
    mine, others = one.get("properties", {}), other.get("properties", {})
    found = {}
    for name in dict.fromkeys([*mine, *others]):
        if name in mine and name in others:
            found[name] = {"allOf": [mine[name], others[name]]}
        elif not (other if name in mine else one).get("closed"):
            found[name] = mine[name] if name in mine else others[name]
    return found


def needs_more(one: Branch, other: Branch) -> bool:
    """Whether no object held to `other` has all that `one` requires, or allows."""
    names = other.get("properties", {})
    if any(name not in names for name in one.get("required", ())):
        return True
    mine = one.get("properties", {})
    return bool(one.get("closed")) and any(name not in mine for name in other.get("required", ()))


def _same_types(one: set[str], other: set[str], _: str) -> set[str]:
    found = one & other
    for first, second in ((one, other), (other, one)):
        if "integer" in first and "number" in second and "number" not in first:
            found |= {"integer"}
    return found


def _same_values(one: list[Json], other: list[Json], _: str) -> list[Json]:
    known = {_canonical(value) for value in other}
    return [value for value in one if _canonical(value) in known]


def _canonical(value: Json) -> bytes:
    """The same for values that JSON Schema holds to be equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value).encode()
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _equal(name: str) -> Callable[[Json, Json, str], Json]:
    def merge(one: Json, other: Json, path: str) -> Json:
        if one != other:
            raise invalid(f"{path}: two of {name} at once are not supported")
        return one

    return merge


def _most(one: Json, other: Json, _: str) -> Json:
    return max(one, other)


def _least(one: Json, other: Json, _: str) -> Json:
    return min(one, other)


def _all_of(one: Json, other: Json, _: str) -> Json:
    return {"allOf": [one, other]}


def _names(one: Sequence[str], other: Sequence[str], _: str) -> list[str]:
    return list(dict.fromkeys([*one, *other]))


def _later(_: Json, other: Json, __: str) -> Json:
    return other


_MERGED: Final[Mapping[str, Callable[[Json, Json, str], Json]]] = {
    "types": _same_types,
    "values": _same_values,
    "properties": _later,  # `_members` knows both sides
    "closed": _later,
    "open": _later,
    "required": _names,
    "items": _all_of,
    "pattern": _equal("pattern"),
    "format": _equal("format"),
    **{name: _most if name.lower().find("min") >= 0 else _least for name in BOUNDS},
}
