"""Asking servers over real sockets: here is what memory does not show, TLS above all."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
import trustme
from twisted.internet import reactor as real_reactor
from twisted.internet import ssl
from twisted.internet.defer import Deferred, fail, maybeDeferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.web.iweb import IAgent, IResponse
from twisted.web.server import Site
from zope.interface import implementer

from gateway.config import Tier as TierConfig
from gateway.llama.client import LlamaClient
from gateway.remote import remote
from gateway.upstream import Health, Remote, Upstream
from gateway.wire.errors import ApiError, Unavailable
from tests.remote.scene import Elsewhere

# What Twisted gives to pyOpenSSL is not what the newest one likes best.
pytestmark = pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning")

reactor: Any = real_reactor


@attrs.define(eq=False)
class Secure:
    """An https server of the Messages API on this machine."""

    there: Elsewhere
    port: Any
    ca: trustme.CA
    folder: Path

    def client(self, host: str = "localhost", *, trusted: bool = True) -> Remote:
        """A client of it, by this name."""
        path = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(path)
        number = self.port.getHost().port
        url, ca_file = f"https://{host}:{number}/prefix", path if trusted else None
        return remote(reactor, "main", TierConfig(url, "anthropic", ca_file=ca_file))


@pytest_twisted.async_yield_fixture
async def secure(tmp_path: Path) -> AsyncIterator[Secure]:
    """One whose certificate says ``localhost``."""
    ca, there = trustme.CA(), Elsewhere()
    issued = ca.issue_cert("localhost")
    pem = issued.private_key_pem.bytes() + b"".join(p.bytes() for p in issued.cert_chain_pems)
    options = ssl.PrivateCertificate.loadPEM(pem).options()
    port = reactor.listenSSL(0, Site(there), options, interface="127.0.0.1")
    yield Secure(there, port, ca, tmp_path)
    await maybeDeferred(port.stopListening)


@pytest_twisted.ensureDeferred
async def test_a_server_that_its_certificate_vouches_for(secure: Secure) -> None:
    """It is asked under its own name, with the path that stands before all others."""
    assert (await secure.client().props()).n_ctx == 5000
    ((path, _, headers),) = secure.there.asked
    assert path == "/prefix/v1/models"
    assert headers["host"].startswith("localhost:")


@pytest_twisted.ensureDeferred
async def test_cookies_are_not_kept(secure: Secure) -> None:
    """What a server gives with one call does not go along with another client's."""
    client = secure.client()
    for _ in range(2):
        await client.props()
    assert ["cookie" in headers for _, _, headers in secure.there.asked] == [False, False]


@pytest.mark.parametrize(
    ("host", "trusted"), [("127.0.0.1", True), ("localhost", False)], ids=["name", "certificate"]
)
@pytest_twisted.ensureDeferred
async def test_a_server_that_nobody_vouches_for(secure: Secure, host: str, trusted: bool) -> None:
    """Neither another name nor a certificate that nobody trusts is good enough to send a key to."""
    with pytest.raises(ApiError, match="ca_file") as raised:
        await secure.client(host, trusted=trusted).props()
    assert raised.value.should_retry is False
    assert secure.there.asked == []


@pytest_twisted.ensureDeferred
async def test_nobody_listens(secure: Secure) -> None:
    """That is a server which is down, and may come."""
    client = secure.client()
    await maybeDeferred(secure.port.stopListening)
    with pytest.raises(Unavailable, match="No model server answers"):
        await client.props()
    assert await client.health() is Health.DOWN


@pytest_twisted.ensureDeferred
async def test_what_comes_at_once_is_handed_on_at_once() -> None:
    """However many chunks of HTTP it has; what comes later is not waited for."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [head + b"3\r\none\r\n3\r\ntwo\r\n", b"5\r\nthree\r\n", b"4\r\nfour\r\n0\r\n\r\n"]
    received: list[bytes] = []

    class Server(Protocol):
        def dataReceived(self, data: bytes) -> None:  # noqa: ARG002  # whatever is asked
            self.say()

        def say(self) -> None:
            assert self.transport is not None
            self.transport.write(pieces.pop(0))

    server = Server()
    port = reactor.listenTCP(0, Factory.forProtocol(lambda: server), interface="127.0.0.1")
    client = LlamaClient.at(reactor, "main", f"http://127.0.0.1:{port.getHost().port}", None)

    def receive(data: bytes) -> None:
        received.append(data)
        if pieces:
            server.say()

    await (await client.messages({})).stream(receive)
    assert received == [b"onetwo", b"three", b"four"]
    await maybeDeferred(port.stopListening)


@pytest_twisted.ensureDeferred
async def test_no_more_files_may_be_open() -> None:
    """Over a socket in the file system that is no error of Twisted's; it is told as any other."""

    @implementer(IAgent)
    class Agent:
        def request(self, *_: object) -> Deferred[IResponse]:
            return fail(OSError(errno.EMFILE, "Too many open files"))

    def refusal(*_: object) -> ApiError:
        raise AssertionError

    upstream = Upstream.over(Clock(), Agent(), "main", "unix:/run/llama.sock", refusal, {})
    with pytest.raises(Unavailable, match="No model server answers at unix:/run/llama"):
        await upstream.request("GET", "/health")
    assert await upstream.status("/health") is None
