"""Schemas: what is taken, and what is refused by name."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest

from gateway.policy.schema import read
from gateway.policy.shapes import AnyObject, Either, List, Member, Number, Object, Text, Values
from gateway.wire.errors import ApiError

TITLE = {
    "type": "object",
    "properties": {"title": {"type": "string"}},
    "required": ["title"],
    "additionalProperties": False,
}


def an_object(name: str, shape: Any) -> Object:
    return Object((Member(f'"{name}"', shape, required=True),))


@pytest.mark.parametrize(
    ("schema", "shape"),
    [
        (TITLE, an_object("title", Text())),
        ({"type": ["string", "null"]}, Either((Text(), Values(("null",))))),
        ({"type": "string", "minLength": 2.0, "maxLength": 3}, Text(2, 3)),
        ({"enum": ["a", 1, None]}, Either((Values(('"a"',)), Values(("1",)), Values(("null",))))),
        ({"type": "integer", "enum": [1, 2, 9], "maximum": 5}, Values(("1", "2"))),
        ({"const": {"a": [1]}}, Values(('{"a":[1]}',))),
        (
            {"type": "array", "items": {"type": "null"}, "maxItems": 0},
            List(Values(("null",)), 0, 0),
        ),
        ({"minItems": 1, "items": {"type": "null"}}, List(Values(("null",)), 1)),
        (
            {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3},
            Number(Decimal(1), Decimal(2), True),
        ),
        (
            {"type": "number", "multipleOf": 1, "minimum": 1, "maximum": 2},
            Number(Decimal(1), Decimal(2), True),
        ),
        (
            {"type": "integer", "exclusiveMinimum": -2.5, "maximum": 0},
            Number(Decimal(-2), Decimal(0), True),
        ),
        ({"anyOf": [{"type": "string"}, False, {"type": "string"}]}, Text()),
        (
            {"type": "string", "anyOf": [{"maxLength": 3}, {"minLength": 5}]},
            Either((Text(0, 3), Text(5))),
        ),
        ({"type": "string", "format": "of-our-own", "x-order": 3, "nullable": True}, Text()),
    ],
)
def test_what_a_schema_means(schema: Any, shape: Any) -> None:
    """Each keyword ends up in the shape."""
    assert read(schema).shape == shape


def test_parts_of_an_object_are_put_together() -> None:
    """Branches of allOf share one object; each may close it for names of the others."""
    schema = {
        "properties": {"a": {"type": "string"}},
        "allOf": [
            {"properties": {"a": {"maxLength": 3}, "b": {"const": 1}}, "required": ["b"]},
            {"properties": {"c": {"const": 2}}, "required": ["a"]},
        ],
    }
    shape = read(schema).shape
    assert isinstance(shape, Object)
    assert [(m.name, m.shape, m.required) for m in shape.members] == [
        ('"a"', Text(0, 3), True),
        ('"b"', Values(("1",)), True),
        ('"c"', Values(("2",)), False),
    ]


def test_what_stands_beside_a_reference_counts() -> None:
    """A reference and its siblings hold both."""
    schema = {
        "$ref": "#/$defs/a",
        "maxLength": 5,
        "$defs": {"a": {"type": "string", "minLength": 2}},
    }
    assert read(schema).shape == Text(2, 5)


def test_a_tagged_union_is_taken() -> None:
    """Members of oneOf that a constant tells apart are a choice."""
    members = [{"properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab"]
    shape = read({"oneOf": members, "discriminator": {"propertyName": "kind"}}).shape
    assert shape == Either(
        (an_object("kind", Values(('"a"',))), an_object("kind", Values(('"b"',))))
    )


def test_a_tag_tells_members_apart_whatever_else_they_hold() -> None:
    """Patterns that nobody can compare do not matter where a constant decides."""
    members: Any = [
        {
            "properties": {"value": {"pattern": pattern}, "kind": {"const": pattern}},
            "required": ["value", "kind"],
        }
        for pattern in ("^a$", "^b$")
    ]
    assert isinstance(read({"oneOf": members}).shape, Either)
    for member in members:
        del member["properties"]["kind"]
        member["required"].remove("kind")
    with pytest.raises(ApiError, match="could fit two of these"):
        read({"oneOf": members})


def test_members_that_need_different_names_are_apart() -> None:
    """Members of oneOf that each require what the other does not have are a choice."""
    members = [{"properties": {name: {"const": 1}}, "required": [name]} for name in "ab"]
    assert isinstance(read({"oneOf": members}).shape, Either)


def laughs() -> Any:
    """A small schema that its references make a huge one."""
    definitions: dict[str, Any] = {"a0": {"type": "string"}}
    for level in range(1, 40):
        twice = {"$ref": f"#/$defs/a{level - 1}"}
        definitions[f"a{level}"] = {"type": "object", "properties": {"x": twice, "y": twice}}
    return {"$ref": "#/$defs/a39", "$defs": definitions}


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


LONG = {"enum": [f"v{n}" for n in range(1_000)]}
MANY_WAYS = {"allOf": [{"anyOf": [{"minLength": n} for n in range(30)]}] * 5}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": 7}, "is not valid under any of the given schemas"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, "recursive"),
        ({"properties": {"a": {"$ref": "#"}}}, "recursive"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#/properties/a/enum", "properties": {"a": {"enum": []}}}, "leads nowhere"),
        ({"$ref": "https://example.org/x"}, "leads nowhere"),
        (laughs(), "too large or nested too deep"),
        (nested(900), "too large or nested too deep"),
        (MANY_WAYS, "too large or nested too deep"),
        ({"oneOf": [{"const": str(n)} for n in range(700)]}, "too large or nested too deep"),
        ({"enum": [f"v{n}" for n in range(20_000)]}, "too large or nested too deep"),
        ({"type": "null", "$defs": {str(n): {} for n in range(2_000)}}, "too large or nested"),
        ({"anyOf": [{"$ref": "#/$defs/a"}] * 50, "$defs": {"a": LONG}}, "too large or nested"),
        ({"type": [n if n % 2 else str(n) for n in range(19_000)]}, "too large or nested too deep"),
        ({"type": "string", "pattern": "a" * 10_001}, "too large or nested too deep"),
        ({"type": "string", "pattern": "a{99999999999999999999}"}, "pattern: a quantifier above"),
        ({"$ref": "#/default", "default": {"type": 7}}, "leads nowhere"),
        ({"$ref": "#/$defs/a/anyOf", "$defs": {"a": {"anyOf": [{}]}}}, "leads nowhere"),
        ({"type": "number", "exclusiveMinimum": 1e300}, "nothing fits"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
        ({"not": {"type": "string"}}, "not is not supported"),
        ({"properties": {"a": {"contains": {}}}}, r"schema\.properties\.a: contains"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf is not supported"),
        ({"additionalProperties": {"type": "string"}}, "a list of objects"),
        ({"type": "object"}, "needs properties"),
        ({"properties": {"a": {}}, "required": ["b"]}, "'b' is required"),
        ({"type": "string", "pattern": "(?=a)"}, "pattern: a group that looks around"),
        ({"type": "string", "pattern": "["}, "pattern: a class without end"),
        ({"type": "string", "pattern": "\\p{L}"}, r"the escape"),
        ({"type": "string", "pattern": "a", "format": "date"}, "beside a format"),
        ({"type": "string", "pattern": "^a$", "minLength": 2}, "does not go with the length"),
        ({"type": "string", "format": "uuid", "maxLength": 5}, "does not go with the length"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "two of pattern"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "could fit two of these"),
        ({"oneOf": [{"enum": ["a"]}, {"type": "string"}]}, "could fit two of these"),
        ({"oneOf": [TITLE, {"properties": {"title": {}, "b": {}}}]}, "could fit two of these"),
        ({"type": "string", "const": 1}, "nothing fits"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "nothing fits"),
        ({"type": "integer", "minimum": 2**53}, "nothing fits"),
        ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "nothing fits"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "nothing fits"),
        ({"anyOf": [False]}, "nothing fits"),
        ({"type": "array", "minItems": 10**9}, "minItems is above"),
        ({"enum": ["a"], "pattern": "a"}, "listed values say all"),
    ],
)
def test_what_cannot_be_held_is_refused(schema: Any, says: str) -> None:
    """A schema that answers could not be held to is a 400 that says why and where."""
    with pytest.raises(ApiError, match=says) as caught:
        read(schema)
    assert caught.value.status == 400
    assert caught.value.message.startswith("output_config.format.schema")


@pytest.mark.parametrize("text", ["", "{", '{"title": 1}', "[]", '{"title": "a", "b": 1}'])
def test_what_does_not_fit(text: str) -> None:
    """Text that is no JSON, or the wrong one, does not fit."""
    assert not read(TITLE).fits(text)


def test_a_pattern_is_never_looked_for() -> None:
    """One that would take Python's engine for ever is left to the grammar, and said to be."""
    schema = {"type": "string", "pattern": "^(a+)+$"}
    form = read(schema)
    assert form.fits('"' + "a" * 200 + '!"')
    assert not form.is_exact
    assert read(TITLE).is_exact


def test_pythons_engine_sees_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when a schema is read, and not when an answer is looked at."""
    seen: list[object] = []

    def watched(function: Any) -> Any:
        def watch(wanted: object, *given: object) -> Any:
            seen.append(wanted)
            return function(wanted, *given)

        return watch

    for name in ("compile", "search", "match", "fullmatch"):
        monkeypatch.setattr(re, name, watched(getattr(re, name)))
    form = read({"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}})
    assert form.fits('{"a": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"}')
    assert not any("a+" in str(each) for each in seen)


def test_many_names_of_one_place_are_looked_at_once() -> None:
    """A place may be said in any number of ways, and holds a lot: it is no loop, and soon seen."""
    ways = {f"a{n}": {"$ref": f"#/$defs/a/anyOf/{'0' * (n + 1)}"} for n in range(900)}
    much = {"anyOf": [{"type": "string", "examples": list(range(15_000))}]}
    assert isinstance(read({"properties": ways, "$defs": {"a": much}}).shape, Object)


def test_an_object_of_any_members() -> None:
    """It is taken as the whole answer alone, and only where nothing closes it."""
    anything = {"type": "object", "additionalProperties": True}
    closed = {"type": "object", "additionalProperties": False}
    assert isinstance(read(anything).shape, AnyObject)
    assert read({"allOf": [anything, closed]}).shape == Object(())
    for schema in ({"type": "object"}, {"type": "array", "items": anything}):
        with pytest.raises(ApiError, match="an object needs properties"):
            read(schema)
