"""
A llama-server without a model, as fast as a socket: what the gateway is measured against.

It speaks as llama-server does wherever the gateway listens, in the words of either API.  The last
message of a call says, in its last words, what is to happen (`ORDERS`).  ``GET /journal`` tells
what became of each call, in seconds of the clock that all processes of this machine share.

It reads no more of HTTP than its callers send (a body has a length), writes bytes that were made
before, and sends them at once: so it is not what limits a gateway, which `bench.overhead` proves.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import sys
import time
from asyncio import Transport
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import attrs
import orjson

from bench.client import until
from tests.e2e.stack import Running, free_port, start

Json = Any

#: What a call can ask for; a number may follow.  Anything else gets a short answer.
ORDERS: Final[Mapping[str, str]] = {
    "silence": "not even a status, as when the call waits for a slot",
    "prefill": "a status, then nothing",
    "drip": "an event each 10 ms, without end",
    "paced": "so many events, 4 ms apart",
    "steady": "so many events, 100 ms apart: 10 tokens a second",
    "burst": "so many events at once",
    "flood": "so many bytes, as fast as they are taken",
    "stubborn": "a status, then nothing; the slot works on for `_STUBBORN` s when the client left",
}

#: Events that are written at once in a flood, and the text of each.
_BLOCK: Final = 32
_TEXT: Final = "x" * 1000

#: A llama-server that decodes a batch does not see that its client left.
_STUBBORN: Final = 3.0


# --- for who uses it ------------------------------------------------------------------------------


@attrs.frozen
class FastLlama:
    """This server, running as a process."""

    running: Running

    @classmethod
    def started(cls, folder: Path, slots: int = 1) -> FastLlama:
        """One that listens, with its log in `folder`."""
        port = free_port()
        module = [sys.executable, "-m", "bench.fast_llama"]
        command = [*module, "--port", str(port), "--slots", str(slots)]
        running = start(command, port, folder / "fast_llama.log")
        running.wait("/health")
        return cls(running)

    @property
    def url(self) -> str:
        return self.running.url

    def calls(self) -> int:
        """How many calls have come so far."""
        return int(self.running.ask("/calls")[1])

    def entry(self, number: int) -> dict[str, Json] | None:
        """What became of call `number`; None while it has not come."""
        status, found = self.running.ask(f"/journal/{number}")
        return found if status == 200 else None

    def journal(self, since: int) -> list[dict[str, Json]]:
        """What became of each call from number `since` on, in the order in which they came."""
        return [self.running.ask(f"/journal/{n}")[1] for n in range(since, self.calls())]

    def left(self, number: int, seconds: float = 30) -> float:
        """When it was seen that the client of call `number` was gone; raises TimeoutError."""

        def look() -> float | None:
            entry = self.entry(number)
            return entry["left"] if entry else None

        return until(look, seconds)

    def stands_still(self, number: int, seconds: float = 1.0) -> int:
        """The bytes of call `number` that were taken, once no more are for so long."""
        seen, since = -1, time.monotonic()

        def look() -> int | None:
            nonlocal seen, since
            entry = self.entry(number)
            assert entry is not None
            if entry["accepted"] != seen or not (entry["paused"] or entry["ended"]):
                seen, since = entry["accepted"], time.monotonic()
            return seen if time.monotonic() - since > seconds else None

        return until(look)

    def stop(self) -> None:
        """End it."""
        self.running.stop()


# --- the server -----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Entry:
    """
    What became of one call.

    Attributes:
        order: what it asked for.
        overlapped: whether another call still had a slot when it came.
        accepted: bytes of its answer that the connection took.
        events: events of a flood that the connection took.
        paused: whether the connection takes no more.
        left: when the client was seen to be gone.
        ended: whether the answer was sent to its end.
    """

    order: str
    overlapped: bool = False
    accepted: int = 0
    events: int = 0
    paused: bool = False
    left: float | None = None
    ended: bool = False


@attrs.define(eq=False)
class Llama:
    """
    What all connections share.

    Attributes:
        slots: how many it has.
        calls: all that have come.
        working: those that have a slot.
    """

    slots: int
    calls: list[Entry] = attrs.field(factory=list)
    working: set[Entry] = attrs.field(factory=set)

    def begun(self, order: str) -> Entry:
        """A call that has come."""
        entry = Entry(order, overlapped=bool(self.working))
        self.calls.append(entry)
        self.working.add(entry)
        return entry

    def told(self, path: str, raw: bytes) -> Json:
        """What is answered at any path that is no completion; None for a path that there is not."""
        match path.split("/")[1:]:
            case ["health"]:
                return {"status": "ok"}
            case ["props"]:
                window = {"n_ctx": 200_000}
                return {"default_generation_settings": window, "total_slots": self.slots}
            case ["slots"]:
                busy = len(self.working)
                return [{"is_processing": n < busy} for n in range(self.slots)]
            case ["apply-template"]:
                return {"prompt": raw.decode()}
            case ["tokenize"]:
                return {"tokens": list(range(len(raw) // 4))}
            case ["calls"]:
                return len(self.calls)
            case ["journal", number] if int(number) < len(self.calls):
                return attrs.asdict(self.calls[int(number)])
            case _:
                return None


class Connection(asyncio.Protocol):
    """One connection: a request at a time, and its answer."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._loop = asyncio.get_running_loop()
        self._read = bytearray()
        self._transport: Transport
        self._entry: Entry | None = None
        self._api = MESSAGES
        self._is_last = False
        self._timer: asyncio.TimerHandle | None = None
        self._more: Callable[[], None] = _nothing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._read += data
        while self._entry is None and (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._read[: end + 2])
            length = _LENGTH.search(head)
            body = end + 4
            after = body + (int(length[1]) if length else 0)
            if len(self._read) < after:
                return
            raw = bytes(self._read[body:after])
            del self._read[:after]
            self._is_last = _CLOSE.search(head) is not None
            self._asked(head.split(b" ", 2)[1].decode(), raw)

    def eof_received(self) -> None:
        # The client is gone, whatever of the answer is not sent yet.
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # left is left
        if self._timer is not None:
            self._timer.cancel()
        if (entry := self._entry) is None:
            return
        entry.left = time.monotonic()
        if entry.order == "stubborn":
            self._loop.call_later(_STUBBORN, self._llama.working.discard, entry)
        else:
            self._llama.working.discard(entry)

    def pause_writing(self) -> None:
        if self._entry is not None:
            self._entry.paused = True

    def resume_writing(self) -> None:
        if self._entry is not None:
            self._entry.paused = False
            self._more()

    # --- answers ----------------------------------------------------------------------------------

    def _asked(self, path: str, raw: bytes) -> None:
        if path.startswith(("/v1/messages", "/v1/chat/completions")):
            self._api = MESSAGES if path.startswith("/v1/messages") else CHAT
            self._ordered(*ordered(orjson.loads(raw)))
            return
        said, status = self._llama.told(path, raw), b"200 OK"
        if said is None:
            said, status = _NOT_FOUND, b"404 Not Found"
        told = orjson.dumps(said)
        self._transport.write(_WHOLE % (status, len(told), told))
        self._is_done()

    def _ordered(self, name: str, number: str) -> None:
        """Do what the prompt says."""
        self._entry = self._llama.begun(f"{name} {number}".strip())
        match name:
            case "silence":
                pass
            case "prefill" | "stubborn":
                self._transport.write(_STREAM)
            case "drip":
                self._drip(0.01)
            case "paced":
                self._drip(0.004, int(number))
            case "steady":
                self._drip(0.1, int(number))
            case "burst":
                self._end(_STREAM + self._api.start + self._api.events(int(number)))
            case "flood":
                self._flood(int(number))
            case _:
                self._end(_STREAM + self._api.start + self._api.delta("Hello"))

    def _end(self, before: bytes = b"") -> None:
        """The events that end an answer, and the end of the body."""
        assert self._entry is not None
        entry, self._entry, self._more = self._entry, None, _nothing
        self._llama.working.discard(entry)
        entry.ended = True
        self._transport.write(before + self._api.end)
        entry.accepted += len(before) + len(self._api.end)
        self._is_done()

    def _is_done(self) -> None:
        if self._is_last:
            self._transport.close()

    def _flood(self, size: int) -> None:
        """At least `size` bytes, as fast as they are taken."""
        entry, block = self._entry, self._api.events(_BLOCK, _TEXT)
        assert entry is not None

        def more() -> None:
            while not entry.paused and entry.accepted < size:
                self._transport.write(block)
                entry.accepted += len(block)
                entry.events += _BLOCK
            if not entry.paused:
                self._end()

        self._more = more
        self._transport.write(_STREAM + self._api.start)
        more()

    def _drip(self, seconds: float, count: float = float("inf")) -> None:
        """An event each so many seconds, with the time of its writing in it."""
        left, at = count, self._loop.time()

        def drop() -> None:
            nonlocal left, at
            if left <= 0:
                self._end()
                return
            self._transport.write(self._api.delta(f"{time.monotonic():.7f}"))
            left -= 1
            at += seconds
            self._timer = self._loop.call_at(at, drop)

        self._transport.write(_STREAM + self._api.start)
        drop()


def ordered(body: Mapping[str, Json]) -> tuple[str, str]:
    """The order in the last message, and its number."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    words: list[str] = ["", "", *text.split()]
    name, number = words[-2:]
    return (name, number) if number.isdigit() else (number, "")


def _nothing() -> None:
    pass


# --- its bytes ------------------------------------------------------------------------------------


_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)
_WHOLE: Final = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
_STREAM: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_NOT_FOUND: Final = {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}


def chunk(data: bytes) -> bytes:
    """One chunk of a body, as HTTP/1.1 frames it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(data: bytes) -> bytes:
    """The chunk that a body ends with."""
    return chunk(data) + chunk(b"")


def event(body: Mapping[str, Json]) -> bytes:
    """One event of the Messages API."""
    return b"event: %b\ndata: %b\n\n" % (body["type"].encode(), orjson.dumps(body))


def chat(delta: Mapping[str, Json], **more: Json) -> bytes:
    """One event of the chat API."""
    choice = {"index": 0, "delta": delta, **more}
    return b"data: %b\n\n" % orjson.dumps({"id": "chatcmpl-fast", "choices": [choice]})


def said(text: str) -> bytes:
    """A part of the answer's text, as the Messages API has it."""
    delta = {"type": "text_delta", "text": text}
    return event({"type": "content_block_delta", "index": 0, "delta": delta})


@attrs.frozen
class Api:
    """
    The bytes of a stream.

    Attributes:
        start: the chunk of what comes before the answer's text.
        end: the chunk of what comes after it, and the end of the body.
    """

    start: bytes = attrs.field(converter=chunk)
    end: bytes = attrs.field(converter=last_chunk)
    _said: Callable[[str], bytes]

    def delta(self, text: str) -> bytes:
        """One chunk with one event of the answer's text."""
        return chunk(self._said(text))

    def events(self, count: int, text: str = "token") -> bytes:
        """So many chunks, each with one event."""
        return self.delta(text) * count


_MESSAGE: Final[Json] = {
    "id": "chatcmpl-fast",
    "type": "message",
    "role": "assistant",
    "content": [],
    "model": "fast",
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"cache_read_input_tokens": 0, "input_tokens": 10, "output_tokens": 0},
}
_USAGE: Final = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
_STOP: Final = {"stop_reason": "end_turn", "stop_sequence": None}
MESSAGES: Final = Api(
    event({"type": "message_start", "message": _MESSAGE})
    + event(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    ),
    event({"type": "content_block_stop", "index": 0})
    + event({"type": "message_delta", "delta": _STOP, "usage": {"output_tokens": 1}})
    + event({"type": "message_stop"}),
    said,
)
CHAT: Final = Api(
    chat({"role": "assistant", "content": None}),
    chat({}, finish_reason="stop")
    + b"data: %b\n\n" % orjson.dumps({"choices": [], "usage": _USAGE})
    + b"data: [DONE]\n\n",
    lambda text: chat({"content": text}),
)


async def serve(port: int, slots: int) -> None:
    """Serve for ever."""
    llama, loop = Llama(slots), asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(llama), "127.0.0.1", port, backlog=socket.SOMAXCONN
    )
    await server.serve_forever()


def main() -> None:
    """Serve until TERM."""
    parser = argparse.ArgumentParser(prog="python -m bench.fast_llama", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=1)
    options = parser.parse_args()
    asyncio.run(serve(options.port, options.slots))


if __name__ == "__main__":
    main()
