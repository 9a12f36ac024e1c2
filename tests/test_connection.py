"""How a connection is made, and how bytes leave on it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.internet import reactor as real_reactor
from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectError
from twisted.internet.error import ConnectionRefusedError as Refused
from twisted.internet.interfaces import IPushProducer
from twisted.internet.testing import MemoryReactor, StringTransport
from twisted.internet.threads import deferToThread
from twisted.web.http import Request
from twisted.web.iweb import IAgent
from zope.interface import implementer

from gateway.connection import Whole, agent_for, send_now, write_now
from gateway.web.connections import PoliteChannel

reactor: Any = real_reactor


class Connection(FileDescriptor):
    """
    One of which the system takes so much.

    Attributes:
        TLS: whether it is encrypted, as Twisted has it.
        takes: bytes that it takes, or why it takes none any more.
        taken: what it took.
    """

    TLS = False

    def __init__(self) -> None:
        super().__init__(reactor=MemoryReactor())  # it never comes round to anything
        self.connected = 1
        self.takes: int | Exception = 100
        self.taken = b""

    def writeSomeData(self, data: bytes) -> int | Exception:
        if isinstance(self.takes, Exception):
            return self.takes
        now = data[: self.takes]
        self.taken += now
        self.takes -= len(now)
        return len(now)

    def getPeer(self) -> None:
        """Nobody in particular."""

    getHost = getPeer

    @property
    def waits_for_the_reactor(self) -> bool:
        assert isinstance(self.reactor, MemoryReactor)
        return self in self.reactor.writers


@implementer(IPushProducer)
@attrs.define
class Producer:
    """Knows whether it is paused."""

    paused: bool = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        """Nothing: no connection ends here."""


@pytest.fixture
def connection() -> Connection:
    return Connection()


def test_what_is_written_leaves_at_once(connection: Connection) -> None:
    """The reactor is not even asked."""
    write_now(connection, b"a token")
    assert connection.taken == b"a token"
    assert not connection.waits_for_the_reactor


def test_what_is_written_does_not_overtake_what_waits(connection: Connection) -> None:
    """A status that was written before it leaves before it, and both at once."""
    connection.write(b"200 OK ")
    write_now(connection, b"a token")
    assert connection.taken == b"200 OK a token"


def test_what_the_system_does_not_take_is_the_reactors(connection: Connection) -> None:
    """Byte for byte, and in its order."""
    connection.takes = 4
    write_now(connection, b"0123456789")
    write_now(connection, b"abc")
    assert connection.taken == b"0123"
    assert connection.waits_for_the_reactor
    connection.takes = 100
    connection.doWrite()
    assert connection.taken == b"0123456789abc"


def test_a_client_that_does_not_read_pauses_who_writes(connection: Connection) -> None:
    """As anything that is written pauses it."""
    producer = Producer()
    connection.registerProducer(producer, True)
    connection.takes = 0
    write_now(connection, b"x" * connection.bufferSize)
    assert not producer.paused
    write_now(connection, b"x")
    assert producer.paused
    connection.takes = 2 * connection.bufferSize
    connection.doWrite()
    assert not producer.paused


def test_a_connection_that_broke_is_left_to_the_reactor(connection: Connection) -> None:
    """It finds what is wrong, and tells whom it concerns."""
    connection.takes = ConnectionError()
    write_now(connection, b"a token")
    assert connection.waits_for_the_reactor


def test_a_connection_that_ends_is_left_to_the_reactor(connection: Connection) -> None:
    """It may be closed by what is sent last, which is the reactor's to do."""
    connection.write(b"a token")
    connection.loseConnection()
    send_now(connection)
    assert connection.taken == b""


def test_a_connection_that_is_encrypted_is_written_to_as_ever(connection: Connection) -> None:
    """Nothing may go past what encrypts it."""
    connection.TLS = True
    write_now(connection, b"a token")
    assert connection.taken == b""
    assert connection.waits_for_the_reactor


def test_a_body_that_was_written_is_not_kept() -> None:
    """Twisted's objects of a call stay until Python looks for them; a prompt may be megabytes."""
    body, transport = Whole(b"a prompt"), StringTransport()
    body.startProducing(transport)
    assert (transport.value(), body.length, body.body) == (b"a prompt", 8, b"")


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_reply_leaves_at_once(connection: Connection, version: bytes) -> None:
    """With its headers, in chunks and without; the reactor is not waited for."""
    channel = PoliteChannel()
    channel.transport = connection
    connection.takes = 10_000
    request = Request(channel)
    request.clientproto = b"HTTP/" + version
    request.write(b"")
    request.write(b"a token")
    assert b"a token" in connection.taken


# --- a port of this machine -----------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """One that nobody has come to yet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        found.settimeout(10)
        yield found


def agent(listening: socket.socket) -> IAgent:
    return agent_for(reactor, f"http://127.0.0.1:{listening.getsockname()[1]}")


def ask(agent: IAgent) -> Any:
    return agent.request(b"GET", b"http://localhost/health")


@pytest_twisted.ensureDeferred
async def test_a_request_has_left_by_the_time_that_it_is_made(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No turn of the reactor is waited for."""
    monkeypatch.setattr("gateway.connection._AT_ONCE", 10.0)  # as on an idle machine
    asked = ask(agent(listening))
    with listening.accept()[0] as server:
        assert server.recv(65536).startswith(b"GET /health HTTP/1.1\r\n")
        server.sendall(b"HTTP/1.1 204 Fine\r\n\r\n")
        assert (await asked).code == 204


@pytest_twisted.ensureDeferred
async def test_a_port_where_nobody_listens(listening: socket.socket) -> None:
    """Twisted says it in its own words."""
    there = agent(listening)
    listening.close()
    with pytest.raises(Refused):
        await ask(there)


@pytest_twisted.ensureDeferred
async def test_no_more_open_files(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is an error of connecting like others, and no fault of ours."""

    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("socket.socket", none)
    with pytest.raises(ConnectError):
        await ask(agent(listening))


@pytest_twisted.ensureDeferred
async def test_a_port_that_does_not_answer_at_once(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for as any other, and the reactor goes on meanwhile."""
    monkeypatch.setattr("gateway.connection._AT_ONCE", 0.0)  # as one whose backlog is full
    asked = ask(agent(listening))
    accepting: Any = deferToThread(_accepted, listening)
    with await accepting as server:
        server.sendall(b"HTTP/1.1 204 Fine\r\n\r\n")
        assert (await asked).code == 204


def _accepted(listening: socket.socket) -> socket.socket:
    """The connection over which a request came; one that was given up brings none."""
    while True:
        server, _ = listening.accept()
        if server.recv(65536):
            return server
        server.close()
