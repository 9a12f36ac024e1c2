"""The client's side of one answer, on a connection that the system knows."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from twisted.internet.abstract import FileDescriptor
from twisted.internet.testing import MemoryReactor

from gateway.web.api import Reply


class Connection(FileDescriptor):
    """One that takes everything, and what it took so far."""

    def __init__(self) -> None:
        super().__init__(reactor=MemoryReactor())  # it never comes round to anything
        self.connected = 1
        self.taken = b""

    def writeSomeData(self, data: bytes) -> int:  # noqa: N802  # Twisted's name
        self.taken += data
        return len(data)


@attrs.define
class Channel:
    transport: Connection


@attrs.define
class Request:
    """One that is written as it is, without HTTP."""

    channel: Channel | None

    def write(self, data: bytes) -> None:
        if self.channel is not None:
            self.channel.transport.write(data)


@pytest.fixture
def connection() -> Connection:
    return Connection()


def reply(connection: Connection | None) -> Reply:
    request: Any = Request(None if connection is None else Channel(connection))
    return Reply(request)


def test_what_is_told_leaves_at_once(connection: Connection) -> None:
    """It does not wait for what else the same piece of the answer brought with it."""
    reply(connection).write(b"a token")
    assert connection.taken == b"a token"


def test_a_connection_that_ends_is_left_to_the_reactor(connection: Connection) -> None:
    """It may be closed by what is sent last, which is the reactor's to do."""
    connection.loseConnection()
    reply(connection).write(b"a token")
    assert connection.taken == b""


def test_a_client_that_left_is_told_nothing() -> None:
    """There is nobody to tell."""
    reply(None).write(b"a token")
