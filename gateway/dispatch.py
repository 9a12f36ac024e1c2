"""
The way of one call, from its parsed body to its last event.

This is the only room that knows the whole way.  It decides nothing itself (`gateway.policy` does)
and touches no socket (`gateway.tier` and `gateway.llama` do).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import cache, partial
from hashlib import blake2b
from typing import Any, Final, Protocol, TypeVar
from uuid import uuid4

import attrs
import orjson
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.config import RouteRule
from gateway.ledger import ENDED_BY_HAND, Ledger, Record
from gateway.policy import calls, order, patience, prefix, routes, schema, tools
from gateway.policy.calls import Call
from gateway.policy.routes import Route
from gateway.policy.schema import Form
from gateway.tier import answer, embeddings
from gateway.tier.answer import Client, Teller
from gateway.tier.ended import Ended
from gateway.tier.line import Ticket
from gateway.tier.tier import Tier
from gateway.upstream import Lost
from gateway.wire import openai
from gateway.wire import request as wire
from gateway.wire.chat import AS_MANY_AS_FIT
from gateway.wire.dialect import MESSAGES, Dialect
from gateway.wire.errors import ApiError, Unavailable, down, invalid, prompt_too_long, unavailable
from gateway.wire.events import Repair, Truncated
from gateway.wire.pulse import Times
from gateway.wire.request import MessagesRequest

Json = Any
T = TypeVar("T")

#: How often a call may find that a server which was up is not.
_AWAY: Final = 20

#: Tokens that a template may add to what a body says: a preamble, and so much for each tool.
_PREAMBLE: Final = 1024
_EACH_TOOL: Final = 64

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


@attrs.frozen
class _Prepared:
    """
    A call that is ready to be sent.

    Attributes:
        tokens: of its prompt; None where they were not counted.
        form: what its answer is held to, where the gateway does that.
        check: raises ApiError if it is too late for it, when its turn comes.
    """

    request: MessagesRequest
    call: Call
    route: Route
    tier: Tier
    body: dict[str, Json]
    tokens: int | None
    record: Record
    form: Form | None = None
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

            tickets: list[Ticket] = []

            async def ask_once(teller: Teller) -> None:
                ready = await self._prepare(request, headers, caller, record)
                repair.tier = ready.tier.name
                teller.ready(partial(ready.tier.counter.count, ready.body))
                ticket = _ticket(ready, partial(self.ledger.content, record))
                self._ended.check(ticket)
                tickets[:] = [ticket]
                asking = partial(self._asking(ready, ticket, headers, repair), teller)
                if ready.tier.remote is not None:
                    return await asking()
                return await ready.tier.deaths.during(ticket, asking)

            async def ask_until(teller: Teller) -> None:
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

            async def ask(teller: Teller) -> None:
                """As `ask_until`, unless a person ends it."""
                await self._endable(record, tickets, ask_until(teller))

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
            tickets: list[Ticket] = []

            async def ask() -> dict[str, Json]:
                lost = 0
                while True:
                    _, call, route = self._understand(request, headers)
                    tier, route = await self._reach(route)
                    _check_takes_bare(tier)
                    self._note(record, request, call, route, caller)
                    view = dict(request.body)
                    ready = _Prepared(request, call, route, tier, view, None, record)
                    ticket = _ticket(ready, partial(self.ledger.content, record))
                    self._ended.check(ticket)
                    tickets[:] = [ticket]
                    started = partial(self.ledger.started, record)
                    how: Any = {"ticket": ticket, "started": started}
                    asking = partial(embeddings.ask, tier, request.prepared, view, **how)
                    try:
                        return await tier.deaths.during(ticket, asking)
                    except (Lost, Unavailable) as error:
                        lost += 1
                        if lost > tier.config.resends:
                            raise unavailable(
                                f"The model server of tier {tier.name!r} went away."
                            ) from error
                        tier.lost()
                        record.again()

            said = await self._endable(record, tickets, ask())
            usage = said.get("usage")
            if isinstance(usage, Mapping):
                record.usage.learn({"input_tokens": usage.get("prompt_tokens")})
            return orjson.dumps(said)

    @property
    def _now(self) -> int:
        """Seconds since 1970."""
        return int(self.reactor.seconds())

    async def count(self, raw: bytes, headers: Mapping[str, str], caller: Caller) -> int:
        """
        The tokens that a call with this body would have as its prompt, on the tier it would go to.

        Raises:
            ApiError: the body is wrong, or the server is down; 404, it counts no tokens.
        """
        with self.ledger.call(caller.request_id) as record:
            request = wire.parse(raw, counting=True)
            record.kind, record.model = "count", request.model
            lost = 0
            while True:
                request, call, wanted = self._understand(request, headers)
                tier, body, route = await self._place(request, call, wanted)
                record.tier, record.rule = route.tier, route.rule
                caller.routed(route.tier, "count", route.degraded)
                try:
                    tokens = await tier.counter.count(body, headers)
                except Unavailable:
                    lost += 1
                    if lost > tier.config.resends:
                        raise
                    tier.lost()
                else:
                    if tokens is None:
                        raise _counts_none(tier)
                    record.usage.input = tokens
                    return tokens

    async def _endable(
        self, record: Record, tickets: list[Ticket], asking: Coroutine[Deferred[Any], Any, T]
    ) -> T:
        """What `asking` gives, unless a person ends it, whose ticket stands in `tickets` then."""
        under_way = self._open[record.id] = Deferred.fromCoroutine(asking)
        try:
            found: T = await under_way
        except CancelledError:
            if record.id in self._open:
                raise  # it was the client who left
            record.outcome = ENDED_BY_HAND
            raise self._ended.end(tickets) from None
        finally:
            self._open.pop(record.id, None)
        return found

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

    # --- the rooms on the way ---------------------------------------------------------------------

    def _understand(
        self, request: MessagesRequest, headers: Mapping[str, str]
    ) -> tuple[MessagesRequest, Call, Route]:
        if isinstance(request, openai.Bare):
            call = Call("other", "no conversation")
        else:
            call = calls.understand(request, headers)
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
        form = _form(request, self.tiers[route.tier])  # its refusal waits for no server that loads
        tier, body, route = await self._place(request, call, route)
        self._note(record, request, call, route, caller)
        if _is_bounded(call, route, tier):
            body["max_tokens"] = min(request.max_tokens, tier.config.answer_tokens)
        body["max_tokens"], tokens = await self._room(body, tier)
        form = form or _form(request, tier)
        ready = _Prepared(request, call, route, tier, body, tokens, record, form)
        if call.kind == "classifier" and route.tier == routes.MAIN and tier.remote is None:
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
        tier, route = await self._reach(route)
        body = await self._body(request, call, tier)
        if route.tier == routes.MAIN:
            return tier, body, route
        window = (await tier.props()).n_ctx
        bound = tier.config.answer_tokens
        room = window - min(request.max_tokens or bound, bound)
        tokens = None if _at_most(body) < room else await tier.counter.count(body)
        if tokens is None or tokens < room:
            return tier, body, route
        main = self.tiers[routes.MAIN]
        await main.ready()
        route = routes.too_long_for_small(route, tokens, window)
        return main, await self._body(request, call, main), route

    async def _reach(self, route: Route) -> tuple[Tier, Route]:
        """The tier of `route`, once its server is there, or another one's; raises as `_place`."""
        tier = self.tiers[route.tier]
        if route.tier != routes.MAIN and not await tier.is_up():
            route = routes.while_down(route)
            tier = self.tiers[route.tier]
        if route.background and not await tier.is_up():
            raise down("Its model is down, and nobody waits for this call.", should_retry=False)
        await tier.ready()
        return tier, route

    async def _body(self, request: MessagesRequest, call: Call, tier: Tier) -> dict[str, Json]:
        if isinstance(request, openai.Bare):
            _check_takes_bare(tier)
            return dict(request.prepared)
        if tier.remote is not None:
            as_sent = tier.remote.is_verbatim
            return tier.remote.prepare(request if as_sent else _meant(request, call))
        request = _meant(request, call)
        body = prefix.prepare(request, await tier.template())
        told = body.get("chat_template_kwargs")
        if told and call.is_in_conversation and not request.is_bound:
            body["chat_template_kwargs"] = tier.keep(call.conversation, told)
        return body

    async def _room(self, body: Mapping[str, Json], tier: Tier) -> tuple[int, int | None]:
        """
        The longest answer that fits the window, and the prompt, in tokens.

        The prompt is counted only where the size of the body does not rule an overflow out.  Other
        servers than a llama-server refuse an answer that would not fit as well, so there both
        count; one that gets what the client sent is left to refuse it itself.  A client that sets
        no bound leaves it to a chat server, which is told none either; a server of the Messages API
        has to be told one, of at most half the window where nobody can count.

        Raises:
            ApiError: 400, the prompt itself does not fit.
        """
        wanted, is_remote = int(body["max_tokens"]), tier.remote is not None
        is_unbounded = wanted >= AS_MANY_AS_FIT
        if tier.remote is not None and tier.remote.is_verbatim and not is_unbounded:
            return wanted, None
        props = await tier.props()
        window = props.n_ctx
        if is_unbounded and props.answer is not None:
            wanted = props.answer
        is_left_open = is_remote and is_unbounded and props.answer is None
        if _at_most(body) + (wanted if is_remote and not is_left_open else 0) < window:
            return wanted if is_left_open else min(wanted, window), None
        tokens = await tier.counter.count(body)
        if tokens is not None and tokens >= window:
            raise prompt_too_long(tokens, window)
        if is_left_open:
            return wanted, tokens
        if tokens is None:
            return min(wanted, window // 2 if is_unbounded else window), None
        return min(wanted, window - tokens), tokens

    async def _in_time(self, ready: _Prepared, headers: Mapping[str, str]) -> Callable[[], None]:
        """
        What refuses a safety check that its client would not wait for.

        Returns:
            Raises ApiError (503, not to be tried again) if it is too late by now.
        """
        pace, body, record = ready.tier.pace, ready.body, ready.record
        tokens = await ready.tier.counter.count(body)
        assert tokens is not None  # a llama-server counts
        output = patience.verdict_tokens(body["max_tokens"])
        limit = patience.client_waits(headers)

        def check() -> None:
            needed = pace.estimate(tokens, pace.seen(body), output)
            waited = self.reactor.seconds() - record.arrived
            refusal = patience.refuse(tokens, needed, waited, limit)
            if refusal is not None:
                log.warn("{id} classifier: {why}", id=record.id, why=refusal.message)
                raise refusal

        check()
        return check

    def _asking(
        self, ready: _Prepared, ticket: Ticket, headers: Mapping[str, str], repair: Repair
    ) -> answer.Ask:
        """How the answer of `ready` is asked for, once somebody says how it is to be told."""

        def started() -> None:
            self.ledger.started(ready.record)
            ready.check()

        how: Any = {"ticket": ticket, "started": started}
        if ready.tier.remote is not None:  # which is told of a schema itself
            how["headers"] = headers
            return partial(answer.from_model, ready.tier, ready.body, repair, **how)
        if ready.form is None:
            return partial(answer.from_model, ready.tier, ready.body, repair, **how)
        tokens = ready.body["max_tokens"]
        if _is_bounded(ready.call, ready.route, ready.tier):
            tokens = min(tokens, ready.tier.config.schema_tokens)
        is_bound = _meant(ready.request, ready.call).is_bound
        under = answer.under_schema if is_bound else answer.words_under_schema
        return partial(under, ready.tier, ready.body, ready.form, repair, tokens=tokens, **how)


def _check_takes_bare(tier: Tier) -> None:
    """Raise ApiError, 400, if only conversations can be sent to the server of `tier`."""
    if tier.llama is None:
        raise invalid(f"The server of tier {tier.name!r} is no llama-server: it takes chats only.")


def _counts_none(tier: Tier) -> ApiError:
    return ApiError("not_found_error", f"The server of tier {tier.name!r} counts no tokens.")


def _form(request: MessagesRequest, tier: Tier) -> Form | None:
    """
    What an answer of `tier` is held to; None where nothing is asked, or its server sees to it.

    Raises:
        ApiError: 400, no answer can be held to it.
    """
    if request.schema is None or tier.remote is not None:
        return None
    return schema.read(request.schema)


def _meant(request: MessagesRequest, call: Call) -> MessagesRequest:
    """What a call is about: an older client sends its tools to a hook that wants a verdict."""
    return request.without_tools() if call.kind == "hook" else request


def _at_most(body: Mapping[str, Json]) -> int:
    """More tokens than the prompt can have: a token stands for at least one byte."""
    return len(orjson.dumps(body)) + _PREAMBLE + _EACH_TOOL * len(body.get("tools", ()))


def _ticket(ready: _Prepared, content: Callable[[], None]) -> Ticket:
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
        content,
    )


def _is_bounded(call: Call, route: Route, tier: Tier) -> bool:
    """Whether the answer is housekeeping, which a tiny model would never end by itself."""
    if tier.remote is not None and tier.remote.is_verbatim:
        return False
    is_aside = call.kind == "other" and call.from_claude_code
    return call.is_housekeeping or (is_aside and route.tier != routes.MAIN)
