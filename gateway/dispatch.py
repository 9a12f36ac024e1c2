"""
The way of one call, from its parsed body to its last event.

This is the only room that knows the whole way.  It decides nothing itself (`gateway.policy` does)
and touches no socket (`gateway.tier` and `gateway.llama` do).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol
from uuid import uuid4

import attrs
from twisted.internet.interfaces import IReactorTime

from gateway.config import RouteRule
from gateway.ledger import Ledger, Record
from gateway.policy import calls, prefix, routes
from gateway.policy.calls import Call
from gateway.policy.routes import Route
from gateway.tier import answer, constrained
from gateway.tier.answer import Client, Teller
from gateway.tier.tier import Tier
from gateway.wire import request as wire
from gateway.wire.errors import prompt_too_long
from gateway.wire.events import Repair
from gateway.wire.request import MessagesRequest

Json = Any

#: Tokens that a template may add to what a body says: a preamble, and so much for each tool.
_PREAMBLE: Final = 1024
_EACH_TOOL: Final = 64


class Caller(Client, Protocol):
    """A client that also wants to know where its call goes, before the first byte."""

    @property
    def request_id(self) -> str:
        """What the client was told as ``request-id``."""

    def routed(self, tier: str, kind: str) -> None:
        """The call goes to `tier`, as one of `kind`."""


@attrs.frozen
class _Prepared:
    """A call that is ready to be sent."""

    request: MessagesRequest
    call: Call
    route: Route
    tier: Tier
    body: dict[str, Json]
    record: Record


@attrs.frozen(eq=False)
class Dispatch:
    """
    Conducts calls through the house.

    Attributes:
        tiers: all there are, by name.
        rules: the routes of the configuration.
        ledger: where each call is written down.
    """

    tiers: Mapping[str, Tier]
    rules: Sequence[RouteRule]
    ledger: Ledger
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
            if request.schema is not None:
                constrained.usable(request.schema)
            ready = await self._prepare(request, headers, caller, record)
            repair = Repair(f"msg_{uuid4().hex}", request.model, ready.tier.name)
            record.usage = repair.usage
            ask = self._asking(ready, repair)
            if not request.stream:
                return await answer.whole(repair, ask)
            failure = await answer.stream(caller, self._reactor, repair, caller.request_id, ask)
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
            body = prefix.prepare(request)
            _, route = self._route(request, headers)
            route = await self._where_it_fits(request, body, route)
            record.kind, record.model = "count", request.model
            record.tier, record.rule = route.tier, route.rule
            caller.routed(route.tier, "count")
            tokens = await self.tiers[route.tier].counter.count(body)
            record.usage.input = tokens
            return tokens

    # --- the rooms on the way ---------------------------------------------------------------------

    def _route(self, request: MessagesRequest, headers: Mapping[str, str]) -> tuple[Call, Route]:
        call = calls.understand(request, headers)
        return call, routes.choose(call, request.model, self.rules, self.tiers.keys())

    async def _prepare(
        self,
        request: MessagesRequest,
        headers: Mapping[str, str],
        caller: Caller,
        record: Record,
    ) -> _Prepared:
        """Decide all that can be decided, and refuse what can be refused, before the line."""
        call, route = self._route(request, headers)
        record.kind, record.model = call.kind, request.model
        record.tier, record.rule = route.tier, route.rule
        caller.routed(route.tier, call.kind)
        body = prefix.prepare(request)
        route = await self._where_it_fits(request, body, route)
        tier = self.tiers[route.tier]
        if call.is_housekeeping:
            body["max_tokens"] = min(request.max_tokens, tier.config.answer_tokens)
        record.tier, record.rule, record.background = route.tier, route.rule, route.background
        caller.routed(route.tier, call.kind)
        body["max_tokens"] = await self._room(request, body, tier)
        return _Prepared(request, call, route, tier, body, record)

    async def _where_it_fits(
        self, request: MessagesRequest, body: Mapping[str, Json], route: Route
    ) -> Route:
        """`route`, or the main tier for what is too long for the small one."""
        if route.tier == routes.MAIN:
            return route
        tier = self.tiers[route.tier]
        window = (await tier.props()).n_ctx
        bound = tier.config.answer_tokens
        room = window - min(request.max_tokens or bound, bound)
        if _at_most(request) < room:
            return route
        tokens = await tier.counter.count(body)
        if tokens < room:
            return route
        return routes.too_long_for_small(route, tokens, window)

    async def _room(self, request: MessagesRequest, body: Mapping[str, Json], tier: Tier) -> int:
        """
        The longest answer that fits the window, in tokens.

        The prompt is counted only where the size of the body does not rule an overflow out.

        Raises:
            ApiError: 400, the prompt itself does not fit.
        """
        window = (await tier.props()).n_ctx
        wanted = int(body["max_tokens"])
        if _at_most(request) < window:
            return min(wanted, window)
        tokens = await tier.counter.count(body)
        if tokens >= window:
            raise prompt_too_long(tokens, window)
        return min(wanted, window - tokens)

    def _asking(self, ready: _Prepared, repair: Repair) -> answer.Ask:
        """How the answer of `ready` is asked for, once somebody says how it is to be told."""
        background, started = ready.route.background, partial(self.ledger.started, ready.record)
        schema = ready.request.schema
        if schema is None or ready.request.tools:

            async def ask(teller: Teller) -> None:
                await answer.from_model(
                    ready.tier, ready.body, repair, teller, background=background, started=started
                )

            return ask
        tokens = ready.body["max_tokens"]
        if ready.call.is_housekeeping:
            tokens = min(tokens, ready.tier.config.schema_tokens)

        async def ask_under_schema(teller: Teller) -> None:
            await answer.under_schema(
                ready.tier,
                ready.body,
                schema,
                repair,
                teller,
                tokens=tokens,
                background=background,
                started=started,
            )

        return ask_under_schema


def _at_most(request: MessagesRequest) -> int:
    """More tokens than the prompt can have: a token stands for at least one byte."""
    return request.size + _PREAMBLE + _EACH_TOOL * len(request.tools)
