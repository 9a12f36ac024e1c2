"""When states are saved and restored, and what warms an empty slot: each rule."""

from __future__ import annotations

from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.prefix import prepare
from gateway.policy.template import Template
from gateway.policy.warm import (
    REFUSED_FOR,
    Offer,
    Slot,
    beginning,
    rendered_beginning,
    restores,
    saves,
    two_beginnings,
)
from gateway.wire.request import parse
from tests.conversations import assistant, body, text, user

# --- restores -------------------------------------------------------------------------------------

#: GLM-5 on a large machine: 25 000 tokens of 110 KB, 74 tokens and 1 GB a second.
GLM = Offer(kept=25_000, held=0, size=2_750_000_000, prefill=74.0, reading=1e9)


def test_minutes_are_spared_in_seconds() -> None:
    """338 s of evaluation against 2.75 s of reading."""
    assert restores(GLM)
    assert round(GLM.spares) == 338
    assert GLM.takes == 2.75


def test_what_the_server_holds_is_not_spared() -> None:
    """The same conversation is still in its slot."""
    assert not restores(attrs.evolve(GLM, held=25_000))
    assert not restores(attrs.evolve(GLM, held=26_000))
    assert restores(attrs.evolve(GLM, held=15_000))


def test_a_few_tokens_are_not_worth_it() -> None:
    """However fast the disk is."""
    assert not restores(Offer(kept=255, held=0, size=1, prefill=1.0))
    assert restores(Offer(kept=256, held=0, size=1, prefill=1.0))


def test_a_slow_disk_is_not_worth_it() -> None:
    """A restore has to be twice as fast as the evaluation."""
    assert restores(attrs.evolve(GLM, reading=2_750_000_000 / 168))
    assert not restores(attrs.evolve(GLM, reading=2_750_000_000 / 170))


def test_what_was_not_measured_is_assumed() -> None:
    """A fast model and a slow disk, so that a guess is no loss."""
    unknown = attrs.evolve(GLM, prefill=None, reading=None)
    assert (unknown.spares, unknown.takes) == (12.5, 27.5)
    assert not restores(unknown)
    assert restores(attrs.evolve(GLM, reading=None))
    assert restores(Offer(kept=14_000, held=0, size=317_000_000))


@given(st.builds(Offer, *[st.integers(0, 10**12)] * 3, *[st.none() | st.floats(0.0, 1e12)] * 2))
def test_any_offer_is_decided(offer: Offer) -> None:
    """Zeros and unknowns too; nothing is restored for nothing."""
    assert not restores(offer) or offer.kept > offer.held


# --- saves ----------------------------------------------------------------------------------------

IDLE = Slot(exactly=False, idle=20.0, new=2048)


def now(slot: Slot, **more: Any) -> bool:
    return saves(slot, after=20.0, least=2048, **more)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"idle": 19.9}, False),
        ({"idle": None}, False),
        ({"new": 2047}, False),
        ({"new": -5}, False),
        ({"exactly": True}, False),
        ({"refused": REFUSED_FOR - 1}, False),
        ({"refused": REFUSED_FOR}, True),
    ],
)
def test_when_a_slot_is_saved(change: dict[str, Any], expected: bool) -> None:
    """Idle for long enough, with enough that is new, of a kind that is worth it."""
    assert now(attrs.evolve(IDLE, **change)) is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"idle": 0.0}, True),
        ({"idle": 0.0, "refused": 1.0}, True),
        ({"idle": None}, False),
        ({"idle": 0.0, "new": 0}, False),
        ({"idle": 0.0, "exactly": True}, False),
    ],
)
def test_when_a_slot_is_saved_at_the_end(change: dict[str, Any], expected: bool) -> None:
    """Nobody waits for idle seconds; what is not worth it still is not."""
    assert now(attrs.evolve(IDLE, **change), last_chance=True) is expected


# --- what warms an empty slot ---------------------------------------------------------------------


def test_a_beginning_is_all_that_comes_before_the_first_message() -> None:
    """Tools, system prompt and switches as they were, a turn that says nothing, no answer."""
    asked = body([user(text("Hello.")), assistant(text("Hi.")), user(text("Why?"))])
    prepared = prepare(
        parse(orjson.dumps(asked | {"temperature": 1.0})), Template(knows=("enable_thinking",))
    )
    found = beginning(prepared)
    assert {name: found[name] for name in ("tools", "system", "chat_template_kwargs")} == {
        name: prepared[name] for name in ("tools", "system", "chat_template_kwargs")
    }
    assert found["messages"] == [user(text(""))]
    assert found["max_tokens"] == 0
    assert "temperature" not in found
    assert len(prepared["messages"]) == 3


def test_a_body_without_tools_and_system_prompt() -> None:
    """Its beginning is the empty turn."""
    assert beginning({"messages": []}) == {"messages": [user(text(""))], "max_tokens": 0}


def test_where_a_beginning_ends() -> None:
    """Where the first word of a user would stand, on any template."""
    one, other = two_beginnings({"system": "Be careful.", "messages": [user(text("Hello."))]})

    def rendered(said: Any) -> str:
        return f"<sys>{said['system']}<user>{said['messages'][0]['content'][0]['text']}<answer>"

    shared = rendered_beginning(rendered(one), rendered(other))
    assert shared == "<sys>Be careful.<user>"
    assert rendered_beginning("", "x") == ""
