"""
One answer on its way to one client.

An answer is asked for in one way (`from_model`, `under_schema`, `words_under_schema`) and told in
another: as a stream (`Streamed`) or as one JSON message (`Whole`).  The permit is taken before the
server hears of the call and given back by what became of it: finished, or abandoned.

Once the status is sent, errors go into the stream.  Claude Code sends a call again, streaming, when
it reads ``overloaded_error`` before any content or when the connection is cut after some; any other
error makes it send the call again without streaming, which then gets the true status
(docs/protocol.md, "Errors").
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime

from gateway.background import begin
from gateway.tier import constrained
from gateway.tier.line import Ticket
from gateway.tier.tier import Tier
from gateway.tier.turn import Turn
from gateway.upstream import Lost
from gateway.wire import pulse
from gateway.wire.dialect import MESSAGES, Dialect
from gateway.wire.errors import ApiError, unavailable
from gateway.wire.events import (
    Assembly,
    Event,
    Repair,
    Truncated,
    Usage,
    message_events,
)
from gateway.wire.pulse import Rung, Times, Told
from gateway.wire.sse import EventTooLong

if TYPE_CHECKING:
    from gateway.policy.schema import Form

Json = Any


class Client(Protocol):
    """The client's side of one call, as HTTP gives it to us."""

    @property
    def begun(self) -> bool:
        """Whether the status is sent."""

    def begin(self) -> None:
        """Send the status and the headers of a stream, now."""

    def write(self, data: bytes) -> None:
        """Send a part of the body."""

    def meet(self, producer: IPushProducer) -> None:
        """Let `producer` be paused while the client does not read."""

    def part(self) -> None:
        """No producer any more."""

    def cut(self) -> None:
        """Close the connection at once, so that the client sees a broken answer."""


class Teller(Protocol):
    """How an answer is told."""

    def ready(self, count: Count) -> None:
        """The call waits for nothing but its turn; `count` gives the tokens of its prompt."""

    def commit(self) -> None:
        """The upstream has accepted the call."""

    def tell(self, events: Iterable[Event]) -> None:
        """These come next."""

    def meet(self, producer: IPushProducer) -> None:
        """They come from here."""

    def again(self) -> bool:
        """Whether the answer can be told from its beginning once more; if so, it will be."""


#: Counts the tokens of a call's prompt; None where nobody can.
Count = Callable[[], Awaitable[int | None]]

#: Asks for an answer, once it is known how it is to be told.
Ask = Callable[[Teller], Awaitable[None]]


# --- how it is asked for ----------------------------------------------------------------------


async def from_model(
    tier: Tier,
    body: Mapping[str, Json],
    repair: Repair,
    teller: Teller,
    *,
    ticket: Ticket,
    started: Callable[[], None],
    headers: Mapping[str, str] | None = None,
) -> None:
    """
    Ask `tier` for a free answer and tell it as it comes.

    Args:
        tier: who is asked.
        body: a prepared body.
        repair: mends the stream, and knows the usage afterwards.
        teller: tells it.
        ticket: what the line is told of it.
        started: called when the call's turn has come; may raise ApiError.
        headers: the client's own, names in lower case.

    Raises:
        ApiError: refused, or failed on the way.
        Lost: the server went away.
        Truncated: its answer did.
    """
    async with Turn(tier, ticket) as turn:
        answer = await turn.ask(body, started, partial(tier.client.messages, body, headers))
        teller.commit()
        watch = tier.pace.watch(body)
        tier.progress.expect(ticket.name, ticket.seen)

        def receive(chunk: bytes) -> None:
            told: list[Event] = []
            try:
                for event in answer.parser.feed(chunk):
                    watch.token()
                    tier.token()
                    tier.progress.token(ticket.name)
                    told += repair.feed(event)
            except EventTooLong as error:
                raise ApiError("api_error", f"The model server sent {error}.") from None
            finally:
                if repair.has_content:
                    ticket.content()
                teller.tell(told)

        await answer.stream(receive, teller.meet)
        try:
            if repair.usage.input is None:
                # llama-server forgot its message_start, the only place where it says this.
                with suppress(ApiError):  # the answer is whole, whatever it cost
                    repair.usage.input = await tier.counter.count(body)
            teller.tell(repair.end())
            watch.ended(repair.usage)
            tier.cache.answered(body, repair.usage, ticket)
        finally:
            turn.finished()


async def under_schema(
    tier: Tier,
    body: Mapping[str, Json],
    form: Form,
    repair: Repair,
    teller: Teller,
    *,
    tokens: int,
    ticket: Ticket,
    started: Callable[[], None],
) -> None:
    """As `from_model`, for an answer of at most `tokens` that must have this form."""
    assert isinstance(tier.client, constrained.Holding)
    complete = partial(constrained.complete, tier.client, body, form, tokens)
    async with Turn(tier, ticket) as turn:
        completion = await turn.ask(body, started, complete)
        ticket.content()
        its_own = Usage(completion.evaluated, completion.cached, completion.generated)
        tier.pace.learn(body, its_own, completion.prefill, completion.generation)
        tier.cache.answered(body, its_own, ticket)
        usage = repair.usage  # with what was said freely before
        usage.input, usage.cached = its_own.input, its_own.cached
        usage.output += its_own.output
        turn.finished()
    message = {
        "id": repair.message_id,
        "type": "message",
        "role": "assistant",
        "model": repair.model,
        "content": [{"type": "text", "text": completion.text}],
        "stop_reason": "max_tokens" if completion.stopped == "limit" else "end_turn",
        "stop_sequence": None,
        "usage": usage.as_json(),
    }
    events = message_events(message)
    teller.tell(events[1:] if repair.has_started else events)


async def words_under_schema(
    tier: Tier,
    body: Mapping[str, Json],
    form: Form,
    repair: Repair,
    teller: Teller,
    *,
    tokens: int,
    ticket: Ticket,
    started: Callable[[], None],
) -> None:
    """
    As `under_schema`, for an answer that may call tools instead.

    The model answers freely first.  What it says is kept until it is known to be a call, or words
    that fit; words that do not fit are asked for again under the schema, behind the same prompt.
    """
    free = Kept(teller)
    how: Any = {"ticket": ticket, "started": started}
    await from_model(tier, body, repair, free, **how)
    message = free.message()
    words = "".join(block["text"] for block in message["content"] if block["type"] == "text")
    if message["stop_reason"] == "tool_use" or (form.is_exact and form.fits(words)):
        teller.tell(free.events)
        return
    told = {**(body.get("chat_template_kwargs") or {}), "enable_thinking": False}
    bound = {**body, "chat_template_kwargs": told}
    await under_schema(tier, bound, form, repair, teller, tokens=tokens, **how)


# --- how it is told ---------------------------------------------------------------------------


@attrs.define(eq=False)
class Whole:
    """One JSON message, when all of it is there."""

    _assembly: Assembly = attrs.field(factory=Assembly, init=False)

    def ready(self, count: Count) -> None: ...

    def commit(self) -> None: ...

    def tell(self, events: Iterable[Event]) -> None:
        self._assembly.add(events)

    def meet(self, producer: IPushProducer) -> None: ...

    def again(self) -> bool:
        self._assembly.again()
        return True

    def message(self) -> Mapping[str, Json]:
        """The message that was told."""
        return self._assembly.message()


@attrs.define(eq=False)
class Kept(Whole):
    """
    All of it kept for somebody who will decide; only its beginning is told.

    Attributes:
        events: what was kept so far.
    """

    _teller: Teller
    events: list[Event] = attrs.field(factory=list, init=False)

    def commit(self) -> None:
        self._teller.commit()

    def tell(self, events: Iterable[Event]) -> None:
        told = list(events)
        super().tell(told)
        begins = [event for event in told if event.body["type"] == "message_start"]
        self._teller.tell(begins)
        self.events += told[len(begins) :]


@attrs.define(eq=False)
class Streamed:
    """
    A stream of events, with a pulse while there is nothing to say.

    Use it as a context manager: it stops its clock when it is left.
    """

    client: Client
    _reactor: IReactorTime
    _times: Times
    _repair: Repair
    _arrived: float
    _dialect: Dialect = MESSAGES
    _count: Count | None = attrs.field(default=None, init=False)
    _said_at: float | None = attrs.field(default=None, init=False)
    _beat_at: IDelayedCall | None = attrs.field(default=None, init=False)
    _starting: Deferred[None] | None = attrs.field(default=None, init=False)

    def __enter__(self) -> Self:
        self._beat()
        return self

    def __exit__(self, *_: object) -> None:
        if self._beat_at is not None and self._beat_at.active():
            self._beat_at.cancel()
        self._beat_at = None
        if self._starting is not None:
            self._starting.cancel()
        self.client.part()

    def ready(self, count: Count) -> None:
        self._count = count
        self._beat()

    def commit(self) -> None:
        if not self.client.begun:
            self.client.begin()

    def tell(self, events: Iterable[Event]) -> None:
        data = self._dialect.told(events)
        if data:
            self._say(data)

    def meet(self, producer: IPushProducer) -> None:
        self.client.meet(producer)

    def again(self) -> bool:
        self.client.part()
        return not self._repair.has_content

    def fail(self, error: ApiError, *, request_id: str) -> None:
        """
        Put `error` into the stream, in the way that the client treats best.

        Raises:
            ApiError: `error` itself, where it can still be a status.
        """
        if not self.client.begun:
            raise error
        if not self._repair.has_content and error.is_transient:
            error = attrs.evolve(error, kind="overloaded_error")
        self._say(self._dialect.failed(error, request_id))

    def _say(self, data: bytes) -> None:
        self.commit()
        self.client.write(data)
        self._said_at = self._reactor.seconds()

    # --- the pulse --------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Say what is due, and come again when the next is."""
        if self._beat_at is not None and self._beat_at.active():
            self._beat_at.cancel()
        told = Told(
            self._arrived,
            self._said_at,
            held=self._count is None,
            started=self._repair.has_started,
            in_block=self._repair.in_block,
        )
        rung, again = pulse.due(self._reactor.seconds(), told, self._times)
        self._beat_at = self._reactor.callLater(again, self._beat)
        match rung:
            case Rung.PING:
                self._say(self._dialect.ping())
            case Rung.DELTA:
                self._say(self._dialect.still())
            case Rung.START if self._starting is None:
                self._starting = begin(self._start())
            case _:
                pass

    async def _start(self) -> None:
        """Begin the message with the counted tokens; with none where nobody can count."""
        tokens = 0
        if self._count is not None:
            with suppress(ApiError):
                tokens = await self._count() or 0
        self.tell(self._repair.start(tokens))


async def stream(
    client: Client,
    reactor: IReactorTime,
    times: Times,
    repair: Repair,
    request_id: str,
    ask: Ask,
    dialect: Dialect = MESSAGES,
) -> ApiError | None:
    """
    Tell the answer that `ask` asks for as a stream, its failure included.

    Returns:
        What went wrong after the status was sent, if anything did.

    Raises:
        ApiError: it went wrong before.
    """
    with Streamed(client, reactor, times, repair, reactor.seconds(), dialect) as told:
        try:
            await ask(told)
        except ApiError as error:
            told.fail(error, request_id=request_id)
            return error
        except (Lost, Truncated):
            gone = went_away(repair.tier)
            if repair.has_content:
                client.cut()
            else:
                told.fail(gone, request_id=request_id)
            return gone
    return None


async def whole(
    reactor: IReactorTime,
    repair: Repair,
    ask: Ask,
    limit: float | None,
    dialect: Dialect = MESSAGES,
) -> bytes:
    """
    The answer that `ask` asks for, as the JSON of one message.

    It may take `limit` seconds, after which the client would give up; None is without end.

    Raises:
        ApiError: it failed, or took too long.
    """
    told = Whole()
    asked = Deferred.fromCoroutine(_asked(ask, told))
    if limit is not None:
        asked.addTimeout(limit, reactor)
    try:
        await asked
    except (Lost, Truncated):
        raise went_away(repair.tier) from None
    except TimedOut:
        raise _too_slow(limit or 0) from None
    return dialect.whole(told.message())


async def _asked(ask: Ask, teller: Teller) -> None:
    await ask(teller)


def went_away(tier: str) -> ApiError:
    """What a client is told of an answer that broke off."""
    return unavailable(f"The model server of tier {tier!r} went away in the middle of its answer.")


def _too_slow(limit: float) -> ApiError:
    return ApiError(
        "timeout_error",
        f"There was no answer within {limit:.0f} seconds, and the client would not wait longer for"
        " one that is not streamed. What was evaluated is kept: ask again, or ask for a stream.",
    )
