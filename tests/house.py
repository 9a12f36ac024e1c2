"""
A whole gateway in memory: no socket, no second that passes by itself.

`Household` puts the real API in front of real tiers whose servers are `FakeLlama`s.  `Browser`
speaks raw HTTP to it, so that a test sees the very bytes; `Household.settle` lets everything that
can happen at this instant happen, and `Household.clock` is the only time there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import orjson
from treq.testing import RequestTraversalAgent
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from gateway.config import RouteRule
from gateway.config import Tier as TierConfig
from gateway.dispatch import Dispatch
from gateway.ledger import Ledger
from gateway.llama.client import LlamaClient
from gateway.tier.tier import Tier
from gateway.web.access import Access
from gateway.web.api import Api
from gateway.web.connections import ConnectionLimits, QuietSite, site
from gateway.wire.pulse import Times

CLAUDE_CODE = {"user-agent": "claude-cli/2.1.330 (external, cli)"}

#: What a llama-server streams for a short answer.
HELLO: Final[list[dict[str, Any]]] = [
    {
        "type": "message_start",
        "message": {
            "id": "chatcmpl-1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "fake",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"cache_read_input_tokens": 3, "input_tokens": 4, "output_tokens": 0},
        },
    },
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    },
    {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "Hello"},
    },
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {"output_tokens": 1},
    },
    {"type": "message_stop"},
]


def sse(*events: Mapping[str, Any]) -> bytes:
    """Events as llama-server writes them."""
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
        for event in events
    )


@attrs.define(eq=False)
class Held:
    """A completion that a fake server was asked for and has not ended."""

    body: dict[str, Any]
    request: Request
    left: bool = False
    over: bool = False

    def begin(self) -> None:
        """Status and headers, as when a slot starts on the prompt."""
        self.request.setHeader("content-type", "text/event-stream")
        self.request.write(b"")

    def send(self, *events: Mapping[str, Any]) -> None:
        self.request.write(sse(*events))

    def say(self, *said: Mapping[str, Any]) -> None:
        """Events of ``/completion``, which have no names."""
        self.request.write(b"".join(b"data: %b\n\n" % orjson.dumps(each) for each in said))

    def finish(self) -> None:
        self.request.finish()

    def answer(self, *events: Mapping[str, Any]) -> None:
        """The whole stream at once."""
        self.begin()
        self.send(*(events or HELLO))
        self.finish()

    def refuse(self, status: int, body: Mapping[str, Any]) -> None:
        self.request.setResponseCode(status)
        self.request.write(orjson.dumps(body))
        self.request.finish()

    def die(self) -> None:
        """The server's process is gone: its connections break."""
        self.request.channel.transport.abortConnection()  # type: ignore[union-attr]


class FakeLlama(Resource):
    """
    A llama-server that answers as a test tells it to.

    Prompts have as many tokens as their text has characters.  Its template is one that shows the
    messages alone, whatever `template`, the text that it pretends to have, reads.
    """

    isLeaf = True

    def __init__(self, n_ctx: int = 4096, slots: int = 1) -> None:
        super().__init__()
        self.n_ctx, self.slots = n_ctx, slots
        #: Completions that wait for the test, oldest first.
        self.held: list[Held] = []
        #: Every request: its path and body.
        self.asked: list[tuple[str, Any]] = []
        #: Texts that /completion answers with, in this order.
        self.completions: list[str] = []
        #: A status that everything is answered with, for a server that loads.
        self.status: int | None = None
        #: Whether its process is gone: each connection breaks.
        self.gone = False
        self.busy = 0
        #: Whether it takes images.
        self.vision = False
        #: The text of its chat template.
        self.template = ""
        #: Whether it says "no" at the end of each turn of a user when thinking is off.
        self.rewrites = False
        #: Whether it was started with --embeddings.
        self.embeds = False
        #: Paths that are never answered.
        self.hangs: set[str] = set()

    def render(self, request: Request) -> Any:
        assert request.content is not None
        raw = request.content.read()
        body: Any = orjson.loads(raw) if raw else None
        path = request.path.decode()
        self.asked.append((path, body))
        if path in self.hangs:
            return NOT_DONE_YET
        if self.gone:
            request.channel.transport.abortConnection()  # type: ignore[union-attr]
            return NOT_DONE_YET
        if self.status is not None:
            request.setResponseCode(self.status)
            said = {"code": self.status, "message": "Loading model", "type": "unavailable_error"}
            return orjson.dumps({"error": said})
        match path:
            case "/props":
                return orjson.dumps(
                    {
                        "default_generation_settings": {"n_ctx": self.n_ctx},
                        "total_slots": self.slots,
                        "model_alias": "fake",
                        "build_info": "b1",
                        "modalities": {"vision": self.vision},
                        "chat_template": self.template,
                    }
                )
            case "/slots":
                busy = [{"is_processing": n < self.busy} for n in range(self.slots)]
                return orjson.dumps(busy)
            case "/apply-template":
                return orjson.dumps({"prompt": self.prompt_of(body)})
            case "/tokenize":
                return orjson.dumps({"tokens": list(range(len(body["content"])))})
            case "/v1/messages/count_tokens":
                return orjson.dumps({"input_tokens": 77})
            case "/v1/messages":
                return self._hold(body, request)
            case "/completion" if body.get("stream"):
                return self._hold(body, request)
            case "/v1/embeddings" if self.embeds:
                vector = {"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}
                usage = {"prompt_tokens": 3, "total_tokens": 3}
                said = {"object": "list", "model": "fake", "data": [vector], "usage": usage}
                return orjson.dumps(said)
            case "/v1/embeddings":
                request.setResponseCode(501)
                message = "This server does not support embeddings. Start it with `--embeddings`"
                error = {"code": 501, "message": message, "type": "not_supported_error"}
                return orjson.dumps({"error": error})
            case "/completion":
                said = {
                    "content": self.completions.pop(0),
                    "stop_type": "eos",
                    "tokens_predicted": 5,
                    "timings": {
                        "prompt_n": 11,
                        "cache_n": 2,
                        "prompt_ms": 1100.0,
                        "predicted_ms": 500.0,
                    },
                }
                return orjson.dumps(said)
            case _:
                request.setResponseCode(404)
                return b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}'

    def _hold(self, body: Any, request: Request) -> Any:
        """Leave a completion to the test."""
        held = Held(body, request)
        self.held.append(held)
        request.notifyFinish().addErrback(lambda _: setattr(held, "left", True))
        return NOT_DONE_YET

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def prompt_of(self, chat: Mapping[str, Any]) -> str:
        """What a chat is rendered to."""
        prompt = orjson.dumps(chat["messages"]).decode()
        if self.rewrites and chat["chat_template_kwargs"]["enable_thinking"] is False:
            return prompt.replace('"user"', '"user, no thinking"')
        return prompt


class Wire(StringTransport):
    """A connection whose other end is the test."""

    aborted = False
    finished = False
    protocol: Any = None

    def loseWriteConnection(self) -> None:
        self.finished = True

    def loseConnection(self) -> None:
        """Twisted waits for what is to be written, and only for that."""
        if self.finished:
            self.protocol.connectionLost(Failure(ConnectionDone()))
        else:
            super().loseConnection()

    def abortConnection(self) -> None:
        self.aborted = True
        self.protocol.connectionLost(Failure(ConnectionAborted()))


@attrs.define(eq=False)
class Browser:
    """One client's connection to the gateway."""

    protocol: Any
    wire: Wire

    def send(self, raw: bytes) -> None:
        self.protocol.dataReceived(raw)

    def post(self, body: Any, path: str = "/v1/messages", **headers: str) -> None:
        """Send a request; header names with ``_`` for ``-``."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        lines = {"host": "localhost:9090", "content-length": str(len(raw)), **named}
        head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        self.send(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + raw)

    def get(self, path: str, method: str = "GET", **headers: str) -> None:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        lines = {"host": "localhost:9090", **named}
        head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())

    def half_close(self) -> None:
        """Send no more, and go on reading."""
        self.protocol.readConnectionLost()

    def leave(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))

    # --- what has come back so far ----------------------------------------------------------------

    @property
    def raw(self) -> bytes:
        return bytes(self.wire.value())

    @property
    def status(self) -> int | None:
        """The HTTP status, or None while nothing came."""
        return int(self.raw.split(b" ", 2)[1]) if self.raw else None

    @property
    def headers(self) -> dict[str, str]:
        head = self.raw.split(b"\r\n\r\n", 1)[0].decode().split("\r\n")[1:]
        pairs = (line.split(": ", 1) for line in head)
        return {name.lower(): value for name, value in pairs}

    @property
    def body(self) -> bytes:
        """The body, taken out of its chunks."""
        head, _, rest = self.raw.partition(b"\r\n\r\n")
        if b"chunked" not in head:
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return body

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream."""
        blocks = [block for block in self.body.split(b"\n\n") if b"data: " in block]
        return [orjson.loads(block.split(b"data: ", 1)[1]) for block in blocks]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of a stream in the words of the OpenAI API, without its end."""
        blocks = [block for block in self.body.split(b"\n\n") if block.startswith(b"data: {")]
        return [orjson.loads(block.removeprefix(b"data: ")) for block in blocks]

    @property
    def ended(self) -> bool:
        """Whether a chunked answer came to its regular end."""
        return self.raw.endswith(b"0\r\n\r\n")


@attrs.define(eq=False)
class Household:
    """A gateway with a main and a small tier, in memory."""

    clock: Clock
    main: FakeLlama
    small: FakeLlama
    api: Api
    site: QuietSite
    _agents: list[RequestTraversalAgent]

    @classmethod
    def built(
        cls,
        *,
        token: str | None = None,
        hosts: Sequence[str] = (),
        body_limit: int = 32 * 1024 * 1024,
        rules: Sequence[RouteRule] = (),
        limits: ConnectionLimits | None = None,
        main: FakeLlama | None = None,
        small: FakeLlama | None = None,
        **tier: Any,
    ) -> Household:
        """One whose tiers have `tier` as further configuration."""
        clock = Clock()
        servers = {
            "main": main or FakeLlama(),
            "small": small or FakeLlama(n_ctx=2048, slots=2),
        }
        agents, tiers = [], {}
        for name, llama in servers.items():
            agent = RequestTraversalAgent(llama)
            agents.append(agent)
            url = f"http://{name}"
            client = LlamaClient.over(clock, name, url, None, agent)
            config = TierConfig(url=url, slots=llama.slots, **tier)
            tiers[name] = Tier.of(name, config, client, clock)
            tiers[name].start()
        dispatch = Dispatch(tiers, tuple(rules), Ledger(clock), Times(), clock)
        api = Api(dispatch, "0")
        door = site(api.app.resource(), Access(token, hosts, body_limit), clock, limits)
        return cls(clock, servers["main"], servers["small"], api, door, agents)

    def browser(self) -> Browser:
        """A new connection."""
        protocol, wire = self.site.buildProtocol(None), Wire()
        wire.protocol = protocol
        protocol.makeConnection(wire)
        return Browser(protocol, wire)

    def ask(self, body: Any, path: str = "/v1/messages", **headers: str) -> Browser:
        """Send a request on a new connection and let happen what can happen at once."""
        browser = self.browser()
        browser.post(body, path, **headers)
        self.settle()
        return browser

    def settle(self) -> None:
        """Let everything happen that needs no time."""
        for _ in range(30):
            for agent in self._agents:
                agent.flush()
            self.clock.advance(0)

    def forget(self) -> None:
        """Let go of what a test may look at: what the servers were asked, and over what."""
        for llama in (self.main, self.small):
            llama.held.clear()
            llama.asked.clear()
        for agent in self._agents:
            network = agent._memoryReactor  # it keeps all connections
            network.tcpClients.clear()
            network.connectors.clear()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.settle()
        self.clock.advance(seconds)
        self.settle()

    def line(self, tier: str = "main") -> Any:
        return self.api.dispatch.tiers[tier].line


def turn(text: str = "hi", **more: Any) -> dict[str, Any]:
    """The body of a plain turn."""
    return {
        "model": "my-model",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": text}],
        **more,
    }
