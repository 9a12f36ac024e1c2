"""
Both ends of a real gateway, watched from the test's own reactor.

An `Observer` stands between gateway and server, hands every byte on and notes what it saw; a
`Visitor` is a client that notes when what came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final

import attrs
import orjson
from twisted.internet import reactor as the_reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from tests.house import Browser, Wire

reactor: Any = the_reactor

COMPLETIONS: Final = ("POST /v1/messages", "POST /completion")


# --- between gateway and server -------------------------------------------------------------------


@attrs.define(eq=False)
class Exchange:
    """
    One connection from the gateway to the server.

    Attributes:
        began: when the gateway connected.
        ended: when the answer was whole, or somebody hung up; None before that.
        asked: the request, as far as it has come.
        answered: the answer, likewise.
    """

    began: float = attrs.field(factory=time.monotonic)
    ended: float | None = None
    asked: bytearray = attrs.field(factory=bytearray)
    answered: bytearray = attrs.field(factory=bytearray)

    @property
    def what(self) -> str:
        """Method and path."""
        return bytes(self.asked).partition(b" HTTP/1.1\r\n")[0].decode()

    @property
    def is_completion(self) -> bool:
        return self.what in COMPLETIONS

    @property
    def is_whole(self) -> bool:
        """Whether the server has said all that it wanted to say."""
        head, found, body = bytes(self.answered).partition(b"\r\n\r\n")
        if not found:
            return False
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if b"content-length" in fields:
            return len(body) == int(fields[b"content-length"])
        return body.endswith(b"0\r\n\r\n")

    def answer(self, data: bytes) -> None:
        self.answered += data
        if self.is_whole:
            self.end()

    def end(self) -> None:
        self.ended = self.ended or time.monotonic()


@attrs.define(eq=False)
class _Side(Protocol):
    """One of two connections: what it reads is noted and goes to the other."""

    note: Callable[[bytes], object]
    exchange: Exchange
    other: _Side | None = None
    is_lost: bool = False
    transport: Any = attrs.field(default=None, init=False)

    def connectionMade(self) -> None:
        if self.other is None:
            self.transport.pauseProducing()  # until there is somebody to hand it to
        elif self.other.is_lost:
            self.transport.loseConnection()
        else:
            self.other.other = self
            self.other.transport.resumeProducing()

    def dataReceived(self, data: bytes) -> None:
        self.note(data)
        assert self.other is not None
        self.other.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: ARG002
        self.is_lost = True
        self.exchange.end()
        if self.other is not None:
            self.other.transport.loseConnection()


@attrs.define(eq=False)
class Observer:
    """
    Stands between the gateway and the server at `server_port`.

    Attributes:
        exchanges: what it saw, in the order of beginning.
    """

    server_port: int
    exchanges: list[Exchange] = attrs.field(factory=list, init=False)
    _door: Any = attrs.field(init=False)

    @classmethod
    def before(cls, server_port: int) -> Observer:
        """One that listens."""
        self = cls(server_port)
        factory = Factory.forProtocol(self._meet)
        factory.noisy = False
        self._door = reactor.listenTCP(0, factory, interface="127.0.0.1")
        return self

    def _meet(self) -> _Side:
        """The gateway connects."""
        exchange = Exchange()
        self.exchanges.append(exchange)
        gateway = _Side(exchange.asked.extend, exchange)
        server = _Side(exchange.answer, exchange, gateway)
        endpoint = HostnameEndpoint(reactor, "127.0.0.1", self.server_port)
        connectProtocol(endpoint, server)
        return gateway

    async def stop(self) -> None:
        """Let nobody in any more."""
        await self._door.stopListening()

    @property
    def port(self) -> int:
        return int(self._door.getHost().port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.is_completion]

    def most_at_once(self) -> int:
        """The most completions that were open at one time."""
        steps = [(each.began, 1) for each in self.completions]
        steps += [(each.ended, -1) for each in self.completions if each.ended is not None]
        open_now = most = 0
        for _, step in sorted(steps):
            open_now += step
            most = max(most, open_now)
        return most

    def too_early(self) -> list[Exchange]:
        """Completions that came after one that was cut off, before the slot was said to be idle."""
        return [
            following
            for cut, following in pairwise(self.completions)
            if not cut.is_whole and not self._was_idle(cut.ended or 0, following.began)
        ]

    def _was_idle(self, since: float, until: float) -> bool:
        return any(
            each.what == "GET /slots" and each.ended is not None and each.ended <= until
            for each in self.exchanges
            if each.began >= since and b'"is_processing":true' not in each.answered
        )


# --- in front of the gateway ----------------------------------------------------------------------


class _Connection(Protocol):
    """Notes when what came."""

    def __init__(self) -> None:
        #: Each part, with the time of its coming and the bytes up to its end.
        self.parts: list[tuple[float, int]] = []
        self.received = bytearray()
        self.closed_at: float | None = None
        self.closed: Deferred[None] = Deferred()
        self._awaited: list[tuple[bytes, Deferred[None]]] = []

    def until(self, mark: bytes) -> Deferred[None]:
        """Fires once `mark` has come, or can come no more."""
        come: Deferred[None] = Deferred()
        self._awaited.append((mark, come))
        self._look()
        return come

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self.parts.append((time.monotonic(), len(self.received)))
        self._look()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: ARG002
        self.closed_at = time.monotonic()
        self._look()
        self.closed.callback(None)

    def _look(self) -> None:
        awaited, self._awaited = self._awaited, []
        for mark, come in awaited:
            if self.closed_at is not None or mark in self.received:
                come.callback(None)
            else:
                self._awaited.append((mark, come))


@attrs.define(eq=False)
class Visitor(Browser):
    """
    A client of a real gateway, for one request.

    Attributes:
        began: when it asked.
        has_left: whether it went before the answer had ended.
    """

    began: float
    has_left: bool = False

    @classmethod
    async def asking(
        cls, port: int, body: Any, path: str = "/v1/messages", headers: Mapping[str, str] = {}
    ) -> Visitor:
        """One that has asked."""
        endpoint = HostnameEndpoint(reactor, "127.0.0.1", port)
        protocol = await connectProtocol(endpoint, _Connection())
        visitor = cls(protocol, Wire(), time.monotonic())
        visitor.post(orjson.dumps(body), path, connection="close", **headers)
        return visitor

    def send(self, raw: bytes) -> None:
        self.protocol.transport.write(raw)

    @property
    def raw(self) -> bytes:
        return bytes(self.protocol.received)

    @property
    def ended_at(self) -> float:
        """When the answer's last byte came."""
        return float(self.protocol.parts[-1][0])

    def came_at(self, mark: bytes) -> float:
        """When `mark` was there."""
        end = self.raw.index(mark) + len(mark)
        return float(next(at for at, size in self.protocol.parts if size >= end))

    async def until(self, mark: bytes) -> None:
        """Until `mark` has come, or the gateway has closed the connection."""
        await self.protocol.until(mark)

    async def until_closed(self) -> None:
        """Until the gateway has closed the connection."""
        await self.protocol.closed

    def leave(self) -> None:
        """Close the connection, if it is still open."""
        if self.protocol.closed_at is None:
            self.has_left = True
            self.protocol.transport.abortConnection()


async def until(holds: Callable[[], Any], seconds: float = 30) -> None:
    """Until `holds`, which must come to pass."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        await deferLater(reactor, 0.1)
