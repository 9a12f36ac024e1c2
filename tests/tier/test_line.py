"""The waiting line, under a test clock."""

from __future__ import annotations

import attrs
import pytest
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from gateway.tier.line import FIRST_ASK, NEXT_ASK, Line, Permit
from gateway.wire.errors import ApiError, unavailable


@attrs.define(eq=False)
class Server:
    """What a line asks for: how many slots work."""

    busy: int = 0
    asked: int = 0
    failure: Exception | None = None

    def busy_slots(self) -> Deferred[int]:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return succeed(self.busy)


@attrs.define(eq=False)
class Caller:
    """One call in a line."""

    turn: Deferred[Permit]
    permit: Permit | None = None
    cancelled: bool = False

    def __attrs_post_init__(self) -> None:
        self.turn.addCallbacks(self._go, self._gone)

    def _go(self, permit: Permit) -> None:
        self.permit = permit

    def _gone(self, failure: object) -> None:
        failure.trap(CancelledError)  # type: ignore[attr-defined]
        self.cancelled = True


@attrs.define(eq=False)
class Scene:
    """A line that has begun to serve."""

    slots: int = 1
    max_waiting: int = 64
    clock: Clock = attrs.field(factory=Clock)
    server: Server = attrs.field(factory=Server)
    line: Line = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.line = Line(self.slots, self.max_waiting, self.server.busy_slots, self.clock)
        self.line.start()

    def join(self, *, background: bool = False) -> Caller:
        return Caller(self.line.join(background))


def test_one_at_a_time() -> None:
    """With one slot the second call goes when the first has finished, and not before."""
    scene = Scene()
    first, second = scene.join(), scene.join()
    assert first.permit is not None
    assert second.permit is None
    assert (scene.line.running, scene.line.waiting) == (1, 1)
    first.permit.finished()
    assert second.permit is not None
    assert (scene.line.running, scene.line.waiting) == (1, 0)


def test_as_many_as_there_are_slots() -> None:
    """With three slots three calls run and the fourth waits."""
    scene = Scene(slots=3)
    callers = [scene.join() for _ in range(4)]
    assert [caller.permit is not None for caller in callers] == [True, True, True, False]


def test_background_gives_way() -> None:
    """A call that came later but that somebody waits for goes before a background call."""
    scene = Scene()
    holder = scene.join()
    background, turn = scene.join(background=True), scene.join()
    assert holder.permit is not None
    holder.permit.finished()
    assert turn.permit is not None
    assert background.permit is None
    turn.permit.finished()
    assert background.permit is not None


def test_who_leaves_the_line_is_forgotten() -> None:
    """A cancelled waiter frees its place, and the next one goes in its stead."""
    scene = Scene()
    holder, leaver, patient = scene.join(), scene.join(), scene.join()
    leaver.turn.cancel()
    assert leaver.cancelled
    assert scene.line.waiting == 1
    assert holder.permit is not None
    holder.permit.finished()
    assert patient.permit is not None


def test_an_abandoned_permit_waits_for_the_slot() -> None:
    """After a cancellation the next call goes only when the server says that the slot is idle."""
    scene = Scene()
    scene.server.busy = 1
    leaver, patient = scene.join(), scene.join()
    assert leaver.permit is not None
    leaver.permit.abandon()
    assert (scene.line.running, scene.line.settling) == (0, 1)
    scene.clock.advance(FIRST_ASK - 0.1)
    assert scene.server.asked == 0
    scene.clock.advance(0.1)
    assert scene.server.asked == 1
    assert patient.permit is None
    scene.clock.advance(NEXT_ASK - 0.1)
    assert scene.server.asked == 1
    scene.server.busy = 0
    scene.clock.advance(0.1)
    assert scene.server.asked == 2
    assert patient.permit is not None
    assert scene.line.settling == 0
    scene.clock.advance(60)
    assert scene.server.asked == 2, "nothing is polled when nothing settles"


def test_a_server_that_is_gone_has_no_busy_slot() -> None:
    """A server that cannot be asked does not keep the line shut."""
    scene = Scene()
    scene.server.failure = unavailable("down")
    leaver, patient = scene.join(), scene.join()
    assert leaver.permit is not None
    leaver.permit.abandon()
    scene.clock.advance(FIRST_ASK)
    assert patient.permit is not None


def test_only_idle_slots_come_back() -> None:
    """Of two abandoned slots the one that still works keeps its permit."""
    scene = Scene(slots=2)
    first, second = scene.join(), scene.join()
    third, fourth = scene.join(), scene.join()
    assert first.permit is not None
    assert second.permit is not None
    first.permit.abandon()
    second.permit.abandon()
    scene.server.busy = 1
    scene.clock.advance(FIRST_ASK)
    assert third.permit is not None
    assert fourth.permit is None
    scene.server.busy = 1  # the third call's own
    scene.clock.advance(NEXT_ASK)
    assert fourth.permit is not None


def test_a_permit_is_given_back_once() -> None:
    """Whatever a call does with its permit after it was given back, one call runs at a time."""
    scene = Scene()
    first = scene.join()
    assert first.permit is not None
    first.permit.finished()
    first.permit.finished()
    first.permit.abandon()
    second, third = scene.join(), scene.join()
    assert second.permit is not None
    assert third.permit is None
    assert scene.line.settling == 0


def test_a_full_line_refuses() -> None:
    """One call more than may wait gets 529 and is told when to come back."""
    scene = Scene(max_waiting=2)
    callers = [scene.join() for _ in range(3)]
    with pytest.raises(ApiError) as caught:
        scene.join()
    assert caught.value.status == 529
    assert caught.value.kind == "overloaded_error"
    assert caught.value.retry_after == 2
    callers[1].turn.cancel()
    assert scene.join().permit is None


def test_a_line_that_stops_cancels_who_waits() -> None:
    """When the service stops, who waits is cancelled and nothing is left on the clock."""
    scene = Scene()
    holder, waiter = scene.join(), scene.join()
    assert holder.permit is not None
    holder.permit.abandon()
    scene.line.stop()
    assert waiter.cancelled
    assert scene.clock.getDelayedCalls() == []


def test_whatever_the_server_answers_no_permit_is_lost(logged: list[LogEvent]) -> None:
    """An answer that makes no sense is logged, and the line goes on."""
    scene = Scene()
    scene.server.failure = KeyError("is_processing")
    leaver, patient = scene.join(), scene.join()
    assert leaver.permit is not None
    leaver.permit.abandon()
    scene.clock.advance(FIRST_ASK)
    assert patient.permit is not None
    assert any(event.get("log_failure") for event in logged)
    logged.clear()
