"""What upstreams send: any bytes are an answer as the API promises it, or a known failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import orjson

from gateway.wire.bare import Continuation
from gateway.wire.chunks import Chunks
from gateway.wire.completions import Chat, Text
from gateway.wire.dialect import MESSAGES
from gateway.wire.errors import ApiError
from gateway.wire.events import Assembly, Event, Repair, Truncated
from gateway.wire.sse import EventTooLong, SSEEvent, SSEParser, encode
from tests.fuzz import Target
from tests.fuzz.changes import of_bytes, of_json
from tests.house import HELLO
from tests.wire.test_events import events_of
from tests.wire.test_sse import by_the_book

Json = Any


#: Bytes of a stream that is read byte by byte, several times.
_LONGEST: Final = 512


class _Parser(Protocol):
    def feed(self, chunk: bytes) -> list[SSEEvent]: ...


# --- server-sent events ---------------------------------------------------------------------------


def sse_holds(data: bytes) -> None:
    """Bytes in pieces of any size give the events that the format says, and nothing is hoarded."""
    data = data[:_LONGEST] + b"\n"
    wanted = by_the_book(data)
    for size in (1, 2, 3, 7, len(data)):
        parser = SSEParser()
        found = [event for piece in _pieces(data, size) for event in parser.feed(piece)]
        assert found == wanted, size
        assert len(parser._rest) <= len(data)
    for event in wanted:
        if b"\n" not in event.data and event.name.isascii() and "\r" not in event.name:
            assert SSEParser().feed(encode(event.name, event.data)) == [event]
    small = SSEParser(limit=16)
    try:
        for piece in _pieces(data, 3):
            small.feed(piece)
            assert len(small._rest) <= 16
    except EventTooLong:
        assert max(map(len, data.split(b"\n"))) > 0


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


# --- answers --------------------------------------------------------------------------------------


def _holds(parser: Callable[[], _Parser]) -> Callable[[bytes], None]:
    def holds(data: bytes) -> None:
        stream = _stream(data)
        told, failure = _told(parser(), [stream])
        for size in (1, 5):
            assert _told(parser(), _pieces(stream, size)) == (told, failure), size
        check_answer(told, is_whole=failure == "")

    return holds


def _stream(data: bytes) -> bytes:
    """The bytes of the events in a list; anything else is a stream itself."""
    try:
        events = orjson.loads(data)
    except ValueError:
        return data
    if not isinstance(events, list):
        return data
    lines = (
        b"event: %b\ndata: %b\n\n" % (_name(event), orjson.dumps(event))
        if not isinstance(event, str)
        else b"data: %b\n\n" % event.encode()
        for event in events
    )
    return b"".join(lines)


def _name(event: Json) -> bytes:
    kind = event.get("type") if isinstance(event, dict) else None
    return kind.encode() if isinstance(kind, str) and kind.isalnum() else b"message"


def _told(parser: _Parser, pieces: Sequence[bytes]) -> tuple[list[Event], str]:
    """What a client is told, and how it failed, if it did: nothing else may be raised."""
    mending, told = Repair("msg_1", "my-model", "main"), list[Event]()
    try:
        for piece in pieces:
            for event in parser.feed(piece):
                told += mending.feed(event)
        told += mending.end()
    except ApiError as error:
        orjson.dumps(error.envelope("req_1"))
        return told, str(error)
    except (EventTooLong, Truncated) as error:
        return told, type(error).__name__
    finally:
        assert all(number >= 0 for number in mending.usage.as_json().values())
    return told, ""


_PAYLOADS: Final = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


def check_answer(told: Sequence[Event], *, is_whole: bool) -> None:
    """The order and the types that the Messages API promises; and every dialect can write it."""
    events = events_of(MESSAGES.told(told))
    assert events == orjson.loads(orjson.dumps([event.body for event in told]))
    opened: dict[str, Json] | None = None
    blocks = 0
    for number, event in enumerate(events):
        kind = event["type"]
        assert (kind == "message_start") == (number == 0)
        match kind:
            case "content_block_start":
                opened = event["content_block"]
                assert event["index"] == blocks
                assert type(event["index"]) is int
                _check_block(opened)
                blocks += 1
            case "content_block_delta":
                assert opened is not None
                assert event["index"] == blocks - 1
                assert type(event["index"]) is int
                delta = event["delta"]
                assert isinstance(delta["type"], str)
                if delta["type"] in _PAYLOADS:
                    assert isinstance(delta[_PAYLOADS[delta["type"]]], str)
            case "content_block_stop":
                assert opened is not None
                opened = None
            case "message_delta":
                assert opened is None
                assert isinstance(event["delta"]["stop_reason"], str)
                assert isinstance(event["delta"]["stop_sequence"], str | None)
            case _:
                assert kind in ("message_start", "message_stop")
    for dialect in (Chat("my-model", 1, with_usage=True), Text("my-model", 1)):
        lines = dialect.told(told).split(b"\n\n")
        assert lines.pop() == b""
        for line in lines:
            said = line.removeprefix(b"data: ")
            assert said == b"[DONE]" or orjson.loads(said)["model"] == "my-model"
    if is_whole:
        assert events[-1]["type"] == "message_stop"
        assembly = Assembly()
        assembly.add(told)
        message = assembly.message()
        assert len(message["content"]) == blocks
        for written in (MESSAGES, Chat("my-model", 1), Text("my-model", 1)):
            assert orjson.loads(written.whole(message))["model"] == "my-model"


def _check_block(block: Json) -> None:
    assert isinstance(block["type"], str)
    match block["type"]:
        case "text" | "thinking" as kind:
            assert isinstance(block[kind], str)
        case "tool_use":
            assert block["id"].startswith("toolu_")
            assert isinstance(block["name"], str)
            assert block["input"] == {}


# --- what cases are made of -----------------------------------------------------------------------


def _block(index: int, block: Json, *deltas: Json) -> list[Json]:
    start = {"type": "content_block_start", "index": index, "content_block": block}
    said = [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
    return [start, *said, {"type": "content_block_stop", "index": index}]


SAID: Final[list[Json]] = [
    HELLO,
    [
        HELLO[0],
        *_block(
            0, {"type": "thinking", "thinking": ""}, {"type": "thinking_delta", "thinking": "h"}
        ),
        *_block(
            1,
            {"type": "tool_use", "id": "a", "name": "Bash"},
            {"type": "input_json_delta", "partial_json": '{"a":'},
            {"type": "input_json_delta", "partial_json": "1}"},
        ),
        *_block(2, {"type": "server_tool_use", "id": "s", "name": "web_search"}),
        *HELLO[-2:],
    ],
    [HELLO[0], {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}],
    [{"code": 400, "message": "m", "type": "exceed_context_size_error", "n_ctx": 9}],
]


def _chunk(finish: str | None = None, **delta: Json) -> Json:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _call(arguments: str, **more: Json) -> Json:
    return _chunk(
        tool_calls=[{"function": {"arguments": arguments, **more}, "index": 0, "id": "a"}]
    )


_USAGE: Final = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 3},
}
_CHUNKED: Final[list[Json]] = [
    [
        _chunk(role="assistant"),
        _chunk(content="Hel"),
        _chunk(content="lo"),
        _chunk("stop"),
        "[DONE]",
    ],
    [
        _chunk(reasoning_content="h"),
        _call('{"a"', name="Bash"),
        _call(":1}"),
        _chunk(tool_calls=[{"index": 1, "id": "b", "function": {"name": "Read"}}]),
        _chunk("tool_calls"),
        {"choices": [], "usage": _USAGE},
        "[DONE]",
    ],
    [{"error": {"message": "m", "type": "t", "code": 400}}],
    [{"object": "error", "message": "m", "code": 503}],
]
CONTINUATIONS: Final[list[Json]] = [
    [
        {"content": "Hel", "stop": False},
        {"content": "lo", "stop": False},
        {
            "content": "",
            "stop": True,
            "stop_type": "word",
            "stopping_word": "x",
            "tokens_predicted": 2,
            "timings": {"prompt_n": 3, "cache_n": 1},
        },
    ],
    [{"error": {"code": 500, "message": "m", "type": "server_error"}}],
]
_RAW: Final = (
    b"data: a\n\n",
    b"\xef\xbb\xbfevent: ping\r\ndata: {}\r\n\r\n: comment\r\rid: 1\ndata:b\ndata: c\n\n",
    *(b"".join(encode(event["type"], orjson.dumps(event)) for event in each) for each in (HELLO,)),
)
_WORDS: Final[tuple[Json, ...]] = (
    *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
    *("message_delta", "message_stop", "ping", "error", "text", "thinking", "tool_use"),
    *("text_delta", "thinking_delta", "signature_delta", "input_json_delta", "end_turn", "[DONE]"),
    *("stop", "length", "tool_calls", {"type": "signature_delta", "signature": "s"}, _USAGE),
    *({"type": "text", "text": "x"}, {"type": "tool_use"}, {"type": "thinking"}, {"id": "a"}),
)


def _told_with(*events: Json) -> list[Json]:
    """An answer with these events in its middle."""
    return [HELLO[0], *events, *HELLO[-2:]]


#: Values of other types than the API has.
_MISTYPED: Final[list[Json]] = [
    *(
        _told_with(*_block(0, block, *deltas))
        for block, *deltas in (
            ({"type": "text"}, {"type": "text_delta", "text": "a"}),
            ({"type": "text", "text": None},),
            ({"type": "thinking", "thinking": 1},),
            ({"type": ["text"], "text": ""},),
            ({"type": "tool_use", "id": "a"},),
            ({"type": "tool_use", "id": "a", "name": None},),
            ({"type": "text", "text": ""}, {"type": "text_delta", "text": {"a": 1}}),
            ({"type": "text", "text": ""}, {"type": "text_delta"}),
            ({"type": "text", "text": ""}, {"type": -1, "text": "a"}),
            ({"type": "thinking", "thinking": ""}, {"type": "signature_delta"}),
        )
    ),
    _told_with(*_block(0, {"type": "text", "text": ""})[:1], *_block(True, {"type": "text"})),
    [{"type": "message_delta", "delta": {"stop_reason": "a", "model": 1, "content": 5}}],
    [HELLO[0], {"type": "message_delta", "delta": {"stop_reason": "a", "stop_sequence": [1]}}],
]
_NAMELESS: Final[list[Json]] = [[_call("1"), "[DONE]"]]
_NO_TEXT: Final[list[Json]] = [
    [{"content": 1, "stop": False}],
    [{"content": "", "stop": True, "stop_type": "word", "stopping_word": ["x"]}],
]


def _target(
    name: str, parser: Callable[[], _Parser], seeds: list[Json], kept: list[Json], cases: int
) -> Target:
    written, once = (tuple(map(orjson.dumps, each)) for each in (seeds, kept))
    return Target(name, _holds(parser), written, of_json(_WORDS), once, cases)


SSE: Final = Target(
    "sse", sse_holds, _RAW, of_bytes((b"data: ", b"data", b"event: ", b":")), cases=400
)
ANSWERS: Final = _target("answers", SSEParser, SAID, _MISTYPED, 500)
CHUNKED: Final = _target("chunks", Chunks, _CHUNKED, _NAMELESS, 400)
BARE: Final = _target("bare", Continuation, CONTINUATIONS, _NO_TEXT, 300)
