"""What is known of one model that calls are sent to: its server, line, window, template, pace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import Tier as Wanted
from gateway.llama.client import LlamaClient, Props
from gateway.policy import template as templates
from gateway.policy.template import Template
from gateway.tier.count import Counter
from gateway.tier.line import Line
from gateway.tier.pace import Pace
from gateway.tier.progress import Progress
from gateway.wire.errors import ApiError, overloaded, stopping

Json = Any

#: Seconds for which a server's word about itself is taken; it may be restarted with another model.
_FRESH: Final = 30.0

#: Seconds between two looks whether a server has come.
_LOOK: Final = 1.0

#: Waiting calls whose turn is foreseen.
_FORESEEN: Final = 20

#: Conversations whose first switches are remembered.
_REMEMBERED: Final = 1024

log = Logger()


@attrs.define(eq=False)
class Tier:
    """
    One tier, with all that belongs to it.

    Attributes:
        name: as in the configuration.
        config: its part of the configuration.
        client: its server.
        line: where its calls wait.
        counter: counts its tokens.
        pace: how fast it is.
        progress: how far its calls are.
    """

    name: str
    config: Wanted
    client: LlamaClient
    line: Line
    counter: Counter
    pace: Pace
    progress: Progress
    _reactor: IReactorTime
    _props: Props | None = attrs.field(default=None, init=False)
    _awaiting: list[Deferred[None]] = attrs.field(factory=list, init=False)
    _looking: Deferred[None] | None = attrs.field(default=None, init=False)
    _rewrites: tuple[str, ...] = attrs.field(default=(), init=False)
    _first: OrderedDict[str, Mapping[str, Json]] = attrs.field(factory=OrderedDict, init=False)
    _asked_at: float = attrs.field(default=0.0, init=False)

    @classmethod
    def of(cls, name: str, wanted: Wanted, client: LlamaClient, reactor: IReactorTime) -> Tier:
        """The tier that the configuration wants, in front of `client`."""
        line = Line(wanted.slots, wanted.max_waiting, wanted.ageing, client.busy_slots, reactor)
        pace = Pace(reactor.seconds)
        ask = None if wanted.server is not None else client.slots
        progress = Progress(wanted.slots, pace, reactor, ask, lambda: line.settling)
        return cls(name, wanted, client, line, Counter(client), pace, progress, reactor)

    def start(self) -> None:
        """Let calls in."""
        self.line.start()

    def stop(self) -> None:
        """Let nobody in any more; who waits is told to come again."""
        self.line.stop()
        if self._looking is not None:
            self._looking.cancel()
        awaiting, self._awaiting = self._awaiting, []
        for come in awaiting:
            come.errback(Failure(stopping()))

    async def props(self) -> Props:
        """
        What the server says of itself, at most `_FRESH` seconds old.

        Raises:
            ApiError: the server is down or loading.
        """
        now = self._reactor.seconds()
        if self._props is None or now - self._asked_at > _FRESH:
            self._asked_at = now  # who comes meanwhile takes what was known
            try:
                found = await self.client.props()
            except ApiError:
                self._props = None
                raise
            if found != self._props:
                await self._meet(found)
            self._props = found
        return self._props

    async def ready(self) -> None:
        """
        Wait for a server that is loading.

        Raises:
            ApiError: it is down, or it is not ready within `startup_patience`; or too many wait.
        """
        try:
            await self.props()
        except ApiError as error:
            if not await self._is_coming(error):
                raise
            await self._wait_for_it()

    async def _is_coming(self, error: ApiError) -> bool:
        """Whether a server that refuses with `error` will answer before long."""
        if error.status != 503 or self.config.startup_patience == 0:
            return False
        return self.config.server is not None or await self.client.is_loading()

    async def _wait_for_it(self) -> None:
        if len(self._awaiting) >= self.config.max_waiting:
            raise overloaded(
                f"{len(self._awaiting)} calls are waiting for this model to load.", retry_after=30
            )
        come: Deferred[None] = Deferred(lambda _: self._awaiting.remove(come))
        self._awaiting.append(come)
        if self._looking is None:
            self._looking = Deferred.fromCoroutine(self._look())
            self._looking.addErrback(lambda failure: failure.trap(CancelledError))
        await come

    async def _look(self) -> None:
        """Ask the server once a second, while somebody waits for it."""
        until = self._reactor.seconds() + self.config.startup_patience
        failure: ApiError | None = None
        while self._awaiting:
            await deferLater(self._reactor, _LOOK)
            try:
                await self.props()
            except ApiError as error:
                if self._reactor.seconds() < until and await self._is_coming(error):
                    continue
                failure = error
            break
        self._looking = None
        awaiting, self._awaiting = self._awaiting, []
        for come in awaiting:
            come.callback(None) if failure is None else come.errback(Failure(failure))

    async def template(self) -> Template:
        """
        The chat template of the server.

        Raises:
            ApiError: the server is down or loading.
        """
        props = await self.props()
        return attrs.evolve(props.template, rewrites=self._rewrites)

    def keep(self, conversation: str, told: Mapping[str, Json]) -> Mapping[str, Json]:
        """
        What the template is to be told in this conversation, where `told` is wanted now.

        Switches that would rewrite earlier turns keep the value that they had first.
        """
        if not self._rewrites:
            return told
        first = self._first.setdefault(conversation, told)
        self._first.move_to_end(conversation)
        if len(self._first) > _REMEMBERED:
            self._first.popitem(last=False)
        free = {name: value for name, value in told.items() if name not in self._rewrites}
        return free | {name: first[name] for name in self._rewrites if name in first}

    async def _meet(self, found: Props) -> None:
        """The server is a new one to us."""
        self.counter.forget()
        self.pace.forget()
        self._first.clear()
        self._rewrites = await self._find_rewrites(found.template)
        log.info(
            "tier {tier}: {alias}, {slots} slot(s) of {n_ctx} tokens, build {build}",
            tier=self.name,
            **attrs.asdict(found),
        )
        if found.slots < self.config.slots:
            log.warn(
                "tier {tier}: slots = {wanted}, but the server has only {slots};"
                " it will make calls wait where nobody sees it",
                tier=self.name,
                wanted=self.config.slots,
                slots=found.slots,
            )

    async def _find_rewrites(self, template: Template) -> tuple[str, ...]:
        """Those switches of a template that change what was said before."""
        found = []
        for switch in template.in_question:
            try:
                renderings = [
                    await self.client.apply_template(templates.probe(switch, which))
                    for which in (0, 1)
                ]
            except ApiError as error:
                log.debug("cannot render with {switch}: {error}", switch=switch, error=error)
                continue
            if templates.rewrites(*renderings):
                found.append(switch)
        return tuple(found)

    def turns(self) -> dict[str, tuple[int, float | None]]:
        """The place of each waiting call, from 1, and, for the first ones, its seconds to go."""
        tickets = self.line.places()
        needs = [self.progress.need(each.tokens, each.seen()) for each in tickets[:_FORESEEN]]
        etas = self.progress.etas([*needs, *[None] * (len(tickets) - len(needs))])
        return {
            ticket.name: (place, eta)
            for place, (ticket, eta) in enumerate(zip(tickets, etas, strict=True), 1)
        }

    def status(self) -> Mapping[str, Json]:
        """For ``/status``: what was last known, asked of nobody."""
        known = None if self._props is None else attrs.asdict(self._props)
        return {
            "url": self.config.url,
            "server": known,
            "slots": self.config.slots,
            "running": self.line.running,
            "settling": self.line.settling,
            "waiting": self.line.waiting + len(self._awaiting),
            "pace": self.pace.status(),
        }
