"""
Who goes next.

1. A call that has waited longer than the ageing bound goes before all others, the oldest first.
2. The house itself, which needs a slot at rest for a moment, goes before a turn that a person waits
   for, and that before a subagent's, and that before one in the background.
3. Among equals, one of the conversation that a slot already holds goes first: ABAB becomes AABB,
   and its prompt is not evaluated anew.
4. Among equals still, the one that came first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Final, Protocol

from gateway.policy.calls import Call
from gateway.policy.routes import Route


class Rank(IntEnum):
    """Who waits for a slot; the lowest goes first."""

    #: Nobody: the house itself needs a slot that does nothing, for a moment.
    HOUSE = -1
    PERSON = 0
    SUBAGENT = 1
    BACKGROUND = 2


_WHY: Final = {
    Rank.HOUSE: "the gateway needs the slot at rest for a moment",
    Rank.PERSON: "a person waits for it",
    Rank.SUBAGENT: "a subagent waits for it: people go first",
    Rank.BACKGROUND: "nobody waits for it: all others go first",
}


class Waiting(Protocol):
    """What is known of a waiting call; its time in seconds on the line's clock."""

    @property
    def rank(self) -> Rank: ...

    @property
    def conversation(self) -> str: ...

    @property
    def arrived(self) -> float: ...


def rank(call: Call, route: Route) -> Rank:
    """Who waits for a call that goes this way."""
    if route.background:
        return Rank.BACKGROUND
    return Rank.SUBAGENT if call.agent or call.kind == "subagent" else Rank.PERSON


def next_to_go(waiting: Sequence[Waiting], held: Collection[str], now: float, ageing: float) -> int:
    """The index of the next call among those that wait, not none; the rest as `in_order`."""
    return in_order(waiting, held, now, ageing)[0]


def in_order(
    waiting: Sequence[Waiting], held: Collection[str], now: float, ageing: float
) -> list[int]:
    """
    The indices of all calls in the order in which they would go now.

    Args:
        waiting: those that wait.
        held: the conversations that the slots hold; "" is none.
        now: seconds on the line's clock.
        ageing: seconds after which a call goes before all that waited less.
    """

    def place(index: int) -> tuple[bool, int, bool, float, int]:
        call = waiting[index]
        if now - call.arrived > ageing:
            return False, 0, False, call.arrived, index
        is_held = bool(call.conversation) and call.conversation in held
        return True, call.rank, not is_held, call.arrived, index

    return sorted(range(len(waiting)), key=place)


def why(call: Waiting, held: Collection[str], now: float, ageing: float) -> str:
    """Why a waiting call has the place that `in_order` gives it, for the person who looks."""
    if now - call.arrived > ageing:
        return "it has waited so long that it goes before all that came later"
    if call.conversation and call.conversation in held:
        return f"{_WHY[call.rank]}; it goes on with what the slot holds"
    return _WHY[call.rank]
