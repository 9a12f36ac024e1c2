"""The waiting line, under a test clock."""

from __future__ import annotations

import attrs
import pytest
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from gateway.policy.order import Rank
from gateway.tier.line import FIRST_ASK, KEPT, NEXT_ASK, Line, Permit, Ticket
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
    ageing: float = 120
    clock: Clock = attrs.field(factory=Clock)
    server: Server = attrs.field(factory=Server)
    line: Line = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.line = Line(
            self.slots, self.max_waiting, self.ageing, self.server.busy_slots, self.clock
        )
        self.line.start()

    def join(self, rank: Rank = Rank.PERSON, *, conversation: str = "", key: bytes = b"") -> Caller:
        return Caller(self.line.join(Ticket(rank, conversation, lambda: key)))


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
    background, turn = scene.join(Rank.BACKGROUND), scene.join()
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


def test_a_server_that_says_that_its_slot_is_idle_is_not_asked() -> None:
    """The permit comes back at once, whether the server said so before the caller left or after."""
    scene = Scene()
    scene.server.busy = 1
    first, second, third = scene.join(), scene.join(), scene.join()
    assert first.permit is not None
    first.permit.abandon()
    scene.clock.advance(0.5)
    first.permit.idle()
    assert second.permit is not None
    second.permit.idle()
    assert third.permit is None, "it has not left yet"
    second.permit.abandon()
    assert third.permit is not None
    first.permit.idle()
    assert scene.line.running == 1
    scene.clock.advance(60)
    assert scene.server.asked == 0


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
    assert caught.value.retry_after == 1, "nothing was measured yet"
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


def test_who_is_refused_is_told_when_to_come_by_what_was_measured() -> None:
    """Two wait, and a call takes about 30 s."""
    scene = Scene(max_waiting=2)
    first = scene.join()
    scene.clock.advance(30)
    assert first.permit is not None
    first.permit.finished()
    for _ in range(3):
        scene.join()
    with pytest.raises(ApiError) as caught:
        scene.join()
    assert caught.value.retry_after == 60


# --- order ----------------------------------------------------------------------------------------


def test_the_conversation_that_the_slot_holds_goes_first() -> None:
    """ABAB becomes AABB."""
    scene = Scene()
    line = [scene.join(conversation=name) for name in "ABAB"]
    gone: list[Caller] = []
    while len(gone) < 4:
        (running,) = [caller for caller in line if caller.permit and caller not in gone]
        gone.append(running)
        assert running.permit is not None
        running.permit.finished()
    assert [line.index(caller) for caller in gone] == [0, 2, 1, 3]


def test_who_has_waited_too_long_goes_first() -> None:
    """A background call is not put off for ever."""
    scene = Scene(ageing=100)
    holder, old = scene.join(conversation="A"), scene.join(Rank.BACKGROUND)
    scene.clock.advance(101)
    young = scene.join(conversation="A")
    assert holder.permit is not None
    holder.permit.finished()
    assert old.permit is not None
    assert young.permit is None


# --- calls that are sent again --------------------------------------------------------------------


def test_who_comes_again_gets_the_old_place() -> None:
    """A waiting call that was cut off is back in time, and goes before who came after it."""
    scene = Scene()
    holder, cut, other = scene.join(), scene.join(key=b"a"), scene.join(key=b"b")
    cut.turn.cancel()
    assert scene.line.waiting == 1
    scene.clock.advance(KEPT - 0.1)
    again = scene.join(key=b"a")
    assert scene.line.waiting == 2
    assert holder.permit is not None
    holder.permit.finished()
    assert again.permit is not None
    assert other.permit is None


def test_who_comes_again_is_who_waits() -> None:
    """The line tells of the call that is there, not of the one that was cut off."""
    scene = Scene()
    scene.join()
    names = ["cut", "again"]
    tickets = [Ticket(Rank.PERSON, "", lambda: b"a", name) for name in names]
    scene.line.join(tickets[0]).addErrback(lambda _: None).cancel()
    scene.line.join(tickets[1])
    assert [ticket.name for ticket, _ in scene.line.places()] == ["again"]


def test_a_place_is_kept_for_two_seconds() -> None:
    """Who comes later than that is at the end."""
    scene = Scene()
    holder, cut, other = scene.join(), scene.join(key=b"a"), scene.join(key=b"b")
    cut.turn.cancel()
    scene.clock.advance(KEPT)
    again = scene.join(key=b"a")
    assert holder.permit is not None
    holder.permit.finished()
    assert other.permit is not None
    assert again.permit is None


def test_a_place_is_kept_for_nobody_else() -> None:
    """Another call does not get it; while it is kept and next, the slot waits for it."""
    scene = Scene()
    holder, cut = scene.join(), scene.join(key=b"a")
    cut.turn.cancel()
    other = scene.join(key=b"b")
    assert holder.permit is not None
    holder.permit.finished()
    assert other.permit is None
    scene.clock.advance(KEPT)
    assert other.permit is not None


def test_a_kept_place_takes_one_slot_and_not_all() -> None:
    """Who comes again has a slot, and who came behind goes where there is another."""
    scene = Scene(slots=3)
    holders = [scene.join() for _ in range(3)]
    cut = scene.join(key=b"a")
    cut.turn.cancel()
    others = [scene.join(key=b"b"), scene.join(key=b"c")]
    for holder in holders[:2]:
        assert holder.permit is not None
        holder.permit.finished()
    assert [other.permit is not None for other in others] == [True, False]
    assert scene.join(key=b"a").permit is not None


def test_a_running_call_that_is_cut_keeps_its_age() -> None:
    """It goes on where it was as soon as its slot is idle, before those that waited."""
    scene = Scene()
    scene.server.busy = 1
    running, other = scene.join(key=b"a"), scene.join(key=b"b")
    assert running.permit is not None
    running.permit.cut()
    scene.clock.advance(0.6)
    again = scene.join(key=b"a")
    scene.server.busy = 0
    scene.clock.advance(FIRST_ASK - 0.6)
    assert again.permit is not None
    assert other.permit is None
    assert scene.line.running == 1


def test_a_call_that_failed_keeps_no_place() -> None:
    """Only a client that was cut off comes again at once."""
    scene = Scene()
    failed, other = scene.join(key=b"a"), scene.join(key=b"b")
    assert failed.permit is not None
    failed.permit.abandon()
    scene.clock.advance(FIRST_ASK)
    assert other.permit is not None


def test_a_kept_place_does_not_outlive_the_line() -> None:
    """Nothing is left on the clock when the service stops."""
    scene = Scene()
    scene.join()
    scene.join(key=b"a").turn.cancel()
    scene.line.stop()
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


# --- a server that goes away ----------------------------------------------------------------------

GONE = unavailable("it is gone")


@attrs.define(eq=False)
class Told:
    """A call that is told when its server goes."""

    turn: Deferred[Permit]
    permit: Permit | None = None
    why: BaseException | None = None

    def __attrs_post_init__(self) -> None:
        self.turn.addCallbacks(
            lambda permit: setattr(self, "permit", permit),
            lambda failure: setattr(self, "why", failure.value),
        )


def test_who_waits_for_a_server_that_goes_is_told() -> None:
    """So is who comes while it is away; the line is open again once it is back."""
    scene = Scene()
    holder, waiter = scene.join(), Told(scene.line.join(Ticket()))
    scene.line.server_down(GONE)
    assert waiter.why == GONE
    assert scene.line.waiting == 0
    with pytest.raises(ApiError) as caught:
        scene.join()
    assert caught.value == GONE
    assert holder.permit is not None
    holder.permit.abandon()
    assert (scene.line.running, scene.line.settling) == (0, 0), "nothing works on it any more"
    scene.line.server_up()
    assert scene.join().permit is not None
    assert scene.clock.getDelayedCalls() == []


def test_slots_of_a_server_that_goes_rest() -> None:
    """Permits that were out for it are back at once, each once, and nobody is sent there."""
    scene = Scene(slots=2)
    scene.server.busy = 2
    leavers = [scene.join(), scene.join()]
    waiter = Told(scene.line.join(Ticket()))
    for leaver in leavers:
        assert leaver.permit is not None
        leaver.permit.abandon()
    scene.line.server_down(GONE)
    assert waiter.permit is None
    assert waiter.why == GONE
    assert scene.line.settling == 0
    for leaver in leavers:
        assert leaver.permit is not None
        leaver.permit.idle()
    scene.line.server_up()
    callers = [scene.join() for _ in range(3)]
    assert [caller.permit is not None for caller in callers] == [True, True, False]
    scene.clock.advance(60)
    assert scene.server.asked == 0


def test_a_place_is_kept_while_the_server_is_away() -> None:
    """Who was cut off by its end comes again, and goes before who came later."""
    scene = Scene()
    cut = scene.join(key=b"a")
    scene.line.server_down(GONE)
    assert cut.permit is not None
    cut.permit.cut()
    scene.line.server_up()
    other = scene.join(key=b"b")
    again = scene.join(key=b"a")
    assert again.permit is not None
    assert other.permit is None


def test_a_new_server_holds_no_conversation() -> None:
    """None goes first for the sake of a slot that is empty by now."""
    scene = Scene()
    held = scene.join(conversation="A")
    scene.line.server_down(GONE)
    assert held.permit is not None
    held.permit.finished()
    scene.line.server_up()
    blocker = scene.join()
    first, second = scene.join(conversation="B"), scene.join(conversation="A")
    assert blocker.permit is not None
    blocker.permit.finished()
    assert first.permit is not None
    assert second.permit is None


def test_a_refusal_does_not_remember_who_was_refused() -> None:
    """While a server is away for long, nothing of the calls that come stays in memory."""
    scene = Scene()
    scene.line.server_down(GONE)
    lengths = set()
    for _ in range(5):
        with pytest.raises(ApiError) as caught:
            scene.join()
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1
