"""
A llama-server without a model, as fast as a socket: what the gateway is measured against.

It speaks as llama-server does wherever the gateway listens, in the words of either API.  The last
message of a call says, in its last words, what is to happen (`ORDERS`).  ``GET /journal`` tells
what became of each call, in seconds of the clock that all processes of this machine share.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
from twisted.internet import reactor as the_reactor
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import LoopingCall
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request
from zope.interface import implementer

from gateway.web.access import QuietSite
from tests.e2e.stack import Running, free_port, start

reactor: Any = the_reactor
Json = Any

#: What a call can ask for; a number may follow.  Anything else gets a short answer.
ORDERS: Final[Mapping[str, str]] = {
    "silence": "not even a status, as when the call waits for a slot",
    "prefill": "a status, then nothing",
    "drip": "an event each 10 ms, without end",
    "paced": "so many events, 4 ms apart",
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

    def journal(self) -> list[dict[str, Json]]:
        """What became of each call so far, in the order in which they came."""
        status, calls = self.running.ask("/journal")
        assert status == 200
        return list(calls)

    def entry(self, number: int) -> dict[str, Json] | None:
        """What became of call `number`; None while it has not come."""
        calls = self.journal()
        return calls[number] if number < len(calls) else None

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

    @property
    def works(self) -> bool:
        """Whether it has a slot."""
        if self.left is None:
            return not self.ended
        return self.order == "stubborn" and time.monotonic() < self.left + _STUBBORN


@implementer(IPushProducer)
@attrs.define(eq=False)
class Stream:
    """One answer, written in chunks that were made before."""

    request: Request
    entry: Entry
    api: Api
    _more: Callable[[], None] | None = None

    def begin(self) -> None:
        """Status, headers and the first events."""
        self.status()
        self.write(self.api.start)

    def status(self) -> None:
        """Status and headers, and no event yet."""
        self.request.setHeader("content-type", "text/event-stream")
        self.request.write(b"")

    def write(self, chunks: bytes) -> None:
        """Past the request, which would frame a whole block as one chunk."""
        self.entry.accepted += len(chunks)
        assert self.request.channel is not None
        self.request.channel.write(chunks)

    def end(self) -> None:
        """The events that end an answer, and the end of the body."""
        self.write(self.api.end)
        self.entry.ended = True
        self.request.finish()

    def flood(self, size: int) -> None:
        """At least `size` bytes, as fast as they are taken."""
        block = self.api.events(_BLOCK, _TEXT)

        def more() -> None:
            while not self.entry.paused and self.entry.accepted < size:
                self.write(block)
                self.entry.events += _BLOCK
            if not self.entry.paused:
                self._more = None
                self.request.unregisterProducer()
                self.end()

        self._more = more
        self.request.registerProducer(self, True)
        more()

    def drip(self, seconds: float, count: float = float("inf")) -> None:
        """An event each so many seconds, with the time of its writing in it."""
        left = count

        def drop() -> None:
            nonlocal left
            if left <= 0:
                loop.stop()
                self.end()
                return
            left -= 1
            self.write(self.api.delta(f"{time.monotonic():.7f}"))

        loop = LoopingCall(drop)
        self.request.notifyFinish().addErrback(lambda _: loop.stop())
        loop.start(seconds)

    def pauseProducing(self) -> None:
        self.entry.paused = True

    def resumeProducing(self) -> None:
        self.entry.paused = False
        if self._more is not None:
            self._more()

    def stopProducing(self) -> None:
        self._more = None


class Llama(Resource):
    """Every endpoint, and the journal."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.isLeaf = True
        self.slots = slots
        self.calls: list[Entry] = []

    def render(self, request: Request) -> Any:
        """Answer `request`."""
        assert request.content is not None
        raw = request.content.read()
        match request.path.decode():
            case "/v1/messages":
                return self.message(request, orjson.loads(raw), MESSAGES)
            case "/v1/chat/completions":
                return self.message(request, orjson.loads(raw), CHAT)
            case "/health":
                return b'{"status":"ok"}'
            case "/props":
                window = {"n_ctx": 200_000}
                props = {"default_generation_settings": window, "total_slots": self.slots}
                return orjson.dumps(props)
            case "/slots":
                busy = sum(entry.works for entry in self.calls)
                return orjson.dumps([{"is_processing": n < busy} for n in range(self.slots)])
            case "/apply-template":
                return orjson.dumps({"prompt": raw.decode()})
            case "/tokenize":
                return orjson.dumps({"tokens": list(range(len(raw) // 4))})
            case "/journal":
                return orjson.dumps([attrs.asdict(entry) for entry in self.calls])
            case _:
                request.setResponseCode(404)
                return b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}'

    def message(self, request: Request, body: Mapping[str, Json], api: Api) -> int:
        """Do what the prompt says."""
        name, number = ordered(body)
        overlapped = any(other.works for other in self.calls)
        entry = Entry(f"{name} {number}".strip(), overlapped)
        self.calls.append(entry)
        request.notifyFinish().addErrback(lambda _: setattr(entry, "left", time.monotonic()))
        stream = Stream(request, entry, api)
        match name:
            case "silence":
                pass
            case "prefill" | "stubborn":
                stream.status()
            case "drip":
                stream.begin()
                stream.drip(0.01)
            case "paced":
                stream.begin()
                stream.drip(0.004, int(number))
            case "burst":
                stream.begin()
                stream.write(api.events(int(number)))
                stream.end()
            case "flood":
                stream.begin()
                stream.flood(int(number))
            case _:
                stream.begin()
                stream.write(api.delta("Hello"))
                stream.end()
        return NOT_DONE_YET


def ordered(body: Mapping[str, Json]) -> tuple[str, str]:
    """The order in the last message, and its number."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    words: list[str] = ["", "", *text.split()]
    name, number = words[-2:]
    return (name, number) if number.isdigit() else (number, "")


# --- its bytes ------------------------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    """One chunk of a body, as HTTP/1.1 frames it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


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
        end: the chunk of what comes after it.
    """

    start: bytes = attrs.field(converter=chunk)
    end: bytes = attrs.field(converter=chunk)
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


def main() -> None:
    """Serve until TERM."""
    parser = argparse.ArgumentParser(prog="python -m bench.fast_llama", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=1)
    options = parser.parse_args()
    reactor.listenTCP(options.port, QuietSite(Llama(options.slots)), interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    main()
