"""The turn of one call: from its place in the line until its slot is given back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar

import attrs
from twisted.internet.defer import CancelledError

from gateway.tier.line import Permit, Ticket
from gateway.tier.tier import Tier
from gateway.wire.errors import ApiError

Json = Any
T = TypeVar("T")


@attrs.define(eq=False)
class Turn:
    """
    The permit of one call, as an asynchronous context manager: it is entered when its turn comes.

    Who leaves it without `finished` has abandoned the call, or was cut; its slot is given back once
    it is known to be idle.  Progress ends before the permit goes to the next one.
    """

    _tier: Tier
    _ticket: Ticket
    _permit: Permit = attrs.field(init=False)

    async def __aenter__(self) -> Self:
        self._tier.cache.give_way()
        self._permit = await self._tier.line.join(self._ticket)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tier.progress.end(self._ticket.name)
        if kind is not None and issubclass(kind, CancelledError):
            self._permit.cut()
        else:
            self._permit.abandon()

    async def ask(
        self,
        body: Mapping[str, Json],
        started: Callable[[], None],
        ask: Callable[[], Awaitable[T]],
    ) -> T:
        """What `ask` gives, once the slot is ready for `body`; a refusal leaves the slot idle."""
        try:
            started()
            if self._tier.remote is not None:
                self._permit.idle()  # whoever is hung up on there is gone; no slot can be asked
            await self._tier.cache.before(body)
            self._tier.line.check_server()  # it may have gone meanwhile, and hears of no call now
            name, tokens = self._ticket.name, self._ticket.tokens
            self._tier.progress.begin(name, tokens, idle=self._permit.idle)
            return await ask()
        except ApiError:
            self.finished()
            raise

    def finished(self) -> None:
        """The server has ended its answer: the next call may have the slot before this returns."""
        self._tier.progress.end(self._ticket.name)
        self._permit.finished()
