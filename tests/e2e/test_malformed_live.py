"""The whole table of malformed requests, thrown at a real gateway while a real turn streams."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import attrs
import orjson
import pytest

from tests.e2e.stack import Running, start_gateway
from tests.house import turn
from tests.web.test_malformed import KINDS, LIMIT, TOKEN, Kind, check, request
from tests.wire.test_events import Told, checked, events_of

pytestmark = pytest.mark.server

#: The turn's longest answer, in tokens: it must outlast the table.
_LONG = 400


@pytest.fixture(scope="module")
def guarded(
    main_server: Running, small_server: Running, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A gateway in front of both servers that wants a token and takes short bodies only."""
    tiers = {
        "main": {"url": main_server.url, "slots": 1},
        "small": {"url": small_server.url, "slots": 2},
    }
    more = f'token = "{TOKEN}"\nbody_limit = {LIMIT}\n\n'
    folder: Path = tmp_path_factory.mktemp("guarded")
    running = start_gateway(folder, tiers, more)
    yield running
    running.stop()


@attrs.define(eq=False)
class Listener:
    """A client that reads a streamed turn in a thread of its own."""

    port: int
    began: threading.Event = attrs.field(factory=threading.Event, init=False)
    over: threading.Event = attrs.field(factory=threading.Event, init=False)
    raw: bytes = attrs.field(default=b"", init=False)

    def listen(self) -> None:
        """Ask, and read to the end; `began` is set with the first piece of text."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = turn("Tell a long story.", stream=True, max_tokens=_LONG, temperature=0)
        try:
            connection.request("POST", "/v1/messages", orjson.dumps(body), {"x-api-key": TOKEN})
            answer = connection.getresponse()
            while chunk := answer.read1():
                self.raw += chunk
                if b"content_block_delta" in self.raw:
                    self.began.set()
        finally:
            self.began.set()
            self.over.set()
            connection.close()

    @property
    def told(self) -> Told:
        """What was told, by the rules of the Messages API."""
        return checked(events_of(self.raw))


def throw(port: int, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send these very bytes, and read the answer to them: status, headers and body."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(raw)
        answer = HTTPResponse(connection)
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()


def mistakes(port: int, kinds: list[Kind]) -> list[str]:
    """The kinds that were not refused as they must be, each with the reason."""
    found = []
    for kind in kinds:
        try:
            check(kind, *throw(port, kind.raw))
        except (AssertionError, OSError, ValueError, KeyError) as error:
            found.append(f"{kind.name}: {type(error).__name__}: {error}"[:300])
    return found


def test_malformed_requests_disturb_nobody(guarded: Running) -> None:
    """Each is refused as in memory, the turn beside them ends well, and nothing is left over."""
    listener = Listener(guarded.port)
    thread = threading.Thread(target=listener.listen)
    thread.start()
    try:
        assert listener.began.wait(120)
        assert not listener.over.is_set()
        found = mistakes(guarded.port, KINDS)
        rounds = 1
        while not listener.over.is_set():
            found += mistakes(guarded.port, KINDS[rounds % 7 :: 7])
            rounds += 1
    finally:
        thread.join(300)
    assert found == []
    told = listener.told
    (block,) = told.content
    assert block["type"] == "text"
    assert len(block["text"]) > 100
    assert told.ending["stop_reason"] in ("end_turn", "max_tokens")
    assert told.usage["output_tokens"] <= _LONG
    status, _, body = throw(guarded.port, request(b"", path="/status", method="GET"))
    assert status == 200
    shown = orjson.loads(body)
    assert shown["calls"] == []
    for tier in shown["tiers"].values():
        assert (tier["running"], tier["waiting"], tier["settling"]) == (0, 0, 0)


def test_clients_that_break_off_disturb_nobody(guarded: Running) -> None:
    """Requests that end in their middle, at any byte, are no requests and leave nothing behind."""
    raw = request(turn("Say hello.", max_tokens=8))
    for length in range(0, len(raw), 7):
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=60) as connection:
            connection.sendall(raw[:length])
    status, _, body = throw(guarded.port, raw)
    assert status == 200
    assert orjson.loads(body)["type"] == "message"
    shown = orjson.loads(throw(guarded.port, request(b"", path="/status", method="GET"))[2])
    assert shown["calls"] == []
    assert [tier["running"] for tier in shown["tiers"].values()] == [0, 0]


def send_without_end(connection: socket.socket) -> None:
    while True:
        connection.sendall(b" " * 65536)


def test_a_body_that_is_far_too_large_is_not_even_read(guarded: Running) -> None:
    """The connection of a client that sends without end is closed, and the others work on."""
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=60) as connection:
        connection.sendall(request(b" " * (LIMIT * 10)).partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            send_without_end(connection)
    assert throw(guarded.port, request(b"", path="/healthz", method="GET"))[0] == 200


def test_the_log_has_no_token_and_no_failure(guarded: Running) -> None:
    """After all that the log holds neither what was said nor a traceback."""
    log = guarded.log.read_text()
    assert TOKEN not in log
    assert "long story" not in log
    assert "Traceback" not in log
