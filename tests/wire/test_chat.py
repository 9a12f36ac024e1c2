"""Messages shape to chat shape, as llama-server itself converts it."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.wire.chat import from_messages

Json = Any

TEXT = {"type": "text", "text": "hello"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"cmd": "é", "n": [1, None]}}
TOOL_CALL = {
    "id": "toolu_1",
    "type": "function",
    "function": {"name": "Bash", "arguments": '{"cmd":"é","n":[1,null]}'},
}


def messages(*blocks: Json, role: str = "user") -> Json:
    """The chat messages that one message of these blocks becomes."""
    return from_messages({"messages": [{"role": role, "content": list(blocks)}]})["messages"]


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_string_stays_one(role: str) -> None:
    """Content that is a string is passed as it is, whoever says it."""
    said = {"role": role, "content": "hello"}
    assert from_messages({"messages": [said]}) == {"messages": [said]}


def test_system_as_a_string() -> None:
    """A system prompt is the first message."""
    chat = from_messages({"system": "be brief", "messages": [{"role": "user", "content": "x"}]})
    assert chat["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "x"},
    ]


def test_system_blocks_are_joined_with_nothing() -> None:
    """Text blocks run together, and blocks of other kinds are dropped."""
    system = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert from_messages({"system": system, "messages": []})["messages"] == [
        {"role": "system", "content": "ab"}
    ]


def test_text_is_passed_whole() -> None:
    """A text block is a part, with whatever else it has."""
    block: Json = TEXT | {"citations": []}
    assert messages(block, TEXT) == [{"role": "user", "content": [block, TEXT]}]


def test_thinking_is_reasoning() -> None:
    """Thinking is joined into `reasoning_content`; its signature is not looked at."""
    thinking = [
        {"type": "thinking", "thinking": "a", "signature": "x"},
        {"type": "thinking", "thinking": "b"},
    ]
    assert messages(*thinking, TEXT, role="assistant") == [
        {"role": "assistant", "content": [TEXT], "reasoning_content": "ab"}
    ]
    assert messages(*thinking, role="assistant") == [
        {"role": "assistant", "content": "", "reasoning_content": "ab"}
    ]


def test_a_tool_call() -> None:
    """A call is a function call whose arguments are JSON text in the order of its keys."""
    assert messages(TEXT, CALL, role="assistant") == [
        {"role": "assistant", "content": [TEXT], "tool_calls": [TOOL_CALL]}
    ]
    assert messages(CALL, role="assistant") == [
        {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]}
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("done", "done"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "tool_reference", "tool_name": "Bash"}], ""),
        (
            [TEXT | {"citations": []}, IMAGE],
            [{"type": "text", "text": "hello"}, IMAGE_PART],
        ),
    ],
)
def test_a_tool_result(content: Json, said: Json) -> None:
    """Texts run together; with an image they stay parts; `is_error` and others are dropped."""
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, "is_error": True}
    assert messages(result) == [{"role": "tool", "tool_call_id": "toolu_1", "content": said}]


def test_a_result_without_content() -> None:
    """A tool that said nothing is a message all the same."""
    assert messages({"type": "tool_result", "tool_use_id": "toolu_1"}) == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": ""}
    ]


def test_results_come_after_the_words_beside_them() -> None:
    """That is what llama-server does; `gateway.policy.prefix` sees to it that it never must."""
    first = {"type": "tool_result", "tool_use_id": "a", "content": "1"}
    second = {"type": "tool_result", "tool_use_id": "b", "content": "2"}
    assert messages(first, TEXT, second) == [
        {"role": "user", "content": [TEXT]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
    ]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (IMAGE["source"], [IMAGE_PART]),
        (
            {"type": "url", "url": "http://127.0.0.1/a.png"},
            [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}],
        ),
        ({"type": "file", "file_id": "file_1"}, []),
    ],
)
def test_an_image(source: Json, parts: list[Json]) -> None:
    """Data and addresses are image parts; other sources are dropped."""
    block = {"type": "image", "source": source}
    assert messages(TEXT, block) == [{"role": "user", "content": [TEXT, *parts]}]


@pytest.mark.parametrize(
    "kind",
    ["redacted_thinking", "document", "search_result", "server_tool_use", "container_upload"],
)
def test_what_llama_server_drops_is_dropped(kind: str) -> None:
    """Blocks that it does not know are not there, and a message of nothing else is none."""
    block = {"type": kind, "data": "x"}
    assert messages(TEXT, block) == [{"role": "user", "content": [TEXT]}]
    assert messages(block) == []
    assert messages() == []


def test_tools_are_functions() -> None:
    """Every tool is one, a server's own tool and one without a schema too."""
    tools = [
        {"name": "Bash", "description": "runs", "input_schema": {"type": "object"}, "strict": True},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    chat = from_messages({"messages": [], "tools": tools})
    assert chat["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "Bash",
                "description": "runs",
                "parameters": {"type": "object"},
            },
        },
        {
            "type": "function",
            "function": {"name": "web_search", "description": "", "parameters": {}},
        },
    ]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "Bash"}, "required"),
        ({"type": "none"}, None),
        (None, None),
    ],
)
def test_a_choice(choice: Json, said: str | None) -> None:
    """A tool by name is "required", and "none" is not said at all."""
    assert from_messages({"messages": [], "tool_choice": choice}).get("tool_choice") == said


def test_what_the_template_is_told() -> None:
    """`chat_template_kwargs` go along; sampling and lengths say nothing to a template."""
    told = {"enable_thinking": False}
    body = {"messages": [], "chat_template_kwargs": told, "max_tokens": 5, "temperature": 1}
    assert from_messages(body) == {"messages": [], "chat_template_kwargs": told}
