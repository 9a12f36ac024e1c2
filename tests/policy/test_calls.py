"""What kind of call it is: Claude Code's own marks, and nobody else's."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.policy.calls import HOUSEKEEPING, KINDS, MARKS, Call, understand
from gateway.wire.request import parse
from tests.house import CLAUDE_CODE, turn

Json = Any

TOOL = {"name": "Bash", "input_schema": {}}
AGENT = {"x-claude-code-agent-id": "agent-7"}
HAIKU = {"model": "claude-haiku-4-5"}


def schema(*names: str) -> Json:
    """A request for an answer with properties of these names."""
    properties = {name: {"type": "string"} for name in names}
    wanted = {"type": "object", "properties": properties}
    return {"output_config": {"format": {"type": "json_schema", "schema": wanted}}}


def says(words: str) -> Json:
    """A request with these words in its system prompt, behind other blocks."""
    texts = ("x-anthropic-billing-header: x", words)
    return {"system": [{"type": "text", "text": text} for text in texts]}


def asks(words: str) -> Json:
    """A request whose last turn says something else first, then these words."""
    blocks = [{"type": "text", "text": text} for text in ("Something else.", words)]
    last = {"role": "system", "content": "Today is Sunday."}
    return {"messages": [*turn()["messages"], {"role": "user", "content": blocks}, last]}


def call(headers: dict[str, str], **more: Json) -> Call:
    return understand(parse(orjson.dumps(turn() | more)), headers)


@pytest.mark.parametrize(
    ("more", "headers", "kind"),
    [
        ({}, {}, "turn"),
        ({"tools": [TOOL]}, {}, "turn"),
        ({"tools": [TOOL]}, AGENT, "subagent"),
        (schema("title"), {}, "title"),
        (schema("title"), AGENT, "title"),
        (schema("ok", "reason"), {}, "hook"),
        (schema("summary"), {}, "other"),
        (schema(), {}, "other"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, {}, "other"),
        (schema("title") | {"tools": [TOOL]}, {}, "turn"),
        (schema("ok", "reason") | {"tools": [TOOL]}, {}, "turn"),
        (
            schema("ok", "reason") | {"tools": [TOOL]} | says("You are evaluating a hook"),
            {},
            "hook",
        ),
        ({"stop_sequences": ["</block>"]}, {}, "classifier"),
        ({"stop_sequences": ["</block>"], "tools": [TOOL]}, {}, "turn"),
        (says("You are a security monitor for agents"), {}, "classifier"),
        ({"max_tokens": 1}, {}, "probe"),
        ({"max_tokens": 1, "tools": [TOOL]}, {}, "turn"),
        ({"max_tokens": 2}, {}, "turn"),
        (asks("\nWeb page content:\n---\n"), {}, "fetch"),
        (asks("What is a Web page content:"), {}, "turn"),
        (asks("CRITICAL: Respond with TEXT ONLY. Do"), {}, "compaction"),
        (asks("CRITICAL: Respond with TEXT ONLY. Do") | {"tools": [TOOL]}, AGENT, "compaction"),
        (says("You are tasked with summarizing conversations."), {}, "compaction"),
        (asks("The user stepped away and is coming back."), {}, "recap"),
        (asks("[SUGGESTION MODE: Suggest"), {}, "suggestion"),
        (says("You are an agent for Claude Code, Anthropic's official CLI"), {}, "subagent"),
        (says("You are Claude Code, Anthropic's official CLI for Claude."), {}, "turn"),
        (schema("title") | {"tools": []}, {}, "title"),
        (HAIKU, {}, "other"),
        (HAIKU | {"tools": []}, {}, "other"),
        (HAIKU | {"tools": [TOOL]}, {}, "turn"),
        (HAIKU | {"tools": [TOOL]}, AGENT, "subagent"),
        ({"model": "claudegw-small"}, {}, "other"),
        (HAIKU | schema("title"), {}, "title"),
        (HAIKU, AGENT, "other"),
        ({"model": "Local-HAIKU"}, {}, "other"),
    ],
)
def test_calls_of_claude_code(more: Json, headers: dict[str, str], kind: str) -> None:
    """Its shape decides, then its name, then its agent."""
    found = call(CLAUDE_CODE | headers, **more)
    assert found.kind == kind
    assert found.why
    assert found.from_claude_code


@pytest.mark.parametrize(
    "more",
    [
        schema("title"),
        schema("ok"),
        HAIKU,
        {"max_tokens": 1},
        {"stop_sequences": ["</block>"]},
        asks("Web page content:"),
        asks("CRITICAL: Respond with TEXT ONLY"),
        says("You are a security monitor"),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [{}, AGENT, {"user-agent": "anthropic-sdk-python 1.0"}, {"user-agent": "my-claude-cli/"}],
)
def test_anybody_elses_call_is_a_turn(more: Json, headers: dict[str, str]) -> None:
    """Who does not say that it is Claude Code gets what it asks for, whatever it looks like."""
    found = call(headers, **more)
    assert found.kind == "turn"
    assert not found.from_claude_code
    assert not found.is_housekeeping


def test_session_and_agent_are_kept() -> None:
    """They are Claude Code's own ids, or nothing."""
    found = call(CLAUDE_CODE | AGENT | {"x-claude-code-session-id": "session-1"})
    assert (found.session, found.agent) == ("session-1", "agent-7")
    found = call(CLAUDE_CODE)
    assert (found.session, found.agent) == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_housekeeping(kind: Any) -> None:
    """Titles, hooks, page summaries and probes are; all else is somebody's work."""
    assert Call(kind, "").is_housekeeping == (kind in ("title", "hook", "fetch", "probe"))
    assert set(KINDS) >= HOUSEKEEPING


def conversation(headers: dict[str, str], **more: Json) -> str:
    return call(headers, **more).conversation


def test_a_conversation_is_the_clients_session_and_agent() -> None:
    """Two subagents of one session are two conversations."""
    session = CLAUDE_CODE | {"x-claude-code-session-id": "session-1"}
    first = conversation(session)
    assert first == conversation(session, system="else", metadata={"user_id": "x"})
    assert first != conversation(session | AGENT)
    assert first != conversation(CLAUDE_CODE | {"x-claude-code-session-id": "session-2"})


def test_without_a_session_it_is_the_user_and_how_it_begins() -> None:
    """A later turn belongs to it in either shape of content; another beginning or user does not."""
    opening, mark = turn("hi")["messages"], {"cache_control": {"type": "ephemeral"}}
    reshaped = [{"role": "user", "content": [{"type": "text", "text": "hi", **mark}]}]
    answer = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    first = conversation({}, metadata={"user_id": "me"})
    assert first == conversation({}, metadata={"user_id": "me"}, messages=reshaped + answer)
    assert first != conversation({}, metadata={"user_id": "you"}, messages=opening)
    assert first != conversation({}, metadata={"user_id": "me"}, messages=turn("ho")["messages"])
    assert conversation({}) == conversation({}, messages=opening + answer)


def test_every_mark_says_where_it_was_seen() -> None:
    """Each row of the table names its kind, its mark in words, and versions of the client."""
    for mark in MARKS:
        assert mark.kind in KINDS
        assert mark.why
        assert mark.seen
