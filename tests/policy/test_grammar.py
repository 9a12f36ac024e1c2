"""Grammars: what they let through fits, closes, and leaves nothing out."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gateway.policy import grammar
from gateway.policy.schema import read
from gateway.policy.shapes import ENDLESS, List, Number, Shape, Text, Values, portions
from tests.schemas import Speaker, answers

#: How talkative a speaker is: the shortest texts, some, and the longest ones.
TALKATIVE = (0, 0.3, 1)


def said(shape: Shape, room: int, many: int = 20) -> list[str]:
    written = grammar.write(shape, room)
    return [Speaker(written, Random(n), TALKATIVE[n % 3]).say() for n in range(many)]


@pytest.mark.parametrize("talkative", [0, 0.2, 0.4])
def test_any_object_is_let_through(talkative: float) -> None:
    """An object that may have any members has them, of every type, in JSON that fits."""
    form = read({"type": "object", "additionalProperties": True})
    written = grammar.write(form.shape, 10)
    for number in range(200):
        assert form.fits(Speaker(written, Random(number), talkative).say())


def characters(text: str) -> int:
    """The length of JSON text, where an escape counts as the character that it stands for."""
    return len(re.sub(r"\\(u....|.)", "x", text))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(answers(), st.sampled_from([1, 64, 1024]))
def test_what_is_let_through_fits_and_closes(schema: Any, room: int) -> None:
    """Each text is JSON that fits the client's own schema, and no longer than it may be."""
    form = read(schema)
    validator = Draft202012Validator(schema)
    for text in said(form.shape, room, 3):
        validator.validate(orjson.loads(text))
        assert form.fits(text)
        assert characters(text) <= max(room, form.shape.shortest)


@given(st.integers(-10, 10**6), st.integers(0, 10**4), st.integers(1, 10**5) | st.just(ENDLESS))
def test_portions_fit_their_room(room: int, shortest: int, longest: float) -> None:
    """There is one thing at least, and several have room together, each for its shortest form."""
    count, each = portions(room, shortest, longest)
    assert count >= 1
    assert count == 1 or count * each <= room
    assert each >= min(shortest, longest)
    assert each <= longest


@given(st.integers(-(10**5), 10**5), st.integers(0, 10**5), st.integers(-(10**6), 10**6))
def test_whole_numbers_are_let_through_exactly(low: int, width: int, number: int) -> None:
    """A whole number passes if and only if it lies between its bounds."""
    shape = Number(Decimal(low), Decimal(low + width), whole=True)
    rule = grammar.write(shape, 20).splitlines()[1].partition(" ::= ")[2]
    passes = re.fullmatch(rule.replace('"-"', "-").replace(" ", ""), str(number)) is not None
    assert passes == (low <= number <= low + width)


@given(
    st.decimals(-1000, 1000, places=3),
    st.decimals(0, 1000, places=3),
    st.integers(0, 1000),
)
def test_fractions_lie_between_their_bounds(low: Decimal, width: Decimal, seed: int) -> None:
    """What has a fraction lies between its bounds, however close those are."""
    shape = Number(low, low + width, whole=False)
    written = grammar.write(shape, 30)
    text = Speaker(written, Random(seed), 0.5).say()
    assert Fraction(low) <= Fraction(text) <= Fraction(low + width)


def test_a_text_of_any_length_is_written() -> None:
    """Long texts are made of blocks, and reach both of their bounds."""
    for least, most in ((0, 0), (0, 1), (3, 3), (0, 256), (0, 257), (300, 300), (130, 5000)):
        lengths = {len(orjson.loads(text)) for text in said(Text(least, most), 10_000)}
        assert min(lengths) == least
        assert max(lengths) == most


def test_no_repetition_is_above_what_the_server_takes() -> None:
    """However much room there is, no number in the grammar is above a thousand."""
    for shape in (Text(), List(Text()), List(Values(("1",)))):
        written = grammar.write(shape, 10**6)
        assert max(map(int, re.findall(r"[0-9]+(?=[,}])", written))) <= 1000


def test_a_list_of_paths_has_room_for_paths() -> None:
    """A list shares its room between how many and how long."""
    longest = orjson.loads(said(List(Text()), 1000, 3)[2])
    assert len(longest) == 8
    assert len(longest[0]) > 100


def test_who_needs_little_leaves_the_rest_to_the_others() -> None:
    """Beside short members a text has nearly all of the room."""
    schema = {
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}, "why": {"type": "string"}},
        "required": ["ok", "n", "why"],
    }
    longest = orjson.loads(said(read(schema).shape, 500, 3)[2])
    assert 440 <= len(longest["why"]) <= 500


@pytest.mark.parametrize("required", [[], ["a"], ["b"], ["c"], ["a", "c"]])
def test_optional_members_come_and_go(required: list[str]) -> None:
    """Each set of optional members is let through, with its commas right."""
    schema = {"properties": {name: {"const": 1} for name in "abc"}, "required": required}
    seen = {tuple(orjson.loads(text)) for text in said(read(schema).shape, 100, 200)}
    assert len(seen) == 2 ** (3 - len(required))
    assert all(set(required) <= set(names) for names in seen)
