"""What is known of one model that calls are sent to: its server, line, window, template, pace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Final

import attrs
from twisted.application.internet import backoffPolicy
from twisted.internet.defer import CancelledError, Deferred, DeferredLock
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.background import begin
from gateway.config import Tier as Wanted
from gateway.llama.child import Child, State
from gateway.llama.client import SLOT_PATIENCE, LlamaClient
from gateway.llama.snapshots import Store
from gateway.policy import template as templates
from gateway.policy.order import Rank
from gateway.policy.template import Template
from gateway.tier.cache import Cache
from gateway.tier.count import Counter
from gateway.tier.deaths import Deaths
from gateway.tier.line import Line, Permit, Ticket
from gateway.tier.pace import Pace
from gateway.tier.progress import Progress
from gateway.tier.vitals import Vitals
from gateway.upstream import Health, Props, Remote, Server
from gateway.wire.errors import (
    ApiError,
    Unavailable,
    down,
    invalid,
    overloaded,
    stopping,
    unavailable,
)

Json = Any

#: Seconds for which a server's word about itself is taken; it may be restarted with another model.
_FRESH: Final = 30.0

#: Seconds between two looks whether a server has come, by how often it had not.
_LOOK: Final = backoffPolicy(0.5, 2.0, 1.3, jitter=lambda: 0.0)

#: States in which there is no process that could answer.
_GONE: Final = frozenset({State.STOPPED, State.BACKOFF, State.FAILED})

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
        llama: the same, where that is a llama-server.
        remote: the same, where it is any other.
        line: where its calls wait.
        counter: counts its tokens.
        pace: how fast it is.
        progress: how far its calls are.
        deaths: the calls during which its server went away.
        vitals: whether its server does anything; of a server of ours.
        store_for: where a server with this command saves its slot; None for nowhere.
        cache: what its slot holds, and what of it is kept.
        child: its server, where it is one of ours.
        is_due: that one will be started, once another has left its place.
    """

    name: str
    config: Wanted
    client: Server
    line: Line
    counter: Counter
    pace: Pace
    progress: Progress
    deaths: Deaths
    vitals: Vitals | None
    _reactor: IReactorTime
    store_for: Callable[[Sequence[str]], Store | None] = lambda _: None
    llama: LlamaClient | None = attrs.field(default=None, init=False)
    remote: Remote | None = attrs.field(default=None, init=False)
    cache: Cache = attrs.field(init=False)
    child: Child | None = attrs.field(default=None, init=False)
    is_due: bool = attrs.field(default=False, init=False)
    _opening: Deferred[None] | None = attrs.field(default=None, init=False)
    _is_open: bool = attrs.field(default=False, init=False)
    _props: Props | None = attrs.field(default=None, init=False)
    _met: Props | None = attrs.field(default=None, init=False)
    _error: ApiError | None = attrs.field(default=None, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    _awaiting: list[Deferred[None]] = attrs.field(factory=list, init=False)
    _looking: Deferred[None] | None = attrs.field(default=None, init=False)
    _alarm: IDelayedCall | None = attrs.field(default=None, init=False)
    _rewrites: tuple[str, ...] = attrs.field(default=(), init=False)
    _first: OrderedDict[str, Mapping[str, Json]] = attrs.field(factory=OrderedDict, init=False)
    _asked_at: float = attrs.field(default=0.0, init=False)
    _resting: DeferredLock = attrs.field(factory=DeferredLock, init=False)

    @classmethod
    def of(
        cls, name: str, wanted: Wanted, client: LlamaClient | Remote, reactor: IReactorTime
    ) -> Tier:
        """The tier that the configuration wants, in front of `client`."""
        line = Line(wanted.slots, wanted.max_waiting, wanted.ageing, client.busy_slots, reactor)
        pace = Pace(reactor.seconds)
        llama = client if isinstance(client, LlamaClient) else None
        ask = None if llama is None or wanted.server is not None else llama.slots
        progress = Progress(wanted.slots, pace, reactor, ask, lambda: line.settling)
        deaths = Deaths(reactor)
        tier = cls(
            name, wanted, client, line, Counter(client), pace, progress, deaths, None, reactor
        )
        tier.llama = llama
        tier.remote = None if isinstance(client, LlamaClient) else client
        tier.cache = Cache(name, wanted, llama, line, pace.prefill_rate, reactor)
        if wanted.server is not None:
            tier.vitals = Vitals(wanted.stall, tier._works, tier._slots, tier._stuck, reactor)
        return tier

    def start(self) -> None:
        """Let calls in."""
        self.line.start()

    def stop(self) -> None:
        """Let nobody in any more; who waits is told to come again."""
        self._stopped = True
        self.line.stop()
        self.cache.stop()
        if self.vitals is not None:
            self.vitals.stop()
        if self._looking is not None:
            self._looking.cancel()
        awaiting, self._awaiting = self._awaiting, []
        for come in awaiting:
            come.errback(Failure(stopping()))

    def adopt(self, config: Wanted) -> None:
        """Go by another configuration, for a tier of the same server."""
        self.config = self.cache.config = config
        self.line.max_waiting, self.line.ageing = config.max_waiting, config.ageing
        if self.vitals is not None:
            self.vitals.stall = config.stall

    def shares_with(self, other: Tier) -> bool:
        """Whether the servers of both cannot run at the same time: of one name, or at one place."""
        return self.name == other.name or self.config.url == other.config.url

    async def rest(self, rank: Rank = Rank.HOUSE) -> list[Permit]:
        """
        All permits of its slots, each as soon as it is free; fewer once its server is away.

        Cancelling it gives back those that it has.
        """
        permits: list[Permit] = []
        async with self._resting:  # two who each held some would wait for each other
            try:
                with suppress(Unavailable):  # it goes away, and so rests
                    while len(permits) < self.config.slots and not self._is_away:
                        permits.append(await self.line.join(Ticket(rank), in_any_case=True))
            except BaseException:
                for permit in permits:
                    permit.finished()
                raise
        return permits

    async def restart(self) -> None:
        """
        End its server and start it anew, because a person wants it, whatever it does.

        What its slot holds is saved first where no call has it; calls that run are sent again.

        Raises:
            ApiError: its server is not one of ours.
        """
        if self.child is None:
            raise invalid(f"The server of tier {self.name!r} is started by somebody else.")
        permits = [] if self._is_away or self._works() else await self.rest()
        try:
            await self.cache.rest(SLOT_PATIENCE)
            self.child.restart()
        finally:
            for permit in permits:
                permit.finished()

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
            except ApiError as error:
                self._props, self._error = None, error
                raise
            self._error = None
            if found != self._met:
                await self._meet(found)
            self._props = self._met = found
        return self._props

    @property
    def met(self) -> Props | None:
        """What the server said of itself last, however long ago; None where it never did."""
        return self._met

    # --- a server that comes and goes -------------------------------------------------------------

    async def is_up(self) -> bool:
        """Whether its server answers, or is on its way for the first time or after a restart."""
        if self.child is not None:
            return self.child.state in (State.STARTING, State.LOADING, State.READY)
        try:
            await self.props()
        except ApiError as error:
            # What refuses for good is up, and will say so itself.
            if not isinstance(error, Unavailable):
                return True
            return await self.client.health() is Health.LOADING
        return True

    async def ready(self) -> None:
        """
        Wait for a server that loads, or that is gone and comes back.

        Raises:
            ApiError: it does not come within `startup_patience`, or at all; or too many wait.
        """
        if not self._is_away:
            try:
                await self.props()
            except Unavailable as error:
                if not self.config.startup_patience:
                    raise down(error.message) from None
            else:
                return
        await self._wait_for_it()

    def lost(self) -> None:
        """It went away; what it said of itself is worth nothing now."""
        self._props = self._error = None

    def hear(self, line: str) -> None:
        """A line of the output of a server of ours."""
        if self.progress.listen(line):
            self._sign()

    def token(self) -> None:
        """The server said something in an answer."""
        self._sign()

    def server_is(self, state: State) -> None:
        """A server of ours came into another state."""
        assert self.vitals is not None
        self.lost()
        if self._opening is not None:
            self._opening.cancel()
        if state is State.READY:
            self.vitals.start()
            self.pace.emptied()
            self._opening = begin(self._open())
            return
        self._is_open = False
        self.vitals.stop()
        if state is State.DRAINING:
            self.cache.told_to_end()
        self.cache.closed()
        self.line.server_down(self._away())
        if state in _GONE:
            self.client.hang_up()  # a connection can outlive its server, behind a proxy
        self._nudge()

    async def _open(self) -> None:
        """Let calls in, once the slot holds what was kept of it."""
        assert self.child is not None
        command, self.cache.env = self.child.started_with
        self.cache.command = tuple(command)
        self.cache.store = self.store_for(command) if self.config.slots == 1 else None
        try:
            await self.cache.opened(await self.props())
        except ApiError as error:
            log.warn("tier {tier}: nothing is restored: {error}", tier=self.name, error=error)
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001  # whatever it is, calls wait for this
            log.failure("tier {tier}: nothing is restored", tier=self.name)
        self._is_open = True
        self.line.server_up()
        self._nudge()
        if not self._awaiting:  # they will warm it themselves
            self.cache.let_in()

    def _nudge(self) -> None:
        """Somebody may be waiting for this."""
        if self._alarm is not None and self._alarm.active():
            self._alarm.reset(0)

    @property
    def _is_away(self) -> bool:
        return self.child is not None and not self._is_open

    def _away(self) -> Unavailable:
        assert self.child is not None
        why = self.child.status()["reason"] or f"it is {self.child.state.value}"
        return unavailable(f"The model server of tier {self.name!r} is not there: {why}.")

    def _works(self) -> bool:
        return bool(self.line.running or self.line.settling)

    async def _slots(self) -> Sequence[Mapping[str, Json]]:
        """What its server says of its slots; it says nothing while it moves a slot's state."""
        assert self.llama is not None
        return [] if self.cache.moves else await self.llama.slots()

    def _sign(self) -> None:
        if self.vitals is not None:
            self.vitals.sign()

    def _stuck(self, why: str) -> None:
        assert self.child is not None
        self.child.stuck(why)

    async def _wait_for_it(self) -> None:
        if self._stopped:  # who lost a server meanwhile would wait for one, and get no place
            raise stopping()
        if len(self._awaiting) >= self.config.max_waiting:
            raise overloaded(
                f"{len(self._awaiting)} calls are waiting for this model to load.", retry_after=30
            )
        come: Deferred[None] = Deferred(lambda _: self._awaiting.remove(come))
        self._awaiting.append(come)
        if self._looking is None or self._looking.called:  # it may end before it is known here
            self._looking = begin(self._look())
        await come

    async def _look(self) -> None:
        """Look for the server, while somebody waits for it."""
        until = self._reactor.seconds() + self.config.startup_patience
        failure: ApiError | None = None
        for attempt in count():
            try:
                failure = await self._missing()
            except CancelledError:
                raise
            except Exception:  # noqa: BLE001  # whatever it is, calls wait for this
                log.failure("tier {tier}: its server cannot be asked", tier=self.name)
                failure = ApiError("api_error", "The gateway itself failed; its log says why.")
                break
            if failure is None or not self._awaiting:
                break
            if self._reactor.seconds() >= until or self._is_given_up:
                break
            await self._sleep(_LOOK(attempt))
        self._looking = None
        awaiting, self._awaiting = self._awaiting, []
        for come in awaiting:
            come.callback(None) if failure is None else come.errback(Failure(failure))

    def _sleep(self, seconds: float) -> Deferred[None]:
        """Fires after so long, or when a server of ours comes into another state."""
        slept: Deferred[None] = Deferred(lambda _: alarm.cancel())
        alarm = self._alarm = self._reactor.callLater(seconds, slept.callback, None)
        return slept

    @property
    def _is_given_up(self) -> bool:
        if self.child is None or self.is_due:
            return False
        return self.child.state in (State.FAILED, State.STOPPED)

    async def _missing(self) -> ApiError | None:
        """Why nobody can be sent to the server; None if it is there."""
        if self._is_away:
            return down(self._away().message)
        try:
            await self.props()
        except Unavailable as error:
            return down(error.message)
        except ApiError as error:
            return error
        return None

    async def template(self) -> Template:
        """
        The chat template of the server.

        Raises:
            ApiError: the server is down or loading.
        """
        return (await self.props()).template

    def switches_for(self, conversation: str, told: Mapping[str, Json]) -> Mapping[str, Json]:
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
        self.cache.free = frozenset(found.template.in_question) - {*self._rewrites}
        log.info(
            "tier {tier}: {alias}, {slots} slot(s) of {n_ctx} tokens, build {build}",
            tier=self.name,
            **attrs.asdict(found),
        )
        for advice in self.cache.advice():
            log.info("tier {tier}: {advice}", tier=self.name, advice=advice)
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
        found: list[str] = []
        if self.llama is None:
            return ()
        for switch in template.in_question:
            try:
                renderings = [
                    await self.llama.apply_template(templates.probe(switch, which))
                    for which in (0, 1)
                ]
            except ApiError as error:
                log.debug("cannot render with {switch}: {error}", switch=switch, error=error)
                continue
            if templates.rewrites(*renderings):
                found.append(switch)
        return tuple(found)

    @property
    def waiting(self) -> int:
        """Calls that wait, in line or for its server."""
        return self.line.waiting + len(self._awaiting)

    def turns(self) -> dict[str, tuple[int, float | None, str]]:
        """
        Of each waiting call its place, from 1, its seconds to go, and why it stands there.

        The seconds are foreseen for the first ones only.
        """
        places = self.line.places()
        tickets = [ticket for ticket, _ in places]
        needs = [self.progress.need(each.tokens, each.seen()) for each in tickets[:_FORESEEN]]
        etas = self.progress.etas([*needs, *[None] * (len(tickets) - len(needs))])
        return {
            ticket.name: (place, eta, why)
            for place, ((ticket, why), eta) in enumerate(zip(places, etas, strict=True), 1)
        }

    def status(self) -> Mapping[str, Json]:
        """For ``/status``: what was last known, asked of nobody."""
        known, error = None if self._props is None else attrs.asdict(self._props), self._error
        return {
            "url": self.config.url,
            "server": known,
            "error": None
            if error is None
            else {"message": error.message, "passes": isinstance(error, Unavailable)},
            "slots": self.config.slots,
            "running": self.line.running,
            "settling": self.line.settling,
            "waiting": self.waiting,
            "pace": self.pace.status(),
            "cache": self.cache.status(),
            "process": None if self.child is None else self.child.status(),
            "refused": self.deaths.status(),
        }
