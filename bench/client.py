"""A client that reads when it is told to, and the calls that `bench.fast_llama` understands."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import attrs
import orjson

Json = Any
T = TypeVar("T")

#: What the upstream offers to a client that does not read.
OFFERED: Final = 400_000_000

#: Where a call can be when its client leaves: the order that brings it there, and what the client
#: has read by then.
STAGES: Final = {
    "before the status": ("silence", b""),
    "in prefill": ("prefill", b"HTTP/1.1 200"),
    "mid-stream": ("drip", b"content_block_delta"),
    "stalled": (f"flood {OFFERED}", b"content_block_delta"),
}

#: What calls name as their model.
MODEL: Final = "main"

#: What ends a body that is sent in chunks.
LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


@attrs.frozen
class Client:
    """
    A client that reads when it is told to, and at no other time.

    Attributes:
        connection: to the gateway, or to a server.
        read: all that it has read.
    """

    connection: socket.socket
    read: bytearray = attrs.field(factory=bytearray, init=False)

    @classmethod
    @contextmanager
    def connected(cls, port: int) -> Iterator[Client]:
        """One that has sent nothing, and leaves when the block does."""
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            yield cls(connection)

    @classmethod
    @contextmanager
    def calling(cls, port: int, body: Json) -> Iterator[Client]:
        """One that has sent a call, and leaves when the block does."""
        with cls.connected(port) as client:
            client.connection.sendall(request(body))
            yield client

    def receive(self) -> bytes:
        """What has come since, at least one byte; raises EOFError at the end."""
        data = self.connection.recv(256 * 1024)
        if not data:
            raise EOFError(bytes(self.read[-200:]))
        self.read.extend(data)
        return data

    def read_until(self, mark: bytes) -> None:
        """All up to `mark`; raises EOFError if it does not come."""
        unseen = 0
        while self.read.find(mark, unseen) < 0:
            unseen = max(0, len(self.read) - len(mark))
            self.receive()

    def leave(self) -> float:
        """Close the connection; the time of that."""
        now = time.monotonic()
        self.connection.close()
        return now


def request(body: Json) -> bytes:
    """A call as it is sent."""
    raw = orjson.dumps(body)
    head = (
        "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n"
        "user-agent: claude-cli/2.1.330 (external, cli)\r\n"
        "anthropic-version: 2023-06-01\r\nauthorization: Bearer none\r\n"
        f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def unchunked(read: bytes) -> bytes:
    """The body of a whole answer that was sent in chunks."""
    chunks, at = list[bytes](), read.index(b"\r\n\r\n") + 4
    while (line := read.find(b"\r\n", at)) > at:
        size = int(read[at:line], 16)
        chunks.append(read[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return b"".join(chunks)


def events(read: bytes) -> tuple[int, bool]:
    """How many events of text a whole answer has, and whether it says that it ends."""
    body = unchunked(read)
    return body.count(b"event: content_block_delta\n"), b"event: message_stop\n" in body[-200:]


def call(order: str, **more: Json) -> dict[str, Json]:
    """A streamed call that `bench.fast_llama` understands."""
    messages = [{"role": "user", "content": order}]
    return {"model": MODEL, "max_tokens": 100, "stream": True, "messages": messages, **more}


def large(order: str) -> dict[str, Json]:
    """`order` in a body of 60 KB with 20 tools."""
    prose = "The quick brown fox jumps over the lazy dog. "
    field = {"type": "string", "description": prose * 4}
    schema = {"type": "object", "properties": {"path": field, "text": field}, "required": ["path"]}
    tools = [
        {"name": f"tool_{n}", "description": prose * 32, "input_schema": schema} for n in range(20)
    ]
    rest = 60_000 - len(orjson.dumps(tools))
    system = [{"type": "text", "text": (prose * 2000)[:rest]}]
    return call(order, tools=tools, system=system)


def until(look: Callable[[], T | None], seconds: float = 30) -> T:
    """What `look` finds, once it finds something; raises TimeoutError."""
    end = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > end:
            raise TimeoutError("it did not come to pass")
        time.sleep(0.02)
    return found
