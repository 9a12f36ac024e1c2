"""
The calls during which one server went away.

A call that was sent twice and both times lost its server is likely to be the reason: it is refused
from then on, for an hour, so that it does not take the others with it.  One that lost its server
once is a suspect, until it is answered, and suspects go one at a time: who was only beside the one
that did it will not be beside it again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import attrs
from twisted.internet.defer import DeferredLock
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.tier.line import Ticket
from gateway.upstream import Lost
from gateway.wire.errors import ApiError, poisonous

Json = Any
_T = TypeVar("_T")

#: Deaths after which a call is poison, and seconds for which that is remembered.
_TOO_MANY: Final = 2
REMEMBERED: Final = 3600.0

#: Calls that are remembered at most.
_MOST: Final = 1000

log = Logger()


@attrs.define
class _Suspect:
    """A call that lost its server."""

    name: str
    last: float
    deaths: int = 1


@attrs.define(eq=False)
class Deaths:
    """What is remembered of them, oldest first."""

    _reactor: IReactorTime
    _suspects: OrderedDict[bytes, _Suspect] = attrs.field(factory=OrderedDict, init=False)
    _alone: DeferredLock = attrs.field(factory=DeferredLock, init=False)

    async def during(self, ticket: Ticket, asking: Callable[[], Awaitable[_T]]) -> _T:
        """
        Await `asking`, which sends the call of `ticket` to the server, and give what it gives.

        Raises:
            ApiError: 500, the call is poison; or what `asking` raises.
            Lost: the server went away.
        """
        suspect = self._known(ticket)
        if suspect is not None and suspect.deaths >= _TOO_MANY:
            raise self._refusal(suspect)
        try:
            if suspect is None:
                return await asking()
            async with self._alone:
                given = await asking()
            self._suspects.pop(ticket.key(), None)
        except Lost:
            suspect = self._blame(ticket)
            if suspect.deaths >= _TOO_MANY:
                raise self._refusal(suspect) from None
            raise
        return given

    def status(self) -> list[Json]:
        """For ``/status``: the calls that are refused, by the id that they had last."""
        self._forget()
        return [each.name for each in self._suspects.values() if each.deaths >= _TOO_MANY]

    def _known(self, ticket: Ticket) -> _Suspect | None:
        self._forget()
        # Most of the time there are none, and a key is the digest of a whole body.
        return self._suspects.get(ticket.key()) if self._suspects else None

    def _blame(self, ticket: Ticket) -> _Suspect:
        key, now = ticket.key(), self._reactor.seconds()
        suspect = self._suspects.pop(key, None)
        deaths = 1 if suspect is None else suspect.deaths + 1
        blamed = self._suspects[key] = _Suspect(ticket.name, now, deaths)
        if len(self._suspects) > _MOST:
            self._suspects.popitem(last=False)
        return blamed

    def _forget(self) -> None:
        oldest = self._reactor.seconds() - REMEMBERED
        while self._suspects and next(iter(self._suspects.values())).last < oldest:
            self._suspects.popitem(last=False)

    def _refusal(self, suspect: _Suspect) -> ApiError:
        log.warn(
            "{id} is refused: its server went away {deaths} times while it worked on it",
            id=suspect.name,
            deaths=suspect.deaths,
        )
        return poisonous(
            f"The model's server went away {suspect.deaths} times while it worked on this call, so"
            " it is not sent there again for an hour. Its log says why; another call may do."
        )
