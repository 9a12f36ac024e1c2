"""
The way of one call, from its parsed body to its last event.

This is the only room that knows the whole way.  It decides nothing itself (`gateway.policy` does),
makes no call ready (`gateway.preparation` does) and touches no socket (`gateway.tier` and
`gateway.llama` do).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeVar
from uuid import uuid4

import attrs
import orjson
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.config import RouteRule
from gateway.figures import ENDED_BY_HAND
from gateway.ledger import Ledger, Record
from gateway.policy import patience, routes, tools
from gateway.policy.calls import Call
from gateway.policy.routes import Route
from gateway.preparation import Preparation, Prepared, identity
from gateway.tier import answer, embeddings
from gateway.tier.answer import Client, Teller
from gateway.tier.ended import Ended
from gateway.tier.line import Ticket
from gateway.tier.tier import Tier
from gateway.upstream import Lost
from gateway.wire import openai
from gateway.wire import request as wire
from gateway.wire.dialect import MESSAGES, Dialect
from gateway.wire.errors import ApiError, Unavailable
from gateway.wire.events import Repair, Truncated
from gateway.wire.pulse import Times
from gateway.wire.request import MessagesRequest

Json = Any
T = TypeVar("T")

#: How often a call for a message may find that a server which was up is not.
_AWAY: Final = 20

log = Logger()


#: Reads a body of another API: the Messages request that it is, and in whose words to answer.
Read = Callable[[bytes], tuple[MessagesRequest, Dialect]]


class Caller(Client, Protocol):
    """A client that also wants to know where its call goes, before the first byte."""

    @property
    def request_id(self) -> str:
        """What the client was told as ``request-id``."""

    def routed(self, tier: str, kind: str, degraded: str = "") -> None:
        """The call goes to `tier`, as one of `kind`; `degraded` says why not where it belongs."""


@attrs.define(eq=False)
class Dispatch:
    """
    Conducts calls through the house; what is changed here holds for calls that come later.

    Attributes:
        tiers: all there are, by name.
        rules: the routes of the configuration.
        ledger: where each call is written down.
        times: what keeps a waiting client alive, and when.
        reactor: the clock.
    """

    tiers: Mapping[str, Tier]
    rules: Sequence[RouteRule]
    ledger: Ledger
    times: Times
    reactor: IReactorTime
    _open: dict[str, Deferred[Any]] = attrs.field(factory=dict, init=False)
    _ended: Ended = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._ended = Ended(self.reactor)

    async def message(
        self,
        raw: bytes,
        headers: Mapping[str, str],
        caller: Caller,
        read: Read | None = None,
    ) -> bytes | None:
        """
        Answer a Messages call, or one that `read` makes one of.

        Args:
            raw: its body.
            headers: its headers, names in lower case.
            caller: who wants the answer.
            read: gives the request in `raw`, and in whose words it is answered.

        Returns:
            The JSON of the whole message, or None where it was streamed to `caller`.

        Raises:
            ApiError: it is refused, or it failed before its status was sent.
        """
        with self.ledger.call(caller.request_id) as record:
            request, dialect = (wire.parse(raw), MESSAGES) if read is None else read(raw)
            one_call = tools.takes_one_call(request)
            repair = Repair(f"msg_{uuid4().hex}", request.model, one_call=one_call)
            record.usage = repair.usage
            key = partial(identity, request, headers)
            note = partial(self._note, record, request, caller, key)

            async def ask_once(teller: Teller) -> None:
                ready = await self._preparation.message(request, headers, record, note)
                repair.tier = ready.tier.name
                teller.ready(partial(ready.tier.counter.count, ready.body))
                ticket = ready.ticket(partial(self.ledger.content, record))
                asking = partial(self._asking(ready, ticket, headers, repair), teller)
                if ready.tier.remote is not None:
                    return await asking()
                return await ready.tier.deaths.during(ticket, asking)

            async def ask(teller: Teller) -> None:
                def again() -> bool:
                    can = teller.again()
                    if can:
                        repair.again()
                    return can

                asking = self._until_answered(
                    record, partial(ask_once, teller), again=again, may_be_away=_AWAY
                )
                await self._endable(record, key, asking)

            if not request.stream:
                limit = patience.client_waits(headers)
                return await answer.whole(self.reactor, repair, ask, limit, dialect)
            failure = await answer.stream(
                caller, self.reactor, self.times, repair, caller.request_id, ask, dialect
            )
            if failure is not None:
                record.outcome = record.outcome or f"broken: {failure.kind}"
            return None

    async def chat(self, raw: bytes, headers: Mapping[str, str], caller: Caller) -> bytes | None:
        """As `message`, for a chat call of the OpenAI API."""
        read = partial(openai.read_chat, created=self._now)
        return await self.message(raw, headers, caller, read)

    async def complete(
        self, raw: bytes, headers: Mapping[str, str], caller: Caller
    ) -> bytes | None:
        """As `message`, for a bare prompt, as the OpenAI API has it."""
        read = partial(openai.read_completion, created=self._now)
        return await self.message(raw, headers, caller, read)

    async def embed(self, raw: bytes, headers: Mapping[str, str], caller: Caller) -> bytes:
        """
        What the server of a tier says to a call for embeddings.

        Raises:
            ApiError: the body is wrong; or the server is down, or has no embeddings.
        """
        with self.ledger.call(caller.request_id) as record:
            request = openai.read_embedding(raw)
            key = partial(identity, request, headers)
            note = partial(self._note, record, request, caller, key)

            async def ask_once() -> dict[str, Json]:
                ready = await self._preparation.embedding(request, headers, record, note)
                ticket = ready.ticket(partial(self.ledger.content, record))
                started = partial(self.ledger.started, record)
                how: Any = {"ticket": ticket, "started": started}
                asking = partial(embeddings.ask, ready.tier, request.prepared, ready.body, **how)
                return await ready.tier.deaths.during(ticket, asking)

            asking = self._until_answered(record, ask_once)
            try:
                said = await self._endable(record, key, asking)
            except Lost as error:
                raise answer.went_away(record.tier) from error
            usage = said.get("usage")
            if isinstance(usage, Mapping):
                record.usage.learn({"input_tokens": usage.get("prompt_tokens")})
            return orjson.dumps(said)

    async def count(self, raw: bytes, headers: Mapping[str, str], caller: Caller) -> int:
        """
        The tokens that a call with this body would have as its prompt, on the tier it would go to.

        Raises:
            ApiError: the body is wrong, or the server is down; 404, it counts no tokens.
        """
        with self.ledger.call(caller.request_id) as record:
            request = wire.parse(raw, counting=True)
            record.kind, record.model = "count", request.model

            def note(_call: Call, route: Route) -> None:
                record.tier, record.rule = route.tier, route.rule
                caller.routed(route.tier, "count", route.degraded)

            async def ask_once() -> int:
                tier, body = await self._preparation.count(request, headers, note)
                tokens = await tier.counter.count(body, headers)
                if tokens is None:
                    raise _counts_none(tier)
                return tokens

            record.usage.input = tokens = await self._until_answered(record, ask_once)
            return tokens

    def end(self, call: str) -> bool:
        """
        End the open call with this id, because a person wants it; whether there is one.

        Its client is told not to send it again, and is refused if it does so soon.
        """
        asking = self._open.pop(call, None)
        if asking is None:
            return False
        asking.cancel()
        return True

    def status(self) -> dict[str, Json]:
        """For ``/status``: the tiers, and the calls with how far they are and when they go."""
        found = {
            "tiers": {name: tier.status() for name, tier in self.tiers.items()},
            **self.ledger.status(),
        }
        turns: dict[str, tuple[int, float | None, str]] = {}
        for tier in self.tiers.values():
            turns |= tier.turns()
        for call in found["calls"]:
            where = self.tiers.get(call["tier"])
            progress = None if where is None else where.progress.of(call["id"])
            call["progress"] = None if progress is None else progress.as_json()
            turn = turns.get(call["id"], (None, None, ""))
            call["place"], call["eta"], call["why"] = turn
        return found

    @property
    def _now(self) -> int:
        """Seconds since 1970."""
        return int(self.reactor.seconds())

    # --- how a call is conducted ------------------------------------------------------------------

    @property
    def _preparation(self) -> Preparation:
        """What makes a call ready by what holds now."""
        return Preparation(self.tiers, self.rules, self.reactor)

    def _note(
        self,
        record: Record,
        request: MessagesRequest,
        caller: Caller,
        key: Callable[[], bytes],
        call: Call,
        route: Route,
    ) -> None:
        """Write down what a call is and where it goes; raises ApiError if a person ended it."""
        record.kind, record.session, record.model = call.kind, call.session, request.model
        record.tier, record.rule, record.background = route.tier, route.rule, route.background
        caller.routed(route.tier, call.kind, route.degraded)
        self._ended.check(key)

    async def _until_answered(
        self,
        record: Record,
        ask: Callable[[], Awaitable[T]],
        *,
        again: Callable[[], bool] = lambda: True,
        may_be_away: int = 0,
    ) -> T:
        """
        What `ask` gives, asked anew where a server goes away.

        Args:
            record: says which one.
            ask: may raise Lost, Truncated or Unavailable.
            again: whether the answer can still be told from its beginning.
            may_be_away: how often the server may not even be there, where not as often as lost.
        """
        lost = away = 0
        while True:
            try:
                return await ask()
            except (Lost, Truncated, Unavailable) as error:
                # A reload may have taken its tier away; then it goes elsewhere now.
                tier = self.tiers.get(record.tier, self.tiers[routes.MAIN])
                away += isinstance(error, Unavailable)
                lost += not isinstance(error, Unavailable)
                resends = tier.config.resends
                if lost > resends or away > max(resends, may_be_away) or not again():
                    raise
                tier.lost()
                record.again()
                log.warn("{id}: {why}; asking again", id=record.id, why=str(error))

    async def _endable(
        self,
        record: Record,
        key: Callable[[], bytes],
        asking: Coroutine[Deferred[Any], Any, T],
    ) -> T:
        """What `asking` gives, unless a person ends it; `key` tells the call from others."""
        under_way = self._open[record.id] = Deferred.fromCoroutine(asking)
        try:
            found: T = await under_way
        except CancelledError:
            if record.id in self._open:
                raise  # it was the client who left
            record.outcome = ENDED_BY_HAND
            raise self._ended.end(key()) from None
        finally:
            self._open.pop(record.id, None)
        return found

    def _asking(
        self, ready: Prepared, ticket: Ticket, headers: Mapping[str, str], repair: Repair
    ) -> answer.Ask:
        """How the answer of `ready` is asked for, once somebody says how it is to be told."""

        def started() -> None:
            self.ledger.started(ready.record)
            ready.check()

        how: Any = {"ticket": ticket, "started": started}
        if ready.form is None:
            how["headers"] = headers
            return partial(answer.from_model, ready.tier, ready.body, repair, **how)
        how["tokens"] = ready.form_tokens
        under = answer.under_schema if ready.meant.is_bound else answer.words_under_schema
        return partial(under, ready.tier, ready.body, ready.form, repair, **how)


def _counts_none(tier: Tier) -> ApiError:
    return ApiError("not_found_error", f"The server of tier {tier.name!r} counts no tokens.")
