"""
The waiting line in front of one model's slots.

One loop takes a permit of the `DeferredSemaphore` and only then chooses who goes, so that who comes
late but matters more can still go first (`gateway.policy.order`).  The permit belongs to the slot,
not to the caller: a caller that is cancelled goes at once, and its permit comes back when the slot
is known to be idle.  So llama-server never has more calls than slots, and never a queue of its own,
where a client's leaving goes unnoticed (docs/protocol.md, "Cancellation").

The line writes no bytes; it knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import attrs
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.policy import order
from gateway.wire.errors import ApiError, overloaded, unavailable

#: Seconds after a cancellation until the slots are first asked for, and from then on between two
#: questions.  llama-server looks once a second whether a client is still there, and each question
#: puts that off.
FIRST_ASK: Final = 1.5
NEXT_ASK: Final = 2.0

#: Seconds that a refused client is told to wait, for each call before it.
_PACE: Final = 1.0

log = Logger()


@attrs.define(eq=False)
class Permit:
    """
    The right to use one slot, once.

    `finished` gives it back at once: the upstream has ended its answer.  `abandon` gives it back
    when the slot is known to be idle.  The first of the two counts.
    """

    _give_back: Callable[[], None]
    _settle: Callable[[], None]
    _spent: bool = False

    def finished(self) -> None:
        if not self._spent:
            self._spent = True
            self._give_back()

    def abandon(self) -> None:
        if not self._spent:
            self._spent = True
            self._settle()


@attrs.define(eq=False)
class _Place:
    """One waiting call."""

    background: bool
    turn: Deferred[Permit]


@attrs.define(eq=False)
class Line:
    """
    The calls that wait for one model, and those that run on it.

    Attributes:
        slots: how many calls may run at once.
        max_waiting: how many may wait; one more is refused.
        busy_slots: asks the server how many slots work; raises ApiError when the server is gone.
    """

    slots: int
    max_waiting: int
    busy_slots: Callable[[], Awaitable[int]]
    _reactor: IReactorTime
    _waiting: list[_Place] = attrs.field(factory=list, init=False)
    _running: int = attrs.field(default=0, init=False)
    _settling: int = attrs.field(default=0, init=False)
    _arrival: Deferred[None] | None = attrs.field(default=None, init=False)
    _loop: Deferred[None] | None = attrs.field(default=None, init=False)
    _asking: Deferred[None] | None = attrs.field(default=None, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    _semaphore: DeferredSemaphore = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._semaphore = DeferredSemaphore(self.slots)

    # --- for who runs the house -------------------------------------------------------------------

    def start(self) -> None:
        """Let calls in."""
        self._loop = Deferred.fromCoroutine(self._serve())
        self._loop.addErrback(_unless_cancelled)

    def stop(self) -> None:
        """Let nobody in any more; who waits is cancelled."""
        self._stopped = True
        for ended in (self._loop, self._asking):
            if ended is not None:
                ended.cancel()
        for place in list(self._waiting):
            place.turn.cancel()

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Calls that hold a permit."""
        return self._running

    @property
    def settling(self) -> int:
        """Permits whose call is gone and whose slot may still work."""
        return self._settling

    # --- for a call -------------------------------------------------------------------------------

    def join(self, background: bool = False) -> Deferred[Permit]:
        """
        Wait for a slot.

        Args:
            background: give way to every call that is not.

        Returns:
            A Deferred of the permit.  Cancelling it leaves the line.

        Raises:
            ApiError: 529, the line is full; 503, it has stopped.
        """
        if self._stopped:
            raise unavailable("The gateway is stopping; try again.")
        if len(self._waiting) >= self.max_waiting:
            raise overloaded(
                f"{len(self._waiting)} calls are waiting for this model already; try again later.",
                retry_after=max(1, round(_PACE * len(self._waiting) / self.slots)),
            )
        place = _Place(background, Deferred(lambda _: self._waiting.remove(place)))
        self._waiting.append(place)
        if self._arrival is not None:
            arrival, self._arrival = self._arrival, None
            arrival.callback(None)
        return place.turn

    # --- the loop ---------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            await self._semaphore.acquire()
            try:
                while not self._waiting:
                    self._arrival = Deferred()
                    await self._arrival
            except CancelledError:
                self._semaphore.release()
                raise
            place = self._waiting.pop(order.next_to_go(self._waiting))
            self._running += 1
            place.turn.callback(Permit(self._give_back, self._settle))

    def _give_back(self) -> None:
        self._running -= 1
        self._semaphore.release()

    # --- slots whose call is gone -----------------------------------------------------------------

    def _settle(self) -> None:
        self._running -= 1
        self._settling += 1
        if self._asking is None:
            self._asking = Deferred.fromCoroutine(self._ask())
            self._asking.addErrback(_unless_cancelled)

    async def _ask(self) -> None:
        """Give back the permits of slots that have become idle, until none is out."""
        try:
            await deferLater(self._reactor, FIRST_ASK)
            while True:
                known = self._settling
                idle = await self._idle(known)
                for _ in range(idle):
                    self._settling -= 1
                    self._semaphore.release()
                if not self._settling:
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
        return max(0, min(settling, self._running + settling - busy))


def _unless_cancelled(failure: Failure) -> None:
    failure.trap(CancelledError)
