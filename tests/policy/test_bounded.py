"""Schemas whose answers end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from gateway.policy.bounded import bounded
from gateway.policy.schema import read
from tests.schemas import answers

Json = Any


@pytest.mark.parametrize(
    ("schema", "more"),
    [
        ({"type": "string"}, {"maxLength": 56}),
        ({"type": ["string", "null"]}, {"maxLength": 56}),
        ({"type": "string", "maxLength": 9}, {}),
        ({"type": "string", "maxLength": 900}, {"maxLength": 56}),
        ({"type": "string", "minLength": 70}, {"maxLength": 70}),
        ({"type": "string", "minLength": 70, "maxLength": 80}, {"maxLength": 70}),
        ({"type": "string", "pattern": "^a+$"}, {}),
        ({"type": "string", "format": "date"}, {}),
        ({"type": "string", "enum": ["a"]}, {}),
        ({"type": "integer"}, {}),
        ({"type": "array"}, {"maxItems": 3}),
        ({"type": "array", "minItems": 7}, {"maxItems": 7}),
        (True, None),
    ],
)
def test_what_has_no_end_gets_one(schema: Json, more: Json) -> None:
    """Wherever in a schema it stands; what has one keeps it."""
    expected = schema if more is None else {**schema, **more}
    for wrap in (
        lambda inner: inner,
        lambda inner: {"properties": {"type": inner}},
        lambda inner: {"$defs": {"a": inner}, "$ref": "#/$defs/a"},
        lambda inner: {"anyOf": [{"type": "null"}, inner]},
        lambda inner: {"items": inner},
    ):
        assert bounded(wrap(schema), 200) == wrap(expected)


@settings(deadline=None)
@given(answers())
def test_it_is_still_a_schema_that_can_be_held(schema: Json) -> None:
    """And the client's own is as it was."""
    before = repr(schema)
    found = bounded(schema, 40)
    Draft202012Validator.check_schema(found)
    assert read(found).shape.shortest == read(schema).shape.shortest
    assert repr(schema) == before
