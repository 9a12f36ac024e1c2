"""
The waiting line in front of one model's slots.

One loop takes a permit of the `DeferredSemaphore` and only then chooses who goes, so that who comes
late but matters more can still go first (`gateway.policy.order`).  The permit belongs to the slot,
not to the caller: a caller that is cancelled goes at once, and its permit comes back when the slot
is known to be idle.  So llama-server never has more calls than slots, and never a queue of its own,
where a client's leaving goes unnoticed (docs/protocol.md, "Cancellation").

Whoever is cut off keeps his place and his age for two seconds: Claude Code sends a call again after
0.6 s, and llama-server has kept what it evaluated of it.  Nobody else goes into a kept place, and
nobody is given another's answer.

The line writes no bytes; it knows nothing of HTTP.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from typing import Any, Final

import attrs
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from gateway.background import begin
from gateway.policy import order
from gateway.policy.order import Rank
from gateway.wire.errors import ApiError, overloaded, stopping

#: Seconds after a cancellation until the slots are first asked for, and from then on between two
#: questions.  llama-server looks once a second whether a client is still there, and each question
#: puts that off.
FIRST_ASK: Final = 1.5
NEXT_ASK: Final = 2.0

#: Seconds for which the place of a call that was cut off is kept.
KEPT: Final = 2.0

#: Seconds that a refused client is told to wait at least and at most.
_SOONEST: Final = 1.0
_LATEST: Final = 600.0

#: What an older call's time in a slot counts for, beside each new one.
_FADING: Final = 0.7

log = Logger()


@attrs.frozen
class Ticket:
    """
    What a line is told of a call.

    Attributes:
        rank: who waits for it.
        conversation: whose prompt it goes on with; "" for none.
        key: the same for the same call sent again, and for no other.
        name: what the call is called in the log.
        tokens: of its prompt, where they were counted.
        seen: gives the share of the prompt that the server has likely kept.
        arrived: when it came to us, in seconds on the line's clock; None is now.
        cold: told, as JSON, why its prompt was as cold as it was.
        content: told, once or more often, that there is content of its answer.
    """

    rank: Rank = Rank.PERSON
    conversation: str = ""
    key: Callable[[], bytes] = lambda: b""
    name: str = ""
    tokens: int | None = None
    seen: Callable[[], float] = lambda: 0.0
    arrived: float | None = None
    cold: Callable[[Any], None] = lambda _: None
    content: Callable[[], None] = lambda: None


@attrs.define(eq=False)
class Permit:
    """
    The right to use one slot, once.

    `finished` gives it back at once: the upstream has ended its answer.  `abandon` and `cut` give
    it back when the slot is known to be idle; `cut` also keeps the caller's place.  The first
    counts.  `idle` is for who hears it from the server itself.
    """

    _give_back: Callable[[], None]
    _settle: Callable[[Permit], None]
    _settled: Callable[[Permit], None]
    _keep_place: Callable[[], None]
    _spent: bool = False
    _is_idle: bool = False

    def finished(self) -> None:
        if not self._spent:
            self._spent = True
            self._give_back()

    def abandon(self) -> None:
        if self._spent:
            return
        if self._is_idle:
            self.finished()
        else:
            self._spent = True
            self._settle(self)

    def idle(self) -> None:
        """The server says that the slot is idle."""
        self._is_idle = True
        if self._spent:
            self._settled(self)

    def cut(self) -> None:
        """The client is gone, and may come again."""
        if not self._spent:
            self._keep_place()
            self.abandon()


@attrs.define(eq=False)
class _Place:
    """One place in the line, taken or kept."""

    ticket: Ticket
    arrived: float
    number: int
    turn: Deferred[Permit] | None = None
    key: bytes = b""
    expiry: IDelayedCall | None = None

    @property
    def rank(self) -> Rank:
        return self.ticket.rank

    @property
    def conversation(self) -> str:
        return self.ticket.conversation


@attrs.define(eq=False)
class Line:
    """
    The calls that wait for one model, and those that run on it.

    Attributes:
        slots: how many calls may run at once.
        max_waiting: how many may wait; one more is refused.
        ageing: seconds after which a waiting call goes before all others.
        busy_slots: asks the server how many slots work; raises ApiError when the server is gone.
    """

    slots: int
    max_waiting: int
    ageing: float
    busy_slots: Callable[[], Awaitable[int]]
    _reactor: IReactorTime
    _places: list[_Place] = attrs.field(factory=list, init=False)
    _numbers: Iterator[int] = attrs.field(factory=count, init=False)
    _kept: int = attrs.field(default=0, init=False)
    _held: deque[str] = attrs.field(init=False)
    _running: int = attrs.field(default=0, init=False)
    _settling: int = attrs.field(default=0, init=False)
    _leaving: set[Permit] = attrs.field(factory=set, init=False)
    _pace: float = attrs.field(default=0.0, init=False)
    _change: Deferred[None] | None = attrs.field(default=None, init=False)
    _loop: Deferred[None] | None = attrs.field(default=None, init=False)
    _asking: Deferred[None] | None = attrs.field(default=None, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    _down: ApiError | None = attrs.field(default=None, init=False)
    _semaphore: DeferredSemaphore = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._semaphore = DeferredSemaphore(self.slots)
        self._held = deque(maxlen=self.slots)

    # --- for who runs the house -------------------------------------------------------------------

    def start(self) -> None:
        """Let calls in."""
        self._loop = begin(self._serve())

    def stop(self) -> None:
        """Let nobody in any more; who waits is cancelled, and no place is kept."""
        self._stopped = True
        for ended in (self._loop, self._asking):
            if ended is not None:
                ended.cancel()
        for place in list(self._places):
            if place.turn is not None:
                place.turn.cancel()
            else:
                self._drop(place)

    def check_server(self) -> None:
        """Raise ApiError, 503, if the server is gone."""
        if self._down is not None:
            raise self._down.with_traceback(None)  # which would grow, and hold what it went through

    def server_up(self) -> None:
        """The server is there, and its slots may work."""
        self._down = None

    def server_down(self, why: ApiError) -> None:
        """The server is gone: no slot works, and who waits or comes is told `why`."""
        self._down = why
        self._held.clear()
        self._leaving.clear()
        if self._asking is not None:
            self._asking.cancel()
        for place in [place for place in self._places if place.turn is not None]:
            self._places.remove(place)
            assert place.turn is not None
            place.turn.errback(why)
        # Last, so that no permit goes to somebody who waits.
        settled, self._settling = self._settling, 0
        for _ in range(settled):
            self._semaphore.release()

    def places(self) -> list[tuple[Ticket, str]]:
        """The waiting calls, in the order in which they would go now, and why."""
        waiting = [place for place in self._places if place.turn is not None]
        now = self._reactor.seconds()
        indices = order.in_order(waiting, self._held, now, self.ageing)
        return [
            (waiting[index].ticket, order.why(waiting[index], self._held, now, self.ageing))
            for index in indices
        ]

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return len(self._places) - self._kept

    @property
    def running(self) -> int:
        """Calls that hold a permit."""
        return self._running

    @property
    def settling(self) -> int:
        """Permits whose call is gone and whose slot may still work."""
        return self._settling

    # --- for a call -------------------------------------------------------------------------------

    def join(self, ticket: Ticket, *, in_any_case: bool = False) -> Deferred[Permit]:
        """
        Wait for a slot.

        Args:
            ticket: what is to be known of the call.
            in_any_case: also where the line is full.

        Returns:
            A Deferred of the permit.  Cancelling it leaves the line.

        Raises:
            ApiError: 529, the line is full; 503, it has stopped, or the server is down.
        """
        if self._stopped:
            raise stopping()
        self.check_server()
        if self.waiting >= self.max_waiting and not in_any_case:
            soon = self._pace * self.waiting / self.slots
            raise overloaded(
                f"{self.waiting} calls are waiting for this model already; try again later.",
                retry_after=round(min(max(_SOONEST, soon), _LATEST)),
            )
        place = self._kept_for(ticket)
        if place is not None:
            place.ticket = ticket  # its age is that of the call that was cut off, all else is new
        else:
            now = self._reactor.seconds()
            arrived = now if ticket.arrived is None else ticket.arrived
            place = _Place(ticket, arrived, next(self._numbers))
            self._places.append(place)
        turn: Deferred[Permit] = Deferred(lambda _: self._leave(place))
        place.turn = turn
        self._wake()  # which may be its turn already
        return turn

    def _leave(self, place: _Place) -> None:
        """A waiting call is cancelled."""
        self._places.remove(place)
        self._keep(place)

    # --- places of calls that were cut off --------------------------------------------------------

    def _keep(self, gone: _Place) -> None:
        """Keep the place of a call that was cut off, in the order of arrival."""
        key = gone.ticket.key()
        if self._stopped or not key:
            return
        place = _Place(gone.ticket, gone.arrived, gone.number, key=key)
        place.expiry = self._reactor.callLater(KEPT, self._drop, place)
        insort(self._places, place, key=lambda each: each.number)
        self._kept += 1

    def _drop(self, place: _Place) -> None:
        """Nobody came back for it."""
        self._forget(place)
        self._places.remove(place)
        self._wake()

    def _forget(self, place: _Place) -> None:
        """It is kept no longer."""
        self._kept -= 1
        if place.expiry is not None and place.expiry.active():
            place.expiry.cancel()
        place.expiry = None

    def _kept_for(self, ticket: Ticket) -> _Place | None:
        """The place that is kept for this very call."""
        if not self._kept:
            return None
        key = ticket.key()
        for place in self._places:
            if place.turn is None and place.key == key:
                self._forget(place)
                return place
        return None

    # --- the loop ---------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            await self._semaphore.acquire()
            try:
                place = await self._next()
            except CancelledError:
                self._semaphore.release()
                raise
            turn, place.turn = place.turn, None
            assert turn is not None
            self._running += 1
            self._held.append(place.conversation)
            turn.callback(self._permit(place))

    async def _next(self) -> _Place:
        """The place that goes next, taken out of the line, once there is one."""
        while True:
            if self._places:
                now = self._reactor.seconds()
                index = order.next_to_go(self._places, self._held, now, self.ageing)
                if self._places[index].turn is None:
                    index = self._behind_kept(now)
                if index >= 0:
                    return self._places.pop(index)
            self._change = Deferred()
            await self._change

    def _behind_kept(self, now: float) -> int:
        """Who goes, as there is a slot for each place before it that is kept; -1 for nobody."""
        free = self._semaphore.tokens  # beside the one that is to be given now
        for index in order.in_order(self._places, self._held, now, self.ageing):
            if self._places[index].turn is not None:
                return index
            if free == 0:
                return -1
            free -= 1
        return -1

    def _release(self) -> None:
        """A slot is idle; also who has a free one and waits for another wants to know."""
        self._semaphore.release()
        self._wake()

    def _wake(self) -> None:
        """The line is another one now."""
        if self._change is not None:
            change, self._change = self._change, None
            change.callback(None)

    def _permit(self, place: _Place) -> Permit:
        began = self._reactor.seconds()

        def give_back() -> None:
            took = self._reactor.seconds() - began
            self._pace = took if not self._pace else self._pace * _FADING + took * (1 - _FADING)
            self._running -= 1
            self._release()

        return Permit(give_back, self._settle, self._settled, lambda: self._keep(place))

    # --- slots whose call is gone -----------------------------------------------------------------

    def _settle(self, permit: Permit) -> None:
        self._running -= 1
        if self._down is not None:
            self._release()
            return
        self._settling += 1
        self._leaving.add(permit)
        if self._asking is None:
            self._asking = begin(self._ask())

    def _settled(self, permit: Permit) -> None:
        """The slot of `permit` is idle, unless it was found to be so already."""
        if permit not in self._leaving:
            return
        self._leaving.discard(permit)
        if len(self._leaving) < self._settling:
            self._settling -= 1
            self._release()
            if not self._settling and self._asking is not None:
                self._asking.cancel()

    async def _ask(self) -> None:
        """Give back the permits of slots that have become idle, until none is out."""
        try:
            await deferLater(self._reactor, FIRST_ASK)
            while True:
                known = self._settling
                idle = await self._idle(known)
                for _ in range(min(idle, self._settling)):
                    self._settling -= 1
                    self._release()
                if not self._settling:
                    self._leaving.clear()
                    return
                await deferLater(self._reactor, NEXT_ASK)
        finally:
            self._asking = None

    async def _idle(self, settling: int) -> int:
        """
        How many of `settling` slots are idle.

        Those that work beyond the calls we know of are the ones that do not know yet that their
        client is gone.  A server that does not answer is down, or will not tell; either way it is
        not asked again.
        """
        running = self._running
        try:
            busy = await self.busy_slots()
        except ApiError as error:
            log.debug("cannot ask for the slots: {error}", error=error)
            return settling
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001  # whatever it is, no permit may be lost to it
            log.failure("cannot ask for the slots")
            return settling
        # Who began meanwhile may not be seen as busy yet.
        return max(0, min(settling, min(running, self._running) + settling - busy))
