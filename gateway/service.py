"""
Builds the whole house, and runs it: start, reload, drain, stop.

Started as ``twistd -n claudegw --config etc/gw.toml``.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Coroutine, Sequence
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, Final

import attrs
from twisted.application import strports
from twisted.application.internet import backoffPolicy
from twisted.application.service import MultiService, Service
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.failure import Failure

from gateway.background import begin
from gateway.capture import Capture
from gateway.changes import Changes, between
from gateway.config import LLAMA_SERVER, MIB, Config, ConfigError, Server, load, missing_keys
from gateway.config import Tier as Wanted
from gateway.daemon.descriptors import allow
from gateway.daemon.folder import private
from gateway.daemon.log import Logged, log_file, output
from gateway.daemon.notify import READY, notify, reloading, stopping
from gateway.daemon.sockets import check_door
from gateway.dispatch import Dispatch
from gateway.history import FILE, Bounds, History
from gateway.ledger import Ledger
from gateway.llama import ram
from gateway.llama.child import Child, Limits, State
from gateway.llama.client import SLOT_PATIENCE, LlamaClient
from gateway.llama.command import command, environment, option
from gateway.llama.snapshots import Store
from gateway.policy.calls import ROUTED
from gateway.policy.order import Rank
from gateway.remote import remote
from gateway.tier.tier import Tier
from gateway.web.access import Access
from gateway.web.api import Api
from gateway.web.connections import SPARE, ConnectionLimits, QuietSite, site
from gateway.wire.errors import ApiError
from gateway.wire.pulse import Times

#: Seconds between two looks whether a server is up, by how often it was not.
_PATIENCE: Final = backoffPolicy(initialDelay=0.5, maxDelay=30.0, factor=1.2)

#: Seconds that a server of ours gets to load, at least; a cold disk may need minutes.
_LOADS: Final = 900.0

#: Seconds that the last bytes of answers get to leave, once the answers have ended.
_LAST_BYTES: Final = 5.0

#: Seconds that the saving of slots gets at least, when answers took the most of the grace.
_SAVING: Final = 30.0

#: Files that we have open beside the connections of clients and those to slots: logs, the ledger,
#: pipes of servers, questions to them.
_OWN_FILES: Final = 64

#: How many new objects make Python look for those that nobody can reach, and how many such looks a
#: longer one.  With its own 700, 10 and 10 it looks all the time while a thousand calls are under
#: way; what is much more than this is felt as a pause.
_GARBAGE: Final = (2_000, 20, 20)

#: Connections that there may be in any case.
_FEWEST: Final = 16

log = Logger()


class Options(usage.Options):
    """The command line of ``twistd claudegw``."""

    synopsis = "[--config FILE]"
    optParameters: ClassVar = [
        ["config", "c", "etc/gw.toml", "The configuration; etc/gw.toml explains every key."]
    ]

    def postOptions(self) -> None:
        self.log_file, self.output = log_file(self.parent), output(self.parent)
        try:
            self.path = Path(self["config"]).absolute()
            self.loaded = _load(self.path)
            check_door(self.loaded.gateway)
            _make_state_dir(self.loaded.gateway.state_dir)
        except ConfigError as error:
            lines = "\n  ".join(error.mistakes)
            # Of a UsageError twistd would say its own options first.
            sys.exit(f"claudegw: {self['config']} cannot be used:\n  {lines}")


def _load(path: Path) -> Config:
    """The configuration, with the keys that it takes from the environment; raises ConfigError."""
    config = load(path, ROUTED)
    mistakes = missing_keys(config)
    if mistakes:
        raise ConfigError(mistakes)
    return config


def _make_state_dir(state_dir: Path) -> None:
    """Make the state folder; raises ConfigError where it cannot be used."""
    try:
        private(private(state_dir) / "slots")
    except OSError as error:
        raise ConfigError([f"gateway.state_dir: {state_dir}: {error.strerror}"]) from None


def makeService(options: Options) -> Service:
    """The service that twistd runs."""
    from twisted.internet import reactor  # importing it installs it

    gc.set_threshold(*_GARBAGE)
    gc.collect()
    gc.freeze()  # what is there by now stays: nothing of it need ever be looked at
    process = Logged(options.log_file, options.output)
    House.built(options.loaded, options.path, reactor).setServiceParent(process)
    return process


@attrs.define(eq=False)
class _Stores:
    """
    Where slots are saved: one `Store` for each folder, whichever tiers save there.

    Attributes:
        budget: bytes that the snapshots of a folder may have.
    """

    budget: int
    _by_folder: dict[Path, Store] = attrs.field(factory=dict, init=False)

    def adopt(self, budget: int) -> None:
        """Go by another budget; one of 0 saves nothing from the next start of a server on."""
        self.budget = budget
        for store in self._by_folder.values():
            store.budget = budget

    def of(self, command: Sequence[str]) -> Store | None:
        """Where a server with this command saves its slots; None for nowhere."""
        folder = option(command, "--slot-save-path")
        if folder is None or not self.budget:
            return None
        return self._by_folder.setdefault(Path(folder), Store(Path(folder), self.budget))


@attrs.define(eq=False)
class House(MultiService):
    """
    Everything there is: the door, the tiers, their servers.

    Attributes:
        config: what is in force.
        path: the file that it was read from.
        api: the Messages API, in front of the tiers.
        site: the door's connections.
    """

    config: Config
    path: Path
    api: Api
    _reactor: Any
    site: QuietSite
    _door: Service
    _stores: _Stores
    _announcing: Deferred[None] | None = None
    _changing: set[Deferred[None]] = attrs.field(factory=set, init=False)
    _leaving: list[Tier] = attrs.field(factory=list, init=False)
    _awaiting: list[Deferred[None]] = attrs.field(factory=list, init=False)

    @classmethod
    def built(cls, config: Config, path: Path, reactor: Any) -> House:
        """The house that `config` describes, standing still."""
        gateway = config.gateway
        stores = _Stores(gateway.snapshot_budget * MIB)
        tiers = {name: _tier(config, name, reactor, stores) for name in config.tier}
        times = Times(start=gateway.start_after)
        history = History(gateway.state_dir / FILE, _bounds(config), reactor)
        ledger = Ledger(reactor, history=history)
        dispatch = Dispatch(tiers, config.route, ledger, times, reactor)
        api = Api(dispatch, version("claudegw"))
        limits = _connection_limits(config, reactor)
        factory = site(api.app.resource(), _access(config), reactor, limits)
        door = strports.service(gateway.endpoint, factory, reactor)
        return cls(config, path, api, reactor, factory, door, stores)

    def __attrs_post_init__(self) -> None:
        MultiService.__init__(self)
        self._door.setServiceParent(self)

    @property
    def tiers(self) -> dict[str, Tier]:
        return dict(self.api.dispatch.tiers)

    # --- start ------------------------------------------------------------------------------------

    def startService(self) -> None:
        self.api.dispatch.ledger.start()
        self.api.capture = _capture(self.config)
        for tier in self.tiers.values():
            _start(tier)
        self._reactor.callWhenRunning(self._take_signals)
        super().startService()
        log.info(
            "claudegw {version} listens on {listen}",
            version=self.api.version,
            listen=self.config.gateway.listen,
        )
        notify(READY)
        self._announcing = begin(self._announce())

    async def _announce(self) -> None:
        """Say what to type next, once every server is up."""
        for name, tier in self.tiers.items():
            for attempt in count():
                if self.tiers.get(name) is not tier:
                    break  # it was removed
                try:
                    await tier.props()
                except ApiError:
                    await deferLater(self._reactor, _PATIENCE(attempt))
                else:
                    break
        command = Path(sys.executable).with_name("claudegw")
        log.info(
            "every server is up; in another terminal type:\n{command}",
            command=f"{quote(str(command))} claude --config {quote(str(self.path))}",
        )

    def _take_signals(self) -> None:
        """TERM by Twisted's own way would end the process by the signal; a good stop is a 0."""
        for number, then in ((signal.SIGTERM, self._reactor.stop), (signal.SIGHUP, self.reload)):
            signal.signal(number, lambda *_, then=then: self._reactor.callFromThread(then))

    # --- reload -----------------------------------------------------------------------------------

    def reload(self) -> None:
        """Read the configuration again and go by it, as far as that can be done now."""
        if not self.running:
            return
        notify(reloading())
        try:
            changes = between(self.config, _load(self.path))
        except ConfigError as error:
            log.warn(
                "{path} cannot be used, all stays as it was:\n  {mistakes}",
                path=str(self.path),
                mistakes="\n  ".join(error.mistakes),
            )
        else:
            self._adopt(changes)
        finally:
            notify(READY)

    def _adopt(self, changes: Changes) -> None:
        config, dispatch, before = changes.config, self.api.dispatch, self.tiers
        dispatch.tiers = {
            name: before.get(name) or _tier(config, name, self._reactor, self._stores)
            for name in config.tier
        }
        self.config = config
        self._stores.adopt(config.gateway.snapshot_budget * MIB)
        dispatch.rules, dispatch.times = config.route, Times(start=config.gateway.start_after)
        self.site.access = _access(config)
        self.site.adopt(_connection_limits(config, self._reactor))
        if dispatch.ledger.history is not None:
            dispatch.ledger.history.adopt(_bounds(config))
        self.api.capture = _capture(config)
        for name in changes.removed:
            self._later(self._remove(before[name]))
        for name in changes.added:
            self._later(self._add(dispatch.tiers[name]))
        for name in config.tier:
            if name in before:
                self._renew(before[name])
        log.info("reloaded {path}", path=str(self.path))
        for key in changes.postponed:
            log.warn("{key}: its new value needs a restart of the gateway", key=key)

    def _renew(self, tier: Tier) -> None:
        """Let a tier go by its new configuration, and its server, once it does nothing."""
        before, config = tier.config, self.config.tier[tier.name]
        tier.adopt(config)
        child = tier.child
        if child is None:
            return
        assert before.server is not None
        assert config.server is not None
        child.limits = _limits(config, config.server)
        child.withheld = _withheld(self.config, tier.name)
        reckon = ram.of_command
        if (before.server.command, before.cache_ram) == (config.server.command, config.cache_ram):
            # What was saved meanwhile says better what a token takes; no reason to start anew.
            reckon = partial(_as_it_was, child.command)
        line = command(config, config.server, self.config.gateway.state_dir, reckon)
        if child.replace(line, environment(config, config.server)):
            log.info("tier {tier}: its server is started anew when it rests", tier=tier.name)
            self._later(_restart(tier, child))
        elif child.state is State.FAILED:
            child.retry()

    async def _add(self, tier: Tier) -> None:
        """
        Let a tier in, and start its server as soon as no other one that is let go has its place.

        Until then its calls wait as for a server that loads.
        """
        tier.start()
        if tier.child is None:
            return
        tier.is_due = True
        while any(tier.shares_with(other) for other in self._leaving):
            gone: Deferred[None] = Deferred()
            self._awaiting.append(gone)
            await gone
        tier.is_due = False
        if self.tiers.get(tier.name) is tier:  # it may have been removed itself
            tier.child.startService()

    async def _remove(self, tier: Tier) -> None:
        """
        Let a tier go that nobody is sent to any more, once its calls have their answers.

        What its slot holds is saved, for the day on which the tier comes back.
        """
        self._leaving.append(tier)
        await tier.rest(Rank.BACKGROUND)
        await tier.cache.rest(max(_SAVING, self.config.gateway.grace))
        tier.stop()
        if tier.child is not None:
            await tier.child.stopService()
        self._leaving.remove(tier)
        log.info("tier {tier}: removed", tier=tier.name)
        awaiting, self._awaiting = self._awaiting, []
        for gone in awaiting:
            gone.callback(None)

    def _later(self, change: Coroutine[Deferred[Any], Any, None]) -> None:
        """Make a change that has to wait, unless the house stops first."""
        changing = Deferred.fromCoroutine(change)
        self._changing.add(changing)

        def changed(result: Failure | None) -> None:
            self._changing.discard(changing)
            if isinstance(result, Failure) and not result.check(CancelledError, ApiError):
                log.failure("a part of the new configuration could not be had", result)

        changing.addBoth(changed)

    # --- stop -------------------------------------------------------------------------------------

    def stopService(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        """Let nobody in, let answers end, save what slots hold, stop the servers: in this order."""
        self.running = False
        tiers = [*self.tiers.values(), *self._leaving]
        notify(stopping(self.config.longest_grace))
        if self._announcing is not None:
            self._announcing.cancel()
        for changing in list(self._changing):
            changing.cancel()
        await self._door.stopService()
        for tier in tiers:
            tier.stop()
        until = self._reactor.seconds() + self.config.gateway.grace
        await self.api.drain(self.config.gateway.grace, self._reactor)
        await self.site.hang_up(_LAST_BYTES, self._reactor)
        left = max(_SAVING, until - self._reactor.seconds())
        await gatherResults([Deferred.fromCoroutine(tier.cache.rest(left)) for tier in tiers])
        children = [tier.child for tier in tiers if tier.child is not None]
        await gatherResults([child.stopService() for child in children])
        self.api.dispatch.ledger.stop()


def _access(config: Config) -> Access:
    gateway = config.gateway
    return Access(gateway.token, gateway.hosts, gateway.body_limit)


def _connection_limits(config: Config, reactor: Any) -> ConnectionLimits:
    """What connections get, and as many of them as this process may have."""
    gateway = config.gateway
    ours = _OWN_FILES + 2 * sum(tier.slots for tier in config.tier.values())
    most = max(allow(gateway.max_connections + SPARE + ours, reactor) - SPARE - ours, _FEWEST)
    if most < gateway.max_connections:
        log.warn(
            "no more than {most} connections: the process may have no more open files (ulimit -n)",
            most=most,
        )
    most = min(most, gateway.max_connections)
    return ConnectionLimits(
        most,
        gateway.idle_timeout,
        gateway.head_timeout,
        gateway.body_timeout,
        gateway.unread_timeout,
    )


def _bounds(config: Config) -> Bounds:
    return Bounds(config.gateway.ledger_days, config.gateway.ledger_rows)


def _capture(config: Config) -> Capture | None:
    """What keeps the bodies of calls, if anything does: loudly."""
    capture = Capture.of(config)
    if capture is not None:
        log.warn(
            "capture is on: all that calls say is written to {folder}; when the mistake is found,"
            " turn it off and remove the folder",
            folder=str(capture.folder),
        )
    return capture


def _limits(wanted: Wanted, server: Server) -> Limits:
    restarts, window, grace = server.max_restarts, server.restart_window, server.stop_grace
    return Limits(restarts, window, grace, patience=max(_LOADS, wanted.startup_patience))


def _tier(config: Config, name: str, reactor: Any, stores: _Stores) -> Tier:
    """The tier of that name, with its server if that is ours; both stand still."""
    wanted, state_dir = config.tier[name], config.gateway.state_dir
    if wanted.kind != LLAMA_SERVER:
        return Tier.of(name, wanted, remote(reactor, name, wanted), reactor)
    client = LlamaClient.at(reactor, name, wanted.url, wanted.key)
    tier = Tier.of(name, wanted, client, reactor)
    if (server := wanted.server) is not None:
        tier.child = Child(
            name,
            command(wanted, server, state_dir, ram.of_command),
            environment(wanted, server),
            state_dir,
            client.health,
            reactor,
            _limits(wanted, server),
            on_line=tier.hear,
            on_state=tier.server_is,
            end_calls=client.hang_up,
            withheld=_withheld(config, name),
        )
        tier.store_for = stores.of
        tier.cache.command = tuple(tier.child.command)
        tier.cache.prefix_file = state_dir / f"{name}.prefix"
    return tier


def _withheld(config: Config, name: str) -> frozenset[str]:
    """Variables with the keys of other tiers than `name`: none of its server's business."""
    keys = {other: tier.api_key_env for other, tier in config.tier.items()}
    own = keys.pop(name)
    return frozenset(key for key in keys.values() if key is not None and key != own)


def _as_it_was(line: Sequence[str], *_: Any) -> int | None:
    """The MiB for conversations in RAM that a command line has already."""
    reckoned = option(line, "--cache-ram")
    return None if reckoned is None else int(reckoned)


def _start(tier: Tier) -> None:
    tier.start()
    if tier.child is not None:
        tier.child.startService()


async def _restart(tier: Tier, child: Child) -> None:
    """Start a server anew while none of its slots works, and what it held is saved."""
    permits = await tier.rest()
    try:
        if child.replace(child.command, child.env):  # it may have been started with them meanwhile
            await tier.cache.rest(SLOT_PATIENCE)
            child.restart()
    finally:
        for permit in permits:
            permit.finished()
