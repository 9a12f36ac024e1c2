"""
A call made ready to be sent: what it is, where it goes, and what the server there is told.

All that can be decided about a call is decided here, and refused what can be refused, before it
takes a place in the line.  The decisions are those of `gateway.policy`; what they need to know of a
model, its tier says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import attrs
import orjson
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.config import RouteRule
from gateway.ledger import Record
from gateway.policy import calls, order, patience, prefix, routes
from gateway.policy.calls import Call
from gateway.policy.routes import Route
from gateway.policy.template import Template
from gateway.tier.line import Ticket
from gateway.tier.tier import Tier
from gateway.wire import openai
from gateway.wire.chat import AS_MANY_AS_FIT
from gateway.wire.errors import ApiError, down, invalid, prompt_too_long
from gateway.wire.request import MessagesRequest

if TYPE_CHECKING:
    from gateway.policy.schema import Form

Json = Any

#: Tokens that a template may add to what a body says: a preamble, and so much for each tool.
_PREAMBLE: Final = 1024
_EACH_TOOL: Final = 64

log = Logger()

#: Told what a call is and where it goes, as soon as that is known and again where it changes.
Note = Callable[[Call, Route], None]


@attrs.frozen
class Prepared:
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
    record: Record
    tokens: int | None = None
    form: Form | None = None
    check: Callable[[], None] = lambda: None

    @property
    def meant(self) -> MessagesRequest:
        """What the call is about."""
        return _meant(self.request, self.call)

    @property
    def form_tokens(self) -> int:
        """How long an answer that is held to a form may be."""
        tokens: int = self.body["max_tokens"]
        is_bounded = _is_bounded(self.call, self.route, self.tier)
        return min(tokens, self.tier.config.schema_tokens) if is_bounded else tokens

    def ticket(self, content: Callable[[], None]) -> Ticket:
        """What the line is told of it; `content` is called at the first content of its answer."""
        call, body, record = self.call, self.body, self.record
        return Ticket(
            rank=order.rank(call, self.route),
            conversation=call.conversation if call.is_in_conversation else "",
            key=partial(_digest, call.conversation, body),
            name=record.id,
            tokens=self.tokens,
            seen=cache(partial(self.tier.pace.seen, body)),
            arrived=record.arrived,
            cold=record.knows_cold,
            content=content,
        )


@attrs.frozen
class Preparation:
    """
    Makes calls ready, for the tiers and by the rules of one moment.

    Attributes:
        tiers: all there are, by name.
        rules: the routes of the configuration.
    """

    tiers: Mapping[str, Tier]
    rules: Sequence[RouteRule]
    _reactor: IReactorTime

    async def message(
        self, request: MessagesRequest, headers: Mapping[str, str], record: Record, note: Note
    ) -> Prepared:
        """
        A call for a message.

        Raises:
            ApiError: it is refused, or nobody is there to answer.
        """
        call, route = self._understand(request, headers)
        note(call, route)
        form = _form(request, self.tiers[route.tier])  # its refusal waits for no server that loads
        tier, body, route = await self._place(request, call, route)
        note(call, route)
        if _is_bounded(call, route, tier):
            body["max_tokens"] = min(request.max_tokens, tier.config.answer_tokens)
        if form is None or not _is_held(tier):
            form = _form(request, tier)
        body["max_tokens"], tokens = await self._room(body, tier, form)
        ready = Prepared(request, call, route, tier, body, record, tokens, form)
        if call.kind == "classifier" and route.tier == routes.MAIN and tier.remote is None:
            return attrs.evolve(ready, check=await self._in_time(ready, headers))
        return ready

    async def embedding(
        self, request: openai.Bare, headers: Mapping[str, str], record: Record, note: Note
    ) -> Prepared:
        """As `message`, for a call for embeddings, whose body is here as the line sees it."""
        call, route = self._understand(request, headers)
        tier, route = await self._reach(route)
        _check_takes_bare(tier)
        note(call, route)
        return Prepared(request, call, route, tier, dict(request.body), record)

    async def count(
        self, request: MessagesRequest, headers: Mapping[str, str], note: Note
    ) -> tuple[Tier, dict[str, Json]]:
        """As `message`, for a call to count: the tier of its message, and the body."""
        call, route = self._understand(request, headers)
        tier, body, route = await self._place(request, call, route)
        note(call, route)
        return tier, body

    # --- the steps --------------------------------------------------------------------------------

    def _understand(
        self, request: MessagesRequest, headers: Mapping[str, str]
    ) -> tuple[Call, Route]:
        if isinstance(request, openai.Bare):
            call = Call("other", "no conversation")
        else:
            call = calls.understand(request, headers)
        return call, routes.choose(call, request.model, self.rules, self.tiers.keys())

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
            body["chat_template_kwargs"] = tier.switches_for(call.conversation, told)
        return body

    async def _room(
        self, body: Mapping[str, Json], tier: Tier, form: Form | None
    ) -> tuple[int, int | None]:
        """
        The longest answer that fits the window, and the prompt, in tokens.

        The prompt is counted only where the size of the body does not rule an overflow out.  Other
        servers than a llama-server refuse an answer that would not fit as well, so there both
        count; one that gets what the client sent is left to refuse it itself.  A client that sets
        no bound leaves it to a chat server, which is told none either; a server of the Messages API
        has to be told one, and so has one whose answer is held to a form: of at most half the
        window where nobody can count.

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
        is_left_open = is_remote and is_unbounded and props.answer is None and form is None
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

    async def _in_time(self, ready: Prepared, headers: Mapping[str, str]) -> Callable[[], None]:
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
            waited = self._reactor.seconds() - record.arrived
            refusal = patience.refuse(tokens, needed, waited, limit)
            if refusal is not None:
                log.warn("{id} classifier: {why}", id=record.id, why=refusal.message)
                raise refusal

        check()
        return check


def identity(request: MessagesRequest, headers: Mapping[str, str]) -> bytes:
    """Tells a call from others, wherever it goes; the same when its client sends it again."""
    conversation, body = "", request.body
    if isinstance(request, openai.Bare):
        body = request.prepared
    else:
        call = calls.understand(request, headers)
        conversation = call.conversation
        with suppress(ApiError):  # no llama-server would take it, but another may
            body = prefix.prepare(_meant(request, call), Template(vision=True))
    return _digest(conversation, body)


def _digest(conversation: str, body: Mapping[str, Json]) -> bytes:
    """Of all but what changes when an older client asks again: no stream, and fewer tokens."""
    prompt = {name: body[name] for name in body if name not in ("max_tokens", "stream")}
    return blake2b(orjson.dumps([conversation, prompt]), digest_size=16).digest()


def _check_takes_bare(tier: Tier) -> None:
    """Raise ApiError, 400, if only conversations can be sent to the server of `tier`."""
    if tier.llama is None:
        raise invalid(f"The server of tier {tier.name!r} is no llama-server: it takes chats only.")


def _form(request: MessagesRequest, tier: Tier) -> Form | None:
    """
    What an answer of `tier` is held to; None where nothing is asked, or its server sees to it.

    Raises:
        ApiError: 400, no answer can be held to it.
    """
    if request.schema is None or not _is_held(tier):
        return None
    from gateway.policy import schema  # its libraries are large, and not everybody asks for one

    return schema.read(request.schema)


def _is_held(tier: Tier) -> bool:
    """Whether the gateway holds the answers of `tier` to their schemas."""
    return tier.remote is None or not tier.remote.is_verbatim


def _meant(request: MessagesRequest, call: Call) -> MessagesRequest:
    """What a call is about: an older client sends its tools to a hook that wants a verdict."""
    return request.without_tools() if call.kind == "hook" else request


def _at_most(body: Mapping[str, Json]) -> int:
    """More tokens than the prompt can have: a token stands for at least one byte."""
    return len(orjson.dumps(body)) + _PREAMBLE + _EACH_TOOL * len(body.get("tools", ()))


def _is_bounded(call: Call, route: Route, tier: Tier) -> bool:
    """Whether the answer is housekeeping, which a tiny model would never end by itself."""
    if tier.remote is not None and tier.remote.is_verbatim:
        return False
    is_aside = call.kind == "other" and call.from_claude_code
    return call.is_housekeeping or (is_aside and route.tier != routes.MAIN)
