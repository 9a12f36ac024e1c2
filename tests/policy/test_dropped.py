"""
Every field of the Messages API that llama-server drops or misplaces, and what becomes of it.

`ROWS` is the table of docs/protocol.md, "What llama-server drops", row by row: what a client sends,
and how the body that llama-server gets differs from that of a plain turn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import pytest

from gateway.policy import tools
from gateway.policy.prefix import prepare
from gateway.policy.template import Template
from gateway.wire.errors import ApiError
from gateway.wire.request import parse
from tests.house import turn

Json = Any

DOCS: Final = Path(__file__).parents[2] / "docs/protocol.md"

EVERY: Final = Template.of(
    "enable_thinking reasoning_effort clear_thinking preserve_thinking", vision=False
)
SAID_ALWAYS: Final = {
    "enable_thinking": False,
    "clear_thinking": False,
    "preserve_thinking": True,
}


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def user(*blocks: Json) -> Json:
    return {"role": "user", "content": list(blocks)}


def answered(*blocks: Json) -> Json:
    """The messages of a conversation whose answer had these blocks."""
    answer = {"role": "assistant", "content": list(blocks)}
    return {"messages": [user(text("hi")), answer, user(text("go on"))]}


def said(*blocks: Json) -> Json:
    """The messages of a turn of these blocks."""
    return {"messages": [user(*blocks)]}


def result(*blocks: Json, **more: Json) -> Json:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": list(blocks), **more}


def tool(**more: Json) -> Json:
    return {"name": "Bash", "input_schema": {"type": "object"}, **more}


def offered(*names: str, described: str = "") -> Json:
    schema = {"type": "object"}
    return [{"name": n, "description": described, "input_schema": schema} for n in names]


@attrs.frozen
class Row:
    """
    One row of the table.

    Attributes:
        name: its first column.
        sent: what the client sends beside a plain turn.
        got: how what llama-server gets differs from a plain turn's.
    """

    name: str
    sent: Json
    got: Json = attrs.field(factory=dict)


BASH: Final = {"type": "bash_20250124", "name": "bash"}
SEARCH: Final = {"type": "web_search_20250305", "name": "web_search"}
PDF: Final = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
PNG: Final = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
FOUND: Final = [
    {"type": "web_search_result", "title": "T", "url": "U", "encrypted_content": "x", "page_age": 1}
]

THOUGHT: Final = {"type": "thinking", "thinking": "t", "signature": "s"}

ROWS: Final = [
    Row("`system` as blocks", {"system": [text("a"), text("b")]}, {"system": "a\n\nb"}),
    Row(
        "attribution block",
        {"system": [text("x-anthropic-billing-header: cc_version=1;"), text("a")]},
        {"system": "a"},
    ),
    Row(
        "`role: system`",
        {"messages": [*answered(text("y"))["messages"], {"role": "system", "content": "r"}]},
        {
            "messages": [
                *answered(text("y"))["messages"][:2],
                user(text("go on"), text("\n\n<system-reminder>\nr\n</system-reminder>")),
            ]
        },
    ),
    Row("`cache_control`", {**said({**text("hi"), "cache_control": {}}), "cache_control": {}}),
    Row("`citations`", said({**text("hi"), "citations": []})),
    Row("`thinking.signature`", answered(THOUGHT), answered(THOUGHT)),
    Row(
        "`redacted_thinking`",
        answered({"type": "redacted_thinking", "data": "x"}, text("y")),
        answered(text("y")),
    ),
    Row(
        "`image` without eyes",
        said({"type": "image", "source": PNG}),
        said(text("[an image (image/png) is missing: the model cannot see]")),
    ),
    Row(
        "`image` as a file",
        said({"type": "image", "source": {"type": "file", "file_id": "f"}}),
        said(text("[an image is missing: its source is a file]")),
    ),
    Row(
        "`document` of text",
        said(
            {
                "type": "document",
                "title": "t",
                "context": "c",
                "source": {"type": "text", "media_type": "text/plain", "data": "words"},
            }
        ),
        said(text('<document title="t" context="c">\n'), text("words"), text("\n</document>")),
    ),
    Row(
        "`document` of blocks",
        said({"type": "document", "source": {"type": "content", "content": [text("words")]}}),
        said(text('<document title="document">\n'), text("words"), text("\n</document>")),
    ),
    Row(
        "`document` of another kind (PDF, URL, file)",
        said({"type": "document", "source": PDF}),
        said(
            text('<document title="document">\n'),
            text("[its content (application/pdf) is missing: the model's server takes text only]"),
            text("\n</document>"),
        ),
    ),
    Row(
        "`search_result`",
        said({"type": "search_result", "title": "t", "source": "s", "content": [text("words")]}),
        said(
            text('<search_result title="t" source="s">\n'),
            text("words"),
            text("\n</search_result>"),
        ),
    ),
    Row(
        "`tool_result.is_error`",
        said(result(text("no such file"), is_error=True)),
        said(result(text("Error: "), text("no such file"))),
    ),
    Row(
        "words beside a `tool_result`",
        said(text("stop"), result(text("1"))),
        {"messages": [user(result(text("1"))), user(text("stop"))]},
    ),
    Row(
        "`tool_reference`",
        said(result({"type": "tool_reference", "tool_name": "WebFetch"})),
        said(result(text("The tool WebFetch is loaded now: you can call it.\n"))),
    ),
    Row(
        "`tool_addition`, `tool_removal`",
        {
            "messages": [
                *answered(text("y"))["messages"],
                {
                    "role": "system",
                    "content": [
                        {"type": "tool_addition", "tool": {"name": "A"}},
                        {"type": "tool_removal", "tool": {"name": "B"}},
                    ],
                },
            ]
        },
        {
            "messages": [
                *answered(text("y"))["messages"][:2],
                user(
                    text("go on"),
                    text(
                        "\n\n<system-reminder>\nThe tool A is there now: you can call it.\n\n\n"
                        "The tool B is gone: do not call it any more.\n\n</system-reminder>"
                    ),
                ),
            ]
        },
    ),
    Row(
        "`server_tool_use`, `mcp_tool_use`",
        answered({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": 1}}),
        answered(text('[web_search was run with {"q":1}]')),
    ),
    Row(
        "`web_search_tool_result` and its like",
        answered({"type": "web_search_tool_result", "tool_use_id": "s", "content": FOUND}),
        answered(text("T\nU")),
    ),
    Row(
        "`compaction`",
        answered({"type": "compaction", "content": "so far"}),
        answered(text("so far")),
    ),
    Row(
        "`container_upload` and blocks that nobody knows",
        said(text("hi"), {"type": "container_upload", "file_id": "f"}),
        said(
            text("hi"),
            text(
                "[a block of type container_upload is missing: the model's server cannot take it]"
            ),
        ),
    ),
    Row(
        "`tools`: `strict`, `allowed_callers`, `eager_input_streaming`",
        {"tools": [tool(strict=True, allowed_callers=["direct"], eager_input_streaming=True)]},
        {"tools": offered("Bash")},
    ),
    Row(
        "`tools`: `input_examples`",
        {"tools": [tool(description="d", input_examples=[{"a": 1}])]},
        {"tools": offered("Bash", described='d\n\nExamples of inputs: [{"a":1}]')},
    ),
    Row(
        "`tools`: `defer_loading`",
        {
            "tools": [
                tool(name="DeferredToolPlaceholder"),
                tool(name="A", defer_loading=True),
                tool(name="B"),
            ]
        },
        {"tools": offered("B", "A")},
    ),
    Row(
        "`tools` that Anthropic runs, among others",
        {"tools": [SEARCH, tool()]},
        {"tools": offered("Bash")},
    ),
    Row(
        "`tool_choice`: `none`",
        {"tools": [tool()], "tool_choice": {"type": "none"}},
    ),
    Row(
        "`tool_choice`: `tool`",
        {"tools": [tool(), tool(name="A")], "tool_choice": {"type": "tool", "name": "Bash"}},
        {"tools": offered("Bash"), "tool_choice": {"type": "any"}},
    ),
    Row(
        "`thinking`: `adaptive`",
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"chat_template_kwargs": {**SAID_ALWAYS, "enable_thinking": True}},
    ),
    Row("`thinking`: `disabled`, or none", {"thinking": {"type": "disabled"}}),
    Row(
        "`output_config.effort`",
        {"output_config": {"effort": "high"}},
        {"chat_template_kwargs": {**SAID_ALWAYS, "reasoning_effort": "high"}},
    ),
    Row(
        "`metadata`, `service_tier`, `inference_geo`, `speed`",
        {"metadata": {"user_id": "u"}, "service_tier": "auto", "inference_geo": "x", "speed": "y"},
    ),
    Row(
        "`context_management`, `safeguards`, `fallbacks`, `diagnostics`",
        {"context_management": {"edits": []}, "safeguards": [], "fallbacks": [], "diagnostics": {}},
    ),
    Row("`container`, `mcp_servers`", {"container": "c", "mcp_servers": [{"name": "m"}]}),
]

#: Rows of the table that have their tests elsewhere.
ELSEWHERE: Final = {
    "`output_config.format`": "tests/tier/test_constrained.py",
    "`output_config.format` beside tools": "tests/web/test_answers.py",
    "`tool_choice`: `disable_parallel_tool_use`": "tests/wire/test_events.py",
    "`tools` that Anthropic defined (bash, text editor, memory)": "here, below",
    "only `tools` that Anthropic runs": "here, below",
}


def prepared(**more: Json) -> Json:
    return prepare(parse(orjson.dumps(turn() | more)), EVERY)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_field_that_llama_server_drops(row: Row) -> None:
    """It reaches the model in another way, or is left out where it means nothing to a model."""
    assert prepared(**row.sent) == prepared() | row.got


@pytest.mark.parametrize("kind", ["bash_20250124", "text_editor_20250728", "memory_20250818"])
def test_tools_that_anthropic_defined_get_their_schema(kind: str) -> None:
    """The client runs them; the model is told what it may put into them."""
    (found,) = prepared(tools=[{"type": kind, "name": "its_name"}])["tools"]
    assert found["name"] == "its_name"
    assert found["description"]
    assert "command" in found["input_schema"]["properties"]


def test_only_tools_that_anthropic_runs_are_refused() -> None:
    """An answer without the search would pass for one."""
    with pytest.raises(ApiError, match="web_search") as raised:
        prepared(tools=[SEARCH])
    assert raised.value.status == 400


def test_late_tools_stand_in_the_order_of_their_loading() -> None:
    """Each stands behind those that were loaded before it, whatever its name."""
    late = [tool(name=name, defer_loading=True) for name in "ABCD"]
    references = [
        result(
            {"type": "tool_reference", "tool_name": name},
            {"type": "tool_reference", "tool_name": "C"},
        )
        for name in "CA"
    ]
    body = {"tools": [*late, tool(name="Z")], **said(*references)}
    assert [each["name"] for each in prepared(**body)["tools"]] == ["Z", "C", "A", "B", "D"]


def test_one_call_at_most_where_the_client_says_so() -> None:
    """Only its own word counts."""

    def one(**choice: Json) -> bool:
        body = turn() | {"tools": [tool()], "tool_choice": {"type": "auto", **choice}}
        return tools.takes_one_call(parse(orjson.dumps(body)))

    assert one(disable_parallel_tool_use=True)
    assert not one(disable_parallel_tool_use=False)
    assert not one()


def test_an_error_says_so_once() -> None:
    """A result that says by itself that it is an error is not told to be one again."""
    for words in ("Error: x", "<tool_use_error>x</tool_use_error>", "error"):
        (message,) = prepared(**said(result(text(words), is_error=True)))["messages"]
        assert message["content"][0]["content"] == [text(words)]
    (message,) = prepared(**said(result(is_error=True)))["messages"]
    assert message["content"][0]["content"] == [text("Error")]


def test_the_table_is_the_one_in_the_docs() -> None:
    """Each row stands in docs/protocol.md, and each row there has a test."""
    part = DOCS.read_text().partition("## What llama-server drops")[2].partition("\n## ")[0]
    listed = [row.strip() for row in re.findall(r"^\|(.+?)\|", part, re.MULTILINE)][2:]
    assert sorted(listed) == sorted([*(row.name for row in ROWS), *ELSEWHERE])
