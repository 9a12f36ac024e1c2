"""
The schema of an answer, read.

What structured outputs support is taken (docs/protocol.md, "Schemas"), and so is what a grammar can
hold beyond that: bounds of numbers, texts and lists.  Everything else is refused by name: a model
that is not held to a keyword would break it sooner or later.

1. References are followed, and ``anyOf``, ``oneOf`` and ``allOf`` multiplied out, until there are
   branches of plain keywords; branches that nothing fits are dropped.
2. Each branch becomes a shape for each type that it allows.
3. Objects are closed: an answer has no other members than those that the schema names.  Only one
   that is the whole answer, names none and allows others has what the model likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cache, partial
from itertools import combinations
from typing import Any, Final

import attrs
import orjson
from jsonschema import Draft202012Validator, FormatChecker, validators
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry

from gateway.policy import pattern
from gateway.policy.shapes import (
    ENDLESS,
    AnyObject,
    List,
    Matching,
    Member,
    Number,
    Object,
    Shape,
    Text,
    Values,
    either,
)
from gateway.wire.errors import ApiError, invalid

Json = Any

#: Steps that reading a schema may take, since branches multiply; pairs of branches that it is
#: looked at whether they are apart.  Nobody else is served meanwhile.
_STEPS: Final = 20_000
_PAIRS: Final = 200_000

#: Objects, and values of any kind, that a schema may have; characters of all its patterns.
_OBJECTS: Final = 2_000
_VALUES: Final = 20_000
_CHARACTERS: Final = 10_000

#: The largest whole number that every JSON reader takes (RFC 8259, section 6); the largest other.
_LARGEST: Final = 2**53 - 1
_LARGEST_FRACTION: Final = 10**15

#: Larger than both.
_BEYOND: Final = 10**16

#: The most items or characters that a bound may ask for.
_MOST: Final = 64_000

_WHERE: Final = "output_config.format.schema"

_TYPE_OF: Final = {
    dict: "object",
    list: "array",
    str: "string",
    int: "integer",
    bool: "boolean",
    type(None): "null",
}
_TYPES: Final = ("object", "array", "string", "integer", "number", "boolean", "null")

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
_ELSEWHERE: Final = ("$ref", "allOf", "anyOf", "oneOf")

#: Keywords that have schemas by name.
_HOLD_MANY: Final = ("$defs", "definitions", "properties")

#: Keywords by which a type is meant where none is said.
_MEANT: Final = {
    "object": ("properties", "required", "closed"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}

#: A branch: plain keywords, with ``types``, ``values`` and ``closed`` for `type`, `enum` or
#: `const`, and `additionalProperties`.
_Branch = dict[str, Json]


@attrs.frozen
class Form:
    """
    A schema that answers can be held to.

    Attributes:
        shape: what they look like.
        is_exact: whether `fits` knows all of it.  A pattern is held by the grammar alone: to look
            for a stranger's pattern in a text can take for ever.
    """

    shape: Shape
    is_exact: bool
    _validator: Any

    @property
    def schema(self) -> Mapping[str, Json]:
        """As the client said it."""
        return self._validator.schema  # type: ignore[no-any-return]  # it keeps what it was given

    def fits(self, text: str) -> bool:
        """Whether `text` is JSON that fits, patterns aside."""
        try:
            self._validator.validate(orjson.loads(text))
        except (ValueError, ValidationError):
            return False
        return True


def _nothing(*_: object) -> None:
    """Holds of every value."""


_NO_FORMATS: Final = FormatChecker(())
_Validator: Final = validators.extend(Draft202012Validator, {"pattern": _nothing})


def read(schema: Mapping[str, Json]) -> Form:
    """
    The form of the answers that fit `schema`.

    Raises:
        ApiError: 400, it is no schema, or answers cannot be held to it; with the place.
    """
    if not _is_of_use(schema):
        raise _too_large()
    try:
        # Not its formats: Python's reading of a pattern is not what counts here.
        Draft202012Validator.check_schema(schema, format_checker=_NO_FORMATS)
        if _is_recursive(schema):
            raise invalid(f"{_WHERE}: recursive schemas are not supported")
        reading = _Reading(schema)
        shape = reading.shape(schema, _WHERE)
    except SchemaError as error:
        raise invalid(f"{_WHERE}: {error.message[:200]}") from None
    except RecursionError:
        raise _too_large() from None
    # Without a registry of its own it would fetch what a schema refers to.
    return Form(shape, not reading.has_pattern, _Validator(schema, registry=Registry()))


def _too_large() -> ApiError:
    return invalid(f"{_WHERE}: the schema is too large or nested too deep")


def _is_of_use(schema: Json) -> bool:
    """Whether a schema is small enough to be read while others wait."""
    objects, values, characters = 0, 0, 0
    left = [schema]
    while left:
        each = left.pop()
        values += 1
        if isinstance(each, Mapping):
            objects += 1
            wanted, types = each.get("pattern"), each.get("type")
            if isinstance(types, list) and len(types) > len(_TYPES):
                return False  # jsonschema compares each with each
            characters += len(wanted) if isinstance(wanted, str) else 0
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)
        if objects > _OBJECTS or values + len(left) > _VALUES or characters > _CHARACTERS:
            return False
    return True


# --- references -------------------------------------------------------------------------------


def _resolve(root: Mapping[str, Json], reference: Json) -> Json:
    """The schema at a JSON pointer; where no schema has to be, nobody has looked at what is."""
    found: Json = root
    start, *steps = str(reference).split("/")
    above = ""
    try:
        for step in steps:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found, above = found[int(key)], ""
            elif above in _HOLD_MANY:
                found, above = found[key], ""
            else:
                found, above = found[key], key
                if key not in (*_HOLD_MANY, *_ELSEWHERE, "items"):
                    start = ""
        if above in _HOLD_MANY:
            start = ""
    except (KeyError, IndexError, TypeError, ValueError):
        start = ""
    if start != "#" or not isinstance(found, Mapping | bool):
        raise invalid(f"{_WHERE}: $ref {str(reference)[:80]!r} leads nowhere")
    return found


def _references(schema: Json) -> Iterator[str]:
    """The references anywhere in `schema`."""
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name == "$ref" and isinstance(value, str):
                yield value
            elif name not in ("$defs", "definitions"):
                yield from _references(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from _references(each)


def _is_recursive(root: Mapping[str, Json]) -> bool:
    """Whether a reference leads back to where it stands."""
    through: set[int] = set()

    def leads_back(schema: Json, above: tuple[int, ...]) -> bool:
        # By what they lead to: one place has many names.
        for place in {id(there): there for there in map(resolve, _references(schema))}.items():
            number, there = place
            if number in above:
                return True
            if number not in through:
                if leads_back(there, (*above, number)):
                    return True
                through.add(number)
        return False

    resolve = cache(partial(_resolve, root))
    return leads_back(root, (id(root),))


# --- reading ----------------------------------------------------------------------------------


@attrs.define
class _Reading:
    """One schema, on its way to a shape."""

    root: Mapping[str, Json]
    has_pattern: bool = False
    _left: int = _STEPS
    _pairs: int = _PAIRS

    def shape(self, schema: Json, path: str) -> Shape:
        branches = self.branches(schema, path)
        shapes = [
            self.of_type(kind, branch, path) for branch in branches for kind in _kinds(branch)
        ]
        found = [shape for shape in shapes if shape is not None]
        if not found:
            raise invalid(f"{path}: nothing fits this schema")
        return either(found)

    def step(self, count: int) -> None:
        """Take so many steps; raises ApiError where they are too many."""
        self._left -= count
        if self._left < 0:
            raise _too_large()

    # --- branches ---------------------------------------------------------------------------------

    def branches(self, schema: Json, path: str) -> list[_Branch]:
        """The branches of plain keywords that `schema` has; none where nothing fits it."""
        if isinstance(schema, bool):
            self.step(1)
            return [{}] if schema else []
        self.step(1 + len(schema.get("enum", ())) + len(schema.get("pattern", "")))
        plain = self.plain(schema, path)
        found = [] if plain is None else [plain]
        for key in _ELSEWHERE:
            if key not in schema:
                continue
            if key == "$ref":
                there = [self.branches(_resolve(self.root, schema[key]), path)]
            else:
                listed = enumerate(schema[key])
                there = [self.branches(each, f"{path}.{key}.{index}") for index, each in listed]
            if key == "oneOf":
                self.check_apart(there, f"{path}.{key}")
            if key in ("anyOf", "oneOf"):
                there = [[branch for branches in there for branch in branches]]
            for branches in there:
                found = self.both(found, branches, path)
        return found

    def both(self, ones: list[_Branch], others: list[_Branch], path: str) -> list[_Branch]:
        """The branches of what must fit a branch of both sides."""
        self.step(len(ones) * len(others))
        merged = (_merged(one, other, path) for one in ones for other in others)
        return [branch for branch in merged if branch is not None]

    def plain(self, schema: Mapping[str, Json], path: str) -> _Branch | None:
        """The keywords of `schema` itself; None where they exclude each other."""
        found: _Branch = {}
        for name, value in schema.items():
            if name in _ELSEWHERE:
                continue
            if name in _NOT_HERE:
                raise invalid(f"{path}: {name} is not supported here")
            reading = _PLAIN.get(name, _note)  # a word that JSON Schema does not know is a note
            for key, said in reading(value, path).items():
                found[key] = _MERGED[key](found[key], said, path) if key in found else said
        return _possible(found)

    def check_apart(self, members: Sequence[list[_Branch]], path: str) -> None:
        """Refuse a ``oneOf`` of which one answer could fit two members."""
        for ones, others in combinations(members, 2):
            self._pairs -= len(ones) * len(others)
            if self._pairs < 0:
                raise _too_large()
            for one in ones:
                for other in others:
                    if not self.are_apart(one, other, path):
                        raise invalid(
                            f"{path}: an answer could fit two of these; say anyOf, or give each a"
                            " required member that tells it apart"
                        )

    def are_apart(self, one: _Branch, other: _Branch, path: str) -> bool:
        """Whether no answer that is held to one of the branches fits the other."""
        try:
            merged = _merged(one, other, path)
        except ApiError:
            return False  # two patterns at once: nobody knows what fits both
        if merged is None or not _kinds(merged):
            return True
        if _kinds(merged) != ["object"]:
            return False
        if _needs_more(one, other) and _needs_more(other, one):
            return True
        mine, others = one.get("properties", {}), other.get("properties", {})
        for name in one.get("required", ()):
            if name in other.get("required", ()) and name in mine and name in others:
                pairs = [
                    (first, second)
                    for first in self.branches(mine[name], path)
                    for second in self.branches(others[name], path)
                ]
                if all(self.are_apart(first, second, path) for first, second in pairs):
                    return True
        return False

    # --- shapes -----------------------------------------------------------------------------------

    def of_type(self, kind: str, branch: _Branch, path: str) -> Shape | None:
        """The shape of those values of a type that fit `branch`; None where there are none."""
        if "values" in branch:
            return self.of_values(kind, branch, path)
        match kind:
            case "object":
                return self.of_object(branch, path)
            case "array":
                return self.of_list(branch, path)
            case "string":
                return self.of_text(branch, path)
            case "boolean":
                return Values(("true", "false"))
            case "null":
                return Values(("null",))
            case _:
                return _of_number(kind, branch)

    def of_values(self, kind: str, branch: _Branch, path: str) -> Shape | None:
        if "pattern" in branch or "properties" in branch or "items" in branch:
            raise invalid(f"{path}: listed values say all; leave out what else is said beside them")
        rest: dict[str, Json] = {name: branch[name] for name in _BOUNDS if name in branch}
        rest["type"] = kind
        fitting = [value for value in branch["values"] if _Validator(rest).is_valid(value)]
        texts = tuple(orjson.dumps(value).decode() for value in fitting)
        return Values(texts) if texts else None

    def of_object(self, branch: _Branch, path: str) -> Shape:
        properties, required = branch.get("properties", {}), branch.get("required", ())
        closed = branch.get("closed")
        if branch.get("open") and path == _WHERE and not (properties or required or closed):
            return AnyObject()
        if not properties and not closed:
            raise invalid(f"{path}: an object needs properties, or additionalProperties: false")
        missing = [name for name in required if name not in properties]
        if missing:
            raise invalid(f"{path}: {missing[0]!r} is required, and not among the properties")
        members = []
        for name, schema in properties.items():
            if schema is False and name not in required:
                continue
            shape = self.shape(schema, f"{path}.properties.{name}")
            members.append(Member(orjson.dumps(name).decode(), shape, name in required))
        return Object(tuple(members))

    def of_list(self, branch: _Branch, path: str) -> Shape | None:
        least, most = branch.get("minItems", 0), branch.get("maxItems", ENDLESS)
        if least > most:
            return None
        if most == 0 or (branch.get("items") is False and least == 0):
            return List(Values(("null",)), 0, 0)
        return List(self.shape(branch.get("items", True), f"{path}.items"), least, most)

    def of_text(self, branch: _Branch, path: str) -> Shape | None:
        least, most = branch.get("minLength", 0), branch.get("maxLength", ENDLESS)
        if least > most:
            return None
        form, wanted = branch.get("format"), branch.get("pattern")
        if wanted is not None and form is not None:
            raise invalid(f"{path}: a pattern beside a format is not supported; say one of them")
        if form is not None:
            piece = pattern.FORMATS[form]
        elif wanted is None:
            return Text(least, most)
        else:
            self.has_pattern = True
            try:
                piece = pattern.read(wanted)
            except pattern.NotUnderstood as error:
                raise invalid(f"{path}.pattern: {error} is not supported") from None
        if piece.shortest < least or piece.shortest > most:
            raise invalid(f"{path}: the pattern or format does not go with the length beside it")
        return Matching(piece, most)


def _of_number(kind: str, branch: _Branch) -> Shape | None:
    whole = kind == "integer"
    largest = _LARGEST if whole else _LARGEST_FRACTION
    low, high = Decimal(-largest), Decimal(largest)
    # A whole number just beyond an excluded bound; a fraction, by less than it is written with.
    step = Decimal(1) if whole else Decimal("0.000001")
    if "minimum" in branch:
        low = max(low, _decimal(branch["minimum"]))
    if "exclusiveMinimum" in branch:
        low = max(low, _beyond(min(high, _decimal(branch["exclusiveMinimum"])), step, low))
    if "maximum" in branch:
        high = min(high, _decimal(branch["maximum"]))
    if "exclusiveMaximum" in branch:
        high = min(high, -_beyond(-max(low, _decimal(branch["exclusiveMaximum"])), step, -high))
    if whole:
        low, high = Decimal(math.ceil(low)), Decimal(math.floor(high))
    return Number(low, high, whole) if low <= high else None


def _decimal(number: float) -> Decimal:
    """`number`, or the largest that matters: beyond all that is allowed any bound will do."""
    return Decimal(repr(max(-_BEYOND, min(_BEYOND, number))))


def _beyond(bound: Decimal, step: Decimal, least: Decimal) -> Decimal:
    """The first number above `bound` that is a multiple of `step`; `least` where that is above."""
    if bound < least:
        return least
    return (bound // step + (1 if bound >= 0 or not bound % step else 0)) * step


# --- plain keywords ---------------------------------------------------------------------------


def _kinds(branch: _Branch) -> list[str]:
    """The types of values that may fit a branch."""
    if "types" in branch:
        types = branch["types"] - ({"integer"} if "number" in branch["types"] else set())
        return [kind for kind in _TYPES if kind in types]
    if "values" in branch:
        return list(dict.fromkeys(_type_of(value) for value in branch["values"]))
    meant = [kind for kind, names in _MEANT.items() if any(name in branch for name in names)]
    return meant or ["string", "number", "boolean", "null"]


def _type_of(value: Json) -> str:
    """The narrowest type of JSON Schema that a value has."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return _TYPE_OF[type(value)]


def _types(value: Json, _: str) -> _Branch:
    return {"types": {value} if isinstance(value, str) else set(value)}


def _listed(value: Json, _: str) -> _Branch:
    return {"values": value}


def _const(value: Json, _: str) -> _Branch:
    return {"values": [value]}


def _additional(value: Json, path: str) -> _Branch:
    if value is False:
        return {"closed": True}
    if value is True or not value:
        return {"open": True}
    raise invalid(
        f"{path}: additionalProperties with a schema is not supported; a list of objects with a"
        " name and a value says the same"
    )


def _bound(name: str, value: float, path: str) -> _Branch:
    if name.startswith("min") and name != "minimum" and value > _MOST:
        raise invalid(f"{path}: {name} is above {_MOST}")
    return {name: int(value) if name in _COUNTS else value}


def _multiple(value: float, path: str) -> _Branch:
    if value != 1:
        raise invalid(f"{path}: multipleOf is not supported here")
    return {"types": {*_TYPES} - {"number"}}


def _unique(value: Json, path: str) -> _Branch:
    if value:
        raise invalid(f"{path}: uniqueItems is not supported here")
    return {}


def _note(_: Json, __: str) -> _Branch:
    return {}


def _as_it_is(name: str, value: Json, _: str) -> _Branch:
    return {name: value}


def _format(value: str, _: str) -> _Branch:
    return {"format": value} if value in pattern.FORMATS else {}


_COUNTS: Final = ("minItems", "maxItems", "minLength", "maxLength")
_BOUNDS: Final = (*_COUNTS, "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

_PLAIN: Final[Mapping[str, Callable[[Json, str], _Branch]]] = {
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
    **{name: partial(_bound, name) for name in _BOUNDS},
}


# --- two at once ------------------------------------------------------------------------------


def _merged(one: _Branch, other: _Branch, path: str) -> _Branch | None:
    """The branch of what fits both; None where nothing does."""
    merged = {**one, **other}
    for name in one.keys() & other.keys():
        merged[name] = _MERGED[name](one[name], other[name], path)
    if "properties" in merged or "closed" in merged:
        merged["properties"] = _members(one, other)
    return _possible(merged)


def _possible(branch: _Branch) -> _Branch | None:
    """`branch` without listed values of other types; None where its keywords exclude each other."""
    if "types" in branch and "values" in branch:
        types = branch["types"] | ({"integer"} if "number" in branch["types"] else set())
        branch["values"] = [value for value in branch["values"] if _type_of(value) in types]
    return None if branch.get("types") == set() or branch.get("values") == [] else branch


def _members(one: _Branch, other: _Branch) -> dict[str, Json]:
    mine, others = one.get("properties", {}), other.get("properties", {})
    found = {}
    for name in dict.fromkeys([*mine, *others]):
        if name in mine and name in others:
            found[name] = {"allOf": [mine[name], others[name]]}
        elif not (other if name in mine else one).get("closed"):
            found[name] = mine[name] if name in mine else others[name]
    return found


def _needs_more(one: _Branch, other: _Branch) -> bool:
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
    **{name: _most if name.lower().find("min") >= 0 else _least for name in _BOUNDS},
}
