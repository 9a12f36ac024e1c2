"""
What a client says to a gateway, or a gateway to its server, written down.

A `Recorder` stands between the two, hands on what it hears, and notes each request and the head of
its answer; who asks it to may do something when a request comes, or keep its answer back.  Nothing
of what it notes may be committed as it is: `tests.redacted` makes fixtures of it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from typing import Any, Final

import attrs
import orjson

Json = Any

#: Headers that are nobody's business.
CREDENTIALS: Final = frozenset({"authorization", "x-api-key", "proxy-authorization", "cookie"})

_END: Final = b"\r\n\r\n"
_CHUNK: Final = 65536


@attrs.define(eq=False)
class Heard:
    """
    One request, and what came back.

    Attributes:
        method: of the request.
        path: with its query.
        headers: names in lower case, without credentials.
        body: parsed; None where there was none.
        at: when it was whole, in seconds since the recorder was made.
        status: of the answer; None while there is none.
        answer: the answer's headers, names in lower case.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: Json
    at: float
    status: int | None = None
    answer: dict[str, str] = attrs.field(factory=dict)

    @property
    def is_message(self) -> bool:
        """Whether it is a call to a model."""
        return self.path.partition("?")[0] == "/v1/messages"

    @property
    def is_count(self) -> bool:
        return self.path.partition("?")[0] == "/v1/messages/count_tokens"


def _head(head: bytes) -> tuple[str, dict[str, str]]:
    """The first line, and the headers."""
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return first, {name.lower(): value.strip() for name, _, value in fields}


def _request(data: bytes) -> tuple[int, tuple[str, str, dict[str, str], bytes]] | None:
    """The first request in `data` and its length, once it is whole."""
    head, found, rest = data.partition(_END)
    if not found:
        return None
    first, headers = _head(head)
    assert "transfer-encoding" not in headers, "no client that we know sends its body in chunks"
    size = int(headers.get("content-length", 0))
    if len(rest) < size:
        return None
    method, path, _ = first.split(" ")
    return len(head) + len(_END) + size, (method, path, headers, rest[:size])


@attrs.define(eq=False)
class Recorder:
    """
    Stands before a gateway, or a server, at the port `behind` of 127.0.0.1.

    Attributes:
        before: told of each request before it goes on; it does not, and is left without an answer,
            where this says so by False.
        instead: told of each request that has gone on, whose answer waits meanwhile; may give what
            the client gets in its place before it is hung up on, as is who stands behind.
        heard: every request, in the order in which they were whole.
        port: where it listens.
    """

    behind: int
    before: Callable[[Heard], bool] = lambda _: True
    instead: Callable[[Heard], bytes | None] = lambda _: None
    heard: list[Heard] = attrs.field(factory=list, init=False)
    port: int = attrs.field(default=0, init=False)
    _began: float = attrs.field(factory=time.monotonic, init=False)
    _lock: Lock = attrs.field(factory=Lock, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def messages(self) -> Sequence[Heard]:
        """The calls to a model."""
        return [heard for heard in list(self.heard) if heard.is_message]

    @property
    def now(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    @contextmanager
    def listening(self) -> Iterator[Recorder]:
        """Listen on a free port."""
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = int(door.getsockname()[1])
            Thread(target=self._serve, args=(door,), daemon=True).start()
            try:
                yield self
            finally:
                _shut(door)

    def note(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Heard:
        """Write a request down."""
        kept = {name: value for name, value in headers.items() if name not in CREDENTIALS}
        parsed = orjson.loads(body) if body else None
        with self._lock:
            heard = Heard(method, path, kept, parsed, self.now)
            self.heard.append(heard)
        return heard

    def _serve(self, door: socket.socket) -> None:
        with suppress(OSError):  # the door was shut
            while True:
                client, _ = door.accept()
                Thread(target=self._meet, args=(client,), daemon=True).start()

    def _meet(self, client: socket.socket) -> None:
        """One connection of a client, to its end."""
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.behind)) as end:
            for each in (client, end):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = _Line(self, client, end)
            back = Thread(target=line.answers, daemon=True)
            back.start()
            line.asks()
            back.join()


@attrs.define(eq=False)
class _Line:
    """One connection: what the client asked for on it, and how much of the answers is known."""

    recorder: Recorder
    client: socket.socket
    server: socket.socket
    waiting: list[Heard] = attrs.field(factory=list)
    flows: Event = attrs.field(factory=Event)

    def __attrs_post_init__(self) -> None:
        self.flows.set()

    def asks(self) -> None:
        """Each request of the client, to its end."""
        asked = b""
        with suppress(OSError):
            while data := self.client.recv(_CHUNK):
                asked += data
                while (taken := _request(asked)) is not None:
                    size, request = taken
                    heard = self.recorder.note(*request)
                    if self.recorder.before(heard):
                        self._ask(asked[:size], heard)
                    asked = asked[size:]
        _shut(self.client, self.server)
        self.flows.set()

    def _ask(self, asked: bytes, heard: Heard) -> None:
        self.waiting.append(heard)
        self.flows.clear()
        self.server.sendall(asked)
        instead = self.recorder.instead(heard)
        if instead is not None:
            _shut(self.server)
            self.client.sendall(instead)
            _shut(self.client)
        self.flows.set()

    def answers(self) -> None:
        """All that comes back; only the heads of answers are of interest."""
        answered = b""
        with suppress(OSError):
            while data := self.server.recv(_CHUNK):
                self.flows.wait()
                if self.waiting:
                    answered += data
                    head, found, _ = answered.partition(_END)
                    if found:
                        heard, answered = self.waiting.pop(0), b""
                        first, heard.answer = _head(head)
                        heard.status = int(first.split(" ")[1])
                self.client.sendall(data)
        self.flows.wait()
        _shut(self.client, self.server)


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):  # closing alone would not wake who reads it
            end.shutdown(socket.SHUT_RDWR)
