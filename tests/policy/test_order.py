"""Who goes next: each rule by its number, and the properties that hold for all lines."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.calls import Call
from gateway.policy.order import Rank, next_to_go, rank, why
from gateway.policy.routes import Route

AGEING = 120.0


@attrs.frozen
class Somebody:
    """A call that waits."""

    rank: Rank = Rank.PERSON
    conversation: str = ""
    arrived: float = 0.0


def goes(*line: Somebody, held: tuple[str, ...] = (), now: float = 0.0) -> int:
    return next_to_go(line, held, now, AGEING)


def test_1_who_has_waited_too_long_goes_first() -> None:
    """The oldest of them, whoever waits for the others."""
    old, older = Somebody(Rank.BACKGROUND, arrived=10), Somebody(Rank.SUBAGENT, arrived=5)
    turn = Somebody(conversation="a", arrived=100)
    assert goes(turn, old, older, held=("a",), now=131) == 2
    assert goes(turn, old, held=("a",), now=131) == 1
    assert goes(turn, old, held=("a",), now=130) == 0


def test_2_the_house_goes_before_a_person_before_a_subagent_before_the_background() -> None:
    """However late they came."""
    line = [Somebody(rank, arrived=n) for n, rank in enumerate(reversed(Rank))]
    assert goes(*line) == 3
    assert goes(*line[:3]) == 2
    assert goes(*line[:2]) == 1


def test_3_among_equals_the_conversation_that_is_held() -> None:
    """Not before a higher rank, and nothing is held by who has no conversation."""
    first, second = Somebody(conversation="a"), Somebody(conversation="b", arrived=1)
    assert goes(first, second, held=("b",)) == 1
    assert goes(first, second, held=("c",)) == 0
    assert goes(Somebody(), Somebody(arrived=1), held=("",)) == 0
    agent = Somebody(Rank.SUBAGENT, "b", arrived=1)
    assert goes(first, agent, held=("b",)) == 0


def test_4_among_equals_still_the_first() -> None:
    """In the order of arrival."""
    assert goes(Somebody(arrived=0), Somebody(arrived=1)) == 0
    assert goes(Somebody(arrived=1), Somebody(arrived=1)) == 0


@pytest.mark.parametrize(
    ("call", "background", "expected"),
    [
        (Call("turn", ""), False, Rank.PERSON),
        (Call("compaction", ""), False, Rank.PERSON),
        (Call("classifier", ""), False, Rank.PERSON),
        (Call("subagent", ""), False, Rank.SUBAGENT),
        (Call("compaction", "", agent="x"), False, Rank.SUBAGENT),
        (Call("turn", ""), True, Rank.BACKGROUND),
        (Call("subagent", "", agent="x"), True, Rank.BACKGROUND),
    ],
)
def test_who_waits_for_a_call(call: Call, background: bool, expected: Rank) -> None:
    """A person, unless it is a subagent's; nobody, if its route says so."""
    assert rank(call, Route("main", "", background)) == expected


somebodies = st.builds(
    Somebody,
    st.sampled_from(Rank),
    st.sampled_from(["", "a", "b"]),
    st.floats(0, 300, allow_nan=False),
)


@given(st.lists(somebodies, min_size=1, max_size=20), st.floats(300, 500), st.data())
def test_nobody_goes_before_an_aged_call_but_an_older_one(
    line: list[Somebody], now: float, data: Any
) -> None:
    """Rule 1 for every line; and where nobody is aged, no lower rank goes before a higher one."""
    held = data.draw(st.sets(st.sampled_from(["a", "b"])))
    chosen = line[next_to_go(line, held, now, AGEING)]
    aged = [call for call in line if now - call.arrived > AGEING]
    if aged:
        assert chosen.arrived == min(call.arrived for call in aged)
    else:
        assert chosen.rank == min(call.rank for call in line)


@given(st.lists(somebodies, min_size=1, max_size=20))
def test_everybody_goes_once(line: list[Somebody]) -> None:
    """A line that nobody joins any more is emptied."""
    waiting = list(line)
    while waiting:
        waiting.pop(next_to_go(waiting, ("a",), 0, AGEING))


@pytest.mark.parametrize(
    ("call", "now", "told"),
    [
        (Somebody(arrived=10), 131, "it has waited so long"),
        (Somebody(), AGEING, "a person waits for it"),
        (Somebody(conversation="a"), 0, "a person waits for it; it goes on with what the slot"),
        (Somebody(Rank.SUBAGENT, "b"), 0, "a subagent waits for it"),
        (Somebody(Rank.BACKGROUND), 0, "nobody waits for it"),
        (Somebody(Rank.HOUSE), 0, "the gateway needs the slot"),
    ],
)
def test_a_place_has_a_reason(call: Somebody, now: float, told: str) -> None:
    """The rule that put it there, in words."""
    assert why(call, ("a", ""), now, AGEING).startswith(told)
