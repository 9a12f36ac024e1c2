"""
Builds the whole house, and runs it: start, drain, stop.

Started as ``twistd -n claudegw --config etc/gw.toml``.
"""

from __future__ import annotations

import signal
import sys
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

from gateway.config import Config, ConfigError, load
from gateway.daemon.log import Logged, log_file
from gateway.daemon.notify import READY, notify, stopping
from gateway.daemon.sockets import check_door
from gateway.dispatch import Dispatch
from gateway.ledger import Ledger
from gateway.llama.child import Child, Limits
from gateway.llama.client import LlamaClient
from gateway.llama.command import command
from gateway.policy.calls import KINDS
from gateway.tier.tier import Tier
from gateway.web.access import Access, QuietSite, site
from gateway.web.api import Api
from gateway.wire.errors import ApiError
from gateway.wire.pulse import Times

#: Seconds between two looks whether a server is up, by how often it was not.
_PATIENCE: Final = backoffPolicy(initialDelay=0.5, maxDelay=30.0, factor=1.2)

#: Seconds that the last bytes of answers get to leave, once the answers have ended.
_LAST_BYTES: Final = 5.0

log = Logger()


class Options(usage.Options):
    """The command line of ``twistd claudegw``."""

    synopsis = "[--config FILE]"
    optParameters: ClassVar = [
        ["config", "c", "etc/gw.toml", "The configuration; etc/gw.toml explains every key."]
    ]

    def postOptions(self) -> None:
        self.log_file = log_file(self.parent)
        try:
            self.path = Path(self["config"]).absolute()
            self.loaded = load(self.path, KINDS)
            check_door(self.loaded.gateway)
            _make_state_dir(self.loaded.gateway.state_dir)
        except ConfigError as error:
            lines = "\n  ".join(error.mistakes)
            raise usage.UsageError(f"{self['config']} cannot be used:\n  {lines}") from None


def _make_state_dir(state_dir: Path) -> None:
    """Make the state folder; raises ConfigError where it cannot be used."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state_dir / "slots").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"gateway.state_dir: {state_dir}: {error.strerror}"]) from None


def makeService(options: Options) -> Service:
    """The service that twistd runs."""
    from twisted.internet import reactor  # importing it installs it

    process = Logged(options.log_file)
    House.built(options.loaded, options.path, reactor).setServiceParent(process)
    return process


@attrs.define(eq=False)
class House(MultiService):
    """
    Everything there is: the door, the tiers, their children.

    Attributes:
        config: what it was built from.
        path: the file that it was read from.
        api: the Messages API, in front of the tiers.
    """

    config: Config
    path: Path
    api: Api
    _reactor: Any
    _site: QuietSite
    _door: Service
    _children: list[Child]
    _announcing: Deferred[None] | None = None

    @classmethod
    def built(cls, config: Config, path: Path, reactor: Any) -> House:
        """The house that `config` describes, standing still."""
        gateway, tiers, children = config.gateway, {}, []
        for name, wanted in config.tier.items():
            client = LlamaClient.at(reactor, name, wanted.url, wanted.api_key)
            tiers[name] = Tier.of(name, wanted, client, reactor)
            if (server := wanted.server) is not None:
                line = command(wanted, server, gateway.state_dir)
                limits = Limits(server.max_restarts, server.restart_window, server.stop_grace)
                hear = tiers[name].progress.listen
                children.append(
                    Child(
                        name,
                        line,
                        server.env,
                        gateway.state_dir,
                        client.health,
                        reactor,
                        limits,
                        hear,
                    )
                )
        times = Times(start=gateway.start_after)
        dispatch = Dispatch(tiers, config.route, Ledger(reactor), times, reactor)
        api = Api(dispatch, version("claudegw"))
        access = Access(gateway.token, gateway.hosts, gateway.body_limit)
        factory = site(api.app.resource(), access, reactor)
        door = strports.service(gateway.listen, factory, reactor)
        return cls(config, path, api, reactor, factory, door, children)

    def __attrs_post_init__(self) -> None:
        MultiService.__init__(self)
        for service in (*self._children, self._door):
            service.setServiceParent(self)

    def startService(self) -> None:
        for tier in self.api.dispatch.tiers.values():
            tier.start()
        self._reactor.callWhenRunning(self._take_sigterm)
        super().startService()
        log.info(
            "claudegw {version} listens on {listen}",
            version=self.api.version,
            listen=self.config.gateway.listen,
        )
        notify(READY)
        self._announcing = Deferred.fromCoroutine(self._announce())
        self._announcing.addErrback(lambda failure: failure.trap(CancelledError))

    async def _announce(self) -> None:
        """Say what to type next, once every server is up."""
        for tier in self.api.dispatch.tiers.values():
            for attempt in count():
                try:
                    await tier.props()
                except ApiError:
                    await deferLater(self._reactor, _PATIENCE(attempt))
                else:
                    break
        command = Path(sys.executable).with_name("claudegw")
        log.info(
            "every server is up; in another terminal type:\n{command}",
            command=f'claude --settings "$({command} settings --config {quote(str(self.path))})"',
        )

    def stopService(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        """Let nobody in, let the answers under way end, stop the children: in this order."""
        self.running = False
        notify(stopping(self.config.gateway.grace))
        if self._announcing is not None:
            self._announcing.cancel()
        await self._door.stopService()
        for tier in self.api.dispatch.tiers.values():
            tier.stop()
        await self.api.drain(self.config.gateway.grace, self._reactor)
        await self._site.hang_up(_LAST_BYTES, self._reactor)
        await gatherResults([child.stopService() for child in self._children])

    def _take_sigterm(self) -> None:
        """Twisted's own would end the process by the signal; a stop that went well is a 0."""
        signal.signal(signal.SIGTERM, lambda *_: self._reactor.callFromThread(self._reactor.stop))
