"""A request, read and checked; the mistakes are in `tests.web.test_malformed`."""

from __future__ import annotations

from typing import Any

import attrs
import orjson
import pytest

from gateway.wire.errors import ApiError
from gateway.wire.request import MessagesRequest, parse
from tests.house import turn

Json = Any

SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}}}


def read(**more: Json) -> MessagesRequest:
    return parse(orjson.dumps(turn() | more))


def test_what_a_plain_turn_says() -> None:
    """What is not there has the meaning that the API gives it."""
    raw = orjson.dumps(turn("hi"))
    request = parse(raw)
    assert request.body == turn("hi")
    assert request.size == len(raw)
    assert request.model == "my-model"
    assert request.max_tokens == 100
    assert request.messages == [{"role": "user", "content": "hi"}]
    assert request.stream is False
    assert list(request.tools) == []
    assert list(request.system) == []
    assert request.schema is None


def test_what_a_full_turn_says() -> None:
    """Each view shows its field."""
    tool = {"name": "Bash", "input_schema": {}}
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]
    request = read(stream=True, tools=[tool], system=blocks)
    assert request.stream is True
    assert list(request.tools) == [tool]
    assert list(request.system) == ["a", ""]
    assert list(read(system="be brief").system) == ["be brief"]


def test_null_is_as_good_as_nothing() -> None:
    """An optional field that is null is one that is not there."""
    names = ["system", "tools", "tool_choice", "thinking", "stop_sequences", "temperature"]
    names += ["top_p", "top_k", "stream", "metadata", "output_config", "output_format"]
    request = read(**dict.fromkeys(names))
    assert (request.stream, request.schema) == (False, None)
    assert not request.tools
    assert not request.system


@pytest.mark.parametrize(
    "more",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
    ],
)
def test_a_schema_is_found_where_it_stands(more: Json) -> None:
    """Both the present place and the deprecated one."""
    assert read(**more).schema == SCHEMA


def test_effort_alone_is_no_schema() -> None:
    """An `output_config` may be there for another reason."""
    assert read(output_config={"effort": "high"}).schema is None


def test_a_request_cannot_be_changed() -> None:
    """The view is read-only."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        read().size = 5  # type: ignore[misc]


def test_a_count_needs_no_length() -> None:
    """`max_tokens` is required in a call, and not in a count."""
    raw = orjson.dumps({key: value for key, value in turn().items() if key != "max_tokens"})
    assert parse(raw, counting=True).max_tokens == 0
    with pytest.raises(ApiError, match="max_tokens: Field required"):
        parse(raw)


def test_everything_that_claude_code_sends_passes() -> None:
    """Fields, blocks and tools that we do not know are somebody's future, and no mistakes."""
    request = read(
        thinking={"type": "adaptive", "display": "omitted"},
        output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": '{"session_id": "x"}'},
        safeguards=[{"type": "dangerous_tool_use", "classifier_context": {}}],
        service_tier="auto",
        betas=["a", "b"],
        cache_control={"type": "ephemeral", "ttl": "1h"},
        system=[{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
        tools=[
            {"name": "Bash", "input_schema": {"type": "object"}, "strict": True},
            {"type": "custom", "name": "Read", "input_schema": {}, "defer_loading": True},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        tool_choice={"type": "tool", "name": "Read", "disable_parallel_tool_use": True},
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "x", "citations": None}]},
            {"role": "system", "content": "Today is Sunday."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"a": [1]}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "is_error": False,
                        "content": [
                            {"type": "text", "text": "x"},
                            {"type": "tool_reference", "tool_name": "Bash"},
                        ],
                    },
                    {"type": "tool_result", "tool_use_id": "toolu_2"},
                    {"type": "some_day", "what": {"ever": 1}},
                ],
            },
        ],
    )
    assert len(request.messages) == 4


@pytest.mark.parametrize(
    "thinking",
    [
        {"type": "disabled"},
        {"type": "adaptive"},
        {"type": "enabled", "budget_tokens": 31999},
    ],
)
def test_thinking(thinking: Json) -> None:
    """Each way to ask for thinking, or for none."""
    assert read(thinking=thinking).body["thinking"] == thinking


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "none"}])
def test_a_choice_that_needs_no_tools(choice: Json) -> None:
    """Only a choice that means a tool needs one."""
    assert read(tool_choice=choice).body["tool_choice"] == choice


def test_the_first_mistake_is_said_with_its_path() -> None:
    """The path is the one that the Messages API would name."""
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": 5}]
    with pytest.raises(ApiError) as caught:
        read(messages=[{"role": "user", "content": "x"}, {"role": "user", "content": content}])
    assert caught.value.message == "messages.1.content.1.text: Input should be a string"
    assert (caught.value.status, caught.value.kind) == (400, "invalid_request_error")
