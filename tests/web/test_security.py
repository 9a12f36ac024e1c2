"""What an attacker tries that no single room can show to be in vain (docs/security.md)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
import pytest_twisted
from twisted.internet import reactor as real_reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory
from twisted.logger import LogEvent
from twisted.web.server import Request

from gateway.config import Gateway
from gateway.daemon.log import in_words
from gateway.ledger import Ledger
from gateway.wire import events
from tests.house import HELLO, Household, turn
from tests.remote.scene import Scene

Json = Any

reactor: Any = real_reactor

TOKEN: Final = "the-token-of-the-door"
KEY: Final = "the-key-of-the-tier"
CLIENTS: Final = "the-key-of-the-client"
WORDS: Final = "words-that-nobody-else-may-read"


def written(logged: list[LogEvent]) -> str:
    """All that is logged, as it is written down."""
    return "".join(in_words(event) or "" for event in logged)


def looked_at(house: Household, **headers: str) -> bytes:
    """All that the house says of itself."""
    said = b""
    for path in ("/status", "/metrics", "/", "/v1/models", "/healthz", "/nowhere"):
        browser = house.browser()
        browser.get(path, **headers)
        house.settle()
        said += browser.raw
    return said


def test_no_secret_is_told(logged: list[LogEvent]) -> None:
    """After calls that went well, were refused and broke: by no page, no figure and no log."""
    house = Household.built(token=TOKEN)
    shown = {"x_api_key": TOKEN, "authorization": f"Bearer {CLIENTS}"}
    refused = [
        house.ask(turn(WORDS), x_api_key=CLIENTS).raw,
        house.ask(turn(WORDS, temperature=WORDS), **shown).raw,
        house.ask(b"{" + WORDS.encode(), **shown).raw,
        house.ask(turn(WORDS), path="/v1/nowhere", **shown).raw,
    ]
    well = house.ask(turn(WORDS, stream=True), **shown)
    house.main.held.pop().answer()
    broken = house.ask(turn(WORDS, stream=True), **shown)
    house.main.held.pop().refuse(500, {"error": {"type": "server_error", "message": "no"}})
    house.settle()
    assert b"Hello" in well.raw
    said = [looked_at(house, **shown), *refused, broken.raw, written(logged).encode()]
    for secret in (TOKEN, CLIENTS, WORDS):
        assert not any(secret.encode() in each for each in said)


def test_a_fault_of_ours_tells_the_client_nothing(
    logged: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback is for the log; it has no values, so no words either."""

    def fails(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Ledger, "started", fails)
    house = Household.built(token=TOKEN)
    browser = house.ask(turn(WORDS), x_api_key=TOKEN)
    assert browser.status == 500
    assert browser.json["error"]["message"] == "The gateway itself failed; its log says why."
    told = written(logged)
    assert "a fault" in told
    assert WORDS not in told
    assert TOKEN not in told
    logged.clear()


@pytest.mark.parametrize("kind", ["anthropic", "openai"])
def test_each_key_goes_where_it_is_meant(kind: str) -> None:
    """A server elsewhere gets its tier's key, and nothing by which the client is known to us."""
    scene = Scene.of(kind, api_key=KEY)
    scene.house.ask(
        turn(), x_api_key=CLIENTS, authorization=f"Bearer {CLIENTS}", cookie=CLIENTS,
        anthropic_api_key=CLIENTS, proxy_authorization=CLIENTS,
    )  # fmt: skip
    assert scene.there.held
    for _, _, headers in scene.there.asked:
        assert KEY in " ".join(headers.values())
        assert CLIENTS not in " ".join(headers.values())


def test_a_llama_server_gets_no_header_of_the_client() -> None:
    """It heeds none, so none goes."""
    house = Household.built()
    house.ask(turn(), x_api_key=CLIENTS, authorization=CLIENTS, anthropic_beta=CLIENTS)
    (held,) = house.main.held
    sent = [
        value for _, values in held.request.requestHeaders.getAllRawHeaders() for value in values
    ]
    assert not any(CLIENTS.encode() in value for value in sent)


@pytest.mark.parametrize("kind", ["anthropic", "openai"])
@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_a_server_that_says_its_key_is_not_quoted(
    kind: str, status: int, logged: list[LogEvent]
) -> None:
    """What is passed on of its refusal has the key blotted out."""
    scene = Scene.of(kind, api_key=KEY)
    browser = scene.house.ask(turn())
    said = f"invalid x-api-key {KEY} here"
    scene.there.held[0].refuse(status, {"error": {"type": "some_error", "message": said}})
    scene.house.settle()
    assert "invalid x-api-key *** here" in browser.json["error"]["message"]
    assert KEY not in written(logged)


@pytest.mark.parametrize("kind", ["anthropic", "openai"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(kind: str, status: int) -> None:
    """The key goes to the place of the configuration and to no other."""
    scene = Scene.of(kind, api_key=KEY)
    browser = scene.house.ask(turn())
    asked = len(scene.there.asked)
    request: Request = scene.there.held[0].request
    request.setHeader("location", "http://there.example/prefix/elsewhere")
    scene.there.held[0].refuse(status, {})
    scene.house.settle()
    assert len(scene.there.asked) == asked
    assert (browser.status, browser.json["error"]["type"]) == (502, "api_error")


EVIL: Final = 'x"><script>alert(1)</script>\n2026-01-01T00:00:00+0000 [-] forged\r\x1b[2J\u202e'


def test_a_model_by_an_evil_name(logged: list[LogEvent]) -> None:
    """It forges no line of the log, steers no terminal and is no element of the page."""
    house = Household.built()
    browser = house.ask({**turn(), "model": EVIL}, user_agent="\x1b[2J", x_app="<b>")
    house.main.held.pop().answer()
    house.settle()
    assert browser.json["model"] == EVIL
    lines = [line for line in written(logged).split("\n") if "forged" in line]
    assert lines
    assert all("-> main" in line for line in lines)
    assert "\x1b" not in written(logged)
    page = house.browser()
    page.get("/")
    house.settle()
    assert b"<script>alert" not in page.body
    assert b"\x1b" not in page.body


def test_what_a_server_says_forges_no_line(logged: list[LogEvent]) -> None:
    """Its words reach the log, and begin none of its lines."""
    house = Household.built()
    house.ask(turn(stream=True))
    house.main.held.pop().refuse(503, {"error": {"type": "x", "message": EVIL}})
    house.settle()
    lines = [line for line in written(logged).split("\n") if "forged" in line]
    assert lines
    assert all(line.startswith("\t") for line in lines)
    assert "\x1b" not in written(logged)


def test_a_compressed_body_is_no_body() -> None:
    """Nothing a client sends is unpacked, so that a small body stays a small one."""
    house = Household.built()
    body = gzip.compress(orjson.dumps(turn()))
    browser = house.ask(body, content_encoding="gzip")
    assert browser.status == 415
    assert house.main.held == []


def test_a_server_is_asked_to_pack_nothing() -> None:
    """What it packs all the same is not unpacked: nothing small becomes large here."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn())
    request: Request = scene.there.held[0].request
    assert request.getHeader("accept-encoding") == "identity"
    request.setResponseCode(400)
    request.setHeader("content-encoding", "gzip")
    said = {"type": "error", "error": {"type": "invalid_request_error", "message": "unpacked"}}
    request.write(gzip.compress(orjson.dumps(said)))
    request.finish()
    scene.house.settle()
    assert browser.status == 400
    assert b"unpacked" not in browser.body


def test_an_answer_without_end_is_ended() -> None:
    """A server whose short answer goes on and on is hung up on."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn())
    request: Request = scene.there.held[0].request
    request.setResponseCode(400)
    request.write(bytes(80 * 1024 * 1024))
    scene.house.settle()
    assert browser.status == 500
    assert "sent more than" in browser.json["error"]["message"]


def _said(words: str) -> Json:
    return HELLO[2] | {"delta": {"type": "text_delta", "text": words}}


@pytest.mark.parametrize(
    "more",
    [
        [_said("x" * 5000)],
        [_said("")] * 40,
        [HELLO[3], HELLO[1] | {"content_block": {"type": "text", "text": "x" * 5000}}],
    ],
    ids=["words", "events without words", "blocks that begin with them"],
)
def test_a_message_without_end_is_ended(more: list[Json], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is held whole; one that is streamed on is held by nobody."""
    monkeypatch.setattr(events, "_LONGEST", 20_000)
    scene = Scene.of("anthropic")
    for stream in (False, True):
        browser = scene.house.ask(turn(stream=stream))
        held = scene.there.held.pop()
        held.begin()
        held.send(*HELLO[:2], *more, *more)
        scene.house.settle()
        assert not held.left
        held.send(*more * 2)
        scene.house.settle()
        assert held.left == (not stream)
        if stream:
            held.send(*HELLO[3:])
            held.finish()
            scene.house.settle()
            assert browser.ended
        else:
            assert browser.status == 500
            assert "an answer of more than 20000 bytes" in browser.json["error"]["message"]
    assert scene.house.line().running == 0


@pytest_twisted.ensureDeferred
async def test_a_socket_in_the_file_system_lets_in_its_owner_alone(tmp_path: Path) -> None:
    """From the moment on at which somebody can connect to it."""
    path = tmp_path / "gw.sock"
    endpoint = serverFromString(reactor, Gateway(listen=f"unix:{path}").endpoint)
    factory: Any = Factory()
    port = await endpoint.listen(factory)
    try:
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        stopped: Deferred[None] = port.stopListening()
        await stopped
