"""
Requests that are wrong, each in a way of its own.

`KINDS` is the table; `tests.e2e.test_malformed_live` throws the same one at a real gateway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
import pytest

from tests.house import CLAUDE_CODE, Browser, Household, turn

Json = Any

TOKEN = "a token of the tests"
LIMIT = 20_000

_USER = {"role": "user", "content": "hi"}
_TOOL = {"name": "Bash", "input_schema": {"type": "object"}}


class Kind(NamedTuple):
    """One way to be wrong: its name, the bytes on the wire, and what must come back."""

    name: str
    raw: bytes
    status: int
    kind: str
    says: str


def request(
    body: Json,
    path: str = "/v1/messages",
    method: str = "POST",
    host: str = "host: localhost\r\n",
    token: str = f"x-api-key: {TOKEN}\r\n",
    headers: str = "",
) -> bytes:
    """A request on the wire, as it should be but for what is given."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = f"{method} {path} HTTP/1.1\r\n{host}{token}content-length: {len(raw)}\r\n{headers}\r\n"
    return lines.encode("latin-1") + raw


def _head(*lines: str, first: str = "POST /v1/messages HTTP/1.1") -> bytes:
    """A request's head, with nothing that is not given but a host and a token."""
    every = (first, "host: localhost", f"x-api-key: {TOKEN}", *lines)
    return "".join(f"{line}\r\n" for line in every).encode("latin-1") + b"\r\n"


def _wrong(name: str, body: Json, says: str, **how: str) -> Kind:
    """A body that is refused with a 400 which says where."""
    return Kind(name, request(body, **how), 400, "invalid_request_error", says)


def _field(name: str, value: Json, says: str, **more: Json) -> Kind:
    """A turn with one field that is wrong."""
    return _wrong(f"{name} = {value!r}"[:70], turn(**more) | {name: value}, says)


def _said(name: str, content: Json, says: str, role: str = "user") -> Kind:
    """A turn whose second message has a wrong content."""
    body = turn() | {"messages": [_USER, {"role": role, "content": content}]}
    return _wrong(name, body, says)


def _block(name: str, block: Json, says: str) -> Kind:
    """A turn with one content block that is wrong."""
    return _said(f"a block: {name}", [{"type": "text", "text": "x"}, block], says)


def _schema(name: str, schema: Json, says: str = "output_config.format.schema: ") -> Kind:
    """A housekeeping call with a schema that cannot be used."""
    body = turn(output_config={"format": {"type": "json_schema", "schema": schema}})
    headers = f"user-agent: {CLAUDE_CODE['user-agent']}\r\n"
    return _wrong(f"a schema: {name}", body, says, headers=headers)


def _tools(name: str, tools: Json, says: str, **more: Json) -> Kind:
    return _wrong(f"tools: {name}", turn(tools=tools, **more), says)


def _nested(depth: int, inside: Json = None) -> Json:
    for _ in range(depth):
        inside = {"properties": {"a": inside or {}}}
    return inside


def _deep(template: Json, depth: int) -> bytes:
    """`template` as JSON, with ``"DEEP"`` replaced by objects within objects."""
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    return orjson.dumps(template).replace(b'"DEEP"', deep)


def _chunked(*chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return _head("transfer-encoding: chunked") + body


def _called(**call: Json) -> Json:
    return {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}} | call


def _result(**result: Json) -> Json:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"} | result


_BODIES = [
    _wrong("no body", b"", "not valid JSON"),
    _wrong("half a body", orjson.dumps(turn())[:-5], "not valid JSON"),
    _wrong("a body and a half", orjson.dumps(turn()) + b"{}", "not valid JSON"),
    _wrong("a form", b"model=a&max_tokens=5", "not valid JSON"),
    _wrong("a comment", b"/* hello */ {}", "not valid JSON"),
    _wrong("a comma too many", b'{"model": "a",}', "not valid JSON"),
    _wrong("single quotes", b"{'model': 'a'}", "not valid JSON"),
    _wrong("a key without quotes", b'{model: "a"}', "not valid JSON"),
    _wrong("a byte order mark", b"\xef\xbb\xbf" + orjson.dumps(turn()), "not valid JSON"),
    _wrong("UTF-16", orjson.dumps(turn()).decode().encode("utf-16"), "not valid JSON"),
    _wrong("gzip that is not said", b"\x1f\x8b\x08\x00\x00", "not valid JSON"),
    _wrong("NaN", b'{"max_tokens": NaN}', "not valid JSON"),
    _wrong("Infinity", b'{"temperature": -Infinity}', "not valid JSON"),
    _wrong("a number beyond all bounds", b'{"temperature": 1e999}', "not valid JSON"),
    _wrong("a leading zero", b'{"max_tokens": 007}', "not valid JSON"),
    _wrong("invalid UTF-8", b'{"model": "\xff\xfe"}', "not valid JSON"),
    _wrong("overlong UTF-8", b'{"model": "\xc0\xaf"}', "not valid JSON"),
    _wrong("a surrogate in UTF-8", b'{"model": "\xed\xa0\x80"}', "not valid JSON"),
    _wrong("a lone high surrogate", b'{"model": "\\ud83d"}', "not valid JSON"),
    _wrong("a lone low surrogate", b'{"model": "\\ude00 x"}', "not valid JSON"),
    _wrong("a control character", b'{"model": "a\nb"}', "not valid JSON"),
    _wrong("an unknown escape", b'{"model": "\\x41"}', "not valid JSON"),
    _wrong("NUL after the end", orjson.dumps(turn()) + b"\x00", "not valid JSON"),
    _wrong("lists without end", b"[" * 9000, "not valid JSON"),
    _wrong("objects in 1 500 objects", _deep(turn(metadata="DEEP"), 1500), "not valid JSON"),
    _wrong("null", b"null", "must be a JSON object"),
    _wrong("a list", [turn()], "must be a JSON object"),
    _wrong("a string", "hello", "must be a JSON object"),
    _wrong("a number", b"42", "must be a JSON object"),
]

_FIELDS = [
    _wrong("an empty object", {}, "model: Field required"),
    *(
        _wrong(f"no {name}", {key: turn()[key] for key in turn() if key != name}, f"{name}: Field")
        for name in ("model", "messages", "max_tokens")
    ),
    *(
        _wrong(f"{name} = null", turn() | {name: None}, f"{name}: Input should be")
        for name in ("model", "messages", "max_tokens")
    ),
    _field("model", 5, "model: Input should be a string"),
    _field("model", "", "model: Input should be a string of at least one"),
    _field("model", ["a"], "model: Input should be a string"),
    _field("max_tokens", 0, "max_tokens: Input should be an integer of at least 1"),
    _field("max_tokens", -1, "max_tokens: Input should be an integer"),
    _field("max_tokens", 1.5, "max_tokens: Input should be an integer"),
    _field("max_tokens", "100", "max_tokens: Input should be an integer"),
    _field("max_tokens", True, "max_tokens: Input should be an integer"),
    _wrong(
        "max_tokens = 10**30",
        b'{"model":"a","messages":[],"max_tokens":1%b}' % (b"0" * 30),
        "max_tokens",
    ),
    _field("messages", [], "messages: at least one"),
    _field("messages", {}, "messages: Input should be a list"),
    _field("messages", "hi", "messages: Input should be a list"),
    _field("messages", ["hi"], "messages.0: Input should be an object"),
    _field("messages", [None], "messages.0: Input should be an object"),
    _field("messages", [_USER, []], "messages.1: Input should be an object"),
    _field("messages", [{"content": "hi"}], "messages.0.role: Field required"),
    _field("messages", [{"role": "user"}], "messages.0.content: Field required"),
    _field("messages", [{"role": "tool", "content": ""}], "messages.0.role: Input should be"),
    _field("messages", [{"role": "User", "content": ""}], "messages.0.role: Input should be"),
    _field("messages", [{"role": None, "content": ""}], "messages.0.role: Input should be"),
    _field("messages", [{"role": ["user"], "content": ""}], "messages.0.role: Input should be"),
    _field("system", 5, "system: Input should be a string or a list"),
    _field("system", {"type": "text", "text": "x"}, "system: Input should be a string or a list"),
    _field("system", ["x"], "system.0: Input should be an object"),
    _field("system", [{"type": "text"}], "system.0.text: Field required"),
    _field("system", [{"type": "image", "text": "x"}], "system.0.type: Input should be 'text'"),
    _field("system", [{"type": "text", "text": 5}], "system.0.text: Input should be a string"),
    _field("thinking", True, "thinking: Input should be an object"),
    _field("thinking", {"type": "maybe"}, "thinking.type: Input should be"),
    _field("thinking", {"type": "enabled"}, "thinking.budget_tokens: Field required"),
    _field("thinking", {"type": "enabled", "budget_tokens": 0}, "thinking.budget_tokens: Input"),
    _field("stop_sequences", "STOP", "stop_sequences: Input should be a list"),
    _field("stop_sequences", ["a", 5], "stop_sequences.1: Input should be a string"),
    _field("temperature", "hot", "temperature: Input should be a number"),
    _field("temperature", 3, "temperature: Input should be between"),
    _field("temperature", True, "temperature: Input should be a number"),
    _field("top_p", 1.1, "top_p: Input should be between"),
    _field("top_p", [], "top_p: Input should be a number"),
    _field("top_k", -1, "top_k: Input should be an integer"),
    _field("top_k", 1.5, "top_k: Input should be an integer"),
    _field("stream", "yes", "stream: Input should be true or false"),
    _field("stream", 1, "stream: Input should be true or false"),
    _field("metadata", "me", "metadata: Input should be an object"),
    _field("output_config", [], "output_config: Input should be an object"),
    _field("output_config", {"effort": 5}, "output_config.effort: Input should be a string"),
    _field("output_config", {"format": "json"}, "output_config.format: Input should be an object"),
    _field("output_config", {"format": {"type": "xml"}}, "output_config.format.type: Input"),
    _field("output_config", {"format": {"type": "json_schema"}}, "format.schema: Field required"),
    _field("output_format", {"type": "json_schema", "schema": 5}, "output_format.schema: Input"),
    _field("chat_template_kwargs", "x", "chat_template_kwargs: Input should be an object"),
    _field("thread", {"type": "continue", "previous_message_id": "msg_1"}, "thread: only whole"),
    _wrong(
        "a count of nothing", {"model": "a"}, "messages: Field", path="/v1/messages/count_tokens"
    ),
    _wrong("a count of a list", [], "must be a JSON object", path="/v1/messages/count_tokens"),
]

_CONTENTS = [
    _said("content = 5", 5, "messages.1.content: Input should be a string or a list"),
    _said("content = null", None, "messages.1.content: Input should be a string or a list"),
    _said("content = {}", {}, "messages.1.content: Input should be a string or a list"),
    _said("an assistant's content = true", True, "messages.1.content: Input", role="assistant"),
    _said("a reminder's content = 5", 5, "messages.1.content: Input", role="system"),
    _said("a block that is a string", ["hi"], "messages.1.content.0: Input should be an object"),
    _said("a block that is a list", [[]], "messages.1.content.0: Input should be an object"),
    _block("no type", {"text": "x"}, "messages.1.content.1.type: Field required"),
    _block("an empty type", {"type": ""}, "messages.1.content.1.type: Input should be"),
    _block("a type of 5", {"type": 5}, "messages.1.content.1.type: Input should be a string"),
    _block("a type in a list", {"type": ["text"]}, "messages.1.content.1.type: Input should be"),
    _block("text without text", {"type": "text"}, "messages.1.content.1.text: Field required"),
    _block("text = null", {"type": "text", "text": None}, "messages.1.content.1.text: Input"),
    _block("thinking without it", {"type": "thinking"}, "messages.1.content.1.thinking: Field"),
    _block("an image without source", {"type": "image"}, "messages.1.content.1.source: Field"),
    _block("an image of a string", {"type": "image", "source": "x"}, "content.1.source: Input"),
    _block(
        "an image without data",
        {"type": "image", "source": {"type": "base64", "media_type": "image/png"}},
        "messages.1.content.1.source.data: Field required",
    ),
    _block(
        "an image without a URL",
        {"type": "image", "source": {"type": "url"}},
        "messages.1.content.1.source.url: Field required",
    ),
    _block("a call without id", _called(id=""), "messages.1.content.1.id: Input should be"),
    _block("a call by number", _called(name=7), "messages.1.content.1.name: Input should be"),
    _block("a call with text", _called(input="{}"), "messages.1.content.1.input: Input should be"),
    _block("a call with null", _called(input=None), "messages.1.content.1.input: Input should be"),
    _block("a result of nothing", {"type": "tool_result"}, "content.1.tool_use_id: Field"),
    _block("a result of 5", _result(tool_use_id=5), "content.1.tool_use_id: Input should be"),
    _block("a result that is 5", _result(content=5), "content.1.content: Input should be"),
    _block("a result of strings", _result(content=["x"]), "content.1.content.0: Input should be"),
    _block(
        "a result without text",
        _result(content=[{"type": "text"}]),
        "messages.1.content.1.content.0.text: Field required",
    ),
    _block("a maybe error", _result(is_error="no"), "content.1.is_error: Input should be"),
    _wrong(
        "a call's input nested 400 deep",
        _deep(
            turn() | {"messages": [{"role": "assistant", "content": [_called(input="DEEP")]}]}, 400
        ),
        "nested",
    ),
]

_TOOLS = [
    _tools("an object", {}, "tools: Input should be a list"),
    _tools("names alone", ["Bash"], "tools.0: Input should be an object"),
    _tools("no name", [{"input_schema": {}}], "tools.0.name: Field required"),
    _tools("an empty name", [_TOOL | {"name": ""}], "tools.0.name: Input should be"),
    _tools("a description of 5", [_TOOL | {"description": 5}], "tools.0.description: Input"),
    _tools("no schema", [{"name": "Bash"}], "tools.0.input_schema: Field required"),
    _tools("a schema in text", [_TOOL | {"input_schema": "{}"}], "tools.0.input_schema: Input"),
    _tools("schema = true", [_TOOL | {"input_schema": True}], "tools.0.input_schema: Input"),
    _tools("a type of 5", [_TOOL | {"type": 5}], "tools.0.type: Input should be a string"),
    _tools("the same name twice", [_TOOL, _TOOL], "tools: Tool names must be unique"),
    _tools("choice = 'auto'", [_TOOL], "tool_choice: Input should be", tool_choice="auto"),
    _tools("choice of nothing", [_TOOL], "tool_choice.type: Field", tool_choice={}),
    _tools(
        "choice = required", [_TOOL], "tool_choice.type: Input", tool_choice={"type": "required"}
    ),
    _tools("choice without name", [_TOOL], "tool_choice.name: Field", tool_choice={"type": "tool"}),
    _tools(
        "choice of an unknown tool",
        [_TOOL],
        "there is no tool named 'Read'",
        tool_choice={"type": "tool", "name": "Read"},
    ),
    _tools("any of no tools", [], "'any' needs at least one tool", tool_choice={"type": "any"}),
    _wrong(
        "a tool's schema nested 400 deep",
        _deep(turn(tools=[_TOOL | {"input_schema": "DEEP"}]), 400),
        "nested",
    ),
]

_SCHEMAS = [
    _schema("of no known type", {"type": "banana"}),
    _schema("a type of 5", {"type": 5}),
    _schema("properties in a list", {"type": "object", "properties": []}),
    _schema("a required that is text", {"type": "object", "required": "a"}),
    _schema("a negative length", {"type": "string", "maxLength": -1}),
    _schema(
        "a pattern that is none", {"type": "string", "pattern": "("}, "schema.pattern: a group"
    ),
    _schema("within itself", {"type": "object", "properties": {"a": {"$ref": "#"}}}),
    _schema("a reference to nowhere", {"$ref": "#/$defs/a"}),
    _schema("a reference to the network", {"$ref": "http://127.0.0.1:9/a"}),
    _schema("a hidden reference to the network", {"not": {"$ref": "http://127.0.0.1:9/a"}}),
    _schema(
        "another hidden reference to the network",
        {"type": "object", "additionalProperties": {"$ref": "http://127.0.0.1:9/a"}},
    ),
    _schema("a dynamic reference to the network", {"$dynamicRef": "http://127.0.0.1:9/a"}),
    _schema("nested 200 deep", _nested(100), ""),
]

_PATHS = [
    Kind(name, raw, 404, "not_found_error", "There is no ")
    for name, raw in [
        ("GET /v1/messages", request(b"", method="GET")),
        ("PUT /v1/messages", request(turn(), method="PUT")),
        ("DELETE /v1/messages", request(b"", method="DELETE")),
        ("a method of nobody", request(turn(), method="FROB")),
        ("POST /v1/models", request(turn(), path="/v1/models")),
        ("POST /healthz", request(turn(), path="/healthz")),
        ("GET /api/hello", request(b"", path="/api/hello", method="GET")),
        ("an unknown path", request(turn(), path="/v1/complete")),
        ("an unknown path below", request(turn(), path="/v1/messages/batches")),
        ("a path in capitals", request(turn(), path="/V1/Messages")),
        ("a double slash within", request(turn(), path="/v1//messages")),
        ("dots", request(turn(), path="/v1/models/../messages")),
        ("an absolute path", request(turn(), path="http://localhost/v1/messages")),
        ("a path that goes on and on", request(turn(), path="/v1/" + "a" * 4000)),
    ]
] + [
    _wrong("a path that is not ASCII", turn(), "", path="/v1/m\xe9ssages"),
    _wrong("a path that is not UTF-8", turn(), "", path="/v1/%ff"),
    _wrong("a method that is not ASCII", turn(), "", method="P\xd6ST"),
]

_DOOR = (
    [
        Kind(
            f"host: {host!r}"[:60], request(turn(), host=host), 403, "permission_error", "the name"
        )
        for host in (
            "",
            "host: \r\n",
            "host: evil.example\r\n",
            "host: localhost.evil.example:9090\r\n",
            "host: localhost:9090@evil.example\r\n",
            "host: 127.0.0.1.evil.example\r\n",
            "host: [evil.example]:9090\r\n",
            "host: localhost evil.example\r\n",
            "host: \xff\r\n",
        )
    ]
    + [
        Kind(
            f"token: {token!r}"[:60],
            request(turn(), token=token),
            401,
            "authentication_error",
            "token",
        )
        for token in (
            "",
            "x-api-key: \r\n",
            "x-api-key: wrong\r\n",
            f"x-api-key: {TOKEN}!\r\n",
            f"x-api-key: {TOKEN.upper()}\r\n",
            "x-api-key: t\xf6ken\r\n",
            "authorization: Bearer wrong\r\n",
            "authorization: Bearer\r\n",
            f"authorization: Basic {TOKEN}\r\n",
        )
    ]
    + [
        _wrong(
            "two hosts", turn(), "host stands there more than once", headers="host: localhost\r\n"
        ),
        _wrong("two keys", turn(), "x-api-key stands there", headers=f"x-api-key: {TOKEN}\r\n"),
        Kind(
            "a body that is too large",
            request(b" " * (LIMIT + 1)),
            413,
            "request_too_large",
            f"{LIMIT + 1} bytes; this gateway takes {LIMIT}",
        ),
        Kind(
            "a body in chunks that is too large",
            _chunked(*[b" " * 6000] * 4),
            413,
            "request_too_large",
            f"24000 bytes; this gateway takes {LIMIT}",
        ),
    ]
)

_HTTP = [
    Kind(name, raw, 400, "invalid_request_error", "")
    for name, raw in [
        ("two lengths", _head("content-length: 2", "content-length: 3") + b"{}"),
        ("the same length twice", _head("content-length: 2", "content-length: 2") + b"{}"),
        ("two lengths in one", _head("content-length: 2, 2") + b"{}"),
        ("a length and chunks", _head("content-length: 2", "transfer-encoding: chunked") + b"{}"),
        ("a negative length", _head("content-length: -2") + b"{}"),
        ("a length with a sign", _head("content-length: +2") + b"{}"),
        ("a length in words", _head("content-length: two") + b"{}"),
        ("another transfer encoding", _head("transfer-encoding: gzip") + b"{}"),
        ("a chunk of no length", _head("transfer-encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n"),
        ("a chunk that is longer", _head("transfer-encoding: chunked") + b"1\r\n{}\r\n0\r\n\r\n"),
        ("no HTTP at all", b"hello\r\n\r\n"),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        ("HTTP of another kind", _head(first="GET / HTTP/9.9")),
        ("no version", _head(first="GET /healthz")),
        ("four words", _head(first="GET /healthz now HTTP/1.1")),
        ("a header without a colon", _head("hello")),
        ("a space in a header's name", _head("my name: x")),
        ("NUL in the path", _head(first="GET /heal\x00thz HTTP/1.1")),
        ("too many headers", _head(*["x: 1"] * 600)),
        ("headers that are too long", _head(*[f"x{n}: {'a' * 4000}" for n in range(5)])),
        ("one header that is too long", _head(f"x: {'a' * 40_000}")),
    ]
]

KINDS: list[Kind] = [
    *_BODIES,
    *_FIELDS,
    *_CONTENTS,
    *_TOOLS,
    *_SCHEMAS,
    *_PATHS,
    *_DOOR,
    *_HTTP,
]


def check(kind: Kind, status: int | None, headers: Mapping[str, str], body: bytes) -> None:
    """The answer is the error that it must be, in Anthropic's envelope."""
    assert status == kind.status
    assert headers["content-type"] == "application/json"
    said = orjson.loads(body)
    assert said == {
        "type": "error",
        "error": {"type": kind.kind, "message": said["error"]["message"]},
        "request_id": headers["request-id"],
    }
    assert said["request_id"].startswith("req_")
    message = said["error"]["message"]
    assert kind.says in message
    assert " " in message
    assert 10 < len(message) < 400
    assert TOKEN not in message


def household() -> Household:
    """A gateway that wants a token and takes short bodies only."""
    house = Household.built(token=TOKEN, body_limit=LIMIT)
    house.main.completions = house.small.completions = ["{}", "{}"]
    return house


def completions(house: Household) -> list[str]:
    """What was generated, by either tier."""
    paths = [*house.main.paths(), *house.small.paths()]
    return [path for path in paths if path in ("/v1/messages", "/completion")]


def send(house: Household, raw: bytes) -> Browser:
    browser = house.browser()
    browser.send(raw)
    house.settle()
    return browser


def test_there_are_enough_kinds() -> None:
    """Each kind has a name of its own."""
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 60


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_malformed_request_is_refused(kind: Kind) -> None:
    """It gets its status in Anthropic's envelope, nothing is generated, and the next call works."""
    house = household()
    browser = send(house, kind.raw)
    assert completions(house) == []
    check(kind, browser.status, browser.headers, browser.body)
    good = send(house, request(turn()))
    house.main.held[0].answer()
    house.settle()
    assert good.status == 200
    assert good.json["content"] == [{"type": "text", "text": "Hello"}]
    assert house.line().running == house.line().waiting == 0


@pytest.mark.parametrize("kind", [*_BODIES, *_FIELDS, *_CONTENTS, *_TOOLS], ids=lambda k: k.name)
def test_a_malformed_body_costs_the_servers_nothing(kind: Kind) -> None:
    """What the body itself shows is refused before any server is asked for anything."""
    house = household()
    send(house, kind.raw)
    assert house.main.asked == house.small.asked == []


@pytest.mark.parametrize("kind", _SCHEMAS, ids=lambda kind: kind.name)
def test_a_schema_that_cannot_be_used_is_refused_before_the_line(kind: Kind) -> None:
    """Even while the slot is taken, the refusal comes at once and as a true status."""
    house = household()
    send(house, request(turn()))
    body = kind.raw.partition(b"\r\n\r\n")[2].removesuffix(b"}") + b',"stream":true}'
    browser = send(house, request(body))  # not from Claude Code: a turn, on the main tier
    check(kind, browser.status, browser.headers, browser.body)
    assert house.line().waiting == 0


@pytest.mark.parametrize("path", ["/", "/v1/messages", "/nowhere"])
def test_a_refusal_of_head_has_no_body(path: str) -> None:
    """An answer to HEAD has a status and a request id, and never a body."""
    house = household()
    browser = send(house, request(b"", path=path, method="HEAD", host="host: evil.example\r\n"))
    assert browser.status == 403
    assert browser.headers["request-id"].startswith("req_")
    assert browser.body == b""


def test_a_body_that_is_far_too_large_is_not_even_read() -> None:
    """A body of many times the limit is refused before it has come, said beforehand or not."""
    house = household()
    browser = send(house, _head(f"content-length: {LIMIT * 10}"))
    assert browser.status == 413
    assert browser.wire.finished
    browser = send(house, _head("transfer-encoding: chunked"))
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    sent = 0
    while not browser.wire.finished and sent < LIMIT * 10:
        browser.send(chunk)
        sent += 4096
    assert LIMIT < sent < LIMIT * 5
    assert browser.status == 413
    assert house.main.asked == []


def test_a_body_that_breaks_off_is_no_request() -> None:
    """A client that leaves in the middle of its body has asked for nothing."""
    house = household()
    raw = request(turn())
    browser = send(house, raw[:-5])
    browser.leave()
    house.wait(100)
    assert browser.raw == b""
    assert house.main.asked == []
    status = house.api.dispatch.ledger.status()
    assert (status["calls"], status["last"]) == ([], [])


def test_the_next_request_on_the_same_connection_is_answered() -> None:
    """A refusal that HTTP itself could read does not end the connection."""
    house = household()
    browser = send(house, request({}) + request(b"", path="/healthz", method="GET"))
    house.wait(1)
    first, second = browser.raw.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"400 ")
    assert second.startswith(b"200 ")
    assert b'{"status":"ok"}' in second


def test_a_refused_call_is_written_down_without_its_body() -> None:
    """The ledger knows of a refusal, and of nothing that was in it."""
    house = household()
    send(house, request(turn("a secret", temperature="a secret")))
    (record,) = house.api.dispatch.ledger.status()["last"]
    assert record["outcome"] == "400 invalid_request_error"
    assert b"secret" not in orjson.dumps(record)
