"""Answers and errors in the words of the OpenAI API."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.completions import Chat, Text, envelope, is_meant, model, status
from gateway.wire.errors import ApiError, down, invalid, overloaded, prompt_too_long
from gateway.wire.events import Assembly, Event, Repair
from gateway.wire.sse import SSEEvent

Json = Any

BEARER = {"authorization": "Bearer x"}


def repaired(*blocks: Json, stop: str = "end_turn", pieces: int = 3) -> list[Event]:
    """The events of an answer of these blocks, each said in so many pieces, mended."""
    repair = Repair("msg_1", "my-model")
    events: list[Event] = []

    def hear(body: Json) -> None:
        events.extend(repair.feed(SSEEvent(body["type"], orjson.dumps(body))))

    usage = {"input_tokens": 7, "cache_read_input_tokens": 5, "output_tokens": 0}
    hear({"type": "message_start", "message": {"usage": usage}})
    for index, (kind, said) in enumerate(blocks):
        opened = {"type": kind, "id": f"{index}", "name": "f"} if kind == "tool_use" else None
        opened = opened or {"type": kind, kind: ""}
        hear({"type": "content_block_start", "index": index, "content_block": opened})
        key = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}[kind]
        name = "input_json_delta" if kind == "tool_use" else f"{kind}_delta"
        size = max(1, -(-len(said) // pieces))
        for at in range(0, len(said), size):
            delta = {"type": name, key: said[at : at + size]}
            hear({"type": "content_block_delta", "index": index, "delta": delta})
        hear({"type": "content_block_stop", "index": index})
    ended = {"stop_reason": stop, "stop_sequence": None}
    hear({"type": "message_delta", "delta": ended, "usage": {"output_tokens": 4}})
    return [*events, *repair.end()]


def chunks(data: bytes) -> list[Json]:
    """What a stream says, its end included."""
    assert data.endswith(b"\n\n")
    said = data.removesuffix(b"\n\n").split(b"\n\n")
    assert all(line.startswith(b"data: ") for line in said)
    assert said[-1] == b"data: [DONE]"
    return [orjson.loads(line.removeprefix(b"data: ")) for line in said[:-1]]


def joined(told: list[Json]) -> Json:
    """The message that chunks add up to, as a client of the API adds them up."""
    message: dict[str, Json] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reasons = []
    for chunk in told:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": call["id"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            if choice["finish_reason"] is not None:
                reasons.append(choice["finish_reason"])
    return message | {"finish_reason": reasons}


def test_a_stream_of_text() -> None:
    """It begins with the role, goes on with text, and ends with a reason and a mark of its own."""
    told = chunks(Chat("my-model", 17).told(repaired(("text", "Hello"), pieces=2)))
    assert [chunk["choices"][0]["delta"] for chunk in told] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in told] == [None, None, None, "stop"]
    heads = [{key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in told]
    assert heads == [
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 17,
            "model": "my-model",
        }
    ] * len(told)
    assert all("usage" not in chunk for chunk in told)


def test_the_usage_comes_last_for_who_wants_it() -> None:
    """It has a chunk of its own without choices; all others say that there is none yet."""
    told = chunks(Chat("m", 0, with_usage=True).told(repaired(("text", "Hi"))))
    assert [chunk["usage"] for chunk in told[:-1]] == [None] * (len(told) - 1)
    assert told[-1]["choices"] == []
    assert told[-1]["usage"] == {
        "prompt_tokens": 12,
        "completion_tokens": 4,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


def test_calls_are_told_as_they_come() -> None:
    """Each call has a number, comes with its name, and its arguments follow; none are an object."""
    events = repaired(("tool_use", '{"a": 1}'), ("tool_use", ""), pieces=1)
    told = chunks(Chat("m", 0).told(events))
    calls = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in told]
    assert [call for call in calls if call] == [
        [
            {
                "index": 0,
                "id": "toolu_0",
                "type": "function",
                "function": {"name": "f", "arguments": ""},
            }
        ],
        [{"index": 0, "function": {"arguments": '{"a": 1}'}}],
        [
            {
                "index": 1,
                "id": "toolu_1",
                "type": "function",
                "function": {"name": "f", "arguments": ""},
            }
        ],
        [{"index": 1, "function": {"arguments": "{}"}}],
    ]
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("stop", "reason"),
    [("end_turn", "stop"), ("max_tokens", "length"), ("refusal", "content_filter")],
)
def test_why_it_ended(stop: str, reason: str) -> None:
    """Each stop reason has its word there, in a stream as in one piece."""
    events = repaired(("text", "x"), stop=stop)
    assert joined(chunks(Chat("m", 0).told(events)))["finish_reason"] == [reason]
    whole = orjson.loads(Chat("m", 0).whole(message_of(events)))
    assert whole["choices"][0]["finish_reason"] == reason


def message_of(events: list[Event]) -> Json:
    assembly = Assembly()
    assembly.add(events)
    return assembly.message()


def test_a_whole_answer() -> None:
    """Thought, text and calls have their places; the usage stands beside."""
    events = repaired(("thinking", "Hm."), ("text", "Yes."), ("tool_use", '{"a": 1}'))
    assert orjson.loads(Chat("my-model", 17).whole(message_of(events))) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 17,
        "model": "my-model",
        "choices": [
            {
                "index": 0,
                "logprobs": None,
                "finish_reason": "tool_calls",
                "message": {
                    "role": "assistant",
                    "content": "Yes.",
                    "reasoning_content": "Hm.",
                    "refusal": None,
                    "tool_calls": [
                        {
                            "id": "toolu_2",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"a":1}'},
                        }
                    ],
                },
            }
        ],
        "usage": {
            "prompt_tokens": 12,
            "completion_tokens": 4,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
    }


def test_what_goes_on_from_a_prompt() -> None:
    """Text alone, in a stream as in one piece."""
    events = repaired(("text", "upon a time"), pieces=2, stop="max_tokens")
    told = chunks(Text("m", 0, with_usage=True).told(events))
    texts = [choice["text"] for chunk in told for choice in chunk["choices"]]
    assert texts == ["upon a", " time", ""]
    assert told[2]["choices"][0]["finish_reason"] == "length"
    assert {chunk["object"] for chunk in told} == {"text_completion"}
    whole = orjson.loads(Text("m", 0).whole(message_of(events)))
    assert (whole["id"], whole["choices"][0]["text"]) == ("cmpl-1", "upon a time")


_SAID = st.one_of(
    st.tuples(st.sampled_from(["text", "thinking"]), st.text(min_size=1, max_size=30)),
    st.tuples(
        st.just("tool_use"),
        st.dictionaries(st.text(max_size=5), st.integers(-5, 5) | st.text(max_size=9)).map(
            lambda given: orjson.dumps(given).decode()
        ),
    ),
)


@given(st.lists(_SAID, max_size=5), st.integers(1, 40))
def test_the_same_is_said_whatever_the_chunking(blocks: list[Any], pieces: int) -> None:
    """Texts, thoughts, calls and their arguments come out as they went in, streamed or whole."""
    events = repaired(*blocks, pieces=pieces)
    found = joined(chunks(Chat("m", 0).told(events)))
    calls = [orjson.loads(said) for kind, said in blocks if kind == "tool_use"]
    for kind, name in (("text", "content"), ("thinking", "reasoning_content")):
        assert found[name] == "".join(said for each, said in blocks if each == kind)
    assert [orjson.loads(call["arguments"]) for call in found["tool_calls"]] == calls
    assert len({call["id"] for call in found["tool_calls"]}) == len(calls)
    (choice,) = orjson.loads(Chat("m", 0).whole(message_of(events)))["choices"]
    message = choice["message"]
    assert (message["content"] or "", message.get("reasoning_content", "")) == (
        found["content"],
        found["reasoning_content"],
    )
    whole_calls = message.get("tool_calls", [])
    assert [call["id"] for call in whole_calls] == [call["id"] for call in found["tool_calls"]]
    assert [orjson.loads(call["function"]["arguments"]) for call in whole_calls] == calls
    assert found["finish_reason"] == [choice["finish_reason"]]


def test_signs_of_life_are_comments() -> None:
    """Clients pass over a line that begins with a colon."""
    assert Chat("m", 0).ping() == Text("m", 0).still() == b": ping\n\n"


# --- errors and models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "kind", "param", "says"),
    [
        (invalid("tools.0.type: no"), 400, "invalid_request_error", "tools.0.type", None),
        (invalid("No: nothing"), 400, "invalid_request_error", None, None),
        (prompt_too_long(9, 5), 400, "invalid_request_error", None, "context_length_exceeded"),
        (
            ApiError("authentication_error", "x"),
            401,
            "invalid_request_error",
            None,
            "invalid_api_key",
        ),
        (ApiError("permission_error", "x"), 403, "permission_error", None, None),
        (ApiError("not_found_error", "x"), 404, "invalid_request_error", None, None),
        (ApiError("request_too_large", "x"), 413, "invalid_request_error", None, None),
        (ApiError("rate_limit_error", "x"), 429, "rate_limit_error", None, None),
        (ApiError("api_error", "a: b"), 500, "server_error", None, None),
        (down("x"), 503, "server_error", None, None),
        (overloaded("x", 5), 503, "server_error", None, None),
        (ApiError("timeout_error", "x"), 504, "server_error", None, None),
    ],
)
def test_errors(error: ApiError, code: int, kind: str, param: Json, says: Json) -> None:
    """Each kind has its status, type and code, and a mistake the place where it is."""
    assert status(error) == code
    inside = {"message": error.message, "type": kind, "param": param, "code": says}
    assert envelope(error) == {"error": inside}


def test_a_schema_is_named_where_the_client_wrote_it() -> None:
    """A mistake in a schema is at its place in a chat call."""
    error = envelope(invalid("output_config.format.schema.items: not"))["error"]
    assert error["message"] == "response_format.json_schema.schema.items: not"
    assert error["param"] == "response_format.json_schema.schema.items"


def test_an_error_within_a_stream() -> None:
    """It ends what may have been cut in the middle, and is a chunk of its own."""
    data = Chat("m", 0).failed(down("gone"), "req_1")
    assert data.startswith(b"\n\ndata: ")
    assert orjson.loads(data.strip().removeprefix(b"data: "))["error"]["message"] == "gone"


@pytest.mark.parametrize(
    ("path", "headers", "ours"),
    [
        ("/v1/chat/completions", {}, True),
        ("/v1/completions", {"x-api-key": "x", "anthropic-version": "1"}, True),
        ("/v1/embeddings", {}, True),
        ("/v1/models", BEARER, True),
        ("/v1/models/claudegw-main", BEARER, True),
        ("/v1/responses", BEARER, True),
        ("/v1/models", {}, False),
        ("/v1/models", {"x-api-key": "x"}, False),
        ("/v1/models", {**BEARER, "anthropic-version": "2023-06-01"}, False),
        ("/v1/models", {**BEARER, "x-api-key": "x"}, False),
        ("/v1/models", {"authorization": "Basic x"}, False),
        ("/v1/messages", BEARER, False),
        ("/v1/messages/count_tokens", BEARER, False),
        ("/status", BEARER, False),
    ],
)
def test_whose_words_are_wanted(path: str, headers: dict[str, str], ours: bool) -> None:
    """The path tells, and where both have it the headers do."""
    assert is_meant(path, headers) is ours


def test_a_model() -> None:
    """Its window is told while it is known."""
    assert model("claudegw-main", 512)["max_model_len"] == 512
    assert "max_model_len" not in model("claudegw-main", None)
    assert model("claudegw-main", 512)["object"] == "model"
