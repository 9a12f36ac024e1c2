"""
The waiting line as a state machine: whatever comes in whatever order, no permit and nobody is lost.

Calls arrive, leave, end, fail, are cut off and come again while time passes; the server's slots
go idle when they please.
"""

from __future__ import annotations

from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.policy.order import Rank
from gateway.tier.line import FIRST_ASK, KEPT, NEXT_ASK, Permit
from tests.tier.test_line import Caller, Scene

AGEING = 30.0


@attrs.define(eq=False)
class Guest:
    """A call, as the test knows it."""

    caller: Caller
    key: bytes
    rank: Rank
    conversation: str


class Calls(RuleBasedStateMachine):
    """A line of one to three slots, and all that can happen to it."""

    scene: Scene
    guests: list[Guest]
    #: Those that left or were cut off, and may come again.
    gone: list[Guest]
    #: Permits of slots that work for nobody any more.
    orphans: list[Permit]

    @initialize(slots=st.integers(1, 3))
    def begin(self, slots: int) -> None:
        self.scene = Scene(slots=slots, max_waiting=1000, ageing=AGEING)
        self.guests, self.gone, self.number = [], [], 0
        self.orphans = []

    # --- who is where -----------------------------------------------------------------------------

    @property
    def running(self) -> list[Guest]:
        return [guest for guest in self.guests if guest.caller.permit is not None]

    @property
    def waiting(self) -> list[Guest]:
        return [guest for guest in self.guests if guest.caller.permit is None]

    def _count_busy(self) -> None:
        self.scene.server.busy = len(self.running) + len(self.orphans)

    def _orphan(self, permit: Permit, still_works: bool) -> None:
        """Its slot works on, or is idle by now, which the server may have said already."""
        if still_works:
            self.orphans.append(permit)
        else:
            permit.idle()

    def _join(self, rank: Rank, conversation: str, key: bytes) -> None:
        caller = self.scene.join(rank, conversation=conversation, key=key)
        self.guests.append(Guest(caller, key, rank, conversation))

    # --- what can happen --------------------------------------------------------------------------

    @rule(rank=st.sampled_from(Rank), conversation=st.sampled_from(["", "a", "b"]))
    def arrive(self, rank: Rank, conversation: str) -> None:
        self.number += 1
        self._join(rank, conversation, b"%d" % self.number)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_the_line(self, data: Any) -> None:
        guest = data.draw(st.sampled_from(self.waiting))
        guest.caller.turn.cancel()
        self.guests.remove(guest)
        self.gone.append(guest)
        assert guest.caller.cancelled

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        guest = data.draw(st.sampled_from(self.running))
        self.guests.remove(guest)
        guest.caller.permit.finished()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), still_works=st.booleans())
    def fail(self, data: Any, still_works: bool) -> None:
        guest = data.draw(st.sampled_from(self.running))
        self.guests.remove(guest)
        self._orphan(guest.caller.permit, still_works)
        guest.caller.permit.abandon()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), still_works=st.booleans())
    def cut_off(self, data: Any, still_works: bool) -> None:
        guest = data.draw(st.sampled_from(self.running))
        self.guests.remove(guest)
        self.gone.append(guest)
        self._orphan(guest.caller.permit, still_works)
        guest.caller.permit.cut()

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def come_again(self, data: Any) -> None:
        guest = data.draw(st.sampled_from(self.gone))
        self.gone.remove(guest)
        self._join(guest.rank, guest.conversation, guest.key)

    @precondition(lambda self: self.orphans)
    @rule(data=st.data(), says_so=st.booleans())
    def a_slot_goes_idle(self, data: Any, says_so: bool) -> None:
        permit = data.draw(st.sampled_from(self.orphans))
        self.orphans.remove(permit)
        if says_so:
            permit.idle()

    @rule(seconds=st.sampled_from([0.1, 0.6, FIRST_ASK, KEPT, NEXT_ASK, AGEING]))
    def time_passes(self, seconds: float) -> None:
        self._count_busy()
        self.scene.clock.advance(seconds)

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def never_more_than_slots(self) -> None:
        line = self.scene.line
        assert line.running == len(self.running)
        assert line.waiting == len(self.waiting)
        assert line.running + line.settling <= line.slots

    @invariant()
    def nobody_waits_before_a_free_slot(self) -> None:
        """But for the two seconds in which it is somebody's who may come again."""
        line = self.scene.line
        if self.waiting and line.running + line.settling < line.slots:
            assert any(place.turn is None for place in line._places)

    def teardown(self) -> None:
        """When nobody comes any more everybody gets a turn, and no timer is left."""
        if not hasattr(self, "scene"):
            return
        self.orphans = []
        for _ in range(2 * len(self.guests) + 10):
            self._count_busy()
            self.scene.clock.advance(NEXT_ASK)
            for guest in self.running:
                self.guests.remove(guest)
                assert guest.caller.permit is not None
                guest.caller.permit.finished()
        assert self.guests == []
        assert self.scene.line.settling == 0
        assert self.scene.clock.getDelayedCalls() == []


Calls.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestCalls = Calls.TestCase
