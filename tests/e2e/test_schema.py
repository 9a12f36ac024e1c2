"""Answers under a schema, from real servers: each fits, none is cut off."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from jsonschema import Draft202012Validator

from tests.e2e.stack import Running

CLAUDE_CODE = {"user-agent": "claude-cli/2.1.330 (external, cli)"}


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "title": an_object(title={"type": "string"}),
    "verdict": an_object(ok={"type": "boolean"}, reason={"type": "string"}),
    "list": an_object(files={"type": "array", "items": {"type": "string"}}),
    "nested": an_object(
        steps={"type": "array", "items": an_object(name={"type": "string"}, n={"type": "integer"})}
    ),
    "choice": an_object(colour={"enum": ["red", "green"]}, share={"type": "number"}),
    "either": an_object(value={"anyOf": [{"type": "string"}, {"type": "null"}]}),
}


@pytest.mark.server
@pytest.mark.parametrize(
    ("tier", "name"), [*(("small", name) for name in SCHEMAS), ("main", "title"), ("main", "list")]
)
def test_the_answer_fits(gateway: Running, tier: str, name: str) -> None:
    """Whatever a tiny model would rather say, the answer is JSON of the wanted shape."""
    body = {
        "model": f"claudegw-{tier}",
        "max_tokens": 32_000,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMAS[name]}},
        "messages": [{"role": "user", "content": "Name this session: mend the login page."}],
    }
    status, message = gateway.ask("/v1/messages", body, CLAUDE_CODE)
    assert status == 200, message
    (block,) = message["content"]
    Draft202012Validator(SCHEMAS[name]).validate(orjson.loads(block["text"]))
    assert message["stop_reason"] == "end_turn"
