"""Answers under a schema: what is put into the schema, and what is refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.tier.constrained import bounded, fits, usable
from gateway.wire.errors import ApiError

TITLE = {
    "type": "object",
    "properties": {"title": {"type": "string"}},
    "required": ["title"],
    "additionalProperties": False,
}


def largest(schema: Any) -> Any:
    """The longest value that a bounded schema lets through, numbers aside."""
    if "enum" in schema:
        return max(schema["enum"], key=lambda value: len(orjson.dumps(value)))
    if "anyOf" in schema:
        return max((largest(each) for each in schema["anyOf"]), key=lambda v: len(orjson.dumps(v)))
    match schema["type"]:
        case "object":
            return {name: largest(each) for name, each in schema["properties"].items()}
        case "array":
            return [largest(schema["items"])] * schema["maxItems"]
        case "string":
            return "x" * schema["maxLength"]
        case "boolean":
            return False
        case _:
            return 1000


SCALARS = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "maxLength": 9},
        {"type": "boolean"},
        {"type": "integer"},
        {"type": "number", "minimum": 0},
        {"enum": ["red", "green"]},
    ]
)
NAMES = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=8)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: (
        st.dictionaries(NAMES, inner, min_size=1, max_size=4).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
        | inner.map(lambda items: {"type": "array", "items": items})
        | st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})
    ),
    max_leaves=6,
)


@given(SCHEMAS)
def test_the_longest_answer_closes(schema: Any) -> None:
    """Whatever the schema, its longest answer is within the server's own limit of four times."""
    tight = bounded(schema, 512)
    longest = largest(tight)
    assert fits(usable(tight), orjson.dumps(longest).decode())
    assert len(orjson.dumps(longest)) <= 4 * 512


@given(SCHEMAS)
def test_a_bounded_schema_is_no_wider(schema: Any) -> None:
    """What fits the bounded schema fits the client's own."""
    assert fits(usable(schema), orjson.dumps(largest(bounded(schema, 512))).decode())


def test_a_title_has_room_for_its_bound() -> None:
    """A single string may use nearly all of the room."""
    tight = bounded(TITLE, 512)
    assert 400 <= tight["properties"]["title"]["maxLength"] <= 512


def test_a_tighter_bound_of_the_clients_stays() -> None:
    """A maxLength that is shorter than ours is kept, a longer one is not."""
    assert bounded({"type": "string", "maxLength": 5}, 512)["maxLength"] == 5
    assert bounded({"type": "string", "maxLength": 9999}, 512)["maxLength"] == 512


def test_references_are_followed() -> None:
    """A definition is put in where it is referred to, with bounds."""
    schema = {"type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"type": "string"}}}
    tight = bounded(schema, 512)
    assert tight["items"]["type"] == "string"
    assert "maxLength" in tight["items"]
    assert "$defs" not in tight


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, "recursive"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "https://example.org/x"}, "leads nowhere"),
        ({"$ref": 5}, "leads nowhere"),
    ],
)
def test_what_cannot_be_bounded_is_refused(schema: Any, says: str) -> None:
    """A schema that refers to itself or to nothing is a 400 that says so."""
    with pytest.raises(ApiError, match=says) as caught:
        bounded(schema, 512)
    assert caught.value.status == 400


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


@pytest.mark.parametrize("schema", [laughs(), nested(900)])
def test_a_schema_that_explodes_is_refused(schema: Any) -> None:
    """References that multiply and nesting without end are a 400, soon."""
    with pytest.raises(ApiError, match="too large or nested too deep"):
        bounded(schema, 512)


def test_bounds_that_leave_no_room_are_kept() -> None:
    """An empty list stays empty, and a long string that must be long may be."""
    assert bounded({"type": "array", "maxItems": 0}, 512)["maxItems"] == 0
    assert bounded({"type": "string", "minLength": 600}, 512)["maxLength"] == 600


def test_what_is_no_schema_is_refused() -> None:
    """A schema that JSON Schema does not allow is a 400."""
    with pytest.raises(ApiError, match=r"output_config\.format\.schema"):
        usable({"type": 7})


@pytest.mark.parametrize("text", ["", "{", '{"title": 1}', "[]", '{"title": "a", "b": 1}'])
def test_what_does_not_fit(text: str) -> None:
    """Text that is no JSON, or the wrong one, does not fit."""
    assert not fits(usable(TITLE), text)
