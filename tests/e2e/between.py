"""Somebody between a gateway and its server, who can do something when a word is asked."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import attrs


@attrs.define(eq=False)
class Between:
    """
    Hands everything on, one request a connection, as the gateway asks.

    Attributes:
        server_port: where the server listens.
        word: what is looked for at the beginning of a request; b"" for nothing.
        then: called when it is found, before the request goes on.
        hangs: whether a request with the word is left without an answer instead.
        port: where the gateway asks.
    """

    server_port: int
    word: bytes = b""
    then: Callable[[], None] = lambda: None
    hangs: bool = False
    port: int = attrs.field(default=0, init=False)

    @contextmanager
    def serving(self) -> Iterator[Between]:
        """Listen on a free port of 127.0.0.1."""
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = int(door.getsockname()[1])
            Thread(target=self._serve, args=(door,), daemon=True).start()
            try:
                yield self
            finally:
                with suppress(OSError):
                    door.shutdown(socket.SHUT_RDWR)

    def _serve(self, door: socket.socket) -> None:
        with suppress(OSError):  # the door was shut
            while True:
                client, _ = door.accept()
                Thread(target=self._meet, args=(client,), daemon=True).start()

    def _meet(self, client: socket.socket) -> None:
        """One connection, which is one request."""
        with client, suppress(OSError):
            asked = client.recv(65536)
            if self.word and self.word in asked.partition(b"\r\n")[0]:
                if self.hangs:
                    client.recv(1)  # until the gateway hangs up
                    return
                self.word = b""
                self.then()
            with socket.create_connection(("127.0.0.1", self.server_port)) as server:
                server.sendall(asked)
                Thread(target=_hand_on, args=(client, server), daemon=True).start()
                _hand_on(server, client)


def _hand_on(source: socket.socket, sink: socket.socket) -> None:
    """All that comes from `source`, to `sink`; when one of them goes, so does the other."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):  # closing alone would not wake who reads it
            end.shutdown(socket.SHUT_RDWR)
