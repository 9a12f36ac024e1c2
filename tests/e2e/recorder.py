"""
What a client says to a gateway, written down.

A `Recorder` stands between the two, hands every byte on as it comes, and notes each request and the
head of its answer.  Nothing of what it notes may be committed as it is: `tests.redacted` makes
fixtures of it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Lock, Thread
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


@attrs.define(eq=False)
class _Line:
    """One connection: what the client asked for on it, and how much of the answers is known."""

    recorder: Recorder
    asked: bytearray = attrs.field(factory=bytearray)
    answered: bytearray = attrs.field(factory=bytearray)
    waiting: list[Heard] = attrs.field(factory=list)

    def ask(self, data: bytes) -> None:
        """The client says something."""
        self.asked += data
        while (taken := _request(bytes(self.asked))) is not None:
            size, (method, path, headers, body) = taken
            del self.asked[:size]
            self.answered.clear()
            self.waiting.append(self.recorder.note(method, path, headers, body))

    def answer(self, data: bytes) -> None:
        """The gateway says something; only the heads of answers are of interest."""
        if not self.waiting:
            return
        self.answered += data
        head, found, _ = bytes(self.answered).partition(_END)
        if found:
            heard = self.waiting.pop(0)
            first, heard.answer = _head(head)
            heard.status = int(first.split(" ")[1])


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
    Stands before the gateway at `gateway_port` of 127.0.0.1, while `listening` is entered.

    Attributes:
        heard: every request, in the order in which they were whole.
    """

    gateway_port: int
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

    @contextmanager
    def listening(self) -> Iterator[Recorder]:
        """Listen on a free port."""
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = int(door.getsockname()[1])
            Thread(target=self._serve, args=(door,), daemon=True).start()
            try:
                yield self
            finally:
                with suppress(OSError):
                    door.shutdown(socket.SHUT_RDWR)

    def note(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Heard:
        """Write a request down."""
        kept = {name: value for name, value in headers.items() if name not in CREDENTIALS}
        parsed = orjson.loads(body) if body else None
        with self._lock:
            heard = Heard(method, path, kept, parsed, time.monotonic() - self._began)
            self.heard.append(heard)
        return heard

    def _serve(self, door: socket.socket) -> None:
        with suppress(OSError):  # the door was shut
            while True:
                client, _ = door.accept()
                Thread(target=self._meet, args=(client,), daemon=True).start()

    def _meet(self, client: socket.socket) -> None:
        """One connection of a client, to its end."""
        line = _Line(self)
        with client:
            try:
                gateway = socket.create_connection(("127.0.0.1", self.gateway_port))
            except OSError:
                return
            with gateway:
                for end in (client, gateway):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = Thread(target=_hand_on, args=(gateway, client, line.answer), daemon=True)
                back.start()
                _hand_on(client, gateway, line.ask)
                back.join()


def _hand_on(source: socket.socket, sink: socket.socket, note: Any) -> None:
    """All that comes from `source`, to `sink`; when one of them goes, so does the other."""
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            note(data)
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
