"""
Server-sent events, read and written without any I/O.

The parser takes bytes as they come, split anywhere, and gives whole events.  It follows the WHATWG
event-stream format (https://html.spec.whatwg.org/multipage/server-sent-events.html): lines end in
LF, CR or CRLF, several ``data:`` lines are joined by LF, a leading byte order mark is dropped,
lines that start with a colon are comments.  ``id`` and ``retry`` mean nothing in the Messages API
and are ignored.
"""

from __future__ import annotations

from typing import NamedTuple

import attrs

_BOM = b"\xef\xbb\xbf"


class EventTooLong(Exception):
    """An event grew beyond what we are willing to hold."""


class SSEEvent(NamedTuple):
    """One event: its name (``message`` if it has none) and its data, as bytes."""

    name: str
    data: bytes


def encode(name: str, data: bytes) -> bytes:
    """One event on the wire.  `data` must have no line break; JSON from orjson never has."""
    return b"event: %b\ndata: %b\n\n" % (name.encode("ascii"), data)


@attrs.define(eq=False)
class SSEParser:
    """
    Bytes in, events out.

    Attributes:
        limit: bytes that one event may have; beyond, `feed` raises `EventTooLong`.
    """

    limit: int = 8 * 1024 * 1024
    _rest: bytes = attrs.field(default=b"", init=False)
    _started: bool = attrs.field(default=False, init=False)

    def feed(self, chunk: bytes) -> list[SSEEvent]:
        """The events that `chunk` completes, in order."""
        text = self._rest + chunk
        if not self._started:
            if _BOM.startswith(text):
                self._rest = text
                return []
            self._started = True
            text = text.removeprefix(_BOM)
        held = b""
        if b"\r" in text:
            # A CR at the end may be the first half of a CRLF: it waits for what follows.
            if text.endswith(b"\r"):
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = text.split(b"\n\n")
        self._rest = rest + held
        if len(self._rest) > self.limit:
            raise EventTooLong(f"an event of more than {self.limit} bytes")
        events = (_parse(block) for block in blocks)
        return [event for event in events if event is not None]


def _parse(block: bytes) -> SSEEvent | None:
    """One event from its lines, or None where they hold no data (a comment, an empty line)."""
    name = "message"
    data: list[bytes] = []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace") or "message"
    return SSEEvent(name, b"\n".join(data)) if data else None
