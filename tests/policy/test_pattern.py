"""Simple regular expressions: what is understood, what is refused."""

from __future__ import annotations

import re
from datetime import date, datetime, time
from ipaddress import ip_address
from random import Random
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy import grammar
from gateway.policy.pattern import FORMATS, NotUnderstood, read
from gateway.policy.shapes import Matching
from tests.schemas import PATTERNS, Speaker


def said(pattern: str, room: int = 40, count: int = 30) -> list[str]:
    """Texts that the grammar of `pattern` lets through."""
    written = grammar.write(Matching(read(pattern)), room)
    texts = [Speaker(written, Random(number), number % 3 / 2).say() for number in range(count)]
    return [orjson.loads(text) for text in texts]


@pytest.mark.parametrize(
    "pattern",
    [
        *PATTERNS,
        "^$",
        "^a|b$|c",
        "^(?:ab)+?[^a-y\\s]{2}$",
        "^(?<year>[0-9]{4})-\\d\\d$",
        "^\\x41\\u0042\\t\\/\\.$",
        "^[\\]\\-\\\\^-]+$",
        "^[\\w.-]{1,3}\\W\\D\\S$",
        "^(a{2,3}){2}b{0,}$",
        "^a{0}b?$",
        "^.{3}$",
        "^[\\u0000]$",
    ],
)
def test_what_is_said_matches(pattern: str) -> None:
    """Each text that comes out of a pattern is found by Python's own engine."""
    for text in said(pattern):
        assert re.search(pattern.replace("(?<", "(?P<"), text), text


@given(st.integers(0, 60), st.sampled_from(PATTERNS))
def test_what_is_said_keeps_its_length(room: int, pattern: str) -> None:
    """No text is longer than it may be, but for one that must be."""
    piece = read(pattern)
    for text in said(pattern, room + 2, 6):
        assert len(text) <= max(room, piece.shortest, 1)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "group without end"),
        (")", "never begun"),
        ("[", "class without end"),
        ("[]", "class that is empty"),
        ("[z-a]", "range"),
        ("[a-\\d]", "range"),
        ("*", "after nothing"),
        ("a**", "quantifier after"),
        ("a{3,1}", "quantifier"),
        ("a{x}", "quantifier"),
        ("a{99999999}", "quantifier above"),
        ("a$b", "after a \\$"),
        ("(^a)", "\\^ in the middle"),
        ("(?=a)", "looks around"),
        ("(?<!a)", "looks around"),
        ("(?<1>a)", "proper name"),
        ("(?i)a", "looks around"),
        ("\\bword", "escape"),
        ("(a)\\1", "escape"),
        ("\\p{L}", "escape"),
        ("\\x4", "no character"),
        ("\\uD800", "no character"),
        ("a\\", "escape"),
        ("(" * 60 + ")" * 60, "too deep"),
    ],
)
def test_what_is_not_simple_is_refused(pattern: str, says: str) -> None:
    """What the grammar could not hold is named."""
    with pytest.raises(NotUnderstood, match=says):
        read(pattern)


@given(st.text(st.sampled_from("ab()[]{}|*+?^$.\\d-,1<=!:x"), max_size=20))
def test_nothing_else_goes_wrong(pattern: str) -> None:
    """Any text is a pattern or is refused as none."""
    try:
        piece = read(pattern)
    except NotUnderstood:
        return
    assert piece.shortest <= piece.longest


CHECKS: dict[str, Any] = {
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "date-time": datetime.fromisoformat,
    "duration": re.compile(r"P(?!$)(\d+Y|\d+M|\d+W|\d+D)?(T(?!$)(\d+H)?(\d+M)?(\d+S)?)?").fullmatch,
    "email": re.compile(r"[^@\s]+@[a-z0-9-]+(\.[a-z0-9-]+)+").fullmatch,
    "hostname": re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*").fullmatch,
    "uri": lambda text: urlsplit(text).hostname,
    "ipv4": ip_address,
    "ipv6": ip_address,
    "uuid": UUID,
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_are_kept(name: str) -> None:
    """What is said in a format is read by the standard library as such."""
    written = grammar.write(Matching(FORMATS[name]), 100)
    for number in range(200):
        text = orjson.loads(Speaker(written, Random(number), number % 3 / 2).say())
        assert CHECKS[name](text), text
