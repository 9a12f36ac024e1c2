"""
The schema of an answer, read.

What structured outputs support is taken (docs/protocol.md, "Schemas"), and so is what a grammar can
hold beyond that: bounds of numbers, texts and lists.  Everything else is refused by name: a model
that is not held to a keyword would break it sooner or later.

1. References are followed, and ``anyOf``, ``oneOf`` and ``allOf`` multiplied out, until there are
   branches of plain keywords (`gateway.policy.branches`); branches that nothing fits are dropped.
2. Each branch becomes a shape for each type that it allows.
3. Objects are closed: an answer has no other members than those that the schema names.  Only one
   that is the whole answer, names none and allows others has what the model likes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from gateway.policy.branches import (
    BOUNDS,
    ELSEWHERE,
    TYPES,
    Branch,
    kinds_of,
    merge,
    needs_more,
    read_plain,
)
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

_WHERE: Final = "output_config.format.schema"

#: Keywords that have schemas by name.
_HOLD_MANY: Final = ("$defs", "definitions", "properties")


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
            if isinstance(types, list) and len(types) > len(TYPES):
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
                if key not in (*_HOLD_MANY, *ELSEWHERE, "items"):
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
            self.of_type(kind, branch, path) for branch in branches for kind in kinds_of(branch)
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

    def branches(self, schema: Json, path: str) -> list[Branch]:
        """The branches of plain keywords that `schema` has; none where nothing fits it."""
        if isinstance(schema, bool):
            self.step(1)
            return [{}] if schema else []
        self.step(1 + len(schema.get("enum", ())) + len(schema.get("pattern", "")))
        plain = read_plain(schema, path)
        found = [] if plain is None else [plain]
        for key in ELSEWHERE:
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

    def both(self, ones: list[Branch], others: list[Branch], path: str) -> list[Branch]:
        """The branches of what must fit a branch of both sides."""
        self.step(len(ones) * len(others))
        merged = (merge(one, other, path) for one in ones for other in others)
        return [branch for branch in merged if branch is not None]

    def check_apart(self, members: Sequence[list[Branch]], path: str) -> None:
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

    def are_apart(self, one: Branch, other: Branch, path: str) -> bool:
        """Whether no answer that is held to one of the branches fits the other."""
        try:
            merged = merge(one, other, path)
        except ApiError:
            return False  # two patterns at once: nobody knows what fits both
        if merged is None or not kinds_of(merged):
            return True
        if kinds_of(merged) != ["object"]:
            return False
        if needs_more(one, other) and needs_more(other, one):
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

    def of_type(self, kind: str, branch: Branch, path: str) -> Shape | None:
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

    def of_values(self, kind: str, branch: Branch, path: str) -> Shape | None:
        if "pattern" in branch or "properties" in branch or "items" in branch:
            raise invalid(f"{path}: listed values say all; leave out what else is said beside them")
        rest: dict[str, Json] = {name: branch[name] for name in BOUNDS if name in branch}
        rest["type"] = kind
        fitting = [value for value in branch["values"] if _Validator(rest).is_valid(value)]
        texts = tuple(orjson.dumps(value).decode() for value in fitting)
        return Values(texts) if texts else None

    def of_object(self, branch: Branch, path: str) -> Shape:
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

    def of_list(self, branch: Branch, path: str) -> Shape | None:
        least, most = branch.get("minItems", 0), branch.get("maxItems", ENDLESS)
        if least > most:
            return None
        if most == 0 or (branch.get("items") is False and least == 0):
            return List(Values(("null",)), 0, 0)
        return List(self.shape(branch.get("items", True), f"{path}.items"), least, most)

    def of_text(self, branch: Branch, path: str) -> Shape | None:
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


def _of_number(kind: str, branch: Branch) -> Shape | None:
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
