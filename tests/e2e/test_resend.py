"""
A call that is cut off while its prompt is evaluated, sent again by the real Claude Code.

What is between client and gateway hangs up on the first call.  The server keeps what it evaluated
in its slot and nowhere else, another call waits already, and the line is first come, first served:
only the place that is kept for the call lets it go on where it was.  The figures are logged:
``pytest --log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar, Final

import attrs
import orjson
import pytest

from gateway.llama import loglines
from gateway.llama.loglines import Released, Said
from tests.e2e.clients import VERSIONS, Client, eventually
from tests.e2e.stack import SMOLLM, Running, start_gateway, start_server

Json = Any

figures = logging.getLogger(__name__)

pytestmark = [pytest.mark.client, pytest.mark.server]

#: Tokens of a batch, between two of which a server can stop.
BATCH: Final = 256

#: Seconds for a whole prompt, evaluated by a small machine that has other work too.
PREFILL: Final = 900

#: Some two thousand tokens: enough to be cut off in the middle of them.
SYSTEM: Final = " ".join(f"Gate {number} of the old city is open." for number in range(165))
OPTIONS: Final = ("--system-prompt", SYSTEM, "--tools", "")

#: Put into every call by the client: a tiny model would fill its whole window.
ONE_SENTENCE: Final = '{"temperature": 0, "stop_sequences": [".", "!", "?", "\\n"]}'

#: Somebody else's call.
RIVAL: Final = {
    "model": "any",
    "max_tokens": 2,
    "messages": [{"role": "user", "content": "How is bread baked in the hills?"}],
}

#: A stream that makes the client ask again without one.
BROKEN: Final = (
    b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"It broke."}}\n\n'
)


# --- what hangs up --------------------------------------------------------------------------------


@attrs.define(eq=False)
class Cutter:
    """
    Stands before a gateway and keeps the first call to a model from its answer.

    Attributes:
        gateway: gets every call.
        instead: the stream that the client gets for the first one; nothing at all if empty.
        hang_up: to be set when the gateway is to see the first client leave.
        asked: the body of each call to a model.
        times: when each of them came, and between the first two, when the first was cut off.
    """

    gateway: Running
    instead: bytes
    hang_up: Event = attrs.field(factory=Event, init=False)
    asked: list[Json] = attrs.field(factory=list, init=False)
    times: list[float] = attrs.field(factory=list, init=False)
    port: int = attrs.field(default=0, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator[Cutter]:
        """Listen on a free port of 127.0.0.1."""

        class Ours(_Door):
            cutter = self

        with _Server(("127.0.0.1", 0), Ours) as server:
            self.port = int(server.server_address[1])
            listening = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            listening.start()
            try:
                yield self
            finally:
                self.hang_up.set()
                server.shutdown()
                listening.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""


class _Door(BaseHTTPRequestHandler):
    """One request on one connection."""

    cutter: ClassVar[Cutter]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        gateway = HTTPConnection("127.0.0.1", self.cutter.gateway.port, timeout=PREFILL)
        try:
            gateway.request("POST", self.path, body, dict(self.headers))
            if self.path.partition("?")[0] == "/v1/messages":
                self.cutter.asked.append(orjson.loads(body))
                self.cutter.times.append(time.monotonic())
                if len(self.cutter.asked) == 1:
                    self.cutter.hang_up.wait(PREFILL)
                    gateway.close()
                    self.cutter.times.append(time.monotonic())
                    self._answer_instead()
                    return
            answer = gateway.getresponse()
            self._begin(answer.status, str(answer.headers["content-type"]))
            while data := answer.read1():
                self.wfile.write(data)
        finally:
            gateway.close()

    def do_HEAD(self) -> None:
        self._begin(200, "text/plain")

    def _answer_instead(self) -> None:
        if self.cutter.instead:
            self._begin(200, "text/event-stream")
            self.wfile.write(self.cutter.instead)

    def _begin(self, status: int, content_type: str) -> None:
        """All answers end with their connection."""
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


# --- what is seen ---------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """SmolLM2 with one slot, which is empty, and no memory beside it."""
    flags = (*SMOLLM, "--ctx-size", "8192", "--parallel", "1", "--batch-size", str(BATCH))
    slow_and_forgetful = ("--threads", "1", "--cache-ram", "0")
    running = start_server(tmp_path, "server", *flags, *slow_and_forgetful)
    yield running
    running.stop()


@pytest.fixture
def gateway(server: Running, tmp_path: Path) -> Iterator[Running]:
    """First come, first served."""
    folder = tmp_path / "gateway"
    folder.mkdir()
    running = start_gateway(folder, {"main": {"url": server.url, "slots": 1, "ageing": 0}})
    yield running
    running.stop()


def said_by(server: Running) -> list[Said]:
    """What a server has told of its work."""
    lines = server.log.read_text("utf-8", "replace").splitlines()
    return [said for said in map(loglines.read, lines) if said is not None]


def is_on_its_way(server: Running) -> bool:
    """
    Whether more of a prompt is evaluated than what may be evaluated again.

    To be asked only before the call is cut off: it keeps the server from noticing.
    """
    (slot,) = server.ask("/slots")[1]
    # A slot that has had no work yet does not tell any.
    return bool(slot.get("n_prompt_tokens_processed", 0) >= 2 * BATCH)


def line(gateway: Running) -> Json:
    return gateway.ask("/status")[1]["tiers"]["main"]


def interrupted(
    version: str, gateway: Running, server: Running, place: Path, instead: bytes
) -> tuple[list[Json], str]:
    """
    A prompt of the client whose first call is cut off while somebody else waits.

    Returns:
        The calls to a model as the client sent them, and the answer that it shows.
    """
    with Cutter(gateway, instead).serving() as between, ThreadPoolExecutor(2) as pool:
        env = {"ANTHROPIC_BASE_URL": between.url, "CLAUDE_CODE_EXTRA_BODY": ONE_SENTENCE}
        client = Client.of(version, gateway, place, env)
        saying = pool.submit(client.say, "Which gate is open?", *OPTIONS, seconds=PREFILL)
        try:
            assert eventually(lambda: line(gateway)["running"] == 1, 120)
            rival = pool.submit(gateway.ask, "/v1/messages", RIVAL)
            assert eventually(lambda: line(gateway)["waiting"] == 1, 60)
            assert eventually(lambda: is_on_its_way(server), PREFILL)
        finally:
            between.hang_up.set()
        said = saying.result()
        assert rival.result()[0] == 200
    figures.info("%s: %.1f s, it said %r", version, said.seconds, said.answer)
    assert said.status == 0, said
    _, cut_off, again = between.times
    figures.info("asked again %.1f s after it was cut off", again - cut_off)
    return between.asked, said.answer


def assert_resumed(gateway: Running, server: Running) -> None:
    """One call was cut off, the next went on where that was, and then came the rival's turn."""
    first, second, rival = reversed(gateway.ask("/status")[1]["last"])
    shown = ("kind", "outcome", "waited", "took", "input", "cached", "output")
    for call in (first, second, rival):
        figures.info(" ".join(f"{key}={call[key]}" for key in shown))
    assert [call["outcome"] for call in (first, second, rival)] == ["cancelled"] + ["answered"] * 2
    prompt = second["input"] + second["cached"]
    assert rival["input"] + rival["cached"] < BATCH < prompt

    released = [said.held for said in said_by(server) if isinstance(said, Released)]
    assert len(released) == 3
    evaluated = released[0] + second["input"]  # the slot was empty at first
    figures.info("%d + %d tokens for a prompt of %d", released[0], second["input"], prompt)
    assert 2 * BATCH <= released[0] < prompt
    assert evaluated <= prompt + BATCH


# --- what is shown --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_call_goes_on_where_it_was(
    version: str, gateway: Running, server: Running, tmp_path: Path
) -> None:
    """The connection is cut; the same stream is asked for again, and all but a batch is kept."""
    asked, answer = interrupted(version, gateway, server, tmp_path, b"")
    assert answer.strip()
    first, second = asked
    assert first["stream"]
    assert second == first
    assert_resumed(gateway, server)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stream_that_broke_goes_on_as_a_whole_answer(
    version: str, gateway: Running, server: Running, tmp_path: Path
) -> None:
    """The stream fails; the client asks again without one, and all but a batch is kept."""
    asked, answer = interrupted(version, gateway, server, tmp_path, BROKEN)
    assert answer.strip()
    first, second = asked
    assert first["stream"]
    assert not second.get("stream")
    assert second["messages"] == first["messages"]
    assert_resumed(gateway, server)
