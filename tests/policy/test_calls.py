"""What kind of call it is: Claude Code's own marks, and nobody else's."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.policy.calls import HOUSEKEEPING, KINDS, Call, understand
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


@pytest.mark.parametrize("more", [schema("title"), schema("ok"), HAIKU, {"max_tokens": 1}])
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
    """Turns and subagents are work; titles, hooks and the rest are not."""
    assert Call(kind, "").is_housekeeping == (kind not in ("turn", "subagent"))
    assert set(KINDS) >= HOUSEKEEPING
