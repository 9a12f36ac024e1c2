"""Many calls at once, from one thread."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Final

import attrs

from bench.client import LAST_CHUNK
from bench.client import events as count_events

#: Seconds without a byte for anybody after which the calls that are left are given up.
SILENCE: Final = 30.0

#: Seconds between two looks at what it costs.
LOOK: Final = 0.05


@attrs.frozen
class Crowd:
    """
    What became of it.

    Attributes:
        complete: answers that came to their end with every event.
        seconds: from the first connection to the end of the last answer.
    """

    complete: int
    seconds: float


@attrs.define(eq=False)
class _Caller:
    """One connection, with one call on it."""

    connection: socket.socket
    to_send: memoryview
    read: bytearray = attrs.field(factory=bytearray)

    @classmethod
    def connecting(cls, port: int, request: bytes) -> _Caller:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", port))
        return cls(connection, memoryview(request))

    def may_send(self) -> bool:
        """Send what goes; whether that was all."""
        self.to_send = self.to_send[self.connection.send(self.to_send) :]
        return not self.to_send

    def may_read(self) -> bool:
        """Read what is there; whether that was all."""
        data = self.connection.recv(256 * 1024)
        self.read += data
        return not data or self.read.endswith(LAST_CHUNK)


def crowd(
    port: int,
    requests: Sequence[bytes],
    *,
    calls: int,
    at_once: int,
    events: int,
    look: Callable[[], object] = lambda: None,
) -> Crowd:
    """
    So many calls, each on a connection of its own.

    Args:
        port: where they go.
        requests: what they send, in turns.
        calls: how many.
        at_once: how many of them at any time.
        events: what each answer must have.
        look: called now and then while they run.
    """
    ended: list[_Caller] = []
    begun, next_look = 0, 0.0
    with DefaultSelector() as selector:
        began = heard = time.monotonic()

        def begin() -> None:
            nonlocal begun
            caller = _Caller.connecting(port, requests[begun % len(requests)])
            begun += 1
            selector.register(caller.connection, EVENT_WRITE, caller)

        while begun < min(at_once, calls):
            begin()
        while selector.get_map():
            ready = selector.select(LOOK)
            now = time.monotonic()
            heard = now if ready else heard
            if now > next_look:
                look()
                next_look = time.monotonic() + LOOK
            if now - heard > SILENCE:
                break
            for key, mask in ready:
                if not _went_on(selector, key, mask):
                    ended.append(key.data)
                    if begun < calls:
                        begin()
        took = time.monotonic() - began
        for key in list(selector.get_map().values()):
            key.data.connection.close()
    whole = [bytes(caller.read) for caller in ended if caller.read.endswith(LAST_CHUNK)]
    return Crowd(sum(count_events(read) == (events, True) for read in whole), took)


def _went_on(selector: DefaultSelector, key: selectors.SelectorKey, mask: int) -> bool:
    """Do what a connection is ready for; False once it is closed."""
    caller: _Caller = key.data
    try:
        if mask & EVENT_WRITE and caller.may_send():
            selector.modify(caller.connection, EVENT_READ, caller)
        if not (mask & EVENT_READ and caller.may_read()):
            return True
    except BlockingIOError:
        return True
    except OSError as error:
        caller.read += os.strerror(error.errno or 0).encode()
    selector.unregister(caller.connection)
    caller.connection.close()
    return False
