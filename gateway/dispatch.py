"""
The way of one call, from its parsed body to its last event.

This is the only room that knows the whole way.  It decides nothing itself (`gateway.policy` does)
and touches no socket (`gateway.tier` and `gateway.llama` do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from hashlib import blake2b
from typing import Any, Final, Protocol
from uuid import uuid4

import attrs
import orjson
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.config import RouteRule
from gateway.ledger import Ledger, Record
from gateway.llama.client import Lost
from gateway.policy import calls, order, patience, prefix, routes, schema, tools
from gateway.policy.calls import Call
from gateway.policy.routes import Route
from gateway.policy.schema import Form
from gateway.tier import answer
from gateway.tier.answer import Client, Teller
from gateway.tier.line import Ticket
from gateway.tier.tier import Tier
from gateway.wire import request as wire
from gateway.wire.errors import Unavailable, down, prompt_too_long
from gateway.wire.events import Repair, Truncated
from gateway.wire.pulse import Times
from gateway.wire.request import MessagesRequest

Json = Any

#: How often a call may find that a server which was up is not.
_AWAY: Final = 20

#: Tokens that a template may add to what a body says: a preamble, and so much for each tool.
_PREAMBLE: Final = 1024
_EACH_TOOL: Final = 64

log = Logger()


class Caller(Client, Protocol):
    """A client that also wants to know where its call goes, before the first byte."""

    @property
    def request_id(self) -> str:
        """What the client was told as ``request-id``."""

    def routed(self, tier: str, kind: str, degraded: str = "") -> None:
        """The call goes to `tier`, as one of `kind`; `degraded` says why not where it belongs."""


@attrs.frozen
class _Prepared:
    """
    A call that is ready to be sent.

    Attributes:
        tokens: of its prompt; None where they were not counted.
        check: raises ApiError if it is too late for it, when its turn comes.
    """

    request: MessagesRequest
    call: Call
    route: Route
    tier: Tier
    body: dict[str, Json]
    tokens: int | None
    record: Record
    check: Callable[[], None] = lambda: None


@attrs.define(eq=False)
class Dispatch:
    """
    Conducts calls through the house; what is changed here holds for calls that come later.

    Attributes:
        tiers: all there are, by name.
        rules: the routes of the configuration.
        ledger: where each call is written down.
        times: what keeps a waiting client alive, and when.
    """

    tiers: Mapping[str, Tier]
    rules: Sequence[RouteRule]
    ledger: Ledger
    times: Times
    _reactor: IReactorTime

    async def message(self, raw: bytes, headers: Mapping[str, str], caller: Caller) -> bytes | None:
        """
        Answer a Messages call.

        Args:
            raw: its body.
            headers: its headers, names in lower case.
            caller: who wants the answer.

        Returns:
            The JSON of the whole message, or None where it was streamed to `caller`.

        Raises:
            ApiError: it is refused, or it failed before its status was sent.
        """
        with self.ledger.call(caller.request_id) as record:
            request = wire.parse(raw)
            form = None if request.schema is None else schema.read(request.schema)
            one_call = tools.takes_one_call(request)
            repair = Repair(f"msg_{uuid4().hex}", request.model, one_call=one_call)
            record.usage = repair.usage

            async def ask_once(teller: Teller) -> None:
                ready = await self._prepare(request, headers, caller, record)
                repair.tier = ready.tier.name
                teller.ready(partial(ready.tier.counter.count, ready.body))
                ticket = _ticket(ready)
                asking = self._asking(ready, ticket, form, repair)
                await ready.tier.deaths.during(ticket, partial(asking, teller))

            async def ask(teller: Teller) -> None:
                """As `ask_once`, anew where a server goes away before its answer is told."""
                lost = away = 0
                while True:
                    try:
                        return await ask_once(teller)
                    except (Lost, Truncated, Unavailable) as error:
                        # A reload may have taken its tier away; then it goes elsewhere now.
                        tier = self.tiers.get(record.tier, self.tiers[routes.MAIN])
                        away += isinstance(error, Unavailable)
                        lost += not isinstance(error, Unavailable)
                        too_often = lost > tier.config.resends or away > _AWAY
                        if too_often or not teller.again():
                            raise
                        tier.lost()
                        record.again()
                        repair.again()
                        log.warn("{id}: {why}; asking again", id=record.id, why=str(error))

            if not request.stream:
                limit = patience.client_waits(headers)
                return await answer.whole(self._reactor, repair, ask, limit)
            failure = await answer.stream(
                caller, self._reactor, self.times, repair, caller.request_id, ask
            )
            if failure is not None:
                record.outcome = f"broken: {failure.kind}"
            return None

    async def count(self, raw: bytes, headers: Mapping[str, str], caller: Caller) -> int:
        """
        The tokens that a call with this body would have as its prompt, on the tier it would go to.

        Raises:
            ApiError: the body is wrong, or the server is down.
        """
        with self.ledger.call(caller.request_id) as record:
            request = wire.parse(raw, counting=True)
            record.kind, record.model = "count", request.model
            lost = 0
            while record.usage.input is None:
                request, call, wanted = self._understand(request, headers)
                tier, body, route = await self._place(request, call, wanted)
                record.tier, record.rule = route.tier, route.rule
                caller.routed(route.tier, "count", route.degraded)
                try:
                    record.usage.input = await tier.counter.count(body)
                except Unavailable:
                    lost += 1
                    if lost > tier.config.resends:
                        raise
                    tier.lost()
            return record.usage.input

    def status(self) -> dict[str, Json]:
        """For ``/status``: the tiers, and the calls with how far they are and when they go."""
        found = {
            "tiers": {name: tier.status() for name, tier in self.tiers.items()},
            **self.ledger.status(),
        }
        turns: dict[str, tuple[int, float | None]] = {}
        for tier in self.tiers.values():
            turns |= tier.turns()
        for call in found["calls"]:
            where = self.tiers.get(call["tier"])
            progress = None if where is None else where.progress.of(call["id"])
            call["progress"] = None if progress is None else progress.as_json()
            call["place"], call["eta"] = turns.get(call["id"], (None, None))
        return found

    # --- the rooms on the way ---------------------------------------------------------------------

    def _understand(
        self, request: MessagesRequest, headers: Mapping[str, str]
    ) -> tuple[MessagesRequest, Call, Route]:
        call = calls.understand(request, headers)
        if call.kind == "hook":  # an older client sends its tools along, and wants a verdict
            request = request.without_tools()
        return request, call, routes.choose(call, request.model, self.rules, self.tiers.keys())

    async def _prepare(
        self,
        request: MessagesRequest,
        headers: Mapping[str, str],
        caller: Caller,
        record: Record,
    ) -> _Prepared:
        """Decide all that can be decided, and refuse what can be refused, before the line."""
        request, call, route = self._understand(request, headers)
        self._note(record, request, call, route, caller)
        tier, body, route = await self._place(request, call, route)
        self._note(record, request, call, route, caller)
        if _is_bounded(call, route):
            body["max_tokens"] = min(request.max_tokens, tier.config.answer_tokens)
        body["max_tokens"], tokens = await self._room(body, tier)
        ready = _Prepared(request, call, route, tier, body, tokens, record)
        if call.kind == "classifier" and route.tier == routes.MAIN:
            return attrs.evolve(ready, check=await self._in_time(ready, headers))
        return ready

    def _note(
        self, record: Record, request: MessagesRequest, call: Call, route: Route, caller: Caller
    ) -> None:
        record.kind, record.session, record.model = call.kind, call.session, request.model
        record.tier, record.rule, record.background = route.tier, route.rule, route.background
        caller.routed(route.tier, call.kind, route.degraded)

    async def _place(
        self, request: MessagesRequest, call: Call, route: Route
    ) -> tuple[Tier, dict[str, Json], Route]:
        """
        The tier, the body as its server gets it, and the route.

        The route changes where its tier is down, or its window too small.

        Raises:
            ApiError: 503, nobody is there to answer.
        """
        tier = self.tiers[route.tier]
        if route.tier != routes.MAIN and not await tier.is_up():
            route = routes.while_down(route)
            tier = self.tiers[route.tier]
        if route.background and not await tier.is_up():
            raise down("Its model is down, and nobody waits for this call.", should_retry=False)
        await tier.ready()
        body = await self._body(request, call, tier)
        if route.tier == routes.MAIN:
            return tier, body, route
        window = (await tier.props()).n_ctx
        bound = tier.config.answer_tokens
        room = window - min(request.max_tokens or bound, bound)
        if _at_most(body) < room or (tokens := await tier.counter.count(body)) < room:
            return tier, body, route
        main = self.tiers[routes.MAIN]
        await main.ready()
        route = routes.too_long_for_small(route, tokens, window)
        return main, await self._body(request, call, main), route

    async def _body(self, request: MessagesRequest, call: Call, tier: Tier) -> dict[str, Json]:
        body = prefix.prepare(request, await tier.template())
        told = body.get("chat_template_kwargs")
        if told and call.is_in_conversation and not request.is_bound:
            body["chat_template_kwargs"] = tier.keep(call.conversation, told)
        return body

    async def _room(self, body: Mapping[str, Json], tier: Tier) -> tuple[int, int | None]:
        """
        The longest answer that fits the window, and the prompt, in tokens.

        The prompt is counted only where the size of the body does not rule an overflow out.

        Raises:
            ApiError: 400, the prompt itself does not fit.
        """
        window = (await tier.props()).n_ctx
        wanted = int(body["max_tokens"])
        if _at_most(body) < window:
            return min(wanted, window), None
        tokens = await tier.counter.count(body)
        if tokens >= window:
            raise prompt_too_long(tokens, window)
        return min(wanted, window - tokens), tokens

    async def _in_time(self, ready: _Prepared, headers: Mapping[str, str]) -> Callable[[], None]:
        """
        What refuses a safety check that its client would not wait for.

        Returns:
            Raises ApiError (503, not to be tried again) if it is too late by now.
        """
        pace, body, record = ready.tier.pace, ready.body, ready.record
        tokens = await ready.tier.counter.count(body)
        output = patience.verdict_tokens(body["max_tokens"])
        limit = patience.client_waits(headers)

        def check() -> None:
            needed = pace.estimate(tokens, pace.seen(body), output)
            waited = self._reactor.seconds() - record.arrived
            refusal = patience.refuse(tokens, needed, waited, limit)
            if refusal is not None:
                log.warn("{id} classifier: {why}", id=record.id, why=refusal.message)
                raise refusal

        check()
        return check

    def _asking(
        self, ready: _Prepared, ticket: Ticket, form: Form | None, repair: Repair
    ) -> answer.Ask:
        """How the answer of `ready` is asked for, once somebody says how it is to be told."""

        def started() -> None:
            self.ledger.started(ready.record)
            ready.check()

        how: Any = {"ticket": ticket, "started": started}
        if form is None:
            return partial(answer.from_model, ready.tier, ready.body, repair, **how)
        tokens = ready.body["max_tokens"]
        if _is_bounded(ready.call, ready.route):
            tokens = min(tokens, ready.tier.config.schema_tokens)
        under = answer.under_schema if ready.request.is_bound else answer.words_under_schema
        return partial(under, ready.tier, ready.body, form, repair, tokens=tokens, **how)


def _at_most(body: Mapping[str, Json]) -> int:
    """More tokens than the prompt can have: a token stands for at least one byte."""
    return len(orjson.dumps(body)) + _PREAMBLE + _EACH_TOOL * len(body.get("tools", ()))


def _ticket(ready: _Prepared) -> Ticket:
    """What the line is told of a call."""
    call, body = ready.call, ready.body

    def key() -> bytes:
        # Not max_tokens: an older client that asks again without a stream asks for fewer.
        prompt = {name: body[name] for name in body if name != "max_tokens"}
        return blake2b(orjson.dumps([call.conversation, prompt]), digest_size=16).digest()

    conversation = call.conversation if call.is_in_conversation else ""
    return Ticket(
        order.rank(call, ready.route),
        conversation,
        key,
        ready.record.id,
        ready.tokens,
        cache(partial(ready.tier.pace.seen, body)),
        ready.record.arrived,
        ready.record.knows_cold,
    )


def _is_bounded(call: Call, route: Route) -> bool:
    """Whether the answer is housekeeping, which a tiny model would never end by itself."""
    return call.is_housekeeping or (call.kind == "other" and route.tier != routes.MAIN)
