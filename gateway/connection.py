"""
One request over a connection of its own: what HTTP asks, and no more.

Twisted's agent, and treq above it, look for connections that can be used again, follow redirects,
keep cookies and unpack.  None of it is wanted here, and it took 0.7 ms of each call.  Twisted's
protocol below them is used as it is; only what one read brings is handed on as one piece, however
many chunks it has, since a chunk is one event of a stream.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

import attrs
from twisted.internet import ssl
from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, clientFromString, wrapClientTLS
from twisted.internet.interfaces import IConsumer, IStreamClientEndpoint, ITransport
from twisted.internet.protocol import Factory
from twisted.internet.protocol import Protocol as Receiver
from twisted.python.components import proxyForInterface
from twisted.python.failure import Failure
from twisted.web._newclient import HTTP11ClientProtocol, Request
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from gateway.config import upstream_endpoint

#: Seconds until a connection to another machine must stand.
_CONNECTS: Final = 10.0

#: This machine itself, and the most seconds that it may take to say whether somebody listens.
_LOOPBACK: Final = "127.0.0.1"
_AT_ONCE: Final = 0.002

_CERTIFICATE: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL
)

#: Where a system keeps the certificates that it trusts, if OpenSSL was not told at its build.
_TRUSTED: Final = Path("/etc/ssl/cert.pem")

#: A body that ended as it should.
DONE: Final = Failure(ResponseDone())


def agent_for(reactor: Any, url: str, ca_file: Path | None = None) -> IAgent:
    """
    What asks the one server at `url`, and no other.

    Args:
        reactor: Twisted's.
        url: as in the configuration.
        ca_file: certificates, in PEM, that vouch for it; None for those that the system trusts.

    Raises:
        OSError: `ca_file` cannot be read.
    """
    endpoint: IStreamClientEndpoint
    parts = urlsplit(url)
    if parts.scheme == "https":
        host = parts.hostname or ""
        trusted = ca_file or (_TRUSTED if _TRUSTED.exists() else None)
        roots = ssl.platformTrust() if trusted is None else _roots(trusted)
        plain = HostnameEndpoint(reactor, host, parts.port or 443, timeout=_CONNECTS)
        endpoint = wrapClientTLS(ssl.optionsForClientTLS(host, trustRoot=roots), plain)
    else:
        place = url if parts.scheme == "unix" else f"http://{parts.netloc}"
        endpoint = clientFromString(reactor, upstream_endpoint(place))
        if parts.hostname == _LOOPBACK:
            endpoint = _Loopback(reactor, parts.port or 80, endpoint)
    return _Direct(endpoint)


def _roots(path: Path) -> Any:
    """The certificates in a PEM file, as what is trusted."""
    found = _CERTIFICATE.findall(path.read_bytes())
    return ssl.trustRootFromCertificates([ssl.Certificate.loadPEM(each) for each in found])


# --- in -------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Gathering(Receiver):
    """Hands on in one piece what came in one; the chunks of HTTP's are one for each event."""

    reader: Receiver
    _pieces: list[bytes] = attrs.field(factory=list, init=False)

    def makeConnection(self, transport: ITransport) -> None:
        self.reader.makeConnection(transport)

    def dataReceived(self, data: bytes) -> None:
        self._pieces.append(data)

    def hand_on(self) -> None:
        """No more came at once."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self.reader.dataReceived(b"".join(pieces))

    def connectionLost(self, reason: Failure = DONE) -> None:
        self.hand_on()
        self.reader.connectionLost(reason)


class _Connection(HTTP11ClientProtocol):
    """A connection for one request."""

    gathering: _Gathering | None = None

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        if self.gathering is not None:
            self.gathering.hand_on()


class _Gathered(proxyForInterface(IResponse)):  # type: ignore[misc]  # made by a function
    """A response whose body is gathered."""

    connection: _Connection

    def deliverBody(self, reader: Receiver) -> None:
        gathering = self.connection.gathering = _Gathering(reader)
        self.original.deliverBody(gathering)
        gathering.hand_on()  # what came before there was a reader


# --- out ------------------------------------------------------------------------------------------


@implementer(IBodyProducer)
@attrs.define
class Whole:
    """A request body that is all there, until it is written: Twisted keeps hold of the rest."""

    body: bytes
    length: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.length = len(self.body)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        body, self.body = self.body, b""
        consumer.write(body)
        return succeed(None)

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...

    def stopProducing(self) -> None: ...


def write_now(transport: Any, data: bytes) -> None:
    """
    Write to `transport`, without a turn of the reactor and what it costs to ask for one.

    If the system does not take all, the reactor goes on with it, and finds what is wrong, as ever.
    """
    if not _is_plain(transport):
        transport.write(data)
    elif _has_more(transport):
        transport.write(data)
        transport.doWrite()
    else:
        sent = transport.writeSomeData(data)
        if sent != len(data):
            transport.write(data[sent:] if isinstance(sent, int) else data)


def send_now(transport: Any) -> None:
    """As `write_now`, for what was written already; what is encrypted leaves as ever."""
    if _is_plain(transport):
        transport.doWrite()


def _is_plain(transport: Any) -> bool:
    """Whether bytes can go straight to the system: it is neither encrypted nor at its end."""
    return (
        isinstance(transport, FileDescriptor)
        and bool(transport.connected)
        and not transport.disconnecting
        and not getattr(transport, "TLS", False)
    )


def _has_more(transport: Any) -> bool:
    """Whether something that was written before waits to leave, and must not be overtaken."""
    # Twisted holds it in two places, and says it of neither by a name that is public.
    return bool(transport.dataBuffer or transport._tempDataLen)  # noqa: SLF001


@implementer(IStreamClientEndpoint)
@attrs.frozen
class _Loopback:
    """
    A port of this machine, connected to at once.

    The system has answered by the time it has been asked; Twisted would look for that two turns of
    the reactor later.  Where nobody listens, too many wait there already or no more files may be
    open, `otherwise` takes over and says what is wrong.
    """

    _reactor: Any
    _port: int
    _otherwise: IStreamClientEndpoint

    def connect(self, factory: Any) -> Deferred[Any]:
        connection = factory.buildProtocol(None)
        only = Factory.forProtocol(lambda: connection)
        try:
            with socket.socket() as found:
                found.settimeout(_AT_ONCE)
                found.connect((_LOOPBACK, self._port))
                found.setblocking(False)
                self._reactor.adoptStreamConnection(found.fileno(), found.family, only)
        except OSError:
            return cast("Deferred[Any]", self._otherwise.connect(factory))
        return succeed(connection)


class _Connections(Factory):
    """Such connections."""

    protocol = _Connection
    noisy = False  # Twisted would log the start and the end of each


@implementer(IAgent)
@attrs.frozen
class _Direct:
    """
    Asks one server, over a new connection each time.

    Twisted's own agent looks for one to be used again, and has more to it that is nothing to us.
    """

    endpoint: IStreamClientEndpoint
    _connections: _Connections = attrs.field(factory=_Connections, init=False)

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        _, _, host, path = uri.split(b"/", 3)
        sent = Headers() if headers is None else headers.copy()
        sent.setRawHeaders(b"host", [host])
        request = Request(method, b"/" + path, sent, bodyProducer)

        def ask(connection: _Connection) -> Deferred[IResponse]:
            def gather(response: IResponse) -> IResponse:
                gathered = _Gathered(response)
                gathered.connection = connection
                return cast("IResponse", gathered)

            answered = connection.request(request).addCallback(gather)
            send_now(connection.transport)
            return answered

        connecting: Deferred[Any] = self.endpoint.connect(self._connections)
        return connecting.addCallback(ask)
