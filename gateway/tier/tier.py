"""What is known of one model that calls are sent to: its server, its line, its window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.config import Tier as Wanted
from gateway.llama.client import LlamaClient, Props
from gateway.tier.count import Counter
from gateway.tier.line import Line
from gateway.wire.errors import ApiError

Json = Any

#: Seconds for which a server's word about itself is taken; it may be restarted with another model.
_FRESH: Final = 30.0

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
    """

    name: str
    config: Wanted
    client: LlamaClient
    line: Line
    counter: Counter
    _reactor: IReactorTime
    _props: Props | None = attrs.field(default=None, init=False)
    _asked_at: float = attrs.field(default=0.0, init=False)

    @classmethod
    def of(cls, name: str, wanted: Wanted, client: LlamaClient, reactor: IReactorTime) -> Tier:
        """The tier that the configuration wants, in front of `client`."""
        line = Line(wanted.slots, wanted.max_waiting, client.busy_slots, reactor)
        return cls(name, wanted, client, line, Counter(client), reactor)

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
                self._meet(found)
            self._props = found
        return self._props

    def _meet(self, found: Props) -> None:
        """The server is a new one to us."""
        self.counter.forget()
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

    def status(self) -> Mapping[str, Json]:
        """For ``/status``: what was last known, asked of nobody."""
        known = None if self._props is None else attrs.asdict(self._props)
        return {
            "url": self.config.url,
            "server": known,
            "slots": self.config.slots,
            "running": self.line.running,
            "settling": self.line.settling,
            "waiting": self.line.waiting,
        }
