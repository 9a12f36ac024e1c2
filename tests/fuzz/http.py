"""
Any request to any route of a whole gateway in memory, and any answer of the servers behind it.

A case is a JSON object: ``method``, ``path``, ``headers`` and ``body`` of a request; ``says``, what
the server says to a completion (events, or an object with a ``status`` and a ``body``, or anything
else: then its connection breaks); ``asked``, what it says on other paths; and ``leaves``, for a
client that does not wait for the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import orjson
from twisted.logger import ILogObserver, LogEvent, LogLevel, globalLogPublisher
from twisted.web.server import Request

from tests.fuzz import Target
from tests.fuzz.changes import of_json
from tests.fuzz.requests import BODIES, CHATS, WORDS
from tests.fuzz.streams import CONTINUATIONS, SAID
from tests.house import CLAUDE_CODE, HELLO, Browser, FakeLlama, Held, Household

Json = Any

#: What docs/protocol.md says; 303 is what a button of the page gives.
_STATUSES: Final = frozenset({200, 303, 400, 401, 403, 404, 405, 413, 429, 500, 502, 503, 504, 529})
_FAILED: Final = b"The gateway itself failed"

#: What says how long a request is, and what may come before its answer; those are not guessed here.
_FRAMING: Final = frozenset({"content-length", "transfer-encoding", "expect", "host"})

#: Seconds in which everything that was begun must have come to its end.
_LONG: Final = 1000.0


class _Llama(FakeLlama):
    """A server that says on some paths what it likes."""

    def __init__(self, said: Mapping[str, Json], slots: int) -> None:
        super().__init__(slots=slots)
        self.said = said
        self.embeds = True
        self.completions = ['{"title":"t"}'] * 20

    def render(self, request: Request) -> Any:
        path = request.path.decode("latin-1")
        if path in self.said:
            request.content.read()  # type: ignore[union-attr]  # it is there by now
            return orjson.dumps(self.said[path])
        return super().render(request)


def holds(data: bytes) -> None:
    """The answer is one that is documented, and afterwards nothing is left of it."""
    try:
        case = orjson.loads(data)
    except ValueError:
        return
    if not isinstance(case, dict):
        return
    logged: list[LogEvent] = []
    observer = cast("ILogObserver", logged.append)
    globalLogPublisher.addObserver(observer)
    try:
        _check(case)
    finally:
        globalLogPublisher.removeObserver(observer)
    assert [event for event in logged if event["log_level"] >= LogLevel.error] == []


def _check(case: Mapping[str, Json]) -> None:
    asked = case.get("asked")
    said = asked if isinstance(asked, dict) else {}
    house = Household.built(main=_Llama(said, 1), small=_Llama(said, 2))
    house.settle()
    browser = house.browser()
    method, path = _line(case.get("method"), "POST"), _line(case.get("path"), "/v1/messages")
    browser.send(_request(case, method, path))
    house.settle()
    here = True
    for _ in range(7):
        # Its own end of a connection that we have closed, it closes too.
        if here and (case.get("leaves") is True or browser.wire.disconnecting):
            here = False
            if not browser.wire.aborted:
                browser.leave()
        held = [*house.main.held, *house.small.held]
        house.main.held.clear()
        house.small.held.clear()
        for each in held:
            _answer(each, case.get("says"))
        house.wait(20)
    is_plain = not said and case.get("says") == HELLO
    _check_answer(browser, method, path, is_plain=is_plain, left=not here)
    if here and not browser.wire.aborted:
        browser.leave()
    said.pop("/slots", None)  # whatever was at work there is done by now
    _check_rest(house)


def _line(value: Json, otherwise: str) -> str:
    """A word of the request's first line, or a header: without what would end it."""
    text = value if isinstance(value, str) else otherwise
    return "".join(letter for letter in text if letter > " " and letter != "\x7f") or otherwise


def _request(case: Mapping[str, Json], method: str, path: str) -> bytes:
    headers, body = case.get("headers"), case.get("body")
    raw = body.encode() if isinstance(body, str) else b"" if body is None else orjson.dumps(body)
    lines = [f"{method} {path} HTTP/1.1", "host: localhost:9090", f"content-length: {len(raw)}"]
    for name, value in headers.items() if isinstance(headers, dict) else ():
        known = _line(name, "x").replace(":", "")
        if known.lower() not in _FRAMING and isinstance(value, str):
            lines.append(f"{known}: {' '.join(value.split())}")
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1", "replace") + b"\r\n" + raw


def _answer(held: Held, says: Json) -> None:
    """What a server says to a completion."""
    if held.left or held.request.finished or held.request.channel is None:
        return
    if isinstance(says, list):
        held.begin()
        for event in says:
            data = orjson.dumps(event)
            kind = event.get("type") if isinstance(event, dict) else None
            name = (
                b"event: %b\n" % kind.encode() if isinstance(kind, str) and kind.isalpha() else b""
            )
            held.request.write(name + b"data: %b\n\n" % data)
        held.finish()
    elif isinstance(says, dict) and type(says.get("status")) is int and 200 <= says["status"] < 600:
        held.request.setResponseCode(says["status"])
        held.request.write(orjson.dumps(says.get("body")))
        held.request.finish()
    else:
        held.die()


def _check_answer(browser: Browser, method: str, path: str, *, is_plain: bool, left: bool) -> None:
    if not browser.raw:
        assert left or browser.wire.aborted, "somebody waits for an answer"
        return
    assert browser.status in _STATUSES, browser.raw[:500]
    assert _FAILED not in browser.raw
    assert not (is_plain and browser.status == 500), browser.raw[:500]
    assert browser.headers["request-id"].startswith("req_")
    if method == "HEAD" and b"no HTTP that can be read" not in browser.raw:
        assert browser.body == b""
    elif (browser.status or 0) >= 400 and "html" not in browser.headers.get("content-type", ""):
        _check_error(browser)
    elif browser.headers.get("content-type", "").startswith("application/json"):
        assert isinstance(browser.json, dict)
    elif "event-stream" in browser.headers.get("content-type", "") and path == "/v1/messages":
        assert not browser.ended or browser.events[-1]["type"] in ("message_stop", "error")


def _check_error(browser: Browser) -> None:
    """In the words of one of the two APIs, with a sentence."""
    said = browser.json
    error = said["error"]
    assert isinstance(error["type"], str)
    assert len(error["message"]) > 10
    if "type" in said:
        assert said["type"] == "error"
        assert said["request_id"] == browser.headers["request-id"]
    else:
        assert error.keys() == {"message", "type", "param", "code"}
    for name in ("retry-after", "x-should-retry"):
        assert browser.headers.get(name, "true").isalnum()


def _check_rest(house: Household) -> None:
    """No permit is missing, no call is open, no timer is left."""
    for _ in range(10):
        house.wait(_LONG / 10)
    for name in ("main", "small"):
        line = house.line(name)
        assert line.running == line.waiting == line.settling == 0, name
    assert house.api.dispatch._open == {}
    assert house.api._under_way == set()
    assert house.api.dispatch.ledger.status()["calls"] == []
    assert [call for call in house.clock.getDelayedCalls() if call.active()] == []


# --- what cases are made of -----------------------------------------------------------------------


def _case(path: str, body: Json = None, says: Json = HELLO, **more: Json) -> bytes:
    method = "GET" if body is None else "POST"
    return orjson.dumps(
        {"method": method, "path": path, "headers": {}, "body": body, "says": says, **more}
    )


_ODD_SERVER: Final = {
    "/props": {"default_generation_settings": {"n_ctx": 4096}, "total_slots": 1},
    "/apply-template": {"prompt": "p"},
    "/tokenize": {"tokens": [1]},
    "/v1/messages/count_tokens": {"input_tokens": 5},
    "/slots": [{"is_processing": False}],
    "/v1/embeddings": {"data": [], "usage": {"prompt_tokens": 3}},
    "/completion": {"content": '{"title":"t"}', "stop_type": "eos", "tokens_predicted": 3},
}
_FROM_CLAUDE_CODE: Final = {"headers": {**CLAUDE_CODE, "x-stainless-timeout": "600"}}
_SEEDS: Final = (
    *(_case("/v1/messages", body | {"stream": bool(n % 2)}) for n, body in enumerate(BODIES)),
    *(_case("/v1/messages", body, **_FROM_CLAUDE_CODE) for body in BODIES),
    *(_case("/v1/messages", BODIES[0] | {"stream": True}, says) for says in SAID[1:]),
    _case("/v1/messages", BODIES[0] | {"stream": True}, leaves=True),
    _case("/v1/messages", BODIES[0], {"status": 429, "body": {"error": {"message": "m"}}}),
    _case("/v1/messages", BODIES[0], None),
    _case("/v1/messages", BODIES[1], asked=_ODD_SERVER, **_FROM_CLAUDE_CODE),
    _case("/v1/messages/count_tokens", BODIES[0], asked=_ODD_SERVER),
    *(_case("/v1/chat/completions", body) for body in CHATS[:2]),
    *(_case("/v1/completions", body, CONTINUATIONS[0]) for body in CHATS[2:4]),
    _case("/v1/embeddings", CHATS[4], asked=_ODD_SERVER),
    *(_case(path) for path in ("/", "/healthz", "/status", "/metrics", "/page/events")),
    *(_case(path) for path in ("/page/page.css", "/v1/models", "/v1/models/claudegw-main")),
    _case("/v1/models", headers={"authorization": "Bearer x"}),
    _case("/page/tiers/main/save", {}, headers={"origin": "http://localhost:9090"}),
    _case("/page/tiers/main/restart", {}, headers={"origin": "http://localhost:9090"}),
    _case("/page/calls/req_1/cancel", {}, headers={"origin": "http://localhost:9090"}),
    _case("/api/hello", method="HEAD"),
)
_HTTP_WORDS: Final[tuple[Json, ...]] = (
    *WORDS,
    *("GET", "POST", "HEAD", "PUT", "OPTIONS", "/v1/messages", "/v1/completions", "/status", "/"),
    *("/page/%2e%2e", "/%ff", "//", "/v1/models/%00", "*", "http://a/v1/messages", "http://["),
    *("origin", "authorization", "x-api-key", "user-agent", "x-stainless-timeout", "Basic Og=="),
    *("anthropic-version", "sec-fetch-site", "nan", "inf", "claude-cli/9", HELLO, _ODD_SERVER),
)

#: JSON that is no llama-server's, for who asks for an answer under a schema, and for a count.
_NO_ANSWER: Final[list[Json]] = [
    {"/apply-template": []},
    {"/apply-template": {}},
    {"/completion": {}},
    {"/completion": []},
    {"/completion": {"content": "a", "timings": []}},
]
_NO_COUNT: Final[list[Json]] = [
    {"/apply-template": []},
    {"/tokenize": {"tokens": 5}},
    {"/tokenize": "a"},
]
_KEPT: Final = (
    _case("/v1/messages", BODIES[0], headers={"origin": "http://["}),
    _case("/page/tiers/main/save", {}, headers={"origin": "http://["}),
    *(
        _case("/v1/messages", BODIES[1], asked=_ODD_SERVER | odd, **_FROM_CLAUDE_CODE)
        for odd in _NO_ANSWER
    ),
    *(_case("/v1/messages/count_tokens", BODIES[0], asked=_ODD_SERVER | odd) for odd in _NO_COUNT),
    _case(
        "/v1/messages",
        BODIES[0],
        says=[{"type": "error", "error": {"type": "overloaded_error", "message": "m"}}],
    ),
)

HTTP: Final = Target("http", holds, _SEEDS, of_json(_HTTP_WORDS), _KEPT, 600)
